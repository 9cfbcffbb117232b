"""The small files by which a run's processes, its launcher and its user talk; all below run_dir/runtime.

    attempt.json      the attempt that may write here (the fence); written by the launcher before it starts ranks
    status.json       how the last attempt ended, by rank 0: code, reason, step
    stop_request.json the launcher asks one attempt to save and stop
    heartbeat/        one file per rank
    stacks/           stack dumps of hung ranks
    preflight.json    the table of nodes and the bad ones
    failures.json     the launcher's memory across requeues

run_dir/STOP is the user's: it asks the run to save and end.
"""

import json
import os
import socket
from pathlib import Path

ATTEMPT_VARIABLE = "BD3LM_ATTEMPT"


def current_rank() -> int:
    """The rank of this process from torchrun's or srun's environment; 0 when alone."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def current_attempt() -> str:
    """`restart.attempt` of this process: requeues so far, then starts within this allocation; "0.0" when alone."""
    return os.environ.get(ATTEMPT_VARIABLE, "0.0")


def node_name() -> str:
    """This machine's name as the scheduler knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def has_launcher() -> bool:
    """Whether a launcher started this process and will look after it."""
    return ATTEMPT_VARIABLE in os.environ


def runtime_folder(run_dir: str | Path) -> Path:
    """run_dir/runtime, made if needed."""
    folder = Path(run_dir) / "runtime"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, value: object) -> None:
    """Replace `path` in one step, so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """The object in `path`; empty when the file is missing or damaged (its writer may have died)."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_status(run_dir: str | Path, code: int, reason: str, step: int) -> None:
    """Say how this attempt ends (rank 0, just before it exits): srun's own exit code cannot be relied on."""
    status = {"attempt": current_attempt(), "code": int(code), "reason": reason, "step": step}
    write_json(runtime_folder(run_dir) / "status.json", status)


def read_status(run_dir: str | Path, attempt: str) -> dict:
    """The status that `attempt` wrote, or an empty dict: an older attempt's does not count."""
    status = read_json(Path(run_dir) / "runtime" / "status.json")
    return status if status.get("attempt") == attempt else {}


def claim_attempt(run_dir: str | Path, attempt: str) -> None:
    """Make `attempt` the only one that may write in this run folder (launcher)."""
    write_json(runtime_folder(run_dir) / "attempt.json", {"attempt": attempt})


def is_fenced(run_dir: str | Path) -> bool:
    """True when a newer attempt has taken over: leave with ExitCode.FENCED and touch nothing.

    Ranks on a node that lost its network live on after the run moved elsewhere. They ask this before they commit a
    checkpoint. A run without a launcher is never fenced.
    """
    owner = read_json(Path(run_dir) / "runtime" / "attempt.json").get("attempt")
    return has_launcher() and owner is not None and owner != current_attempt()
