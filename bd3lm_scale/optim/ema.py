"""AdamW that also keeps an exponential moving average of the masters, beside Adam's moments.

Under ZeRO each rank updates the average of the partition it owns: no gathered copy, the same code at every stage.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STATE_KEYS = ("exp_avg", "exp_avg_sq", "ema")


def ema_decay_at(updates: int, decay: float) -> float:
    """Decay of update number `updates` (from 1): min(decay, (1 + n) / (10 + n)), the reference's warm-up."""
    return min(decay, (1 + updates) / (10 + updates))


class AdamWithEma(torch.optim.AdamW):
    """AdamW whose state holds `ema` too: ema <- ema + (1 - decay) (parameter - ema) after every update.

    Attributes:
        ema_decay: decay of the next update; set before each step.
        discard: asked before each partition is updated; where it answers True, a bool scalar on the device,
            parameters and state stay as they are. None: never.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ema_decay = 0.0
        self.discard: Callable[[], Tensor] | None = None

    def prepare(self, partition: Tensor) -> None:
        """Create the state of a partition now, so that it can be saved or filled before the first step."""
        self.state[partition] = {
            "step": torch.zeros((), dtype=torch.float32, device=partition.device),
            "exp_avg": torch.zeros_like(partition),
            "exp_avg_sq": torch.zeros_like(partition),
            "ema": partition.detach().clone(),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of the partitions in param_groups (DeepSpeed narrows them to one at a time)."""
        weight: Tensor | float = 1 - self.ema_decay
        if self.discard is not None:
            dropped = self.discard()
            self.found_inf = dropped.float()  # torch's own way to drop an update on the device; needs fused=True
            weight = torch.where(dropped, 0.0, weight)
        super().step(closure)
        for group in self.param_groups:
            for partition in group["params"]:
                torch.lerp(self.state[partition]["ema"], partition, weight, out=self.state[partition]["ema"])
