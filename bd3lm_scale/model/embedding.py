"""What enters the first layer: the noise level's embedding and the rotary angles.

Shapes: B rows, C conditioning width, P positions, K head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3lm_scale.model.parameters import DEFAULT_ROPE, TIME_FEATURES, Rope
from bd3lm_scale.model.rotary import inverse_frequencies


class TimeEmbedding(nn.Module):
    """SiLU(MLP([cos(sigma f), sin(sigma f)])), f_i = 10000^(-i/128): the conditioning of adaptive layer norm."""

    def __init__(self, cond_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear1 = nn.Linear(TIME_FEATURES, cond_dim, dtype=dtype)
        self.linear2 = nn.Linear(cond_dim, cond_dim, dtype=dtype)

    def forward(self, sigma_B: Tensor) -> Tensor:
        """(B,) noise levels -> (B, C)."""
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=sigma_B.device) / half)
        angles = sigma_B.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(features))))


def rotary_angles(position_P: Tensor, head_width: int, rope: Rope = DEFAULT_ROPE) -> Tensor:
    """Rotary angles (P, 1, 1, K) in Megatron's half-split form, one frequency per pair of channels."""
    angles = torch.outer(position_P.float(), inverse_frequencies(head_width, rope, position_P.device))
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]
