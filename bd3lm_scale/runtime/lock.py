"""One job per run folder: a second one refuses, a dead one's lock is taken over.

The lock is the file run_dir/runtime/lock.N with the highest N, made by a hard link (atomic, also on NFS) to a file
that already says who holds it; the holder touches it every few seconds. Taking over means creating lock.N+1, which
only one of several contenders can. Whether a holder lives is known at once on the same host (its process) and for an
earlier incarnation of the same Slurm job (Slurm ended it); otherwise its heartbeat is watched, with this host's clock.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from pathlib import Path

import psutil
import torch.distributed as dist

from bd3lm_scale.errors import RunInUseError
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import current_attempt, read_json, runtime_folder

log = get_logger(__name__)

LOCK_FILE = re.compile(r"lock\.(\d+)")


class RunLock:
    """The right to write in a run folder, held by one process (rank 0) of a job."""

    def __init__(self, run_dir: str | Path, heartbeat_seconds: float = 5.0, stale_seconds: float = 45.0) -> None:
        """Args: stale_seconds is how long a holder on another host must show no sign of life to count as dead."""
        self.run_dir = Path(run_dir)
        self.heartbeat_seconds = heartbeat_seconds
        self.stale_seconds = stale_seconds
        self._path: Path | None = None
        self._closing = threading.Event()
        self._me = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "attempt": current_attempt(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    def acquire(self) -> "RunLock":
        """Take the lock; waits up to stale_seconds where a holder on another host may be dead.

        Raises:
            RunInUseError: a live job holds it.
        """
        folder = runtime_folder(self.run_dir)
        mine = folder / f".lock_{self._me['host']}_{os.getpid()}_{time.time_ns()}"
        mine.write_text(json.dumps(self._me) + "\n")
        try:
            while True:
                held = _newest(folder)
                if held is not None:
                    self._wait_for_death(held[1])
                path = folder / f"lock.{held[0] + 1 if held else 0}"
                try:
                    os.link(mine, path)
                except FileExistsError:
                    continue  # another contender was faster: look at it
                break
        finally:
            mine.unlink()
        self._path = path
        for _, old in _all(folder):
            if old != path:
                old.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()
        return self

    def is_held(self) -> bool:
        """False before acquire, after release, and when another job has taken over (this one was frozen)."""
        newest = _newest(self.run_dir / "runtime")
        return self._path is not None and newest is not None and newest[1] == self._path

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        self._closing.set()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def __enter__(self) -> "RunLock":
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        path = self._path
        while path is not None and not self._closing.wait(self.heartbeat_seconds):
            # a missing file means that another job has taken over; is_held() tells the store
            with contextlib.suppress(OSError):
                os.utime(path)

    def _wait_for_death(self, path: Path) -> None:
        """Return when the holder is dead; RunInUseError when it lives."""
        holder = read_json(path)
        in_use = (
            f"{self.run_dir} is in use by process {holder.get('pid')} on {holder.get('host')} "
            f"since {holder.get('since')}; stop that job first, or use another run_dir"
        )
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        # Slurm ends a job's processes before it requeues the job
        ended = holder.get("job") == self._me["job"] is not None and holder.get("attempt") != self._me["attempt"]
        if holder.get("machine") == self._me["machine"]:
            if _is_alive(holder):
                raise RunInUseError(in_use)
        elif not ended:
            log.warning("%s holds %s; watching its heartbeat for %.0f s", who, self.run_dir, self.stale_seconds)
            first, deadline = _touched(path), time.monotonic() + self.stale_seconds
            while time.monotonic() < deadline:
                if _touched(path) != first:
                    if path.exists():
                        raise RunInUseError(in_use)
                    return
                time.sleep(min(1.0, self.heartbeat_seconds))
        log.warning("taking over the run folder from %s, which is dead", who)


def lock_run(
    run_dir: str | Path, rank: int, world_size: int, group: dist.ProcessGroup | None, heartbeat_seconds: float = 5.0
) -> RunLock:
    """Lock the run folder for a job: rank 0 takes the lock, RunInUseError is raised on every rank. Collective."""
    lock = RunLock(run_dir, heartbeat_seconds)
    problem = None
    if rank == 0:
        try:
            lock.acquire()
        except (RunInUseError, OSError) as error:
            problem = str(error)
    problem = Agreement(rank, world_size, group).share(problem)
    if problem is not None:
        raise RunInUseError(problem)
    return lock


def _all(folder: Path) -> list[tuple[int, Path]]:
    found = [(LOCK_FILE.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), path) for match, path in found if match)


def _newest(folder: Path) -> tuple[int, Path] | None:
    return next(reversed(_all(folder)), None)


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _is_alive(holder: dict) -> bool:
    """Whether the holder's process runs on this machine; its start time tells it from a later one of the same pid."""
    try:
        process = psutil.Process(int(holder["pid"]))
        same = abs(process.create_time() - float(holder["started"])) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _machine() -> str:
    """This boot of this host as this process sees it: within one, process ids mean the same."""
    parts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if "ns" in path else Path(path).read_text().strip())
        except OSError:
            parts.append(socket.gethostname())
    return " ".join(parts)
