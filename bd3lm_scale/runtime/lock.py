"""One owner per run folder: who may write in it, and which attempt of his.

The owner is the launcher, or rank 0 of a run without one. It holds run_dir/runtime/lock.N with the highest N, made by
a hard link (atomic, also on NFS) to a file that already says who holds it, and touches it every few seconds. N is the
number of the start: taking over, or starting after the last owner has released, means creating lock.N+1, which only
one of several contenders can. A start that is refused creates nothing and changes nothing.

The file also names the attempt that may write. Ranks that live on although their launcher has started others, or
although another start owns the folder, find another name there: they are fenced, and commit nothing.

Whether an owner lives is known at once on the same machine (its process) and for an earlier incarnation of the same
Slurm job (Slurm ended it, or lost it with its node); otherwise its heartbeat is watched, with this machine's clock.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bd3lm_scale.config.environment import number_from_environment
from bd3lm_scale.errors import ConfigError, FencedError, RunInUseError
from bd3lm_scale.runtime.durable import TEMPORARY, remove_leftovers, sync_folder, write_file
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import (
    current_attempt,
    has_launcher,
    label_of,
    node_name,
    read_json,
    runtime_folder,
)

if TYPE_CHECKING:  # the launcher takes locks where there is no torch
    from bd3lm_scale.parallel.agreement import Agreement

log = get_logger(__name__)

LOCK_FILE = re.compile(r"lock\.(\d+)")
START_TICKS_FIELD = 22
DEAD_STATES = ("Z", "X", "x")
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors after which trying again will not make the folder writable."""
BEFORE_ONE_FILE = ("launcher.json", "attempt.json")
"""What named the owner in older versions."""


