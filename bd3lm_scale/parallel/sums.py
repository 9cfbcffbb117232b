"""Small sums over all ranks: on the host's group where the host waits, on the device's where it goes on."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_SHIFTS = (0, 16, 32, 48)
"""An integer travels as four digits of 16 bits in float64: sums over up to 2^37 ranks stay exact."""


def host_copy(tensor: Tensor) -> Callable[[], list[float]]:
    """Queue a copy to the host now; the returned function gives the numbers, and waits for nothing queued later."""
    if not tensor.is_cuda:
        return tensor.tolist
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def values() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return values


class DeviceSum:
    """One small sum over all ranks, started now, on the device's own group.

    On CUDA the host does not wait for it: the device adds up between its other work. With gloo, the device's group of
    a CPU, whoever first asks for the sum waits.

    Args:
        floats: own numbers, on the device or not.
        integers: own integers, added modulo 2^64.
        world_size: number of ranks.
        device: of this rank.
        group: the ranks; None: all of them, by the device's own group.
    """

    def __init__(
        self,
        floats: Sequence[Tensor | float],
        integers: Sequence[int],
        world_size: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._num_floats = len(floats)
        digits = torch.tensor([n >> shift & 0xFFFF for n in integers for shift in _SHIFTS], dtype=torch.float64)
        if device.type == "cuda":
            digits = digits.pin_memory().to(device, non_blocking=True)
        own = [torch.as_tensor(number, dtype=torch.float64, device=device).reshape(1) for number in floats]
        self._total = torch.cat([*own, digits])
        self._work = dist.all_reduce(self._total, group=group, async_op=True) if world_size > 1 else None
        self._copy = None
        if device.type == "cuda":
            self.on_device()
            self._copy = host_copy(self._total)

    def on_device(self) -> Tensor:
        """The floats' sums, float64, on the device."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._total[: self._num_floats]

    def on_host(self) -> tuple[list[float], list[int]]:
        """Both sums; the integers lie in [0, 2^64)."""
        self.on_device()
        values = self._total.tolist() if self._copy is None else self._copy()
        digits = torch.tensor(values[self._num_floats :], dtype=torch.int64).reshape(-1, len(_SHIFTS)).tolist()
        integers = [sum(digit << shift for digit, shift in zip(row, _SHIFTS, strict=True)) % 2**64 for row in digits]
        return values[: self._num_floats], integers


def sum_on_host(
    floats: Sequence[float], integers: Sequence[int], group: dist.ProcessGroup | None
) -> tuple[list[float], list[int]]:
    """Add over the ranks of a host group (None: alone): floats in float64, integers modulo 2^64, in [0, 2^64)."""
    world_size = 1 if group is None else group.size()
    return DeviceSum(floats, integers, world_size, torch.device("cpu"), group).on_host()
