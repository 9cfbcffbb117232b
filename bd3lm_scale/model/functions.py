"""The functions that the fields of `model` name: norms and activations, for training and for decoding alike."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from bd3lm_scale.model.parameters import Architecture

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "swiglu": F.silu,
}
"""Of each kind of MLP: what its inner layer, or the gate of a gated one, passes through."""


def activate(inner: Tensor, arch: Architecture) -> Tensor:
    """The inner layer's outputs (..., F), or gate and value (..., 2F), after the activation: (..., F)."""
    function = ACTIVATIONS[arch.mlp]
    if not arch.gates:
        return function(inner)
    gate, value = inner.chunk(2, dim=-1)
    return function(gate) * value


def normalize(x: Tensor, weight: Tensor, shift: Tensor | None, arch: Architecture) -> Tensor:
    """The network's norm over the last dimension, times a weight, plus a shift where there is one."""
    if arch.norm == "rmsnorm":
        normed = F.rms_norm(x, weight.shape, weight, arch.norm_eps)
        return normed if shift is None else normed + shift
    if arch.norm == "layernorm":
        return F.layer_norm(x, weight.shape, weight, shift, arch.norm_eps)
    raise ValueError(f"model.norm ({arch.norm}): no such norm; use layernorm or rmsnorm")
