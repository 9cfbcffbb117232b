"""Megatron's groups under the names DeepSpeed asks for.

Without this adapter DeepSpeed would average over tensor-parallel peers and train silently wrong.
"""

from typing import Any, cast

import torch.distributed as dist
from megatron.core import parallel_state


class ModelParallelUnit:
    """DeepSpeed's `mpu`: megatron.core.parallel_state plus the names it no longer has."""

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Ranks over which one copy of the model is spread."""
        return (
            parallel_state.get_tensor_model_parallel_world_size()
            * parallel_state.get_pipeline_model_parallel_world_size()
        )

    @staticmethod
    def get_model_parallel_rank() -> int:
        """Place in that copy; 0 counts replicated parameters in the gradient norm."""
        return (
            parallel_state.get_pipeline_model_parallel_rank() * parallel_state.get_tensor_model_parallel_world_size()
            + parallel_state.get_tensor_model_parallel_rank()
        )

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        """Ranks holding the same part of the model."""
        return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group(with_context_parallel=True))

    @staticmethod
    def get_data_parallel_world_size() -> int:
        """Their number."""
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_rank() -> int:
        """This rank among them."""
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Their global ranks."""
        return dist.get_process_group_ranks(ModelParallelUnit.get_data_parallel_group())

    @staticmethod
    def get_data_parallel_src_rank() -> int:
        """Global rank of the first of them."""
        return parallel_state.get_data_parallel_src_rank(with_context_parallel=True)
