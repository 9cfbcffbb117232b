"""Initial weights, and the marks that optimizer, checkpoints and hooks read off a parameter.

Every parameter is drawn from a generator seeded by (seed, its global name): the same weights under every layout,
and no two layers alike. The distributions are the reference's (its defaults of torch layers).
"""

import math
from collections.abc import Iterable, Mapping

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from bd3lm_scale.model.parameters import HEADS, ONES, POSITIONS, ZEROS, Parameter
from bd3lm_scale.parallel.shards import shard
from bd3lm_scale.rng import derive_key

MAX_PROBLEMS = 20


def compare(
    parameters: Iterable[tuple[str, nn.Parameter]], expected: Mapping[str, Parameter], tensor_size: int
) -> None:
    """Compare a rank's parameters with the table.

    Args:
        parameters: by global name, as the modules made them.
        expected: what the table says this rank holds, by global name.
        tensor_size: ranks that cut them.

    Raises:
        ValueError: naming every parameter that differs.
    """
    found = {name: tuple(parameter.shape) for name, parameter in parameters}
    wanted = {name: parameter.shard_shape(tensor_size) for name, parameter in expected.items()}
    problems = [f"{name} is in the table, not in the model" for name in wanted if name not in found]
    problems += [f"{name} is in the model, not in the table" for name in found if name not in wanted]
    problems += [
        f"{name} is {found[name]} in the model, {shape} in the table"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(
            "the network and its description in bd3lm_scale/model/parameters.py differ; correct one of them:\n  "
            + "\n  ".join(problems[:MAX_PROBLEMS])
        )


@torch.no_grad()
def initialize(
    parameters: Iterable[tuple[str, nn.Parameter]],
    table: Mapping[str, Parameter],
    tensor_rank: int,
    tensor_size: int,
    sequence_parallel: bool,
    seed: int,
) -> None:
    """Fill parameters in place and mark each with what checkpoints, clipping and gradient hooks need to know.

    Sets on every parameter: `description`, `sums_over_tensor_ranks` (its gradient on one rank is a share), and
    Megatron's tensor-parallel attributes, which DeepSpeed's gradient clipping reads.
    """
    for name, parameter in parameters:
        described = table[name]
        parameter.copy_(shard(_initial_value(described, seed), described, tensor_rank, tensor_size))
        for attribute in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
        is_cut = described.shard_dim is not None and tensor_size > 1
        dim = described.shard_dim if is_cut else -1
        set_tensor_model_parallel_attributes(parameter, is_cut, dim, max(1, len(described.parts)))
        is_share = described.gradient == HEADS or (described.gradient == POSITIONS and sequence_parallel)
        parameter.description = described  # pyright: ignore[reportAttributeAccessIssue]
        parameter.sums_over_tensor_ranks = is_share and tensor_size > 1  # pyright: ignore[reportAttributeAccessIssue]


def _initial_value(parameter: Parameter, seed: int) -> Tensor:
    """The whole parameter, fp32: U(+-1/sqrt(fan_in)), ones for norms, zeros for modulations and the head."""
    if parameter.start == ONES:
        return torch.ones(parameter.shape)
    if parameter.start == ZEROS:
        return torch.zeros(parameter.shape)
    bound = 1.0 / math.sqrt(parameter.fan_in)
    generator = torch.Generator().manual_seed(derive_key(seed, "init " + parameter.name) & (2**63 - 1))
    return torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound)
