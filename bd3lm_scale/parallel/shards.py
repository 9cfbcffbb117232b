"""Runs of the part of a parameter that a tensor-parallel rank holds, as checkpoints describe them."""

from torch import Tensor, nn

from bd3lm_scale.model.parameters import Parameter
from bd3lm_scale.parallel.mesh import Mesh
from bd3lm_scale.values import StateSlice


def description_of(parameter: nn.Parameter) -> Parameter:
    """What `model.initialize` marked a parameter with."""
    return parameter.description  # pyright: ignore[reportAttributeAccessIssue]


def state_slice(
    parameter: Parameter, mesh: Mesh, start: int, stop: int, tensors: dict[str, Tensor], is_copy: bool = False
) -> StateSlice:
    """The flat run [start, stop) of this rank's part of a parameter.

    Args:
        parameter: what it is a part of.
        mesh: this rank's position in the layout.
        start, stop: in the flattened part.
        tensors: 1-D state of the run by kind.
        is_copy: another pipeline stage holds the same and saves it.
    """
    is_cut = parameter.shard_dim is not None and mesh.tensor_size > 1
    return StateSlice(
        name=parameter.name,
        global_shape=parameter.shape,
        shard_dim=parameter.shard_dim if is_cut else None,
        shard_index=mesh.tensor_rank if is_cut else 0,
        shard_count=mesh.tensor_size if is_cut else 1,
        start=start,
        stop=stop,
        is_owner=(is_cut or mesh.tensor_rank == 0) and not is_copy,
        tensors=tensors,
        parts=parameter.parts if is_cut else (),
    )
