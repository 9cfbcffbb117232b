"""A process that dies or a disk that fails in any phase of a save: the checkpoint before stays, the next save works."""

import errno
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from bd3lm_scale.checkpoint import files
from bd3lm_scale.checkpoint import store as store_module
from bd3lm_scale.checkpoint.folders import list_steps
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.checkpoint.verify import verify
from bd3lm_scale.config.schema import CheckpointConfig
from tests.checkpoint.layouts import cut, whole_state

SHAPES = {"w": (64, 64), "norm": (64,), "v": (300, 64)}
POINTS = ("copied", "folder_made", "run_written", "file_written", "before_manifest", "before_rename", "after_rename")
FORK = multiprocessing.get_context("fork")


def save(folder, step, asynchronous=False):
    store = CheckpointStore(folder, CheckpointConfig(keep_last=2, asynchronous=asynchronous))
    (slices,) = cut(SHAPES, dict.fromkeys(SHAPES), 1, 1, 1, whole_state(SHAPES, step))
    store.save(step, slices, {"tokens": step})
    store.wait()
    return store


def assert_newest(folder, steps):
    reader = CheckpointStore(folder, CheckpointConfig()).newest()
    step = reader.meta["step"]
    assert step in steps
    state = whole_state(SHAPES, step)
    assert all(torch.equal(reader.read(name, kind), state[kind][name]) for kind in state for name in SHAPES)
    assert all(report.is_valid for report in verify(folder))
    return step


def run_and_die(target, *args):
    process = FORK.Process(target=target, args=args)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_phase_of_a_save(tmp_path, monkeypatch, point, asynchronous):
    save(tmp_path, 1)
    monkeypatch.setenv("BD3LM_FAULTS", f"kill@save:{point}:step=2")
    run_and_die(save, tmp_path, 2, asynchronous)
    assert_newest(tmp_path, {2} if point == "after_rename" else {1})
    assert save(tmp_path, 3).last_save.problem is None
    assert_newest(tmp_path, {3})
    assert not list(tmp_path.glob(".*")), "the next save removes what the dead one left"


def test_killed_between_the_two_renames_of_a_replacement(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setenv("BD3LM_FAULTS", "kill@save:replacing")
    run_and_die(save, tmp_path, 1)
    assert_newest(tmp_path, {1})


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("point", POINTS[:-1])
def test_an_error_at_each_phase_is_reported_and_the_run_goes_on(tmp_path, monkeypatch, point, asynchronous):
    save(tmp_path, 1)
    monkeypatch.setenv("BD3LM_FAULTS", f"error@save:{point}:step=2")
    store = save(tmp_path, 2, asynchronous)
    assert f"injected at save:{point}" in store.last_save.problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001"]
    assert save(tmp_path, 3).last_save.problem is None
    assert_newest(tmp_path, {3})


@pytest.mark.parametrize("call", ["fsync", "write", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_is_reported_and_leaves_nothing_behind(tmp_path, monkeypatch, call, code):
    save(tmp_path, 1)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(files, "_write_all", fail)
        elif call == "fsync":
            patch.setattr(files.os, "fsync", fail)
        else:
            patch.setattr(store_module, "put_in_place", fail)
        store = save(tmp_path, 2)
    assert os.strerror(code) in store.last_save.problem
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001"]
    assert save(tmp_path, 3).last_save.problem is None
    assert_newest(tmp_path, {3})


def keep_saving(folder, first):
    for step in range(first, first + 10_000):
        save(folder, step, asynchronous=True)


def test_killed_at_random_moments_again_and_again(tmp_path):
    """Each life goes on from what the last one left; no checkpoint is ever wrong or lost."""
    draw = random.Random(7)
    save(tmp_path, 1)
    step = 1
    for _ in range(15):
        process = FORK.Process(target=keep_saving, args=(tmp_path, step + 1))
        process.start()
        deadline = time.monotonic() + 30
        while list_steps(tmp_path)[0][0] <= step and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.1 * draw.random())
        process.kill()
        process.join()
        step = assert_newest(tmp_path, range(step + 1, 10**6))
    assert not list(tmp_path.glob("*.damaged"))


def test_signals_during_a_save_do_not_harm_it(tmp_path):
    received = []
    before = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        store = CheckpointStore(tmp_path, CheckpointConfig())
        (slices,) = cut(SHAPES, dict.fromkeys(SHAPES), 1, 1, 1, whole_state(SHAPES, 1))
        store.save(1, slices, {})
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        store.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]
    assert_newest(tmp_path, {1})
