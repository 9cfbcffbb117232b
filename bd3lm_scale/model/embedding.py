"""What enters the first layer: the noise level's embedding and the rotary angles.

Shapes: B rows, C conditioning width, P positions, K head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FREQUENCIES = 256


class TimeEmbedding(nn.Module):
    """SiLU(MLP([cos(sigma f), sin(sigma f)])), f_i = 10000^(-i/128): the conditioning of adaptive layer norm."""

    def __init__(self, cond_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear1 = nn.Linear(_FREQUENCIES, cond_dim, dtype=dtype)
        self.linear2 = nn.Linear(cond_dim, cond_dim, dtype=dtype)

    def forward(self, sigma_B: Tensor) -> Tensor:
        """(B,) noise levels -> (B, C)."""
        half = _FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=sigma_B.device) / half)
        angles = sigma_B.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(features))))


def rotary_angles(position_P: Tensor, head_width: int) -> Tensor:
    """Rotary angles (P, 1, 1, K) in Megatron's half-split form, one frequency per pair of channels."""
    exponent = torch.arange(0, head_width, 2, device=position_P.device).float() / head_width
    angles = torch.outer(position_P.float(), 1.0 / (10000.0**exponent))
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]
