"""The next step's batch: read and noised in a thread while the device computes this one's."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from bd3lm_scale.data.batches import BatchReader
from bd3lm_scale.errors import BadShardError
from bd3lm_scale.training.step import NoisedStep
from bd3lm_scale.values import Interval, Rows


@dataclass(frozen=True)
class StepBatch:
    """This data-parallel rank's micro-batches of one step: as read, and as noised."""

    step: int
    rows: list[Rows]
    noised: NoisedStep


class ReadAhead:
    """One batch under way at a time. What it gives is the same as without the thread: noise is a pure function.

    Args:
        batches: the reader; used by the thread alone between `start` and `drop`.
        noise: (step, rows, interval) -> NoisedStep.

    Attributes:
        wait_seconds: total time that `take` has waited.
    """

    def __init__(self, batches: BatchReader, noise: Callable[[int, list[Rows], Interval], NoisedStep]) -> None:
        self.batches = batches
        self.wait_seconds = 0.0
        self._noise = noise
        self._thread = ThreadPoolExecutor(1, "read ahead")
        self._next: Future[StepBatch] | None = None

    def start(self, step: int, interval: Interval) -> None:
        """Begin with the batch of `step`, unless one is under way."""
        if self._next is None:
            self._next = self._thread.submit(self._prepare, step, interval)

    def bad_shard(self) -> BadShardError | None:
        """What kept the batch under way from being read, once that is known; None if nothing did, or none is.

        Anything else that went wrong is raised, here or by `take`.
        """
        error = None if self._next is None else self._next.exception()
        if error is None or isinstance(error, BadShardError):
            return error
        raise error

    def take(self, interval: Interval) -> StepBatch:
        """The batch under way, noised for `interval` even if it was begun for another."""
        assert self._next is not None, "start comes first"
        started = time.perf_counter()
        batch, self._next = self._next.result(), None
        if batch.noised.clip_interval != interval:  # a validation in between has moved it
            batch = StepBatch(batch.step, batch.rows, self._noise(batch.step, batch.rows, interval))
        self.wait_seconds += time.perf_counter() - started
        return batch

    def drop(self) -> None:
        """Forget what is under way; the reader is free afterwards."""
        if self._next is not None:
            self._next.exception()
            self._next = None

    def close(self) -> None:
        """End the thread and the reader."""
        self.drop()
        self._thread.shutdown()
        self.batches.close()

    def _prepare(self, step: int, interval: Interval) -> StepBatch:
        rows = next(self.batches)
        return StepBatch(step, rows, self._noise(step, rows, interval))
