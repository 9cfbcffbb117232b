"""Batches: which rows a rank needs at each step, read ahead by worker processes.

    step s -> sample indices of this rank -> worker s mod W -> shared memory -> list of Rows, one per micro-batch

Shapes: B rows in a micro-batch, L tokens in a row.
"""

import dataclasses
import json
import logging
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bd3lm_scale.data.shards import BadShardError
from bd3lm_scale.data.stream import RowStream
from bd3lm_scale.data.worker import IGNORED_SIGNALS
from bd3lm_scale.values import Cursor, Rows

__all__ = ["BadShardError", "BatchPlan", "BatchReader"]

_MAX_RESTARTS = 5
_CLOSE_SECONDS = 2.0
_log = logging.getLogger(__name__)


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

    Attributes:
        wait_seconds: total time `next` has waited for data.
    """

    def __init__(self, stream: RowStream, plan: BatchPlan, cursor: Cursor, workers: int, prefetch_steps: int):
        self.plan = plan
        self.wait_seconds = 0.0
        self._stream = stream
        self._cursor = cursor
        positions = [plan.positions(m) for m in range(plan.num_micro_batches)]
        self._position_MB = np.stack(positions)
        self._is_real_MB = self._position_MB < plan.global_batch_size
        self._pool = None
        if workers > 0 and self._is_real_MB.any():
            self._pool = _WorkerPool(stream, int(self._is_real_MB.sum()), workers, max(prefetch_steps, workers))
        self.seek(cursor)

    def __iter__(self) -> Iterator[list[Rows]]:
        return self

    def __next__(self) -> list[Rows]:
        """The next step's micro-batches, m = 0 ... M - 1.

        Raises:
            BadShardError: a shard stays unreadable; the reader still stands at the same step. Add the shard to
                the cursor's excluded_shards on all ranks and `seek`, or stop.
        """
        started = time.perf_counter()
        index = self._index(self._cursor.step)
        if self._pool is None:
            rows = self._stream.read(index)
        else:
            for step in range(self._cursor.step, self._cursor.step + self._pool.depth):
                self._pool.request(step, self._index, self._cursor.excluded_shards)
            rows = self._pool.take(self._cursor.step)
        batch = self._cut(rows)
        if self._pool is not None:  # the slot is free again
            self._pool.request(self._cursor.step + self._pool.depth, self._index, self._cursor.excluded_shards)
        self._cursor = dataclasses.replace(self._cursor, step=self._cursor.step + 1)
        self.wait_seconds += time.perf_counter() - started
        return batch

    def seek(self, cursor: Cursor) -> None:
        """Continue at `cursor`, in constant time."""
        if tuple(cursor.excluded_shards) != self._stream.source.excluded:
            old = self._stream
            self._stream = old.without(tuple(cursor.excluded_shards))
            old.close()
        self._cursor = cursor
        if self._pool is not None:
            self._pool.forget_requests()

    def close(self) -> None:
        """End the workers; the reader is of no use afterwards. Called twice does no harm."""
        if self._pool is not None:
            self._pool.close()
        self._stream.close()

    def __enter__(self) -> "BatchReader":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

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


class _WorkerPool:
    """Worker processes, their requests under way, and the memory they answer in.

    Step s belongs to worker s mod W, which works through its requests in order, so a slot that is asked for
    again after a seek is written last by the request that is wanted.
    """

    def __init__(self, stream: RowStream, rows: int, workers: int, prefetch_steps: int):
        self.depth = -(-prefetch_steps // workers) * workers
        self._source = stream.source
        self._generation = 0
        self._under_way: dict[int, dict] = {}  # step -> request
        self._answers: dict[int, dict] = {}
        self._restarts = 0
        shape = (self.depth, rows, stream.source.config.context_length)
        dtype = np.dtype(stream.source.dtype)
        self._memory_file = _anonymous_file(int(np.prod(shape)) * dtype.itemsize)
        self._map = mmap.mmap(self._memory_file, 0)
        self._slots = np.frombuffer(self._map, dtype).reshape(shape)
        self._workers = [self._start() for _ in range(workers)]
        self._pending = [b""] * workers

    def request(self, step: int, index: Callable[[int], np.ndarray], excluded: tuple[str, ...]) -> None:
        """Ask for a step unless that was done; `index(step)` gives its sample indices."""
        if step in self._under_way or step in self._answers:
            return
        request = {
            "step": step,
            "slot": step % self.depth,
            "generation": self._generation,
            "index": index(step).tolist(),
            "excluded": list(excluded),
        }
        self._under_way[step] = request
        self._send(step % len(self._workers), request)

    def take(self, step: int) -> np.ndarray:
        """Wait for a requested step; its rows (n, L) are valid until the next request."""
        while step not in self._answers:
            self._receive(step % len(self._workers))
        answer = self._answers.pop(step)
        if "error" in answer:
            self.forget_requests()
            if answer["shard"] is not None:
                raise BadShardError(answer["shard"], answer["error"])
            raise RuntimeError(f"data worker: {answer['error']}")
        return self._slots[answer["slot"], : answer["rows"]]

    def forget_requests(self) -> None:
        """Drop everything asked for so far."""
        self._generation += 1
        self._under_way.clear()
        self._answers.clear()

    def close(self) -> None:
        for worker in self._workers:
            # ends by itself when its input closes
            worker.stdin.close()
        for worker in self._workers:
            try:
                worker.wait(_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            worker.stdout.close()
        self._workers = []
        if self._memory_file is not None:
            os.close(self._memory_file)
            self._memory_file = None

    def _start(self) -> subprocess.Popen:
        source = self._source
        setup = {
            "config": dataclasses.asdict(source.config),
            "seed": source.seed,
            "split": source.split,
            "excluded": list(source.excluded),
            "memory": self._memory_file,
            "shape": self._slots.shape,
            "dtype": self._slots.dtype.str,
            "parent": os.getpid(),
        }
        here = str(Path(__file__).parents[2])
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # the child inherits the mask, so no signal can end it before it has learnt to ignore them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "bd3lm_scale.data.worker", json.dumps(setup)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=environment,
                pass_fds=(self._memory_file,),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _send(self, number: int, request: dict) -> None:
        data = json.dumps(request).encode() + b"\n"
        try:
            view = memoryview(data)
            while view:
                view = view[self._workers[number].stdin.write(view) :]
        except BrokenPipeError:
            self._replace(number)

    def _receive(self, number: int) -> None:
        """Take in what one worker has to say, waiting for it."""
        select.select([self._workers[number].stdout], [], [])
        data = os.read(self._workers[number].stdout.fileno(), 1 << 16)
        if not data:
            self._replace(number)
            return
        *lines, self._pending[number] = (self._pending[number] + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if answer["generation"] == self._generation:
                del self._under_way[answer["step"]]
                self._answers[answer["step"]] = answer

    def _replace(self, number: int) -> None:
        """Start a dead worker anew with the same requests: rows are pure functions, so nothing is lost."""
        status = self._workers[number].wait()
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise RuntimeError(
                f"data worker {number} ended again with status {status} (-9: killed, perhaps out of memory); "
                "see its messages above, or set data.workers=0 to read in the training process"
            )
        _log.warning("data worker %d ended with status %s; starting another", number, status)
        self._workers[number].stdin.close()
        self._workers[number].stdout.close()
        self._workers[number] = self._start()
        self._pending[number] = b""
        for step, request in self._under_way.items():
            if step % len(self._workers) == number:
                self._send(number, request)


def _anonymous_file(size: int) -> int:
    """A file in memory that has no name and vanishes with its last user."""
    file = os.memfd_create("bd3lm_batches")
    os.ftruncate(file, max(size, 1))
    return file
