"""Who slows the others down: the spread of step times over ranks and nodes."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bd3lm_scale.config.schema import RuntimeConfig
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import node_name

log = get_logger(__name__)

MIN_LAG_SECONDS = 0.02  # below this a difference is noise, whatever its ratio


@dataclass(frozen=True)
class StepSpread:
    """How evenly the work of the last steps was spread.

    Attributes:
        median_seconds: the usual rank's own work per step.
        slowest_seconds: the slowest rank's.
        slowest_rank, slowest_node: who that is.
        slow_ranks: ranks above straggler_factor times the median, slowest first.
        slow_nodes: nodes whose median rank is above it: the machine, not one of its processes.
    """

    median_seconds: float
    slowest_seconds: float
    slowest_rank: int
    slowest_node: str
    slow_ranks: tuple[int, ...]
    slow_nodes: tuple[str, ...]

    def message(self) -> str:
        """One line for the log."""
        ratio = self.slowest_seconds / self.median_seconds if self.median_seconds else float("inf")
        who = f"node {', '.join(self.slow_nodes)}" if self.slow_nodes else f"rank {self.slowest_rank}"
        return (
            f"straggler: {who} ({self.slowest_node}) needs {self.slowest_seconds:.3f} s per step for its own work, "
            f"{ratio:.1f} times the median {self.median_seconds:.3f} s"
        )


def find_stragglers(seconds: Sequence[float], nodes: Sequence[str], factor: float) -> StepSpread:
    """Judge the own-work times of all ranks (index = rank) against `factor` times their median."""
    usual = median(seconds)
    order = sorted(range(len(seconds)), key=lambda rank: -seconds[rank])
    by_node: dict[str, list[float]] = {}
    for node, value in zip(nodes, seconds, strict=True):
        by_node.setdefault(node, []).append(value)
    limit = max(factor * usual, usual + MIN_LAG_SECONDS)
    slow_nodes = tuple(node for node, values in by_node.items() if median(values) > limit and len(by_node) > 1)
    return StepSpread(
        median_seconds=usual,
        slowest_seconds=seconds[order[0]],
        slowest_rank=order[0],
        slowest_node=nodes[order[0]],
        slow_ranks=tuple(rank for rank in order if seconds[rank] > limit),
        slow_nodes=slow_nodes,
    )


class OwnWork:
    """Median over the last steps of the time from the start of a step until this rank begins to wait for the others.

    Whole steps take equally long everywhere, because everyone waits for the slowest; what a rank does before it
    waits is what tells them apart. Call `start` at the step's beginning and `waiting` before its last collective.
    """

    def __init__(self, window: int = 20) -> None:
        self._times: deque[float] = deque(maxlen=window)
        self._started = time.perf_counter()

    def start(self) -> None:
        """The step begins."""
        self._started = time.perf_counter()

    def waiting(self) -> None:
        """Own work is done; from here on this rank waits."""
        self._times.append(time.perf_counter() - self._started)

    @property
    def seconds(self) -> float:
        """The median; 0 before the first step."""
        return median(self._times) if self._times else 0.0


class StragglerWatch:
    """Compares all ranks every `every_steps` steps and names who slows the run down.

    Around each step: `start`, then `waiting` when own work is done, then `look`, which is collective.
    """

    def __init__(self, config: RuntimeConfig, agreement: Agreement, every_steps: int = 100) -> None:
        self.factor = config.straggler_factor
        self.agreement = agreement
        self.every_steps = every_steps
        self.own_work = OwnWork()
        self.start = self.own_work.start
        self.waiting = self.own_work.waiting
        self._nodes = agreement.exchange(node_name())

    def look(self, step: int) -> StepSpread | None:
        """The spread, when it is time for it; a straggler is a warning in the log of rank 0."""
        if self.agreement.world_size == 1 or step % self.every_steps or self.own_work.seconds == 0.0:
            return None
        spread = find_stragglers(self.agreement.exchange(self.own_work.seconds), self._nodes, self.factor)
        if spread.slow_ranks and self.agreement.rank == 0:
            log.warning("step %d: %s", step, spread.message())
        return spread
