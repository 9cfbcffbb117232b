"""One DiT block on Megatron-core's column- and row-parallel layers (paper's model; SPEC of the published weights).

    x += gate_a * dropout(Attention(LN(x) * (1 + scale_a) + shift_a))
    x += gate_m * dropout(MLP(LN(x) * (1 + scale_m) + shift_m))

Norms have a weight only. Without adaLN: scale 0, shift 0, gate 1. Which norm LN is, the MLP, the grouping of heads,
norms of queries and keys, and biases follow the configuration (by default the published DiT's).
Shapes: P positions (a shard of them under sequence parallelism), B rows, D width, C conditioning width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from bd3lm_scale.model.attention import BlockAttention, LayerCache
from bd3lm_scale.model.functions import normalize
from bd3lm_scale.model.parameters import Architecture
from bd3lm_scale.model.transformer_config import DenoiserConfig
from bd3lm_scale.rng import derive_key

_SHARD_BITS, _SITE_SHIFT = 12, 36


class ColumnParallelNoBias(tensor_parallel.ColumnParallelLinear):
    """Megatron gives attention biases wherever the MLP has some; here each is a choice of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})


class RowParallel(tensor_parallel.RowParallelLinear):
    """Megatron's names no group here, and its warning of that would cut a compiled layer in two."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._forward_impl(input, weight, *args, **{**kwargs, "tp_group": self.tp_group})


class RowParallelNoBias(RowParallel):
    """See ColumnParallelNoBias."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": False})


class WeightOnlyNorm(nn.Module):
    """The network's norm in fp32, with a weight and no bias. Returns fp32."""

    def __init__(self, config: DenoiserConfig, hidden_size: int, **_: Any) -> None:
        super().__init__()
        self.architecture = config.architecture
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension."""
        return normalize(x.float(), self.weight.float(), None, self.architecture)


class HeadNorm(WeightOnlyNorm):
    """The norm of every head's queries or keys, in their own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension, the width of a head."""
        return super().forward(x).to(x.dtype)


