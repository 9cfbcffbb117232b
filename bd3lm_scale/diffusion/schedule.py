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

MIN_MASK_RATE = 1e-3
"""The small constant of the published schedules: floor of the mask rate, or margin below certain masking."""

MAX_SIGMA = -math.log(MIN_MASK_RATE)
"""Largest noise level shown to the network: sigma at mask rate 1 - MIN_MASK_RATE."""


@dataclass(frozen=True)
class Schedule:
    """A mask-rate curve p(t) on [0, 1] and its derivative.

    Attributes:
        name: as in `diffusion.schedule`.
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


def _linear(name: str, slope: float) -> Schedule:
    return Schedule(name, lambda t: slope * t, lambda t: torch.full_like(t, slope), lambda p: p / slope)


def _cosine() -> Schedule:
    span = 1.0 - MIN_MASK_RATE
    return Schedule(
        "cosine",
        lambda t: 1.0 - span * torch.cos(t * (math.pi / 2)),
        lambda t: span * torch.sin(t * (math.pi / 2)) * (math.pi / 2),
        lambda p: torch.arccos(((1.0 - p) / span).clamp(max=1.0)) * (2 / math.pi),
    )


def _power(name: str, exponent: float) -> Schedule:
    def slope(t: Tensor) -> Tensor:
        rises = t.pow(exponent) > MIN_MASK_RATE
        # below the floor the curve is flat; the where inside keeps t^(a-1) finite at t = 0
        return torch.where(rises, exponent * torch.where(rises, t, 1.0).pow(exponent - 1.0), 0.0)

    return Schedule(name, lambda t: t.pow(exponent).clamp(min=MIN_MASK_RATE), slope, lambda p: p.pow(1 / exponent))


def _log() -> Schedule:
    return Schedule(
        "log",
        lambda t: torch.log1p(t) / math.log(2),
        lambda t: 1.0 / (math.log(2) * (1.0 + t)),
        lambda p: torch.expm1(p * math.log(2)),
    )


_SCHEDULES = {
    schedule.name: schedule
    for schedule in (_linear("loglinear", 1.0), _cosine(), _power("square", 2.0), _power("square_root", 0.5), _log())
}
SCHEDULE_NAMES = tuple(_SCHEDULES)

# sigma(t) = -ln(1 - (1 - e) t) of Sahoo et al. and Lou et al.: the mask rate stops short of 1, p'/p is still 1/t
_SCALED_LOGLINEAR = _linear("loglinear", 1.0 - MIN_MASK_RATE)


def get_schedule(name: str, mdlm_loss_scale: bool = False) -> Schedule:
    """The schedule `name`; with `mdlm_loss_scale` the loglinear one whose mask rate is (1 - 1e-3) t.

    Raises:
        ValueError: unknown name, or mdlm_loss_scale with another schedule than loglinear.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"diffusion.schedule ({name}): no such schedule; use one of {', '.join(SCHEDULE_NAMES)}")
    if not mdlm_loss_scale:
        return _SCHEDULES[name]
    if name != "loglinear":
        raise ValueError(f"diffusion.mdlm_loss_scale (true): defined for schedule loglinear only, not {name}")
    return _SCALED_LOGLINEAR