class RunLock:
    """The right to write in a run folder.

    Attributes:
        run_dir: the run folder.
        attempt: the name of the attempt that may write; empty before the lock is held.
        taken_from: the dead owner it was taken over from; empty when there was none.
    """

    def __init__(self, run_dir: str | Path, heartbeat_seconds: float = 5.0, stale_seconds: float = 45.0) -> None:
        """Args: stale_seconds is how long an owner on another machine must show no sign of life to count as dead."""
        self.run_dir = Path(run_dir)
        self.heartbeat_seconds = heartbeat_seconds
        self.stale_seconds = stale_seconds
        self.attempt = self.taken_from = ""
        self._path: Path | None = None
        self._closing = threading.Event()
        self._attempts = 0
        self._start = secrets.token_hex(6)
        self._me = {
            "host": socket.gethostname(),
            "node": node_name(),
            "machine": _machine(),
            "pid": os.getpid(),
            "ticks": start_ticks(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID") or None,
            "restarts": number_from_environment("SLURM_RESTART_COUNT") or 0,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    def acquire(self) -> "RunLock":
        """Take the lock; waits up to stale_seconds where an owner on another machine may be dead.

        Raises:
            RunInUseError: a live job holds it.
            FencedError: a later incarnation of this very Slurm job holds it.
            ConfigError: the run folder cannot be written here; OSError: not now (a full disk).
        """
        try:
            folder = runtime_folder(self.run_dir)
            while self._path is None:
                newest = _newest(folder)
                if newest is not None:
                    self._wait_until_free(newest[1])
                self._path = self._link(folder, newest[0] + 1 if newest else _first_number(folder))
            self._remove_what_others_left(folder)
        except OSError as error:
            if error.errno in NO_RIGHT:
                problem = f"run_dir ({self.run_dir}): cannot be written: {error}; use another run_dir, or its owner's"
                raise ConfigError([problem]) from error
            raise
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()
        return self

    def join(self, attempt: str) -> "RunLock":
        """Write by the right of the launcher, which holds the lock and started this process for `attempt`."""
        self.attempt = attempt
        return self

    def begin_attempt(self) -> str:
        """Name the next attempt of this start (launcher); from now on no other may write."""
        assert self._path is not None, "only the owner begins attempts"
        start = label_of(self.attempt).partition(".")[0]
        self.attempt = f"{start}.{self._attempts}-{self._start}"
        self._attempts += 1
        try:
            self._write(self.attempt)
        except OSError as error:
            # ranks of a later attempt than the file names are not fenced, see _is_superseded
            log.warning("%s cannot be written (%s); going on", self._path, error)
        return self.attempt

    def is_held(self) -> bool:
        """False before acquire, after release, and when another start or a later attempt has taken over."""
        return bool(self.attempt) and not _is_superseded(self.run_dir / "runtime", self.attempt)

    def release(self) -> None:
        """Give the lock back; harmless when it is not held, and for a process that has joined."""
        self._closing.set()
        if self._path is not None:
            with contextlib.suppress(OSError):  # a full disk: the next start finds the process gone
                if self.is_held():
                    self._write(self.attempt, has_ended=True)
                else:
                    self._path.unlink(missing_ok=True)
        self._path, self.attempt = None, ""

    def __enter__(self) -> "RunLock":
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _link(self, folder: Path, number: int) -> Path | None:
        """The lock file of this number, now ours; None where another contender was faster."""
        path = folder / f"lock.{number}"
        attempt = f"{number}.0-{self._start}"
        mine = folder / f".lock.{self._start}{TEMPORARY}"
        try:
            write_file(mine, json.dumps({**self._me, "attempt": attempt}) + "\n")
            os.link(mine, path)
        except (FileExistsError, FileNotFoundError):  # not found: the new owner has cleared `mine` away
            return None
        finally:
            mine.unlink(missing_ok=True)
        if _newest(folder) != (number, path):  # this process was suspended while others took the lock and gave it back
            path.unlink(missing_ok=True)
            return None
        self.attempt = attempt
        return path

    def _remove_what_others_left(self, folder: Path) -> None:
        for _, old in _all(folder):
            if old != self._path:
                old.unlink(missing_ok=True)
        for name in BEFORE_ONE_FILE:
            (folder / name).unlink(missing_ok=True)
        for written in (folder, folder / "machines"):
            remove_leftovers(written)
        for told in folder.glob("stacks/told_*"):
            told.unlink(missing_ok=True)
        sync_folder(folder)

    def _write(self, attempt: str, has_ended: bool = False) -> None:
        assert self._path is not None
        write_file(self._path, json.dumps({**self._me, "attempt": attempt, "has_ended": has_ended}) + "\n")

    def _beat(self) -> None:
        while not self._closing.wait(self.heartbeat_seconds):
            path = self._path
            # a missing file means that another job has taken over; is_held() tells who asks
            with contextlib.suppress(OSError):
                if path is not None:
                    os.utime(path)

    def _wait_until_free(self, path: Path) -> None:
        """Return when the owner is dead or gone; RunInUseError when it lives, FencedError when it replaced us."""
        owner, first = read_json(path), _touched(path)
        if first is None or owner.get("has_ended"):
            return
        who = f"process {owner.get('pid')} on {owner.get('host')}"
        in_use = (
            f"{self.run_dir} is in use by {who} since {owner.get('since')}; stop that job first, or use another run_dir"
        )
        if self._me["job"] is not None and owner.get("job") == self._me["job"] and owner.get("restarts") is not None:
            # the job itself, before or after Slurm requeued it: the later incarnation is right
            if owner["restarts"] > self._me["restarts"]:
                raise FencedError(f"job {self._me['job']} has been started again elsewhere and owns {self.run_dir}")
            if owner["restarts"] < self._me["restarts"]:
                self.taken_from = f"{who}, an earlier start of this job"
                return
        if owner.get("machine") == self._me["machine"] and owner.get("ticks") is not None:
            if is_alive(owner):
                raise RunInUseError(in_use)
        else:
            log.warning("%s holds %s; watching its heartbeat for %.0f s", who, self.run_dir, self.stale_seconds)
            deadline = time.monotonic() + self.stale_seconds
            while time.monotonic() < deadline:
                time.sleep(min(1.0, self.heartbeat_seconds))
                if (now := _touched(path)) != first:
                    if now is None or read_json(path).get("has_ended"):
                        return
                    raise RunInUseError(in_use)
        self.taken_from = f"{who}, which is dead"


def lock_run(run_dir: str | Path, agreement: "Agreement", heartbeat_seconds: float = 5.0) -> RunLock:
    """Rank 0 takes the run's lock, or checks that its launcher still holds it. Collective; every rank learns the name
    of the attempt.

    Raises:
        RunInUseError: on every rank: a live job holds the lock.
        FencedError: on every rank: a newer start or attempt has taken over from the launcher that started these ranks.
        ConfigError: on every rank: the run folder cannot be written.
    """
    lock = RunLock(run_dir, heartbeat_seconds)
    answer = {}
    if agreement.rank == 0:
        try:
            if has_launcher():
                lock.join(current_attempt())
                if not lock.is_held():
                    raise FencedError(f"attempt {label_of(lock.attempt)} is over: a newer one owns {run_dir}")
            else:
                lock.acquire()
            remove_leftovers_of_ranks(lock.run_dir)
            answer = {"attempt": lock.attempt}
        except ConfigError as error:
            answer = {"problems": error.problems}
        except (RunInUseError, FencedError, OSError) as error:
            answer = {"kind": type(error).__name__, "text": str(error)}
    answer = agreement.share(answer)
    if "problems" in answer:
        raise ConfigError(answer["problems"], source="the run folder")
    if "text" in answer:
        kinds = {kind.__name__: kind for kind in (RunInUseError, FencedError)}
        raise kinds.get(answer["kind"], OSError)(answer["text"])
    lock.attempt = answer["attempt"]
    return lock


def remove_leftovers_of_ranks(run_dir: Path) -> None:
    """Remove what ranks that died left half-written, but nothing that the launcher may be writing just now."""
    remove_leftovers(run_dir)
    remove_leftovers(run_dir / "runtime", ("status.json", "hang.json", "preflight.json"))


def _is_superseded(folder: Path, attempt: str) -> bool:
    """Whether the lock names another start than that of `attempt`, or a later attempt of the same start.

    A folder that cannot be read, or holds no lock, has no other owner.
    """
    newest = _newest(folder)
    if newest is None:
        return False
    named = str(read_json(newest[1]).get("attempt", ""))
    mine, theirs = _parts(attempt), _parts(named)
    if theirs is None or mine is None:
        return mine is None or newest[0] > mine[0]
    if (mine[0], mine[2]) != (theirs[0], theirs[2]):
        return True
    return theirs[1] > mine[1]


def _parts(attempt: str) -> tuple[int, int, str] | None:
    """(start, attempt, random) of an attempt's name."""
    match = re.fullmatch(r"(\d+)\.(\d+)-(\w+)", attempt)
    return (int(match[1]), int(match[2]), match[3]) if match else None


def start_of(attempt: str) -> str:
    """What all attempts of one start have in common; empty for anything else."""
    parts = _parts(attempt)
    return "" if parts is None else f"{parts[0]}-{parts[2]}"


def owner_of(run_dir: str | Path) -> dict:
    """What the newest lock says about its holder (node, pid, attempt, ...) and `beat`, which changes while it lives."""
    newest = _newest(Path(run_dir) / "runtime")
    return {} if newest is None else {**read_json(newest[1]), "beat": [newest[0], _touched(newest[1])]}


def _first_number(folder: Path) -> int:
    """Number of the first start; older versions counted theirs in attempt.json."""
    before = str(read_json(folder / "attempt.json").get("attempt", ""))
    match = re.match(r"\d+", before)
    return int(match[0]) + 1 if match else 0


def _all(folder: Path) -> list[tuple[int, Path]]:
    try:
        found = [(LOCK_FILE.fullmatch(path.name), path) for path in folder.iterdir()]
    except OSError:
        return []
    return sorted((int(match[1]), path) for match, path in found if match)


def _newest(folder: Path) -> tuple[int, Path] | None:
    return next(reversed(_all(folder)), None)


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def is_alive(owner: dict) -> bool:
    """Whether the owner's process runs on this machine.

    Its start in ticks since boot tells it from a later process of the same number: unlike the time of day, that never
    moves when somebody sets the clock.
    """
    pid = owner.get("pid")
    return isinstance(pid, int) and start_ticks(pid) is not None and start_ticks(pid) == owner.get("ticks")


def start_ticks(pid: int) -> int | None:
    """When a process on this machine was started, in clock ticks since boot; None when it is dead.

    Where there is no /proc, 0 for every live process.
    """
    try:
        # the second field is the program's name in brackets, which may hold anything
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() else _live_without_proc(pid)
    return None if state in DEAD_STATES else int(fields[START_TICKS_FIELD - 4])


def _live_without_proc(pid: int) -> int | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0


def _machine() -> str:
    """This boot of this host as this process sees it: within one, process ids mean the same."""
    parts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if "ns" in path else Path(path).read_text().strip())
        except OSError:
            parts.append(socket.gethostname())
    return " ".join(parts)
