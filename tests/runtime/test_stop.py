import os
import signal
import subprocess
import sys
import time

import pytest

from bd3lm_scale.runtime.run_folder import ATTEMPT_VARIABLE, runtime_folder, write_json
from bd3lm_scale.runtime.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_set_a_reason_and_a_second_one_changes_nothing(number):
    before = signal.getsignal(number)
    stop = StopRequest().install()
    try:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == f"signal {number.name}"
    finally:
        stop.close()
    assert signal.getsignal(number) is before


def test_stop_file_is_seen_by_rank_zero_and_forgotten_by_the_next_start(tmp_path):
    stop = StopRequest(tmp_path, poll_seconds=0, rank=0)
    other = StopRequest(tmp_path, poll_seconds=0, rank=1)
    assert stop.reason is None
    (tmp_path / "STOP").touch()
    assert stop.reason == "STOP file"
    assert other.reason is None, "files are polled by one rank only: thousands would load the file system"
    assert StopRequest(tmp_path, poll_seconds=0, rank=0).reason is None


def test_stop_file_survives_the_launchers_restart(tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT_VARIABLE, "0.1")
    (tmp_path / "STOP").touch()
    assert StopRequest(tmp_path, poll_seconds=0, rank=0).reason == "STOP file"


def test_time_limit(tmp_path):
    stop = StopRequest(tmp_path, time_limit_minutes=0.2 / 60, poll_seconds=0, rank=0)
    assert stop.reason is None
    time.sleep(0.25)
    assert stop.reason == "time limit"


def test_launchers_request_binds_only_its_own_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv(ATTEMPT_VARIABLE, "1.0")
    stop = StopRequest(tmp_path, poll_seconds=0, rank=0)
    write_json(runtime_folder(tmp_path) / "stop_request.json", {"attempt": "0.3", "reason": "old"})
    assert stop.reason is None
    write_json(runtime_folder(tmp_path) / "stop_request.json", {"attempt": "1.0", "reason": "SIGUSR1"})
    assert stop.reason == "launcher: SIGUSR1"


def test_real_process_finishes_its_step_under_a_rain_of_signals():
    code = (
        "import time\n"
        "from bd3lm_scale.runtime.stop import StopRequest\n"
        "stop = StopRequest().install()\n"
        "print('ready', flush=True)\n"
        "while stop.reason is None:\n"
        "    time.sleep(0.05)\n"
        "time.sleep(0.3)\n"  # the save: more signals arrive meanwhile
        "print('saved', stop.reason, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "saved signal SIGUSR1\n")
    assert err.count("finishing the step") == 1
