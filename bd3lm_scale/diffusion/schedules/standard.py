"""The five published noise schedules, and the scaled loglinear one of the sigma parameterization."""

import math

import torch
from torch import Tensor

from bd3lm_scale.diffusion.schedule import MIN_MASK_RATE, Schedule


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


LOGLINEAR = _linear("loglinear", 1.0)
COSINE = _cosine()
SQUARE = _power("square", 2.0)
SQUARE_ROOT = _power("square_root", 0.5)
LOG = _log()

# sigma(t) = -ln(1 - (1 - e) t) of Sahoo et al. and Lou et al.: the mask rate stops short of 1, p'/p is still 1/t
SCALED_LOGLINEAR = _linear("loglinear", 1.0 - MIN_MASK_RATE)
