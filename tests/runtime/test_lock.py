"""One owner per run folder, and one of its attempts."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.errors import ConfigError, FencedError, RunInUseError
from bd3lm_scale.runtime import lock as lock_module
from bd3lm_scale.runtime.lock import RunLock, is_alive, start_ticks
from bd3lm_scale.runtime.run_folder import label_of
from tests.checkpoint.layouts import cut, whole_state

FORK = multiprocessing.get_context("fork")


def hold(run_dir, ready):
    RunLock(run_dir).acquire()
    ready.set()
    signal.pause()


@pytest.fixture
def other_job(tmp_path):
    """A live process that holds the run folder."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def make_foreign(run_dir, **changes):
    """Rewrite the lock as if another host held it; returns its file."""
    (path,) = (run_dir / "runtime").glob("lock.*")
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine": "elsewhere", "host": "node7", **changes}))
    return path


def everything_in(run_dir):
    """Name, content and identity of every file: what a start that was refused must leave as it is."""
    files = sorted(path for path in run_dir.rglob("*") if path.is_file())
    return [(path, path.stat().st_ino, path.read_bytes()) for path in files]


def test_second_job_refuses_says_who_and_changes_nothing(tmp_path, other_job):
    before = everything_in(tmp_path)
    with pytest.raises(RunInUseError, match=rf"in use by process {other_job.pid} on .*use another run_dir"):
        RunLock(tmp_path).acquire()
    assert not RunLock(tmp_path).is_held()
    assert everything_in(tmp_path) == before


def test_lock_of_a_dead_job_is_taken_over_at_once(tmp_path, other_job):
    os.kill(other_job.pid, signal.SIGKILL)
    other_job.join()
    begin = time.monotonic()
    with RunLock(tmp_path) as lock:
        assert lock.is_held()
        assert time.monotonic() - begin < 15
        assert f"process {other_job.pid}" in lock.taken_from
        assert [path.name for path in (tmp_path / "runtime").iterdir()] == ["lock.1"]


def test_a_lock_given_back_is_free_for_anybody_and_starts_are_numbered(tmp_path):
    labels, starts = [], set()
    for _ in range(3):
        lock = RunLock(tmp_path).acquire()
        labels.append(label_of(lock.attempt))
        starts.add(lock.attempt.partition("-")[2])
        assert lock.is_held()
        lock.release()
        make_foreign(tmp_path)
        assert not lock.is_held()
    assert labels == ["0.0", "1.0", "2.0"]
    assert len(starts) == 3, "no two starts share a name, whatever is deleted between them"
    assert [path.name for path in (tmp_path / "runtime").iterdir()] == ["lock.2"]


def test_numbers_of_an_older_version_go_on(tmp_path):
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    (runtime / "attempt.json").write_text('{"attempt": "6.2"}')
    (runtime / "launcher.json").write_text('{"pid": 1, "has_ended": true}')
    with RunLock(tmp_path) as lock:
        assert label_of(lock.attempt) == "7.0"
        assert [path.name for path in runtime.iterdir()] == ["lock.7"]


def test_a_later_process_with_the_same_pid_is_not_the_holder(tmp_path):
    with RunLock(tmp_path):
        (path,) = (tmp_path / "runtime").glob("lock.*")
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "ticks": content["ticks"] - 1}))
        assert RunLock(tmp_path).acquire().is_held()


def test_the_time_of_day_says_nothing_about_life(tmp_path, other_job, monkeypatch):
    """A clock that is set forward or back while the owner works; what is compared counts ticks since boot."""
    for shift in (-3600.0, 1.0, 3600.0):
        monkeypatch.setattr(time, "time", lambda shift=shift, now=time.time: now() + shift)
        monkeypatch.setattr(psutil, "boot_time", lambda shift=shift, now=psutil.boot_time: now() + shift)
        with pytest.raises(RunInUseError):
            RunLock(tmp_path).acquire()
    fields = Path(f"/proc/{other_job.pid}/stat").read_text().split()
    assert start_ticks(other_job.pid) == int(fields[21])


