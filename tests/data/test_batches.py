"""The same global order whatever the ranks, workers and micro-batches; workers that neither hang nor linger."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.batches import BatchPlan, BatchReader
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.errors import BadShardError
from bd3lm_scale.values import Cursor
from tests.data.sets import rows_of, write_set

LENGTH = 8
GLOBAL_BATCH = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer_path):
    folder = tmp_path_factory.mktemp("set")
    return folder, write_set(folder, tokenizer_path, [72, 64, 40, 64])


def config(folder) -> DataConfig:
    return DataConfig(path=str(folder), context_length=LENGTH, shuffle_window=2, retries=0)


def reader(folder, plan, cursor=Cursor(), workers=0, prefetch=2) -> BatchReader:  # noqa: B008
    return BatchReader(open_stream(config(folder), 1, cursor=cursor), plan, cursor, workers, prefetch)


def rows_by_step(folder, dp: int, micro: int, steps: int, cursor=Cursor(), workers=0) -> np.ndarray:  # noqa: B008
    """(steps, GLOBAL_BATCH, LENGTH), put together from what all ranks get."""
    out = np.full((steps, GLOBAL_BATCH, LENGTH), -1)
    for rank in range(dp):
        with reader(folder, BatchPlan(GLOBAL_BATCH, micro, rank, dp), cursor, workers) as batches:
            for step in range(steps):
                for rows in next(batches):
                    assert rows.tokens_BL.dtype == torch.int64
                    assert (rows.is_real_B == (rows.position_B < GLOBAL_BATCH)).all()
                    assert (rows.tokens_BL[~rows.is_real_B] == 0).all()
                    position = rows.position_B[rows.is_real_B].numpy()
                    assert (out[step, position] == -1).all(), "a row was given out twice"
                    out[step, position] = rows.tokens_BL[rows.is_real_B].numpy()
    assert (out >= 0).all(), "a row was given to nobody"
    return out


STEPS = 12  # more than two epochs of 30 rows


@pytest.fixture(scope="module")
def expected(dataset):
    stream = open_stream(config(dataset[0]), 1)
    return stream.read(np.arange(STEPS * GLOBAL_BATCH)).reshape(STEPS, GLOBAL_BATCH, LENGTH)


@pytest.mark.parametrize("dp", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_global_order_is_the_same_for_all_layouts(dataset, expected, dp, micro):
    assert (rows_by_step(dataset[0], dp, micro, STEPS) == expected).all()


@pytest.mark.parametrize(("workers", "dp"), [(1, 2), (4, 1)])
def test_global_order_is_the_same_for_any_number_of_workers(dataset, expected, workers, dp):
    assert (rows_by_step(dataset[0], dp, 2, STEPS, workers=workers) == expected).all()


def test_every_row_once_per_epoch(dataset, expected):
    rows = list(map(tuple, expected.reshape(-1, LENGTH).tolist()))
    epoch_rows = sorted(rows_of(dataset[1], LENGTH))
    assert len(epoch_rows) == 30
    for epoch in range(2):
        assert sorted(rows[epoch * 30 : (epoch + 1) * 30]) == epoch_rows


def test_resumed_run_goes_on_as_the_uninterrupted_one(dataset, expected):
    # with other ranks, workers and micro-batches than before
    assert (rows_by_step(dataset[0], 4, 1, 5, Cursor(step=7)) == expected[7:]).all()
    assert (rows_by_step(dataset[0], 1, 3, 5, Cursor(step=7), workers=2) == expected[7:]).all()


def test_data_offset_moves_the_order_and_nothing_else(dataset, expected):
    moved = rows_by_step(dataset[0], 2, 2, 4, Cursor(step=1, data_offset=GLOBAL_BATCH * 3))
    assert (moved == expected[4:8]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_seek_forwards_and_back(dataset, expected, workers):
    with reader(dataset[0], BatchPlan(GLOBAL_BATCH, 3), workers=workers, prefetch=4) as batches:
        for step in (3, 10, 0, 1, 11):
            batches.seek(Cursor(step=step))
            got = torch.cat([rows.tokens_BL for rows in next(batches)]).numpy()
            assert (got == expected[step]).all()
        assert batches.wait_seconds > 0


def test_batch_plan_counts_and_places():
    plan = BatchPlan(global_batch_size=10, micro_batch_size=2, data_parallel_rank=1, data_parallel_size=3)
    assert plan.num_micro_batches == 2
    assert plan.positions(0).tolist() == [2, 3]
    assert plan.positions(1).tolist() == [8, 9]
    last = dataclasses.replace(plan, data_parallel_rank=2)
    assert last.positions(1).tolist() == [10, 11], "padding rows"


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_shard_is_excluded_alike_everywhere(tmp_path, tokenizer_path, workers):
    write_set(tmp_path, tokenizer_path, [72, 64, 40, 64])
    sound = open_stream(config(tmp_path), 1)
    before = sound.read(np.arange(60)).reshape(10, GLOBAL_BATCH, LENGTH)
    shard = sound.source._datasets[0].order.locate(np.arange(60))[0].reshape(10, GLOBAL_BATCH)
    (tmp_path / "train" / "train-000001.tar").unlink()
    cursor = Cursor()
    got = []
    with reader(tmp_path, BatchPlan(GLOBAL_BATCH, GLOBAL_BATCH), workers=workers) as batches:
        while len(got) < 10:
            try:
                got.append(next(batches)[0].tokens_BL.numpy())
            except BadShardError as problem:
                cursor = Cursor(step=len(got), excluded_shards=(*cursor.excluded_shards, problem.shard))
                batches.seek(cursor)
    assert cursor.excluded_shards == ("train-000001.tar",)
    assert (np.stack(got)[shard != 1] == before[shard != 1]).all()
    assert (rows_by_step(tmp_path, 2, 1, 10, Cursor(excluded_shards=cursor.excluded_shards)) == np.stack(got)).all()


def workers_of(pid: int) -> list[psutil.Process]:
    children = [p for p in psutil.Process(pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in children if "bd3lm_scale.data.worker" in p.cmdline()]


def gone(processes: list[psutil.Process], seconds: float = 10.0) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_workers_answer_beyond_descriptor_1023(dataset, expected):
    """Ranks of large runs hold thousands of sockets and files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 4096), before[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert np.array_equal(rows_by_step(dataset[0], 1, 2, 3, workers=1), expected[:3])
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_killed_worker_is_replaced_and_no_row_is_lost(dataset, expected, caplog):
    with reader(dataset[0], BatchPlan(GLOBAL_BATCH, 3), workers=2) as batches:
        for step in range(STEPS):
            if step in (2, 3, 7):
                workers_of(os.getpid())[0].kill()
            assert (torch.cat([rows.tokens_BL for rows in next(batches)]).numpy() == expected[step]).all()
    assert "ended with status -9" in caplog.text


def test_worker_that_cannot_live_ends_in_one_error(dataset, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        reader(dataset[0], BatchPlan(GLOBAL_BATCH, 3), workers=1) as batches,
        pytest.raises(RuntimeError, match=r"data worker 0 ended again with status 1 .*data\.workers=0"),
    ):
        next(batches)


def test_workers_ignore_the_scheduler_and_end_with_close(dataset, expected):
    batches = reader(dataset[0], BatchPlan(GLOBAL_BATCH, 3), workers=2)
    workers = workers_of(os.getpid())
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # from their very first moment on
        for worker in workers:
            worker.send_signal(number)
    for step in range(4):
        assert (torch.cat([rows.tokens_BL for rows in next(batches)]).numpy() == expected[step]).all()
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
    assert workers_of(os.getpid()) == workers
    started_at = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - started_at < 3
    assert gone(workers, 0)


MAIN = """
import sys, time
from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.batches import BatchPlan, BatchReader
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.values import Cursor
stream = open_stream(DataConfig(path=sys.argv[1], context_length=8), 1)
reader = BatchReader(stream, BatchPlan(6, 3), Cursor(), workers=3, prefetch_steps=6)
next(reader)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent(dataset, number):
    main = subprocess.Popen([sys.executable, "-c", MAIN, str(dataset[0])], stdout=subprocess.PIPE)
    assert main.stdout.readline() == b"ready\n"
    workers = workers_of(main.pid)
    assert len(workers) == 3
    main.send_signal(number)
    main.wait()
    main.stdout.close()
    assert gone(workers)
