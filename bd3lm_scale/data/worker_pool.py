"""The training process's side of its data workers: requests out, rows back through shared memory."""

import dataclasses
import json
import logging
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bd3lm_scale.data.source import Source
from bd3lm_scale.data.worker import IGNORED_SIGNALS
from bd3lm_scale.errors import BadShardError

_MAX_RESTARTS = 5
_CLOSE_SECONDS = 2.0
_log = logging.getLogger(__name__)


class _Worker:
    """One worker process and its two pipes."""

    def __init__(self, setup: dict, memory: int):
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        request_end, self.requests = os.pipe()
        self.answers, answer_end = os.pipe()
        # the child inherits the mask, so no signal can end it before it has learnt to ignore them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bd3lm_scale.data.worker", json.dumps(setup)],
                stdin=request_end,
                stdout=answer_end,
                env=environment,
                pass_fds=(memory,),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(request_end)
            os.close(answer_end)
        self._unfinished = b""

    def send(self, message: dict) -> bool:
        """Whether the worker was there to take it."""
        view = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while view:
                view = view[os.write(self.requests, view) :]
        except BrokenPipeError:
            return False
        return True

    def receive(self) -> list[dict] | None:
        """Block for answers of the worker; None when it has ended."""
        waiting = select.poll()  # not select.select: it takes no descriptor beyond 1023
        waiting.register(self.answers, select.POLLIN)
        waiting.poll()
        data = os.read(self.answers, 1 << 16)
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def close(self) -> int:
        """End the process, which does so by itself when its input closes; its exit status."""
        if self.requests >= 0:
            os.close(self.requests)
            self.requests = -1
        try:
            self.process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        if self.answers >= 0:
            os.close(self.answers)
            self.answers = -1
        return self.process.wait()


class WorkerPool:
    """Worker processes, the requests under way, and the memory they answer in.

    Step s belongs to worker s mod W, which works through its requests in order, so a slot that is asked for
    again after a seek is written last by the request that is wanted.

    Args:
        source: what the workers read; each opens its own.
        num_rows: rows per step.
        workers: processes.
        prefetch_steps: steps that can be under way (rounded up to a multiple of `workers`: `depth`).
    """

    def __init__(self, source: Source, num_rows: int, workers: int, prefetch_steps: int):
        self.depth = -(-prefetch_steps // workers) * workers
        self._source = source
        self._generation = 0
        self._under_way: dict[int, dict] = {}  # step -> request
        self._answers: dict[int, dict] = {}
        self._restarts = 0
        shape = (self.depth, max(1, num_rows), source.config.context_length)
        # a file in memory that has no name and vanishes with its last user
        self._memory = os.memfd_create("bd3lm_batches")
        os.ftruncate(self._memory, int(np.prod(shape)) * source.dtype.itemsize)
        self._slots = np.frombuffer(mmap.mmap(self._memory, 0), source.dtype).reshape(shape)
        self._workers = [self._start() for _ in range(workers)]

    def request(self, step: int, index: Callable[[int], np.ndarray], origin: int, excluded: tuple[str, ...]) -> None:
        """Ask for a step unless that was done.

        Args:
            step: at most `depth` steps may be asked for and not taken.
            index: gives the step's sample indices.
            origin: sample index the reader began at.
            excluded: shards to go without.
        """
        if step in self._under_way or step in self._answers:
            return
        self._under_way[step] = {
            "step": step,
            "slot": step % self.depth,
            "generation": self._generation,
            "origin": origin,
            "index": index(step).tolist(),
            "excluded": list(excluded),
        }
        number = step % len(self._workers)
        if not self._workers[number].send(self._under_way[step]):
            self._replace(number)

    def take(self, step: int) -> np.ndarray:
        """Wait for a requested step; its rows (n, L) are valid until the next request.

        Raises:
            BadShardError: a shard is unreadable.
            RuntimeError: anything else that went wrong in a worker. After either, nothing is under way.
        """
        number = step % len(self._workers)
        while step not in self._answers:
            answers = self._workers[number].receive()
            if answers is None:
                self._replace(number)
                continue
            for answer in answers:
                if answer["generation"] == self._generation:
                    del self._under_way[answer["step"]]
                    self._answers[answer["step"]] = answer
                    self._restarts = 0  # workers that live are not the ones that cannot
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
        """End the workers. Called twice does no harm."""
        for worker in self._workers:
            worker.close()
        self._workers = []
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _start(self) -> _Worker:
        setup = {
            "config": dataclasses.asdict(self._source.config),
            "seed": self._source.seed,
            "split": self._source.split,
            "excluded": list(self._source.excluded),
            "block_size": self._source.block_size,
            "memory": self._memory,
            "shape": self._slots.shape,
            "dtype": self._slots.dtype.str,
            "parent": os.getpid(),
        }
        return _Worker(setup, self._memory)

    def _replace(self, number: int) -> None:
        """Start a dead worker anew with the same requests: rows are pure functions, so nothing is lost."""
        status = self._workers[number].close()
        self._restarts += 1
        if self._restarts > _MAX_RESTARTS:
            raise RuntimeError(
                f"data worker {number} ended again with status {status} (-9: killed, perhaps out of memory); "
                "see its messages above, or set data.workers=0 to read in the training process"
            )
        _log.warning("data worker %d ended with status %s; starting another", number, status)
        self._workers[number] = self._start()
        for step, request in self._under_way.items():
            if step % len(self._workers) == number:
                # if this one is gone too, the next `receive` notices
                self._workers[number].send(request)
