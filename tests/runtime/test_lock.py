"""One job per run folder."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.errors import RunInUseError
from bd3lm_scale.runtime.lock import RunLock
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


def test_second_job_refuses_and_says_who(tmp_path, other_job):
    with pytest.raises(RunInUseError, match=rf"in use by process {other_job.pid} on .*use another run_dir"):
        RunLock(tmp_path).acquire()
    assert not RunLock(tmp_path).is_held()


def test_lock_of_a_dead_job_is_taken_over_at_once(tmp_path, other_job):
    os.kill(other_job.pid, signal.SIGKILL)
    other_job.join()
    begin = time.monotonic()
    with RunLock(tmp_path) as lock:
        assert lock.is_held()
        assert time.monotonic() - begin < 15
    assert list((tmp_path / "runtime").iterdir()) == []


def test_a_later_process_with_the_same_pid_is_not_the_holder(tmp_path):
    with RunLock(tmp_path):
        (path,) = (tmp_path / "runtime").glob("lock.*")
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": 1.0}))
        assert RunLock(tmp_path).acquire().is_held()


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


def test_an_earlier_incarnation_of_the_same_slurm_job_is_dead(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    RunLock(tmp_path, heartbeat_seconds=0.1).acquire()
    make_foreign(tmp_path, attempt="earlier")
    begin = time.monotonic()
    lock = RunLock(tmp_path, 0.1, stale_seconds=20).acquire()
    assert lock.is_held()
    assert time.monotonic() - begin < 15
    make_foreign(tmp_path, job="43")
    with pytest.raises(RunInUseError):
        RunLock(tmp_path, 0.1, stale_seconds=20).acquire()


def test_a_lock_released_while_watched_is_taken(tmp_path):
    alive = RunLock(tmp_path, heartbeat_seconds=60).acquire()
    make_foreign(tmp_path)
    threading.Timer(0.3, alive.release).start()
    assert RunLock(tmp_path, 0.1, stale_seconds=20).acquire().is_held()


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
