"""Ancestral sampling with T steps per block: t = 1, 1 - 1/T, ..., 1/T, 0; several tokens may be revealed at once.

The step from t to s reveals a masked token with probability (p(t) - p(s)) / p(t) and the last step, which
ends at s = 0, reveals all that is left, whatever the schedule's floor there.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from bd3lm_scale.diffusion.samplers.protocols import BlockDenoiser
from bd3lm_scale.diffusion.samplers.request import BlockTask, FilledBlock
from bd3lm_scale.diffusion.samplers.reveal import fill_in_order
from bd3lm_scale.diffusion.samplers.sampler import by_blocks
from bd3lm_scale.diffusion.schedule import Schedule, get_schedule


@dataclass(frozen=True)
class Ancestral:
    """The sampler `ancestral`.

    Attributes:
        steps: T.
        schedule: mask rate over time.
    """

    steps: int
    schedule: Schedule = field(default_factory=lambda: get_schedule("loglinear"))

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling.steps ({self.steps}): must be at least 1")

    def __call__(self, denoiser: BlockDenoiser, task: BlockTask) -> FilledBlock:
        """Fill a block in at most T steps per row."""
        return fill_in_order(denoiser, task, self.cells(task.when_BS))

    def cells(self, when_BS: np.ndarray) -> np.ndarray:
        """Which of the T steps reveals each position: T - 1 is the first one, 0 the last."""
        inner_times = torch.arange(1, self.steps, dtype=torch.float64) / self.steps
        edges = self.schedule.mask_rate(inner_times).numpy()
        return np.searchsorted(edges, when_BS, side="right")


SAMPLER = by_blocks(lambda settings: Ancestral(settings.steps, settings.schedule))
