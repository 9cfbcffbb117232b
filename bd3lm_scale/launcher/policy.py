"""What the launcher does after the ranks ended: finish, start again, hand the nodes back, give up. Decisions only."""

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path

from bd3lm_scale.runtime.exit_codes import NEVER_RETRIED, ExitCode
from bd3lm_scale.runtime.run_folder import read_json, runtime_folder, write_json
from bd3lm_scale.runtime.stop import BY_TIME_LIMIT, BY_USER

MAX_BACKOFF_SECONDS = 300.0
TAIL_BYTES = 65536


class Action(Enum):
    """What comes next."""

    END = "end"
    """The run is over, or a restart would not help: exit with the ending's code."""
    RESTART = "restart"
    """Start the ranks again from the last checkpoint, in the same allocation."""
    REQUEUE = "requeue"
    """Give the nodes back and wait in the scheduler's queue for others."""
    GIVE_UP = "give up"
    """It goes in circles."""


@dataclass(frozen=True)
class Ending:
    """How one attempt ended.

    Attributes:
        code: ExitCode, another process exit code, or -n for death by signal n.
        reason: one line for people.
        attempt: its token, restart.attempt.
        step: the last step a heartbeat spoke of.
        blames_node: the machine is at fault rather than the program.
    """

    code: int
    reason: str
    attempt: str = ""
    step: int = 0
    blames_node: bool = False

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


def decide(ending: Ending, stop_asked: bool, can_requeue: bool) -> Action:
    """What to do after `ending`; `stop_asked`: the launcher itself was told to stop (time limit, preemption)."""
    give_way = Action.REQUEUE if can_requeue else Action.END
    if ending.code in (ExitCode.FINISHED, ExitCode.FENCED) or ending.code in NEVER_RETRIED:
        return Action.END
    if ending.reason == BY_USER or (ending.code == ExitCode.STOPPED and ending.reason == BY_TIME_LIMIT):
        return Action.END
    if ending.code == ExitCode.STOPPED or stop_asked:
        return give_way
    return Action.RESTART


class History:
    """Failures and requeues since the last new checkpoint, in runtime/failures.json so that requeues remember them."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = runtime_folder(run_dir) / "failures.json"
        found = read_json(self.path)
        known = {field.name for field in fields(Ending)}
        self.checkpoint_step: int = found.get("checkpoint_step", -1)
        self.requeues: int = found.get("requeues", 0)
        self.failures = [Ending(**{k: v for k, v in f.items() if k in known}) for f in found.get("failures", [])]

    def note_checkpoint(self, step: int) -> None:
        """A checkpoint newer than any before wipes the slate clean."""
        if step > self.checkpoint_step:
            self.checkpoint_step, self.requeues, self.failures = step, 0, []
            self._write()

    def add_failure(self, ending: Ending) -> int:
        """Remember it; how many failures in a row were not a node's fault."""
        self.failures.append(ending)
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
        write_json(self.path, value)


def newest_checkpoint_step(run_dir: str | Path) -> int:
    """Step of the newest committed checkpoint, -1 if there is none: the only progress that counts."""
    manifests = Path(run_dir).glob("checkpoints/step_*/manifest.json")
    steps = [manifest.parent.name.removeprefix("step_") for manifest in manifests]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def last_logged_step(run_dir: str | Path, attempt: str) -> int:
    """The last training step that `attempt` logged, from the end of metrics.jsonl; 0 if there is none."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("kind") == "train" and row.get("attempt") == attempt:
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
