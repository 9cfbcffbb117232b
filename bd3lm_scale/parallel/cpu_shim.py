"""Lets Megatron-core run on CPU with gloo: the few places where it names CUDA directly are rebound.

A no-op where CUDA is used. Each entry was found by running Megatron-core 0.16 without a GPU; nothing about the
mathematics changes, only where tensors live and which generator is forked.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch

_installed = False


class _CpuTorch(types.ModuleType):
    """The name `torch` as the pipeline schedules see it: device "cuda" means "cpu"."""

    def __init__(self) -> None:
        super().__init__("torch")
        own = vars(type(self))
        self.__dict__.update({name: value for name, value in vars(torch).items() if name not in own})

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return torch.zeros(*args, **kwargs)

    @staticmethod
    def autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return torch.autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def is_installed() -> bool:
    """Whether Megatron in this process is bound to the CPU; there is no way back."""
    return _installed


def install() -> None:
    """Rebind Megatron's CUDA calls to the CPU; idempotent."""
    global _installed
    if _installed:
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.synchronize = lambda *_, **__: None
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.tensor_parallel.random as random

    schedules.torch = _CpuTorch()  # pyright: ignore[reportAttributeAccessIssue]
    random._CUDA_RNG_STATE_TRACKER = _cpu_rng_tracker(random)
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    functions: list[Any] = [layers.LinearWithGradAccumulationAndAsyncCommunication, layers.LinearWithFrozenWeight]
    for function in functions:
        function.forward = staticmethod(torch.amp.custom_fwd(function.forward.__wrapped__, device_type="cpu"))
        function.backward = staticmethod(torch.amp.custom_bwd(function.backward.__wrapped__, device_type="cpu"))
    _installed = True


def _cpu_rng_tracker(random: types.ModuleType) -> Any:
    """Megatron's tracker of named generator states, on torch's CPU generator."""

    class CpuRngTracker(random.CudaRNGStatesTracker):
        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"RNG state {name} or seed {seed} already exists")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"RNG state {name} was never added")
            outer_state, outer_name = torch.get_rng_state(), self._current_state_name
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer_state)
                self._current_state_name = outer_name

    tracker = CpuRngTracker()
    return tracker
