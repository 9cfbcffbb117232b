"""Frequencies and angles of the rotary positions.

Shapes: P positions, K head width.
"""

import math

import torch
from torch import Tensor

from bd3lm_scale.model.parameters import DEFAULT_ROPE, Rope


def inverse_frequencies(head_width: int, rope: Rope, device: torch.device | str = "cpu") -> Tensor:
    """(K/2,) float32: theta^(-2j/K), scaled. Without scaling equal to the published buffers bit by bit."""
    exponent = torch.arange(0, head_width, 2, device=device).float() / head_width
    frequency = 1.0 / (rope.theta**exponent)
    if rope.scaling == "none":
        return frequency
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "llama3":
        return _llama3(frequency, rope)
    raise ValueError(f"rope_scaling ({rope.scaling}): no such scaling; use none, linear or llama3")


def rotary_angles(position_P: Tensor, head_width: int, rope: Rope = DEFAULT_ROPE) -> Tensor:
    """Rotary angles (P, 1, 1, K) in Megatron's half-split form, one frequency per pair of channels."""
    angles = torch.outer(position_P.float(), inverse_frequencies(head_width, rope, position_P.device))
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def _llama3(frequency: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: wavelengths beyond original/low are divided by the factor, those below original/high kept."""
    turns = rope.original_context_length * frequency / (2 * math.pi)  # in the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency
