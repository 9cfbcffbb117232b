"""Batches: which rows a rank needs at each step, read ahead by worker processes.

    step s -> sample indices of this rank -> worker s mod W -> shared memory -> list of Rows, one per micro-batch

Shapes: B rows in a micro-batch, L tokens in a row.
"""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bd3lm_scale.data.stream import RowStream
from bd3lm_scale.data.worker_pool import WorkerPool
from bd3lm_scale.errors import BadShardError
from bd3lm_scale.values import PADDING, Cursor, Rows

__all__ = ["BadShardError", "BatchPlan", "BatchReader"]


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut over ranks and micro-steps."""

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1

    @property
    def num_micro_batches(self) -> int:
        """M, micro-steps per optimizer step, equal on all ranks."""
        return -(-self.global_batch_size // (self.data_parallel_size * self.micro_batch_size))

    def positions(self, micro_step: int) -> np.ndarray:
        """Places in the global batch (B,) of this rank's rows in one micro-step; >= global_batch_size is padding."""
        rows = self.data_parallel_size * self.micro_batch_size
        first = micro_step * rows + self.data_parallel_rank * self.micro_batch_size
        return np.arange(first, first + self.micro_batch_size, dtype=np.int64)


class BatchReader:
    """The micro-batches of one optimizer step after another.

    Args:
        stream: where rows come from.
        plan: this rank's share.
        cursor: where to begin.
        workers: reader processes; 0 reads in this process.
        prefetch_steps: steps read ahead (at least one per worker).
        is_text: whether rows are text to be learnt, which never holds the mask.

    Attributes:
        wait_seconds: total time `next` has waited for data.
    """

    def __init__(
        self,
        stream: RowStream,
        plan: BatchPlan,
        cursor: Cursor,
        workers: int,
        prefetch_steps: int,
        is_text: bool = False,
    ):
        self.plan = plan
        self._is_text = is_text
        self.wait_seconds = 0.0
        self._stream = stream
        self._cursor = cursor
        positions = [plan.positions(m) for m in range(plan.num_micro_batches)]
        self._position_MB = np.stack(positions)
        self._is_real_MB = self._position_MB < plan.global_batch_size
        self._origin = 0
        self._pool = None
        if workers > 0:
            self._pool = WorkerPool(stream.source, int(self._is_real_MB.sum()), workers, max(prefetch_steps, workers))
        self.seek(cursor)

    def __iter__(self) -> Iterator[list[Rows]]:
        return self

    def __next__(self) -> list[Rows]:
        """The next step's micro-batches, m = 0 ... M - 1.

        Raises:
            BadShardError: a shard stays unreadable, or holds the mask in its text; the reader still stands at the
                same step. Add the shard to the cursor's excluded_shards on all ranks and `seek`, or stop.
        """
        started_at = time.perf_counter()
        step = self._cursor.step
        if self._pool is None:
            rows = self._stream.read(self._index(step))
        else:
            self._request_until(step + self._pool.depth)
            rows = self._pool.take(step)
        if self._is_text:
            self._stream.refuse_mask(rows, self._index(step))
        batch = self._cut(rows)
        if self._stream.source.has_layout:
            batch = self._lay_out(batch, step)
        self._cursor = dataclasses.replace(self._cursor, step=step + 1)
        if self._pool is not None:  # the rows are copied: their place in memory is free for a later step
            self._request_until(step + 1 + self._pool.depth)
        self.wait_seconds += time.perf_counter() - started_at
        return batch

    def seek(self, cursor: Cursor) -> None:
        """Continue at `cursor`: nothing is replayed, and nothing read before it is kept."""
        if tuple(cursor.excluded_shards) != self._stream.source.excluded:
            old = self._stream
            self._stream = old.without(tuple(cursor.excluded_shards))
            old.close()
        self._cursor = cursor
        self._origin = cursor.data_offset + cursor.step * self.plan.global_batch_size
        self._stream.source.seek(self._origin)
        if self._pool is not None:
            self._pool.forget_requests()
            self._request_until(cursor.step + self._pool.depth)

    def close(self) -> None:
        """End the workers; the reader is of no use afterwards. Called twice does no harm."""
        if self._pool is not None:
            self._pool.close()
        self._stream.close()

    def __enter__(self) -> "BatchReader":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def _request_until(self, stop: int) -> None:
        if self._pool is not None:
            for step in range(self._cursor.step, stop):
                self._pool.request(step, self._index, self._origin, self._cursor.excluded_shards)

    def _index(self, step: int) -> np.ndarray:
        """Global sample indices of this rank's real rows at `step`."""
        first = self._cursor.data_offset + step * self.plan.global_batch_size
        return first + self._position_MB[self._is_real_MB]

    def _cut(self, rows: np.ndarray) -> list[Rows]:
        num_micro, size = self._position_MB.shape
        tokens = np.zeros((num_micro, size, self._stream.source.config.context_length), np.int64)
        tokens[self._is_real_MB] = rows
        return [
            Rows(
                tokens_BL=torch.from_numpy(tokens[m]),
                position_B=torch.from_numpy(self._position_MB[m].copy()),
                is_real_B=torch.from_numpy(self._is_real_MB[m].copy()),
            )
            for m in range(num_micro)
        ]

    def _lay_out(self, batch: list[Rows], step: int) -> list[Rows]:
        """The same with what the positions of each row are, and the targets of the whole global batch."""
        real = torch.from_numpy(self._is_real_MB)
        first = self._cursor.data_offset + step * self.plan.global_batch_size
        targets = self._stream.targets(np.arange(first, first + self.plan.global_batch_size))
        fields = {}
        for name, found_BL in self._stream.layout(self._index(step)).items():
            fill = False if found_BL.dtype == torch.bool else PADDING
            fields[name] = torch.full((*real.shape, found_BL.shape[1]), fill, dtype=found_BL.dtype)
            fields[name][real] = found_BL
        return [
            dataclasses.replace(rows, targets=targets, **{name: whole[m] for name, whole in fields.items()})
            for m, rows in enumerate(batch)
        ]
