"""Megatron's pipeline: its schedules, and the groups of ranks that parts of the model are shared by."""

from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func


def schedule_of_layout() -> Callable[..., list[Any]]:
    """The plain loop at one stage, 1F1B and interleaved 1F1B beyond: one code path for every layout.

    Its arguments are Megatron's: `forward_step_func(iterator, chunk)` returns (output, loss function); the loss
    function gets the last stage's output and returns (loss, report), and the schedule divides the loss, in place, by
    the number of micro-batches. It returns the reports of the last stage, one per micro-batch, elsewhere an empty list.
    Chunks are Megatron's modules without the DeepSpeed wrapper, whose own `config` would hide Megatron's.
    """
    return get_forward_backward_func()


def stage_ends(virtual_stage: int | None) -> tuple[bool, bool]:
    """(holds the embedding, holds the head) for this rank's model chunk number `virtual_stage`."""
    return (
        parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
    )


def tensor_group() -> dist.ProcessGroup:
    """The ranks that share every layer."""
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def data_group() -> dist.ProcessGroup:
    """The ranks that hold the same part of the model and read different rows."""
    return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group())


def embedding_group() -> dist.ProcessGroup | None:
    """First and last stage, which both hold a tied embedding; None on the stages between."""
    if not parallel_state.is_rank_in_embedding_group():
        return None
    return cast(dist.ProcessGroup, parallel_state.get_embedding_group())
