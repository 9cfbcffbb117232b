"""Initial weights, and which dimension of which parameter tensor parallelism cuts.

Every parameter is drawn from a generator seeded by (seed, its global name): the same weights under every layout,
and no two layers alike. The distributions are the reference's (its defaults of torch layers).
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from bd3lm_scale.model.transformer_config import DenoiserConfig
from bd3lm_scale.rng import derive_key

# Suffix of the global name -> dimension that tensor parallelism cuts; all others are replicated.
SHARD_DIM = {
    "embedding.weight": 0,
    "linear_qkv.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
    "head.output.weight": 0,
    "head.output.bias": 0,
}
_TIME_FEATURES = 256


def shard_dim_of(name: str) -> int | None:
    """The dimension along which tensor-parallel ranks split parameter `name`; None if they all hold it."""
    if name == "time_embedding.weight":
        return None
    return next((dim for suffix, dim in SHARD_DIM.items() if name.endswith(suffix)), None)


def initialize(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: DenoiserConfig,
    tensor_rank: int,
    tensor_size: int,
    seed: int,
) -> None:
    """Fill parameters in place and mark each with its global name, shape and cut.

    Sets on every parameter: global_name, global_shape, shard_dim, and Megatron's tensor-parallel attributes, which
    DeepSpeed's gradient clipping reads.
    """
    for name, parameter in parameters:
        dim = shard_dim_of(name) if tensor_size > 1 else None
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= tensor_size
        whole = _initial_value(name, tuple(shape), config, seed)
        with torch.no_grad():
            parameter.copy_(whole if dim is None else whole.chunk(tensor_size, dim)[tensor_rank])
        set_attributes(parameter, name, tuple(shape), dim)


def set_attributes(parameter: nn.Parameter, name: str, shape: tuple[int, ...], dim: int | None) -> None:
    """Mark a parameter with what checkpoints, clipping and gradient hooks need to know of it."""
    for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, attribute):
            delattr(parameter, attribute)
    set_tensor_model_parallel_attributes(parameter, dim is not None, -1 if dim is None else dim, 1)
    parameter.global_name = name  # pyright: ignore[reportAttributeAccessIssue]
    parameter.global_shape = shape  # pyright: ignore[reportAttributeAccessIssue]
    parameter.shard_dim = dim  # pyright: ignore[reportAttributeAccessIssue]


def _initial_value(name: str, shape: tuple[int, ...], config: DenoiserConfig, seed: int) -> Tensor:
    """The whole parameter, fp32: U(+-1/sqrt(fan_in)), ones for norms, zeros for modulations and the head."""
    if name.endswith(("layernorm.weight", "head.norm.weight")):
        return torch.ones(shape)
    if "modulation" in name or name.startswith("head.output"):
        return torch.zeros(shape)
    bound = 1.0 / math.sqrt(_fan_in(name, shape, config))
    generator = torch.Generator().manual_seed(derive_key(seed, "init " + name) & (2**63 - 1))
    return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


def _fan_in(name: str, shape: tuple[int, ...], config: DenoiserConfig) -> int:
    if len(shape) == 2:
        return shape[1]
    return {
        "time_embedding.linear1.bias": _TIME_FEATURES,
        "time_embedding.linear2.bias": config.cond_dim,
    }.get(name) or (config.hidden_size if name.endswith("linear_fc1.bias") else cast(int, config.ffn_hidden_size))
