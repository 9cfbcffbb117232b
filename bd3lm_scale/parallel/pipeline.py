"""Megatron's schedules: the plain loop at one stage, 1F1B and interleaved 1F1B beyond.

One code path for every layout: `get_forward_backward_func` picks the schedule, the caller supplies a forward step.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from torch import Tensor, nn

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Any]]]
ForwardStep = Callable[[Any, nn.Module], tuple[Tensor, LossFunction]]


def run_schedule(
    chunks: Sequence[nn.Module],
    forward_step: Callable[[Any, nn.Module], tuple[Tensor, LossFunction]],
    micro_batches: Sequence[Any],
    *,
    micro_batch_size: int,
    sequence_length: int,
    forward_only: bool = False,
) -> list[dict[str, Any]]:
    """Run all micro-batches forward (and backward) through this rank's model chunks.

    Args:
        chunks: this rank's Megatron modules, one per virtual stage, without the DeepSpeed wrapper (its own
            `config` attribute would hide Megatron's).
        forward_step: (micro_batch, chunk) -> (output, loss function); the loss function gets the last stage's
            output and returns (loss, report). The schedule divides the loss by the number of micro-batches.
        micro_batches: the same list on every stage; each stage uses the parts that it needs.
        micro_batch_size, sequence_length: shape of what travels between stages (sequence_length before
            sequence-parallel sharding).
        forward_only: evaluate; no gradients.

    Returns:
        The reports of the last stage, one per micro-batch; an empty list on other stages.
    """

    def step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, LossFunction]:
        return forward_step(next(iterator), chunk)

    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def before_each_backward(action: Callable[[], None]) -> None:
    """Call `action` before every backward step of the schedules (needed by ZeRO-2 with pipeline stages).

    1F1B runs several backward passes without a forward in between, where DeepSpeed expects one to re-arm it.
    """
    original = schedules.backward_step

    def backward_step(*args: Any, **kwargs: Any) -> Any:
        action()
        return original(*args, **kwargs)

    schedules.backward_step = backward_step


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


def pipeline_group() -> dist.ProcessGroup:
    """The ranks a micro-batch passes through."""
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def embedding_group() -> dist.ProcessGroup | None:
    """First and last stage, which both hold a tied embedding; None on the stages between."""
    if not parallel_state.is_rank_in_embedding_group():
        return None
    return cast(dist.ProcessGroup, parallel_state.get_embedding_group())
