"""What the launcher does after the ranks ended: finish, start again, hand the nodes back, give up. Decisions only."""

import contextlib
import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path

from bd3lm_scale.runtime.exit_codes import NEVER_RETRIED, ExitCode
from bd3lm_scale.runtime.run_folder import label_of, read_json, runtime_folder, try_write_json
from bd3lm_scale.runtime.stop import BY_TIME_LIMIT, BY_USER

MAX_BACKOFF_SECONDS = 300.0
TAIL_BYTES = 65536


class Action(Enum):
    """What comes next."""

    END = "end"
    """The run is over, or a restart would not help: exit with the attempt's code."""
    RESTART = "restart"
    """Start the ranks again from the last checkpoint, in the same allocation."""
    REQUEUE = "requeue"
    """Give the nodes back and wait in the scheduler's queue for others."""
    GIVE_UP = "give up"
    """Failures repeat without progress."""


@dataclass(frozen=True)
class AttemptEnd:
    """How one attempt ended.

    Attributes:
        code: ExitCode, another process exit code, or -n for death by signal n.
        reason: one line for people.
        attempt: its label, start.attempt.
        step: the last step a heartbeat or a metric showed.
        blames_node: the machine is at fault rather than the program.
        by_user: a STOP file asks for the end, whatever the code.
    """

    code: int
    reason: str
    attempt: str = ""
    step: int = 0
    blames_node: bool = False
    by_user: bool = False

    def line(self) -> str:
        """`attempt 0.1  step 1042  exit 1 (failed)  rank 3 was killed by SIGKILL`."""
        return f"attempt {self.attempt}  step {self.step}  {describe_code(self.code)}  {self.reason}"


@dataclass(frozen=True)
class Limits:
    """Against crash loops.

    Attributes:
        max_failures: in a row without a new checkpoint; a lost node does not count, it cannot come again.
        max_requeues: in a row without a new checkpoint.
        backoff_seconds: pause before the second restart without a new checkpoint; doubles up to five minutes.
    """

    max_failures: int = 3
    max_requeues: int = 10
    backoff_seconds: float = 5.0


def decide(end: AttemptEnd, stop_asked: bool, can_requeue: bool) -> Action:
    """What to do after `end`; `stop_asked`: the launcher itself was told to stop (time limit, preemption)."""
    give_way = Action.REQUEUE if can_requeue else Action.END
    if end.code in (ExitCode.FINISHED, ExitCode.FENCED) or end.code in NEVER_RETRIED:
        return Action.END
    if end.by_user or end.reason == BY_USER or (end.code == ExitCode.STOPPED and end.reason == BY_TIME_LIMIT):
        return Action.END
    if end.code == ExitCode.STOPPED or stop_asked:
        return give_way
    return Action.RESTART


