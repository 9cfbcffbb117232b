"""The small files by which a run's processes, its launcher and its user communicate; all below run_dir/runtime.

    lock.N            who owns the run folder, and which of its attempts may write (runtime/lock.py)
    status.json       how an attempt ended, by its rank 0: code, reason, step
    stop_request.json the launcher asks one attempt to save and stop
    hang.json         the suspect of a hang, by the first rank that notices
    heartbeat/        one file per rank
    stacks/           stack dumps of hung ranks
    preflight.json    the table of nodes and the bad ones
    failures.json     the launcher's memory across requeues

run_dir/STOP is the user's: it asks the run to save and end.

Every attempt has a name that no other attempt of any start has: `start.attempt-random`, as 3.1-9f2c41d0a5b6. A file
that carries another name was written by another attempt and says nothing about this one. People, metrics.jsonl and
fault conditions use its first part, the label `3.1`: the fourth start in this run folder, its second attempt.
"""

import json
import os
import socket
import stat
from pathlib import Path

from bd3lm_scale.config.environment import number_from_environment
from bd3lm_scale.runtime.durable import make_folder, write_file
from bd3lm_scale.runtime.log import get_logger

log = get_logger(__name__)

ATTEMPT_VARIABLE = "BD3LM_ATTEMPT"


def current_rank() -> int:
    """The rank of this process from torchrun's or srun's environment; 0 when alone."""
    return number_from_environment("RANK", "SLURM_PROCID") or 0


def current_attempt() -> str:
    """The attempt that the launcher started this process for; "0.0" when alone, where the lock names the attempt."""
    return os.environ.get(ATTEMPT_VARIABLE) or "0.0"


def label_of(attempt: str) -> str:
    """`start.attempt` of an attempt's name, for people."""
    return attempt.partition("-")[0]


def node_name() -> str:
    """This machine's name as the scheduler knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def has_launcher() -> bool:
    """Whether a launcher started this process and will look after it."""
    return bool(os.environ.get(ATTEMPT_VARIABLE))


def runtime_folder(run_dir: str | Path) -> Path:
    """run_dir/runtime, made if needed."""
    return make_folder(Path(run_dir) / "runtime")


def write_json(path: Path, value: object) -> None:
    """Replace `path` in one step, durably: a reader sees the old file or the new one, also after a power cut."""
    write_file(path, json.dumps(value) + "\n")


def try_write_json(path: Path, value: object) -> bool:
    """write_json where a full or absent disk is no reason to end a run: False, and a warning, when it failed."""
    try:
        write_json(path, value)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)
        return False
    return True


def read_json(path: Path) -> dict:
    """The object in `path`; empty when there is no such regular file or it is damaged (its writer may have died)."""
    try:
        # O_NONBLOCK: opening a pipe that lies there must not wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return {}
            value = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_status(run_dir: str | Path, code: int, reason: str, step: int, attempt: str | None = None) -> None:
    """Say how this attempt ends (rank 0, just before it exits): srun's own exit code cannot be relied on."""
    status = {"attempt": attempt or current_attempt(), "code": int(code), "reason": reason, "step": step}
    write_json(runtime_folder(run_dir) / "status.json", status)


def read_status(run_dir: str | Path, attempt: str) -> dict:
    """The status that `attempt` wrote, or an empty dict: another attempt's does not count."""
    status = read_json(Path(run_dir) / "runtime" / "status.json")
    return status if status.get("attempt") == attempt and isinstance(status.get("code"), int) else {}