def test_a_program_name_with_brackets_and_a_zombie(tmp_path):
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    try:
        ticks = start_ticks(process.pid)
        assert isinstance(ticks, int)
        assert abs(ticks - start_ticks(os.getpid())) < 1e7
        assert is_alive({"pid": process.pid, "ticks": ticks})
        process.kill()
        deadline = time.monotonic() + 10
        while start_ticks(process.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive({"pid": process.pid, "ticks": ticks}), "killed, and nobody has asked how it ended"
    finally:
        process.kill()
        process.wait()
    assert start_ticks(process.pid) is None


def test_another_hosts_heartbeat_decides(tmp_path):
    alive = RunLock(tmp_path, heartbeat_seconds=0.1).acquire()
    make_foreign(tmp_path)
    with pytest.raises(RunInUseError, match="on node7"):
        RunLock(tmp_path, 0.1, stale_seconds=20).acquire()
    alive._closing.set()
    time.sleep(0.3)
    with RunLock(tmp_path, 0.1, stale_seconds=0.5) as lock:
        assert lock.is_held()
        assert not alive.is_held(), "the frozen job learns that it lost the folder"


@pytest.mark.parametrize(("before", "now"), [("0", "1"), ("3", "4")])
def test_a_requeued_job_takes_over_from_its_earlier_start_which_cannot_come_back(tmp_path, monkeypatch, before, now):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", before)
    earlier = RunLock(tmp_path, heartbeat_seconds=0.1).acquire()
    make_foreign(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", now)
    begin = time.monotonic()
    lock = RunLock(tmp_path, 0.1, stale_seconds=20).acquire()
    assert time.monotonic() - begin < 15
    assert lock.is_held()
    assert not earlier.is_held()
    make_foreign(tmp_path)
    after = everything_in(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", before)
    with pytest.raises(FencedError, match="job 42 has been started again"):
        RunLock(tmp_path, 0.1, stale_seconds=20).acquire()
    earlier.release()
    assert everything_in(tmp_path) == after, "the earlier start writes nothing"
    assert lock.is_held()


@pytest.mark.parametrize("job", ["42", "43"])
def test_another_job_or_a_second_launcher_of_the_same_one_is_watched(tmp_path, monkeypatch, job):
    """The same job and the same incarnation: two launchers in one allocation."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path, heartbeat_seconds=0.1).acquire()
    make_foreign(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1" if job == "42" else "9")
    with pytest.raises(RunInUseError):
        RunLock(tmp_path, 0.1, stale_seconds=20).acquire()


def test_a_lock_released_while_watched_is_taken(tmp_path):
    alive = RunLock(tmp_path, heartbeat_seconds=60).acquire()
    make_foreign(tmp_path)
    threading.Timer(0.3, alive.release).start()
    assert RunLock(tmp_path, 0.1, stale_seconds=20).acquire().is_held()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_a_lock_that_says_nothing_is_watched(tmp_path, content):
    """What a power cut or an older version may leave."""
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "lock.4").write_text(content)
    begin = time.monotonic()
    with RunLock(tmp_path, 0.1, stale_seconds=0.5) as lock:
        assert time.monotonic() - begin >= 0.5
        assert label_of(lock.attempt) == "5.0"


class TestFence:
    """Ranks write by the right of the launcher that started them."""

    def test_only_the_attempt_that_the_lock_names_may_write(self, tmp_path):
        launcher = RunLock(tmp_path).acquire()
        first = RunLock(tmp_path).join(launcher.begin_attempt())
        assert first.is_held()
        second = RunLock(tmp_path).join(launcher.begin_attempt())
        assert (first.is_held(), second.is_held()) == (False, True)
        assert [label_of(lock.attempt) for lock in (first, second)] == ["0.0", "0.1"]
        second.release()
        assert launcher.is_held(), "only the launcher gives back what it took"
        launcher.release()
        newer = RunLock(tmp_path).acquire()
        assert newer.is_held()
        assert not RunLock(tmp_path).join(launcher.attempt or first.attempt).is_held()

    def test_another_start_of_the_same_number_is_another_start(self, tmp_path):
        """Somebody has deleted the runtime folder, and numbers begin again."""
        earlier = RunLock(tmp_path).acquire()
        (tmp_path / "runtime" / "lock.0").unlink()
        with RunLock(tmp_path) as lock:
            assert label_of(lock.attempt) == label_of(earlier.attempt)
            assert not earlier.is_held()

    def test_a_full_disk_fences_nobody(self, tmp_path, monkeypatch):
        """The launcher cannot write which attempt begins: its ranks may write all the same."""
        launcher = RunLock(tmp_path).acquire()
        old = RunLock(tmp_path).join(launcher.begin_attempt())
        with monkeypatch.context() as patch:
            patch.setattr(lock_module, "write_file", no_space)
            new = RunLock(tmp_path).join(launcher.begin_attempt())
        assert new.is_held()
        assert old.is_held(), "the price: known, and only while the disk is full"
        assert not RunLock(tmp_path).join(RunLock(tmp_path / "else").acquire().attempt).is_held()

    def test_a_folder_that_cannot_be_read_for_a_moment_fences_nobody(self, tmp_path, monkeypatch):
        lock = RunLock(tmp_path).acquire()
        monkeypatch.setattr(Path, "iterdir", no_space)
        assert lock.is_held()

    def test_the_owner_clears_away_what_dead_writers_left(self, tmp_path):
        runtime = tmp_path / "runtime"
        (runtime / "stacks").mkdir(parents=True)
        for name in (".status.json.17.tmp", ".failures.json.1.tmp", ".lock.abc.tmp", "stacks/told_0.0-aa"):
            (runtime / name).write_text("half")
        (runtime / "status.json").write_text("{}")
        with RunLock(tmp_path):
            left = sorted(path.relative_to(runtime).as_posix() for path in runtime.rglob("*") if path.is_file())
            assert left == ["lock.0", "status.json"]


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["file in the way", "link to itself", "too long"])
def test_a_run_folder_that_cannot_be_made_is_a_configuration_error(tmp_path, what):
    place = tmp_path / ("x" * 300 if what == "too long" else "run")
    if what == "file in the way":
        place.write_text("")
    elif what == "link to itself":
        place.symlink_to(place)
    with pytest.raises(ConfigError, match=r"run_dir .*cannot be written"):
        RunLock(place).acquire()


def contend(run_dir, go, wins, finish):
    go.wait()
    try:
        RunLock(run_dir).acquire()
    except RunInUseError:
        return
    wins.release()
    finish.wait()


def test_one_of_many_contenders_wins_a_stale_lock(tmp_path, other_job):
    other_job.kill()
    other_job.join()
    go, finish, wins = FORK.Event(), FORK.Event(), FORK.Semaphore(0)
    jobs = [FORK.Process(target=contend, args=(tmp_path, go, wins, finish)) for _ in range(8)]
    for job in jobs:
        job.start()
    go.set()
    deadline = time.monotonic() + 20
    while sum(job.is_alive() for job in jobs) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    finish.set()
    for job in jobs:
        job.join(20)
    assert [job.exitcode for job in jobs] == [0] * 8
    assert wins.acquire(block=False)
    assert not wins.acquire(block=False)


def test_a_job_that_lost_the_folder_commits_nothing(tmp_path):
    shapes = {"w": (4, 4)}
    (slices,) = cut(shapes, {"w": None}, 1, 1, 1, whole_state(shapes))
    lost = RunLock(tmp_path, heartbeat_seconds=0.1).acquire()
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False), lock=lost)
    store.save(1, slices, {})
    assert store.last_save.problem is None
    make_foreign(tmp_path)
    lost._closing.set()
    with RunLock(tmp_path, 0.1, stale_seconds=0.5):
        store.save(2, slices, {})
        assert store.last_save.problem == "another job has taken over the run folder"
    assert [path.name for path in store.folder.iterdir()] == ["step_00000001"]
