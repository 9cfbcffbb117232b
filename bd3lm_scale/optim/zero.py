"""The DeepSpeed engine: the only door to DeepSpeed, configured here and nowhere else.

The engine does not manage gradient accumulation: Megatron's schedule runs all micro-batches, then `step` is called
once. State is exposed as StateSlices, so that checkpoints never see DeepSpeed.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from bd3lm_scale.config.schema import OptimConfig
from bd3lm_scale.optim.ema import STATE_KEYS, AdamWithEma, ema_decay_at
from bd3lm_scale.optim.partition import buffers_without_copies, cut
from bd3lm_scale.parallel.mesh import Mesh
from bd3lm_scale.parallel.mpu import ModelParallelUnit
from bd3lm_scale.parallel.pipeline import embedding_group, tensor_group
from bd3lm_scale.parallel.shards import description_of, state_slice
from bd3lm_scale.parallel.sums import host_copy
from bd3lm_scale.values import StateSlice


class ZeroOptimizer:
    """A model under DeepSpeed ZeRO 1, 2 or 3 with AdamW and EMA. Its weights are zero until its slices are filled.

    Args:
        module: what the engine wraps; its forward takes (chunk number, *inputs).
        parameters: (global name, parameter) pairs, marked by model.initialize, without values.
        config: hyper-parameters and ZeRO stage.
        precision: fp32 | bf16.
        micro_batch_size: rows per rank and micro-step (DeepSpeed's bookkeeping only).
        mesh: this rank's position in the layout.
        ties_embeddings: whether the head shares the embedding.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        precision: str,
        micro_batch_size: int,
        mesh: Mesh,
        ties_embeddings: bool = False,
    ) -> None:
        self.config, self.mesh, self.stage = config, mesh, config.zero_stage
        self.named = list(parameters)
        self.updates = 0
        self._tied = [p for name, p in self.named if name == "embedding.weight"] if ties_embeddings else []
        self._mark_tied_copy()
        self._sum_sequence_parallel_gradients()
        self.engine, self.inner = self._start_engine(module, precision, micro_batch_size)
        self.forward: Callable[..., Tensor] = self.engine  # ZeRO-2 and 3 rely on its hooks
        self.adam: AdamWithEma = self.inner.optimizer
        for partition in self._partitions():
            self.adam.prepare(partition)
        if self.stage == 2 and mesh.pipeline_size > 1:
            module.register_forward_hook(self._rearm_before_backward)

    def step(self, lr: float, discard: Callable[[], Tensor] | None = None) -> float:
        """Reduce the accumulated gradients, clip, update, publish the new weights.

        Args:
            lr: learning rate of this update.
            discard: asked once, after the gradients are reduced; where it answers True, a bool scalar on the device,
                parameters and state stay as they are.

        Returns:
            The gradient norm before clipping; inf where it is not finite, and then nothing was updated either.
        """
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.ema_decay = ema_decay_at(self.updates + 1, self.config.ema_decay)
        decision: list[Tensor] = []
        copies: list[Callable[[], list[float]]] = []

        def decide() -> Tensor:
            """Asked by Adam for each partition; DeepSpeed knows the norm by then, and no update is queued yet."""
            if not decision:
                norm = torch.as_tensor(self.inner._global_grad_norm, dtype=torch.float64).reshape(())
                dropped = torch.zeros_like(norm, dtype=torch.bool) if discard is None else discard().reshape(())
                decision.append(dropped)
                copies.append(host_copy(torch.stack([norm, dropped.double()])))
            return decision[0]

        self.adam.discard = decide
        if self._tied and self.mesh.pipeline_size > 1:
            self._sum_tied_gradients()
        self.engine.step()
        if self.inner.overflow:
            return math.inf
        decide()
        grad_norm, was_dropped = copies[0]()  # queued before the update: the host does not wait for that
        self.updates += not was_dropped
        return grad_norm

    def train(self, mode: bool = True) -> None:
        """Switch dropout and recomputation."""
        self.engine.train(mode)

    def slices(self) -> list[StateSlice]:
        """Every run of optimizer state this rank owns, as views of live memory (master, exp_avg, exp_avg_sq, ema)."""
        return list(self._partitioned_slices() if self.stage == 3 else self._flat_slices())

    def restored(self, updates: int) -> None:
        """After slices were filled: set the update count and publish masters to the working weights."""
        self.updates = updates
        for partition in self._partitions():
            self.adam.state[partition]["step"].fill_(float(updates))
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the fp32 masters into the working weights of all ranks."""
        if self.stage < 3:
            self.inner.update_lp_params()
            return
        self.inner._partition_all_parameters()
        for group in range(len(self.inner.fp16_groups)):
            self.inner._reassign_or_swap_out_partitioned_parameters(group)
        if self.inner.persistent_parameters:
            self.inner.persistent_parameters[0].all_gather(self.inner.persistent_parameters)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Work with the averaged weights inside; the masters are back, bit for bit, afterwards."""
        masters = [partition.detach().clone() for partition in self._partitions()]
        for partition in self._partitions():
            partition.data.copy_(self.adam.state[partition]["ema"])
        self.publish()
        try:
            yield
        finally:
            for partition, master in zip(self._partitions(), masters, strict=True):
                partition.data.copy_(master)
            self.publish()

    @torch.no_grad()
    def reset_ema(self) -> None:
        """Let the average start at the present masters (a run started from given weights)."""
        for partition in self._partitions():
            self.adam.state[partition]["ema"].copy_(partition)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The accumulated gradient of a whole parameter before the step (ZeRO-1: still on every rank, unreduced)."""
        if self._keeps_own_gradients():
            for params, grads in zip(self.inner.bf16_groups, self.inner.fp32_groups_gradients, strict=True):
                for candidate, grad in zip(params, grads, strict=True):
                    if candidate is parameter:
                        return grad
        return self.inner.get_param_gradient_attribute(parameter)

    # DeepSpeed's three optimizers keep the flat fp32 partitions under three names.
    def _partitions(self) -> list[Tensor]:
        if self.stage == 3:
            return self.inner.fp32_partitioned_groups_flat
        if self._keeps_own_gradients():
            return self.inner.fp32_groups_flat_partition
        return self.inner.single_partition_of_fp32_groups

    def _keeps_own_gradients(self) -> bool:
        return hasattr(self.inner, "fp32_groups_gradients")

    def _flat_slices(self) -> Iterator[StateSlice]:
        partitions = self._partitions()
        for _, parameter in self.named:
            fragment = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if fragment is None:  # none of it lies in this rank's partition
                continue
            inside, held = fragment.lp_fragment_address, fragment.hp_fragment_address
            partition = partitions[fragment.param_group_index]
            yield self._slice(parameter, inside.start, inside.numel, partition, held.start)

    def _partitioned_slices(self) -> Iterator[StateSlice]:
        for _, parameter in self.named:
            group, offset, width = self.inner.grad_position[self.inner.get_param_id(parameter)]
            start = self.mesh.data_rank * width
            length = min(parameter.ds_numel - start, width)  # pyright: ignore[reportAttributeAccessIssue]
            if length > 0:  # the rest of the last partition is padding
                yield self._slice(parameter, start, length, self._partitions()[group], offset)

    def _slice(self, parameter: Any, start: int, length: int, partition: Tensor, offset: int) -> StateSlice:
        state = self.adam.state[partition]
        flat = {"master": partition.data, **{key: state[key] for key in STATE_KEYS}}
        tensors = {kind: tensor.narrow(0, offset, length) for kind, tensor in flat.items()}
        is_copy = getattr(parameter, "ds_pipe_replicated", False)
        return state_slice(description_of(parameter), self.mesh, start, start + length, tensors, is_copy)

    def _start_engine(self, module: nn.Module, precision: str, micro_batch_size: int) -> tuple[Any, Any]:
        import deepspeed  # chooses its accelerator when imported, so only once the device is known
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        if self.mesh.device.type == "cpu":  # would be compiled for half a minute at first use
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        parameters = [parameter for _, parameter in self.named]
        c, unit = self.config, ModelParallelUnit()
        derived = engine_config(c, precision, micro_batch_size)
        adam = AdamWithEma(
            parameters, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, fused=True
        )
        if self.stage == 3:
            cut(module, unit, derived, parameters[0].dtype)
        with buffers_without_copies(parameters):
            engine, optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=adam,
                model_parameters=cast(Any, parameters),  # annotated as a module, read as parameters
                mpu=unit,
                config=derived,
            )
        inner = cast(Any, optimizer)
        inner.flatten = _flatten_dense_tensors  # from here on there are values: gradients
        return engine, inner

    def _sum_sequence_parallel_gradients(self) -> None:
        """Where tensor-parallel ranks see shares of the positions (norms, row-parallel biases) or heads: add them."""

        def summed(grad: Tensor) -> Tensor:
            total = grad.to(torch.float32, copy=True)  # sums are fp32 under bf16 too
            dist.all_reduce(total, group=tensor_group())
            return total.to(grad.dtype)

        for _, parameter in self.named:
            if parameter.sums_over_tensor_ranks:  # pyright: ignore[reportAttributeAccessIssue]
                parameter.register_hook(summed)

    def _rearm_before_backward(self, _module: nn.Module, _inputs: Any, out: Tensor) -> None:
        """Tell ZeRO-2 before each backward pass that a new one begins.

        1F1B runs several backward passes without a forward in between, where DeepSpeed expects one to re-arm it.
        A hook of the wrapped module acts on its output before DeepSpeed does, so this runs first in the backward pass.
        """
        if out.requires_grad:
            out.register_hook(lambda _gradient: self.inner.clear_backward_seen_flag())

    def _mark_tied_copy(self) -> None:
        """The last stage's copy of a tied embedding counts once in norms and is saved once."""
        is_copy = self.mesh.pipeline_size > 1 and self.mesh.is_last_stage
        for parameter in self._tied if is_copy else []:
            parameter.ds_pipe_replicated = True  # pyright: ignore[reportAttributeAccessIssue]

    def _sum_tied_gradients(self) -> None:
        """First and last stage add their gradients of a tied embedding, and so stay equal."""
        for parameter in self._tied:
            dist.all_reduce(self.gradient(parameter), group=embedding_group())


def engine_config(config: OptimConfig, precision: str, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration dict, derived from ours: there is no second file."""
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # the schedule divides by the number of micro-batches
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.grad_clip,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the whole device twice per micro-batch
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": False},
        # unset, it is the precision: bf16 runs would round fp32 accumulators to bf16 before summing them over ranks
        "communication_data_type": config.reduce_dtype,
    }
    if config.zero_stage == 2:
        # DeepSpeed's scattering path divides bf16 gradients by the number of ranks before it widens them (inexact
        # unless that is a power of two); this one sums first. Both send one all-reduce of each bucket.
        derived["zero_optimization"]["reduce_scatter"] = False
    if precision == "bf16":
        derived["bf16"] = {"enabled": True, "immediate_grad_update": True}
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived
