"""Hangs, with real processes that stop moving."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bd3lm_scale.config.schema import RuntimeConfig
from bd3lm_scale.runtime import watchdog
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.run_folder import read_json
from bd3lm_scale.runtime.watchdog import Beat, Watchdog, diagnose, read_beats

LOOP = """
import os, sys, time
from bd3lm_scale.config.schema import RuntimeConfig
from bd3lm_scale.runtime.log import set_up_logging
from bd3lm_scale.runtime.watchdog import Watchdog
run_dir, rank, hang_at, limit, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
set_up_logging(run_dir, rank)
config = RuntimeConfig(hang_factor=3, hang_min_seconds=limit, heartbeat_seconds=0.1, collective_timeout_seconds=limit)
dog = Watchdog(run_dir, config, rank, 2).start()
def stuck_in_python():
    time.sleep(60)
def stuck_in_native_code():
    import ctypes
    ctypes.PyDLL(None).usleep(60_000_000)  # PyDLL keeps the interpreter lock: no Python thread runs any more
for step in range(1, 10_000):
    time.sleep(0.02)
    if step == hang_at:
        {"python": stuck_in_python, "native": stuck_in_native_code}[how]()
    dog.beat(step)
"""


def start(run_dir, rank, hang_at, limit=0.6, how="python"):
    command = [sys.executable, "-c", LOOP, str(run_dir), str(rank), str(hang_at), str(limit), how]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_hang_leaves_stacks_and_a_diagnosis(tmp_path):
    started = time.monotonic()
    stuck, waiting = start(tmp_path, 1, hang_at=20), start(tmp_path, 0, hang_at=21)
    assert stuck.wait(timeout=30) == ExitCode.HANG
    assert waiting.wait(timeout=30) == ExitCode.HANG
    assert time.monotonic() - started < 15
    assert "stuck_in_python" in (tmp_path / "runtime/stacks/rank_00001.txt").read_text()
    logs = [tmp_path / "log.txt", tmp_path / "runtime/rank_00001.log"]
    text = "".join(log.read_text() for log in logs if log.exists())
    assert text.count("hang: no progress") == 1
    assert "rank 1 on" in text
    assert "furthest behind" in text
    assert read_json(tmp_path / "runtime/hang.json")["ranks"] == [1]
    for process in (stuck, waiting):
        process.stderr.close()


def test_one_rank_reads_the_heartbeats_of_a_hang(tmp_path, monkeypatch):
    """The others go on beating, or they would look dead, until it has told; a thousand ranks make 2,000 reads."""
    reads, beats, codes = [], [], []
    monkeypatch.setattr(watchdog, "read_beats", lambda *_: reads.append(1) or {})
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    monkeypatch.setattr(Watchdog, "_write", lambda self: beats.append(self.rank))
    config = RuntimeConfig(heartbeat_seconds=0.01)
    first, second = (Watchdog(tmp_path, config, rank, 2, "0.0-ab") for rank in (0, 1))
    first.stacks.mkdir(parents=True)
    (tmp_path / "runtime/hang.json").write_text('{"attempt": "an older one"}')

    (first.stacks / "told_0.0-ab").touch()
    second._give_up(10, 1)
    assert (reads, set(beats), codes) == ([], {1}, [ExitCode.HANG])
    assert len(beats) > watchdog._LOOKS_APART, "nobody told: it waits longer than a diagnosis takes"

    (first.stacks / "told_0.0-ab").unlink()
    first._give_up(10, 1)
    assert len(reads) == 2
    assert read_json(tmp_path / "runtime/hang.json")["attempt"] == "0.0-ab"
    beats.clear()
    second._give_up(10, 1)
    assert (len(reads), len(beats), codes) == (2, 1, [ExitCode.HANG] * 3), "it leaves once another has told"


def test_frozen_process_is_the_suspect(tmp_path):
    frozen, waiting = start(tmp_path, 1, hang_at=10**6), start(tmp_path, 0, hang_at=60)
    try:
        deadline = time.monotonic() + 20
        while len(read_beats(tmp_path / "runtime")) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        frozen.send_signal(signal.SIGSTOP)
        assert waiting.wait(timeout=30) == ExitCode.HANG
    finally:
        frozen.kill()
        frozen.communicate()
        waiting.stderr.close()
    assert "rank 1" in (tmp_path / "log.txt").read_text()
    assert "no longer answers" in (tmp_path / "log.txt").read_text()


def test_native_call_that_holds_the_interpreter_lock_is_ended_too(tmp_path):
    process = start(tmp_path, 0, hang_at=40, how="native")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "stuck_in_native_code" in stderr


def test_limit_follows_the_median_step(tmp_path):
    config = RuntimeConfig(hang_factor=10, hang_min_seconds=0.05, collective_timeout_seconds=100)
    dog = Watchdog(tmp_path, config)
    assert dog.limit_seconds == 100, "nothing is known before the first steps (compilation)"
    for step in range(1, 8):
        dog.beat(step)
        time.sleep(0.02)
    assert dog.limit_seconds == pytest.approx(0.2, rel=0.5)
    dog.beat(7, "validation")
    assert dog.limit_seconds == 100
    time.sleep(0.3)
    dog.beat(8)
    assert dog.limit_seconds < 0.4, "a validation is no step time"


def test_moving_run_is_left_alone(tmp_path):
    config = RuntimeConfig(hang_factor=3, hang_min_seconds=0.3, heartbeat_seconds=0.05, collective_timeout_seconds=0.3)
    dog = Watchdog(tmp_path, config).start()
    for step in range(40):
        dog.beat(step)
        time.sleep(0.02)
    dog.stop()
    (beat,) = read_beats(tmp_path / "runtime").values()
    assert beat.progress > 30


def test_other_attempts_heartbeats_do_not_count(tmp_path, monkeypatch):
    Watchdog(tmp_path, RuntimeConfig(), rank=0).start().stop()
    monkeypatch.setenv("BD3LM_ATTEMPT", "0.1")
    assert read_beats(tmp_path / "runtime") == {}


def test_diagnosis():
    def beat(rank, progress, alive):
        return Beat(rank, f"node{rank // 2}", progress, alive, progress, "step", 60.0)

    before = {rank: beat(rank, 7, 1) for rank in range(4)}
    silent, text = diagnose(before, {r: beat(r, 7, 1 if r == 2 else 2) for r in range(4)})
    assert silent == [2]
    assert "rank 2 on node1 (step 7, phase step)" in text
    assert diagnose(before, {r: beat(r, 6 if r == 3 else 7, 2) for r in range(4)})[0] == [3]
    assert diagnose(before, {r: beat(r, 7, 2) for r in range(4)})[0] == []


@pytest.mark.parametrize("what", ["link", "hard link", "pipe"])
def test_a_heartbeat_is_never_written_through_what_lies_in_its_place(tmp_path, what):
    """In a shared run folder somebody's link must not make a rank write over his file; a pipe must not stop it."""
    precious, place = tmp_path / "precious", tmp_path / "runtime" / "heartbeat" / "rank_00000.json"
    precious.write_text("x" * 2000)
    place.parent.mkdir(parents=True)
    if what == "link":
        place.symlink_to(precious)
    elif what == "hard link":
        place.hardlink_to(precious)
    else:
        os.mkfifo(place)
    Watchdog(tmp_path, RuntimeConfig(), attempt="2.0-ab").start().stop()
    assert precious.read_text() == "x" * 2000
    assert place.is_file()
    assert not place.is_symlink()
    assert read_beats(tmp_path / "runtime", "2.0-ab")[0].phase == "ended"
    assert read_beats(tmp_path / "runtime", "2.0-cd") == {}, "another start's of the same number"


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"attempt": "1.0-a"}', '{"attempt": "1.0-a", "alive": "x"}', "[" * 10**5]
)
def test_heartbeats_that_are_none_are_passed_over(tmp_path, content):
    folder = tmp_path / "heartbeat"
    folder.mkdir()
    (folder / "rank_00000.json").write_text(content)
    (folder / "rank_x.json").write_text('{"attempt": "1.0-a"}')
    os.mkfifo(folder / "rank_00001.json")
    assert read_beats(tmp_path, "1.0-a") == {}
