"""Starting DeepSpeed on parameters that have no values and no memory, so that a rank holds its own part from the start.

Left alone, DeepSpeed moves the whole model to the device, sends it to all ranks and copies it into flat buffers before
anything is cut. Here its buffers begin as zeros; the values come afterwards, as they do from a checkpoint.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bd3lm_scale.parallel.groups import replaced


@contextmanager
def buffers_without_copies(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, ZeRO-1 and 2 allocate their flat buffers without reading the parameters, and send none of them."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage_1_and_2

    def zeros(tensors: Sequence[Tensor]) -> Tensor:
        count = sum(tensor.numel() for tensor in tensors)
        return torch.zeros(count, dtype=tensors[0].dtype, device=tensors[0].device)

    marked: list[Any] = list(parameters)
    with (
        replaced(bf16_optimizer, "_flatten_dense_tensors", zeros),
        replaced(stage_1_and_2, "_flatten_dense_tensors", zeros),
    ):
        for parameter in marked:
            parameter.ds_optim_param = True  # not to be sent to the other ranks
        try:
            yield
        finally:
            for parameter in marked:
                del parameter.ds_optim_param


def cut(module: nn.Module, unit: Any, config: dict[str, Any], dtype: torch.dtype) -> None:
    """ZeRO-3: give each parameter of the module this rank's part of it, zeros.

    Args:
        module: its parameters have no memory.
        unit: DeepSpeed's view of the layout.
        config: DeepSpeed's configuration.
        dtype: of the parameters.
    """
    from deepspeed.runtime.zero.partition_parameters import Init, PartitionedParamStatus

    class Parts(Init):
        """DeepSpeed's own, but for the whole parameter that it would move, send and copy from."""

        def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
            for parameter in param_list:
                self._convert_to_deepspeed_param(parameter)
                parameter.ds_numel_aligned = self._aligned_size(parameter)
                size = parameter.ds_numel_aligned // parameter.ds_zero_partition_world_size
                part: Any = torch.zeros(size, dtype=parameter.dtype, device=self.local_device)
                part.ds_numel, part.status, part.final_location = size, PartitionedParamStatus.AVAILABLE, None
                parameter.ds_tensor = part
                parameter.partition()

    Parts(
        module=module,
        data_parallel_group=unit.get_data_parallel_group(),
        dtype=dtype,
        config_dict_or_path=config,
        mpu=unit,
    )
