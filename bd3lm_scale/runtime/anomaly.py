"""What to do with a step whose loss or gradient is not finite, or whose loss jumps: a pure policy, equal on all ranks.

It sees only figures that are already global, so every rank comes to the same decision without communication.
"""

import math
import sys
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from bd3lm_scale.config.schema import RuntimeConfig

OK, SKIP, ROLLBACK, STOP = "ok", "skip", "rollback", "stop"
WINDOW_STEPS = 100
MIN_STEPS_FOR_MEDIAN = 20


class AnomalyPolicy:
    """Turns each step's (loss, grad_norm) into "ok", "skip", "rollback" or "stop" by runtime.on_nan.

    skip: leave out the update; more than `max_skips` in a row stop the run. rollback: return to the last checkpoint
    and move data_offset past the bad stretch; more than `max_rollbacks` of them without a good step beyond the bad
    one stop the run. A loss above `spike_factor` times its running median counts as an anomaly too; the median is
    over the last 100 good steps and judges nothing before 20 of them.

    Attributes:
        counts: events since the start of the run: "non_finite", "spike", "skip", "rollback".
        reason: why the last answer was not "ok"; empty otherwise.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self.counts = {"non_finite": 0, "spike": 0, "skip": 0, "rollback": 0}
        self.reason = ""
        self._losses: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._skips_in_a_row = 0
        self._rollbacks_in_a_row = 0
        self._bad_step = -1

    def observe(self, step: int, loss: float, grad_norm: float) -> str:
        """Judge a step whose update was dropped if the loss is above `loss_limit` or something is not finite."""
        self.reason = self.suspicion(loss, grad_norm)
        if not self.reason:
            self._losses.append(loss)
            self._skips_in_a_row = 0
            if step > self._bad_step:
                self._rollbacks_in_a_row = 0
            return OK
        self.counts["spike" if self.reason.startswith("spike") else "non_finite"] += 1
        self._bad_step = max(self._bad_step, step)
        if self.config.on_nan == ROLLBACK:
            self._rollbacks_in_a_row += 1
            return self._limit(ROLLBACK, self._rollbacks_in_a_row, self.config.max_rollbacks)
        if self.config.on_nan == SKIP:
            self._skips_in_a_row += 1
            return self._limit(SKIP, self._skips_in_a_row, self.config.max_skips)
        return STOP

    def state(self) -> dict[str, Any]:
        """JSON-able memory for the checkpoint: without it a resumed run would judge spikes differently."""
        return {"losses": list(self._losses), "counts": dict(self.counts), "skips_in_a_row": self._skips_in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the memory saved with a checkpoint.

        Counts never go back: a rollback restores an older checkpoint and must not forget that it happened.
        """
        self._losses = deque(state.get("losses", ()), maxlen=WINDOW_STEPS)
        self._skips_in_a_row = int(state.get("skips_in_a_row", 0))
        for name, count in state.get("counts", {}).items():
            self.counts[name] = max(self.counts.get(name, 0), int(count))

    def loss_limit(self) -> float:
        """A loss above this is a spike: a multiple of the running median, once there is one."""
        factor = self.config.spike_factor
        if factor is None or len(self._losses) < MIN_STEPS_FOR_MEDIAN:
            return sys.float_info.max
        return factor * median(self._losses)

    def suspicion(self, loss: float, grad_norm: float = 0.0) -> str:
        """What is wrong with these figures, in words; empty when nothing is. Changes no memory."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if loss > self.loss_limit():
            usual = median(self._losses)
            return f"spike: loss {loss:.4f} is above {self.config.spike_factor:g} times its median {usual:.4f}"
        return ""

    def _limit(self, action: str, times: int, limit: int) -> str:
        if times > limit:
            self.reason += f"; {limit} times in a row is the limit (runtime.max_{action}s)"
            return STOP
        self.counts[action] += 1
        return action