def modulate(normed_PBD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Adaptive layer norm: normed * (1 + scale) + shift."""
    return torch.addcmul(shift_BD, normed_PBD, 1 + scale_BD)


@torch.library.custom_op("bd3lm_scale::dropout_uniforms", mutates_args=())
def dropout_uniforms(shape: Sequence[int], key: Tensor, site: Tensor) -> Tensor:
    """fp32 numbers in [0, 1), a pure function of key and site (int64 scalars on the device of the result).

    On CUDA torch's Philox with the key as seed, each site a stretch of 2^36 numbers of its own: nothing is read on the
    host, and a compiled layer contains it. On the CPU torch's generator.
    """
    if key.is_cuda:
        out = torch.empty(shape, device=key.device)
        return torch.ops.aten._philox_uniform_(out, torch.stack([key, site << _SITE_SHIFT]).view(torch.uint64))
    number, generator = int(site), torch.Generator()
    coordinates = number >> (_SHARD_BITS + 1), number >> _SHARD_BITS & 1, number & (2**_SHARD_BITS - 1)
    generator.manual_seed(derive_key(int(key), "dropout", *coordinates) & (2**63 - 1))
    return torch.rand(tuple(shape), generator=generator)


@dropout_uniforms.register_fake
def _(shape: Sequence[int], key: Tensor, site: Tensor) -> Tensor:
    return torch.empty(shape, device=key.device)


def dropout_site(layer: int, index: int, shard: int) -> int:
    """Number of a place of dropout: index (0 or 1) in a layer, and the shard where ranks hold different rows."""
    return ((layer << 1) + index << _SHARD_BITS) + shard


def keyed_dropout(x: Tensor, rate: float, key: Tensor | None, site: Tensor) -> Tensor:
    """Dropout whose mask is a pure function of (key, site), so recomputation and resumption repeat it.

    Args:
        x: any shape.
        rate: probability of zeroing.
        key: int64 scalar, a function of (seed, step, first position of the micro-batch); None: no dropout.
        site: int64 scalar, see `dropout_site`. Both are on x's device: a number on the host would be part of the
            graph when a layer is compiled, and mean a graph for each.
    """
    if rate == 0.0 or key is None:
        return x
    keep = dropout_uniforms(x.shape, key, site) >= rate
    return x * keep / (1 - rate)


class DiTLayer(TransformerLayer):
    """The block above. The conditioning travels in Megatron's `context`, the dropout key in `context_mask`.

    Both go through activation recomputation as arguments, so a recomputed layer sees its own micro-batch's values.
    """

    config: DenoiserConfig
    dropout_sites: Tensor

    def __init__(self, config: DenoiserConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.uses_adaln:
            self.modulation = nn.Linear(config.cond_dim, 6 * config.hidden_size, dtype=config.params_dtype)
        is_last = self.layer_number == config.num_layers
        self.num_outputs = config.context_length if is_last and config.scores_noisy_half_only else None
        self.self_attention.core_attention.num_queries = self.num_outputs
        shard = self.tp_group.rank() if config.sequence_parallel else 0
        sites = [dropout_site(self.layer_number, index, shard) for index in (0, 1)]
        self.register_buffer("dropout_sites", torch.tensor(sites, device="cpu"), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Sequence[LayerCache] | Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (P, B, D), context (B, C) or None, context_mask the dropout key.

        Megatron's slot for a mask carries the documents (B, L) of packed rows in training, None where there are none,
        and what decoding brings: the cache of each layer.
        """
        dtype = self.config.params_dtype
        seen: Any = attention_mask
        is_training = attention_mask is None or isinstance(attention_mask, Tensor)
        if not is_training:
            seen = seen[self.layer_number - 1]
        key = context_mask if self.training else None
        x = hidden_states
        if context is None:
            shift_a = scale_a = shift_m = scale_m = torch.zeros((), device=x.device)
            gate_a = gate_m = torch.ones((), device=x.device)
        else:
            modulation = self.modulation(context)
            if self.config.sequence_parallel:
                modulation = tensor_parallel.copy_to_tensor_model_parallel_region(modulation)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.float().chunk(6, dim=-1)
        attention_input = modulate(self.input_layernorm(x), shift_a, scale_a).to(dtype)
        attended, _bias = self.self_attention(attention_input, attention_mask=seen, rotary_pos_emb=rotary_pos_emb)
        if self.num_outputs is not None and is_training:
            x = self._first_rows(x, self.num_outputs) if self.config.sequence_parallel else x[: self.num_outputs]
        attended = attended.float() if key is None else self.apply_dropout(attended.float(), key, 0)
        x = torch.addcmul(x, gate_a, attended)
        out, bias = self.mlp(modulate(self.pre_mlp_layernorm(x), shift_m, scale_m).to(dtype))
        out = out.float() if bias is None else out.float() + bias.float()
        out = out if key is None else self.apply_dropout(out, key, 1)
        return torch.addcmul(x, gate_m, out), context

    def _first_rows(self, x: Tensor, count: int) -> Tensor:
        """This rank's shard of the first `count` rows of the sequence, from shards of all of it."""
        size, rank = self.tp_group.size(), self.tp_group.rank()
        held, wanted = len(x), count // size

        def moved(source: int, goal: int) -> int:
            stop = min((source + 1) * held, (goal + 1) * wanted)
            return max(0, stop - max(source * held, goal * wanted))

        sent, received = [moved(rank, r) for r in range(size)], [moved(r, rank) for r in range(size)]
        return tensor_parallel.all_to_all(self.tp_group, x[: sum(sent)], received, sent)

    def apply_dropout(self, x: Tensor, key: Tensor, site: int) -> Tensor:
        """Dropout at this layer's `site`; different rows on each rank under sequence parallelism."""
        return keyed_dropout(x, self.hidden_dropout, key, self.dropout_sites[site])


def layer_spec(arch: Architecture) -> ModuleSpec:
    """Megatron's description of the block: which class fills which slot."""
    attention = SelfAttentionSubmodules(
        linear_qkv=tensor_parallel.ColumnParallelLinear if arch.qkv_bias else ColumnParallelNoBias,
        core_attention=BlockAttention,
        linear_proj=RowParallelNoBias,
        q_layernorm=HeadNorm if arch.qk_norm else IdentityOp,
        k_layernorm=HeadNorm if arch.qk_norm else IdentityOp,
    )
    mlp = MLPSubmodules(linear_fc1=tensor_parallel.ColumnParallelLinear, linear_fc2=RowParallel)
    return ModuleSpec(
        module=DiTLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WeightOnlyNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.arbitrary}, submodules=attention
            ),
            pre_mlp_layernorm=WeightOnlyNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
        ),
    )
