"""Ranks as child processes of the launcher: one machine, no scheduler."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bd3lm_scale.launcher.policy import describe_code
from bd3lm_scale.runtime.run_folder import ATTEMPT_VARIABLE, node_name

PR_SET_PDEATHSIG = 1
# Read when a rank starts CUDA: the order of kernels and messages (Megatron), and memory without fragments.
BEFORE_CUDA = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@dataclass(frozen=True)
class RanksExit:
    """All ranks are gone: the first bad exit code (0 when there was none) and who it was."""

    code: int
    who: str


class Ranks(Protocol):
    """Something that starts one process per rank and tells when they are gone."""

    can_requeue: bool
    """Whether a scheduler will run this launcher again after `requeue`."""

    def usable_nodes(self) -> list[str] | None:
        """Names of the machines that answer now; None when the scheduler cannot tell: ask again later."""
        ...

    def start(self, attempt: str, nodes: Sequence[str], command: Sequence[str]) -> None:
        """Start ranks_per_node processes on each node."""
        ...

    def poll(self) -> RanksExit | None:
        """None while any rank runs."""
        ...

    def kill(self) -> None:
        """End every rank now."""
        ...

    def requeue(self, is_owner: Callable[[], bool]) -> int:
        """Give the machines back, while `is_owner`; the exit code if the scheduler lets the launcher live to use it."""
        ...

    def dismiss(self, code: int) -> None:
        """The run is over with this exit code."""
        ...


class LocalRanks:
    """`ranks_per_node` processes on this machine."""

    can_requeue = False

    def __init__(self, ranks_per_node: int, grace_seconds: float = 15.0) -> None:
        self.ranks_per_node = ranks_per_node
        self.grace_seconds = grace_seconds
        self._processes: list[subprocess.Popen] = []
        self._first_rank = 0
        self._first_bad: RanksExit | None = None
        self._kill_at: float | None = None

    def usable_nodes(self) -> list[str] | None:
        """This machine."""
        return [node_name()]

    def start(self, attempt: str, nodes: Sequence[str], command: Sequence[str]) -> None:
        """Start the processes."""
        self.start_part(attempt, command, 0, len(nodes) * self.ranks_per_node, "127.0.0.1", free_port())

    def start_part(
        self, attempt: str, command: Sequence[str], first_rank: int, world_size: int, address: str, port: int
    ) -> None:
        """Start this machine's part of `world_size` ranks that meet at address:port.

        They die with the launcher, and no terminal signal reaches them past it.
        """
        self._first_bad = self._kill_at = None
        job = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        job |= {ATTEMPT_VARIABLE: attempt, "LOCAL_WORLD_SIZE": str(self.ranks_per_node)}
        self._processes = []
        self._first_rank = first_rank
        for local_rank in range(self.ranks_per_node):
            position = {"RANK": str(first_rank + local_rank), "LOCAL_RANK": str(local_rank)}
            process = subprocess.Popen(
                list(command),
                env=BEFORE_CUDA | os.environ | job | position,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            self._processes.append(process)

    def poll(self) -> RanksExit | None:
        """After the first bad exit the others get `grace_seconds` to notice and to log, then they are killed."""
        codes = [process.poll() for process in self._processes]
        bad = [(rank, code) for rank, code in enumerate(codes, start=self._first_rank) if code]
        if bad and self._first_bad is None:
            rank, code = bad[0]
            self._first_bad = RanksExit(code, f"rank {rank}: {describe_code(code)}")
            self.end_after_grace()
        if any(code is None for code in codes):
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self.kill()
            return None
        return self._first_bad or RanksExit(0, "")

    def end_after_grace(self) -> None:
        """A rank ended elsewhere: give these ranks `grace_seconds` to notice."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self.grace_seconds

    def kill(self) -> None:
        """SIGKILL to each rank and what it started."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def requeue(self, is_owner: Callable[[], bool]) -> int:
        """There is no queue here."""
        raise RuntimeError("no scheduler to requeue with")

    def dismiss(self, code: int) -> None:
        """Nothing to do: no other launcher waits for this one."""


def die_with_parent() -> None:
    """In a child before exec: let the kernel end it when the launcher dies, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
