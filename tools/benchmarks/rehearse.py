"""A micro-batch of a configuration at its real sizes, on meta tensors: what a GPU would be asked to do, counted.

The real build, forward and backward of a process that holds the whole model, as eager torch runs them: an operation
that is no view is a kernel that reads its inputs and writes its outputs. Nothing is computed and no GPU is needed, so
the counts are the same on every machine. Attention is stood for by one kernel forward and two backward, with the
operations of the pairs that the visibility rule allows.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bd3lm_scale.config.flops import attention_pairs
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.diffusion.loss import score_rows
from bd3lm_scale.diffusion.process import make_process
from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.model.attention import AttentionPattern
from bd3lm_scale.model.denoiser import Denoiser, build_chunks
from bd3lm_scale.model.transformer_config import make_transformer_config
from bd3lm_scale.parallel.mesh import init_mesh
from bd3lm_scale.values import HeadRows, Interval, NoisyRows

VOCAB_SIZE = 50258
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="configuration to rehearse")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="overrides")


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = load_config(args.config, args.set)
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    cut = [f"parallel.{name}=1" for name in sizes if getattr(config.parallel, name) > 1]
    if cut:
        sys.exit(f"{args.config}: the rehearsal holds the whole model in one process; add --set {' '.join(cut)}")
    return rehearse(config)


class Counts(TorchDispatchMode):
    """Kernels, bytes, floating-point operations and reads on the host of everything that is called meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = self.flops = self.syncs = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.syncs += name in ("_local_scalar_dense", "nonzero")
        read, written = (_tensors(t) for t in ((args, kwargs or {}), out))
        storages = {t.untyped_storage()._cdata for t in read}
        is_view = not func._schema.is_mutable and any(t.untyped_storage()._cdata in storages for t in written)
        if not is_view and name not in ALLOCATIONS:
            self.kernels += 1
            self.bytes += sum(map(_bytes, [*read, *written]))
            self.largest = max([self.largest, *map(_bytes, written)])
            if func.overloadpacket in flop_registry:
                self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """What lies in memory: an expanded dimension is there once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


class _Attention(torch.autograd.Function):
    """Stands for the kernels of attention."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
        out, logsumexp = torch.empty_like(query), torch.empty(query.shape[:3], device=query.device)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def rehearse(config: RunConfig) -> dict[str, Any]:
    """Counts of one micro-batch, forward and backward, and the bytes kept in between."""
    vocab_size = config.model.vocab_size or VOCAB_SIZE
    attention = "flex" if config.model.attention == "auto" else config.model.attention  # what auto is on CUDA
    config = replace(config, model=replace(config.model, attention=attention))
    mesh = init_mesh(config.parallel, "cpu")
    transformer = make_transformer_config(config, vocab_size, vocab_size - 1, torch.device("cuda"))
    process = make_process(config.diffusion, config.data.context_length, vocab_size, vocab_size - 1)
    pattern = training_visibility(config.diffusion.objective, config.data.context_length, config.block_size)
    (chunk,) = build_chunks(transformer, mesh, pattern.first(config.sequence_length), with_memory=False)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    counts = Counts()

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        counts.kernels += 1 + 2
        size = sum(map(_bytes, (query, key, value)))
        counts.bytes += size + _bytes(query) + 2 * (size + _bytes(query)) + size
        share = query.shape[2] / config.sequence_length
        pairs = attention_pairs(config) * query.shape[0] * query.shape[1] * share
        counts.flops += int((4 + 10) * pairs * query.shape[3])
        return _Attention.apply(query, key, value)

    def flex(_: AttentionPattern, query: Tensor, key: Tensor, value: Tensor, num_queries: int) -> Tensor:
        return attend(query, key, value)

    patched = mock.patch.object(AttentionPattern, "_flex", flex)
    with patched, mock.patch("bd3lm_scale.model.attention._attention", attend):
        to_meta(chunk)
        noisy, index_R, target_R, key = fake_batch(config)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counts:
            out = chunk.train()(noisy.input_BP, noisy.sigma_B, key, index_R, target_R)
            is_real_R = torch.ones_like(index_R, dtype=torch.bool)
            loss = score_rows(HeadRows(out[0], out[1], index_R, is_real_R), noisy, process).weighted_nll
            loss.float().backward()
    return {
        "kernels": counts.kernels,
        "gigabytes_moved": counts.bytes / 1e9,
        "tflop": counts.flops / 1e12,
        "host_waits": counts.syncs,
        "saved_gigabytes": sum(kept.values()) / 1e9,
        "largest_buffer_gigabytes": counts.largest / 1e9,
    }


def to_meta(chunk: Denoiser) -> None:
    """Give every parameter and buffer one without memory."""
    for part in chunk.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            setattr(part, name, nn.Parameter(fake))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="meta"))


def fake_batch(config: RunConfig) -> tuple[NoisyRows, Tensor, Tensor, Tensor | None]:
    """A micro-batch with as many scored rows as the schedule scores on average."""
    batch, length, diffusion = config.train.micro_batch_size, config.data.context_length, config.diffusion
    rate = sum(Interval(diffusion.clip_low, diffusion.clip_high).floored(diffusion.time_epsilon)) / 2
    scored = length - 1 if diffusion.objective == "ar" else rate * length
    rows = -(-int(batch * scored) // 128) * 128
    halves = 2 if diffusion.objective == "bd3lm" else 1

    def whole(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device="meta")

    real, noise = torch.zeros(batch, length, device="meta"), torch.zeros(batch, device="meta")
    noisy = NoisyRows(
        input_BP=whole(batch, halves * length), target_BL=whole(batch, length), is_scored_BL=real.bool(),
        weight_BL=real, counts_BL=real.bool(), time_BN=real[:, :1], masked_count_BN=whole(batch, 1), sigma_B=noise,
        position_B=whole(batch), is_real_B=noise.bool(),
    )  # fmt: skip
    return noisy, whole(rows), whole(rows), whole()[()] if config.model.dropout else None
