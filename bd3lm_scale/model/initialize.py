"""Initial weights, and the marks that optimizer, checkpoints and hooks read off a parameter.

Every parameter is drawn from a generator seeded by (seed, its global name), and any part of it alone: the same weights
under every layout, and no two layers alike.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from bd3lm_scale.model.draws import UniformStream
from bd3lm_scale.model.parameters import HEADS, ONES, POSITIONS, ZEROS, Parameter
from bd3lm_scale.rng import derive_key

MAX_PROBLEMS = 20
_DRAWN_AT_ONCE = 2**17


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


def allocate(module: nn.Module, device: torch.device, with_memory: bool) -> None:
    """Put a module that was built on the meta device on its own; its weights have no values yet.

    Args:
        module: parameters on the meta device, buffers on any other.
        device: where they go.
        with_memory: False gives every parameter its shape and no memory (one element, repeated): DeepSpeed then decides
            what this rank keeps of it, see optim/partition.py.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            like = {"dtype": parameter.dtype, "device": device}
            shape = parameter.shape
            part.register_parameter(
                name, nn.Parameter(torch.empty(shape, **like) if with_memory else torch.zeros((), **like).expand(shape))
            )
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def mark(
    parameters: Iterable[tuple[str, nn.Parameter]],
    table: Mapping[str, Parameter],
    tensor_size: int,
    sequence_parallel: bool,
) -> None:
    """Mark each parameter with what checkpoints, clipping and gradient hooks need to know.

    Sets `description`, `sums_over_tensor_ranks` (its gradient on one rank is a share), and Megatron's tensor-parallel
    attributes, which DeepSpeed's gradient clipping reads.
    """
    for name, parameter in parameters:
        described = table[name]
        is_cut = described.shard_dim is not None and tensor_size > 1
        dim = described.shard_dim if is_cut else -1
        set_tensor_model_parallel_attributes(parameter, is_cut, dim, max(1, len(described.parts)))
        is_share = described.gradient == HEADS or (described.gradient == POSITIONS and sequence_parallel)
        parameter.description = described  # pyright: ignore[reportAttributeAccessIssue]
        parameter.sums_over_tensor_ranks = is_share and tensor_size > 1  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def draw(
    out: Tensor, parameter: Parameter, offset: tuple[int, ...], shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> None:
    """The initial values of a box of a parameter: a function of (seed, name, place), whoever asks.

    The distributions are the reference's: U(+-1/sqrt(fan_in)), ones for norms, zeros for modulations and the head. Time
    and memory follow the box, but for columns of a matrix, between which the rest of each row is drawn too.

    Args:
        out: 1-D, filled in the order of the box.
        parameter: the whole one.
        offset, shape: of the box in the whole parameter.
        seed: of the run.
        dtype: of the working weights, which masters start equal to.
    """
    if parameter.start in (ONES, ZEROS):
        out.fill_(float(parameter.start == ONES))
        return
    bound = 1.0 / math.sqrt(parameter.fan_in)
    stream = UniformStream(derive_key(seed, "init " + parameter.name))
    width, columns = parameter.shape[-1], shape[-1]
    rows = math.prod(shape[:-1])
    first = offset[-1] + (offset[0] * width if len(shape) == 2 else 0)
    if columns == width:
        rows, columns = 1, rows * columns
    done = 0
    for row, column, num_rows, num_columns in _pieces(rows, columns, width):
        stream.seek(first + row * width + column)
        values = stream.draw((num_rows - 1) * width + num_columns).mul_(2 * bound).sub_(bound)
        values = values.as_strided((num_rows, num_columns), (width, 1)).to(dtype)
        out.narrow(0, done, values.numel()).view(values.shape).copy_(values)
        done += values.numel()


def _pieces(rows: int, columns: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, rows, columns) of the pieces that are drawn at once: parts of a row, or several rows."""
    if rows == 1 or width > _DRAWN_AT_ONCE:
        for row in range(rows):
            for column in range(0, columns, _DRAWN_AT_ONCE):
                yield row, column, 1, min(_DRAWN_AT_ONCE, columns - column)
        return
    together = max(1, _DRAWN_AT_ONCE // width)
    for row in range(0, rows, together):
        yield row, 0, min(together, rows - row), columns