class History:
    """Failures and requeues since the last new checkpoint, in runtime/failures.json so that requeues remember them.

    Attributes:
        under_way: the Slurm job whose first options (--fresh, --checkpoint) have taken effect.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = run_dir
        self.path = Path(run_dir) / "runtime" / "failures.json"
        found = read_json(self.path)
        self.checkpoint_step = _number(found.get("checkpoint_step"), -1)
        self.requeues = _number(found.get("requeues"), 0)
        self.under_way = str(found.get("under_way", ""))
        failures = found.get("failures")
        self.failures = [f for f in map(_failure, failures if isinstance(failures, list) else []) if f is not None]

    def note_under_way(self, job: str, went_back_to: int | None) -> None:
        """An attempt of this Slurm job got going, at `went_back_to` if it asked for that checkpoint.

        A requeued job goes on with the newest checkpoint instead, and one beyond that step is progress.
        """
        self.under_way = job
        if went_back_to is not None:
            self.checkpoint_step = min(self.checkpoint_step, went_back_to)
        self._write()

    def note_checkpoint(self, step: int) -> None:
        """Forget all failures when there is a checkpoint newer than any before."""
        if step > self.checkpoint_step:
            self.checkpoint_step, self.requeues, self.failures = step, 0, []
            self._write()

    def add_failure(self, end: AttemptEnd) -> int:
        """Remember it; how many failures in a row were not a node's fault."""
        self.failures.append(end)
        self._write()
        return sum(not failure.blames_node for failure in self.failures)

    def blame_node(self) -> None:
        """A node is found missing after the last failure: that explains it."""
        if self.failures:
            self.failures[-1] = replace(self.failures[-1], blames_node=True)
            self._write()

    def add_requeue(self) -> int:
        """Remember it; how many there are in a row."""
        self.requeues += 1
        self._write()
        return self.requeues

    def backoff(self, limits: Limits) -> float:
        """Seconds to wait before the next start: none after the first failure, then doubling."""
        repeated = len(self.failures) - 1
        return min(limits.backoff_seconds * 2.0 ** (repeated - 1), MAX_BACKOFF_SECONDS) if repeated > 0 else 0.0

    def diagnosis(self) -> str:
        """Why the launcher gives up, for the log."""
        since = f"beyond step {self.checkpoint_step}" if self.checkpoint_step >= 0 else "at all"
        lines = [f"{len(self.failures)} failures without a checkpoint {since}:"]
        lines += ["  " + failure.line() for failure in self.failures]
        steps = {failure.step for failure in self.failures}
        reasons = {failure.reason for failure in self.failures}
        if len(steps) == 1:
            lines.append(f"all at step {steps.pop()}: the program, its data or its settings rather than a machine")
        elif len(reasons) == 1:
            lines.append("always the same reason at different steps: a machine or its memory rather than the data")
        return "\n".join(lines)

    def _write(self) -> None:
        failures = [asdict(failure) for failure in self.failures[-20:]]
        value = {"checkpoint_step": self.checkpoint_step, "requeues": self.requeues, "failures": failures}
        with contextlib.suppress(OSError):  # try_write_json says so
            runtime_folder(self.run_dir)
        try_write_json(self.path, {**value, "under_way": self.under_way})


def _number(value: object, default: int) -> int:
    return value if isinstance(value, int) else default


def _failure(found: object) -> AttemptEnd | None:
    """A failure as it was written; None for anything else."""
    if not isinstance(found, dict):
        return None
    known = {field.name for field in fields(AttemptEnd)}
    kept = {name: value for name, value in found.items() if name in known}
    if not isinstance(kept.get("code"), int) or not isinstance(kept.get("reason"), str):
        return None
    return AttemptEnd(**kept)


def newest_checkpoint_step(run_dir: str | Path) -> int:
    """Step of the newest committed checkpoint, -1 if there is none: the only progress that counts."""
    manifests = Path(run_dir).glob("checkpoints/step_*/manifest.json")
    steps = [manifest.parent.name.removeprefix("step_") for manifest in manifests]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def last_logged_step(run_dir: str | Path, attempt: str) -> int:
    """The last training step that `attempt` logged, from the end of metrics.jsonl; 0 if there is none."""
    path = Path(run_dir) / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "train" and row.get("attempt") == label_of(attempt):
            return int(row["step"])
    return 0


def choose_nodes(
    available: Sequence[str], ranks_per_node: int, model_parallel_size: int, min_nodes: int, max_nodes: int | None
) -> list[str]:
    """As many of the nodes as the layout can use: whole model replicas, between min and max; empty when too few."""
    most = min(len(available), max_nodes or len(available))
    for count in range(most, max(min_nodes, 1) - 1, -1):
        if (count * ranks_per_node) % model_parallel_size == 0:
            return list(available[:count])
    return []


def describe_code(code: int) -> str:
    """`exit 87 (hang)`, `killed by SIGKILL`."""
    number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    if number in set(signal.Signals):
        return f"killed by {signal.Signals(number).name}"
    name = f" ({ExitCode(code).name.lower().replace('_', ' ')})" if code in set(ExitCode) else ""
    return f"exit {code}{name}"
