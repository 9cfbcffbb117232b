"""Faults on order, for tests only: nothing here acts unless the environment variable BD3LM_FAULTS is set.

    BD3LM_FAULTS="kill@step=10:rank=1,hang@save:before_manifest:rank=0,nan@step=7"

Each fault is `action@point[:condition=value...]`. The second word is the name given to `point` ("step" when left out).
Conditions: `step`, `rank`, `attempt` (e.g. 0.0), `times` (at most so often in one process), `after` (seconds between
the point and the fault, which then happens in the middle of whatever runs), `seconds` (of slow). Actions: kill
(SIGKILL), hang (sleep for ever), freeze (SIGSTOP), term (SIGTERM), error (raise), slow (sleep once), nan (`point`
returns True: the caller spoils its figure).
"""

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from bd3lm_scale.runtime.run_folder import current_attempt, current_rank, label_of

VARIABLE = "BD3LM_FAULTS"
ACTIONS = ("kill", "hang", "freeze", "term", "error", "slow", "nan")
CONDITIONS = ("step", "rank", "attempt", "times", "after", "seconds")


class InjectedError(RuntimeError):
    """The error that the action `error` raises."""


@dataclass(frozen=True)
class Fault:
    """One fault: what happens, at which point, under which conditions."""

    action: str
    at: str
    conditions: dict[str, str] = field(default_factory=dict)

    def is_due(self, name: str, step: int | None) -> bool:
        """Whether this fault is due at the point `name` in `step` on this rank and attempt."""
        here = {"step": str(step), "rank": str(current_rank()), "attempt": label_of(current_attempt())}
        return self.at == name and all(self.conditions.get(key, value) == value for key, value in here.items())


def parse(text: str) -> tuple[Fault, ...]:
    """Read a list of faults; ValueError names the part that is wrong."""
    faults = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        action, _, rest = item.partition("@")
        words = rest.split(":") if rest else []
        conditions = dict(word.split("=", 1) for word in words if "=" in word)
        unknown = sorted(set(conditions) - set(CONDITIONS))
        if action not in ACTIONS or unknown:
            raise ValueError(f"{VARIABLE} ({item}): use {'|'.join(ACTIONS)}@point, conditions {CONDITIONS}")
        faults.append(Fault(action, ":".join(word for word in words if "=" not in word) or "step", conditions))
    return tuple(faults)


_last_step: int | None = None
_done: Counter[str] = Counter()


def point(name: str, step: int | None = None) -> bool:
    """A point at which a test may order a fault; True when the caller shall spoil its figure with a NaN.

    `step` is remembered, so that points inside a save need not know it.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return False
    global _last_step
    _last_step = _last_step if step is None else step
    due = [fault for fault in parse(text) if fault.is_due(name, _last_step)]
    due = [fault for fault in due if _done[repr(fault)] < float(fault.conditions.get("times", "inf"))]
    for fault in due:
        _done[repr(fault)] += 1
        _act(fault)
    return any(fault.action == "nan" for fault in due)


def _act(fault: Fault) -> None:
    after = float(fault.conditions.get("after", 0))
    if after:
        threading.Thread(target=lambda: (time.sleep(after), _carry_out(fault)), daemon=True).start()
    else:
        _carry_out(fault)


def _carry_out(fault: Fault) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"injected fault: {fault.action}@{fault.at} rank {current_rank()}\n".encode())
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif fault.action == "slow":
        time.sleep(float(fault.conditions.get("seconds", 1)))
    elif fault.action == "hang":
        while True:
            time.sleep(60)
    elif fault.action == "error":
        raise InjectedError(f"injected at {fault.at}")
