"""The batch read ahead is the one that would have been read: same rows, same noise, same errors."""

import threading

import pytest
import torch

from bd3lm_scale.errors import BadShardError
from bd3lm_scale.training.ahead import ReadAhead
from bd3lm_scale.training.step import NoisedStep
from bd3lm_scale.values import Interval, Rows

WIDE, NARROW = Interval(0.0, 1.0), Interval(0.3, 0.8)


class Batches:
    """Rows numbered by call; raises what it is told to."""

    def __init__(self) -> None:
        self.read, self.error, self.closed, self.thread = 0, None, False, None

    def __next__(self) -> list[Rows]:
        self.thread = threading.current_thread()
        if self.error is not None:
            raise self.error
        self.read += 1
        tokens = torch.full((1, 4), self.read)
        return [Rows(tokens, torch.arange(1), torch.ones(1, dtype=torch.bool))]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def ahead():
    noised = []

    def noise(step: int, rows: list[Rows], interval: Interval) -> NoisedStep:
        noised.append((step, int(rows[0].tokens_BL[0, 0]), interval))
        return NoisedStep(interval, [], hash(noised[-1]))

    reader = ReadAhead(Batches(), noise)
    reader.noised = noised
    yield reader
    reader.close()
    assert reader.batches.closed


def test_each_batch_is_read_once_in_a_thread_of_its_own(ahead):
    for step in range(3):
        ahead.start(step, WIDE)
        ahead.start(step + 10, NARROW)  # one is under way
        batch = ahead.take(WIDE)
        assert (batch.step, int(batch.rows[0].tokens_BL[0, 0])) == (step, step + 1)
        assert batch.noised.stream_hash == hash((step, step + 1, WIDE))
    assert ahead.noised == [(step, step + 1, WIDE) for step in range(3)]
    assert ahead.batches.thread is not threading.current_thread()
    assert ahead.wait_seconds > 0


def test_an_interval_that_has_moved_means_new_noise_for_the_same_rows(ahead):
    ahead.start(5, WIDE)
    batch = ahead.take(NARROW)
    assert batch.noised.clip_interval == NARROW
    assert ahead.noised == [(5, 1, WIDE), (5, 1, NARROW)]


def test_a_damaged_shard_is_told_and_the_reader_free_after_a_drop(ahead):
    assert ahead.bad_shard() is None
    ahead.batches.error = BadShardError("shard-1", "checksum")
    ahead.start(0, WIDE)
    assert ahead.bad_shard() is ahead.batches.error
    ahead.drop()
    assert ahead.bad_shard() is None
    ahead.batches.error = None
    ahead.start(0, WIDE)
    assert int(ahead.take(WIDE).rows[0].tokens_BL[0, 0]) == 1


def test_another_error_is_raised_wherever_the_batch_is_asked_for(ahead):
    ahead.batches.error = OSError("disk")
    ahead.start(0, WIDE)
    with pytest.raises(OSError, match="disk"):
        ahead.bad_shard()
    with pytest.raises(OSError, match="disk"):
        ahead.take(WIDE)
    ahead.drop()
