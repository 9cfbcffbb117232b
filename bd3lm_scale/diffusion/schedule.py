"""Noise schedules: how likely a token is masked at time t, and the loss weight that this implies.

The evidence bound in continuous time is NELBO = E_t [ p'(t)/p(t) * sum of nll over masked tokens ], with p the
mask rate (paper, Section 3.1, where 1 - p is called alpha). Each schedule gives p and its exact weight p'/p; both are
float64 in and out, of any shape. Substituting p for t shows that the bound is the same for every schedule
that covers the same mask rates: schedules differ in variance only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3lm_scale.diffusion.registry import SCHEDULES, resolve

MIN_MASK_RATE = 1e-3
"""The small constant of the published schedules: floor of the mask rate, or margin below certain masking."""

MAX_SIGMA = -math.log(MIN_MASK_RATE)
"""Largest noise level shown to the network: sigma at mask rate 1 - MIN_MASK_RATE."""


_SCALED_LOGLINEAR = "bd3lm_scale.diffusion.schedules.standard:SCALED_LOGLINEAR"


@dataclass(frozen=True)
class Schedule:
    """A mask-rate curve p(t) on [0, 1] and its derivative.

    Attributes:
        name: as in `diffusion.schedule` and diffusion/registry.py.
        mask_rate: p(t), probability that a token is masked at time t.
        mask_rate_slope: p'(t).
        time_of: the inverse of p(t) where it rises.
    """

    name: str
    mask_rate: Callable[[Tensor], Tensor]
    mask_rate_slope: Callable[[Tensor], Tensor]
    time_of: Callable[[Tensor], Tensor]

    def loss_weight(self, time: Tensor) -> Tensor:
        """Exact ELBO weight p'(t)/p(t), never negative; 0 where the mask rate stands still at its floor."""
        return self.mask_rate_slope(time) / self.mask_rate(time)

    def sigma(self, time: Tensor) -> Tensor:
        """Total noise -ln(1 - p(t)) that a time-conditioned network is given."""
        return sigma_from_mask_rate(self.mask_rate(time))


def sigma_from_mask_rate(mask_rate: Tensor) -> Tensor:
    """Noise level sigma = -ln(1 - p), at most MAX_SIGMA."""
    return (-torch.log1p(-mask_rate)).clamp(max=MAX_SIGMA)


def get_schedule(name: str, mdlm_loss_scale: bool = False) -> Schedule:
    """The schedule `name`; with `mdlm_loss_scale` the loglinear one whose mask rate is (1 - 1e-3) t.

    Raises:
        ValueError: unknown name, or mdlm_loss_scale with another schedule than loglinear.
    """
    if name not in SCHEDULES:
        raise ValueError(f"diffusion.schedule ({name}): no such schedule; use one of {', '.join(SCHEDULES)}")
    if mdlm_loss_scale and name != "loglinear":
        raise ValueError(f"diffusion.mdlm_loss_scale (true): defined for schedule loglinear only, not {name}")
    schedule = resolve(_SCALED_LOGLINEAR if mdlm_loss_scale else SCHEDULES[name], Schedule)
    if schedule.name != name:
        raise ValueError(f"{SCHEDULES[name]}: is named {schedule.name}; use the name of its line, {name}")
    return schedule
