"""Cached decoding without the training model's machinery: the same function as CachedDecoder, a third of the time.

Decoding a block is a few hundred small operations, and in Megatron's modules most of the time goes to calling them.
Here a layer is written out once more in plain operations on the model's own weights. The network is not told the time,
so its modulation is a constant: scale and shift are folded into the layer norms. The last layer computes queries, and
all that follows them, only at the places that are asked for. For one tensor-parallel rank; the tests hold it to
CachedDecoder's figures.

Shapes: B rows, S tokens in a block, T tokens of a call, I scored positions, D width, H query heads, G heads of keys and
values, K head width, V ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3lm_scale.model.denoiser import Denoiser, named_parameters
from bd3lm_scale.model.functions import activate, normalize
from bd3lm_scale.model.head import linear_fp32
from bd3lm_scale.model.parameters import Architecture
from bd3lm_scale.model.rotary import rotary_angles

_PREFILL = 1024


@dataclass(frozen=True)
class _FoldedNorm:
    """Norm and modulation in one: norm(x) * weight + shift."""

    weight: Tensor
    shift: Tensor | None
    arch: Architecture

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return normalize(x.float(), self.weight, self.shift, self.arch).to(dtype)


@dataclass(frozen=True)
class _Layer:
    """One layer's weights; what a network does not have is None (a gate: 1)."""

    norm_attention: _FoldedNorm
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: _FoldedNorm | None
    k_norm: _FoldedNorm | None
    projection: Tensor
    gate_attention: Tensor | None
    norm_mlp: _FoldedNorm
    fc1: Tensor
    fc1_bias: Tensor | None
    fc2: Tensor
    fc2_bias: Tensor | None
    gate_mlp: Tensor | None


def _add(x: Tensor, gate: Tensor | None, update: Tensor) -> Tensor:
    return x + update.float() if gate is None else torch.addcmul(x, gate, update.float())


class FastWeights:
    """A whole model's weights prepared for decoding; shared by all decoders of it.

    Args:
        model: one pipeline stage, one tensor-parallel rank.

    Raises:
        ValueError: the model is not whole here, or has parameters that this decoder would not use.
    """

    @torch.no_grad()
    def __init__(self, model: Denoiser) -> None:
        config = model.config
        if config.tensor_model_parallel_size != 1 or config.pipeline_model_parallel_size != 1:
            raise ValueError("decoding without Megatron needs the whole model on one rank; use CachedDecoder")
        if config.uses_adaln and config.time_conditioning:
            raise ValueError("a network that reads the time has no constant modulation; use CachedDecoder")
        if config.shift_targets:
            raise ValueError("decoding without Megatron reads predictions at their own position; use CachedDecoder")
        self.arch = config.architecture
        self.device = model.embedding.weight.device
        self.dtype = config.params_dtype
        conditioning = model.condition(torch.zeros(1, device=self.device))
        self._unused = {name: parameter.detach() for name, parameter in named_parameters([model])}
        self.embedding = self._take("embedding.weight")
        layers: list[Any] = list(model.decoder.layers)
        modulations = [None if conditioning is None else layer.modulation(conditioning) for layer in layers]
        self.layers = [self._layer(f"decoder.layers.{i}.", *self._parts(m, 6)) for i, m in enumerate(modulations)]
        shift, scale = self._parts(None if conditioning is None else model.head.modulation(conditioning), 2)
        self.head_norm = self._norm("head.norm.weight", shift, scale)
        output = self._take_if_there("head.output.weight")
        output = self.embedding if output is None else output
        self.output = output if output.is_cuda else output.float()  # widened once, not in every call
        bias = self._take_if_there("head.output.bias")
        bias = self.output.new_zeros(len(self.output)) if bias is None else bias
        self.output_bias = bias.masked_fill(model.head.get_buffer("is_excluded"), float("-inf"))
        constant = ("time_embedding.", "head.modulation.")  # what was computed above, once for all
        left = [n for n in self._unused if not n.startswith(constant) and ".modulation." not in n]
        if left:
            raise ValueError(f"decoding without Megatron does not know {', '.join(left[:3])}; use CachedDecoder")

    def _take(self, name: str) -> Tensor:
        return self._unused.pop(name)

    def _take_if_there(self, name: str) -> Tensor | None:
        return self._unused.pop(name, None)

    def _norm(self, name: str, shift: Tensor | None = None, scale: Tensor | None = None) -> _FoldedNorm:
        weight = self._take(name).float()
        return _FoldedNorm(weight if scale is None else weight * (1 + scale), shift, self.arch)

    @staticmethod
    def _parts(modulation: Tensor | None, count: int) -> Sequence[Tensor | None]:
        return [None] * count if modulation is None else modulation.float()[0].chunk(count)

    def _layer(self, name: str, *modulation: Tensor | None) -> _Layer:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        attention, mlp = f"{name}self_attention.", f"{name}mlp."
        return _Layer(
            norm_attention=self._norm(f"{name}input_layernorm.weight", shift_a, scale_a),
            qkv=self._take(f"{attention}linear_qkv.weight"),
            qkv_bias=self._take_if_there(f"{attention}linear_qkv.bias"),
            q_norm=self._norm(f"{attention}q_layernorm.weight") if self.arch.qk_norm else None,
            k_norm=self._norm(f"{attention}k_layernorm.weight") if self.arch.qk_norm else None,
            projection=self._take(f"{attention}linear_proj.weight"),
            gate_attention=gate_a,
            norm_mlp=self._norm(f"{name}pre_mlp_layernorm.weight", shift_m, scale_m),
            fc1=self._take(f"{mlp}linear_fc1.weight"),
            fc1_bias=self._take_if_there(f"{mlp}linear_fc1.bias"),
            fc2=self._take(f"{mlp}linear_fc2.weight"),
            fc2_bias=self._take_if_there(f"{mlp}linear_fc2.bias"),
            gate_mlp=gate_m,
        )


class FastDecoder:
    """BlockDenoiser (bd3lm) and NextToken (ar) of the samplers; see CachedDecoder for the meaning of all arguments.

    Args:
        weights: of the model.
        block_size: S; 1 for ar.
        batch_size: B.
        window: tokens of context attended to, the current block included; None: no limit.
        cache_dtype: dtype of cached keys and values.
    """

    def __init__(
        self,
        weights: FastWeights,
        block_size: int,
        batch_size: int,
        window: int | None = None,
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        if window is not None and (window < block_size or window % block_size):
            raise ValueError(f"sampling.window ({window}): use a multiple of the block size {block_size}")
        self.weights, self.block_size, self.window = weights, block_size, window
        capacity = 2 * window if window is not None else max(256, block_size)
        shape = (batch_size, weights.arch.kv_heads, capacity, weights.arch.head_width)
        self._keys = [torch.empty(shape, dtype=cache_dtype, device=weights.device) for _ in weights.layers]
        self._values = [torch.empty(shape, dtype=cache_dtype, device=weights.device) for _ in weights.layers]
        self._cached = 0  # tokens in the cache
        self._start = 0  # absolute position of the next token
        self._rotary: tuple[tuple[int, int], Tensor, Tensor] | None = None

    @property
    def vocab_size(self) -> int:
        """V, ids of the logits."""
        return self.weights.arch.vocab_size

    @property
    def length(self) -> int:
        """Committed tokens per row."""
        return self._start

    @torch.no_grad()
    def denoise(self, block_BS: Tensor, scored_BI: Tensor | None = None) -> Tensor:
        """float32 logits (B, S, V), or (B, I, V) at int64 scored_BI; mask and padding ids are -inf."""
        return self._logits(self._run(self._embed(block_BS), scored_BI, commits=False))

    @torch.no_grad()
    def denoise_simplex(self, simplex_BSV: Tensor) -> Tensor:
        """float32 logits (B, S, V) of a block given as distributions over ids: each reads as its mean embedding."""
        embedding = self.weights.embedding[: self.vocab_size].float()
        mixed_BSD = simplex_BSV.to(embedding.device, torch.float32) @ embedding
        return self._logits(self._run(mixed_BSD, None, commits=False))

    @torch.no_grad()
    def commit(self, tokens_BT: Tensor) -> None:
        """Append clean tokens, a multiple of S, to the context."""
        if tokens_BT.shape[1] % self.block_size:
            raise ValueError(f"{tokens_BT.shape[1]} tokens are not whole blocks of {self.block_size}")
        self._append(tokens_BT)

    @torch.no_grad()
    def feed(self, tokens_BT: Tensor) -> Tensor:
        """Append tokens of an autoregressive model; float32 logits (B, V) of what follows the last one."""
        return self._logits(self._append(tokens_BT)[:, -1])

    def keep_rows(self, index: Tensor | Sequence[int]) -> None:
        """Drop all rows but these."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.weights.device)
        self._keys = [key[index] for key in self._keys]
        self._values = [value[index] for value in self._values]

    def _append(self, tokens_BT: Tensor) -> Tensor:
        """Commit in pieces that fit the cache; hidden states of the last piece."""
        piece = self.window or max(self.block_size, _PREFILL // self.block_size * self.block_size)
        pieces = tokens_BT.to(self.weights.device).split(piece, dim=1)
        return [self._run(self._embed(tokens), None, commits=True) for tokens in pieces][-1]

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        """fp32 embeddings (B, T, D)."""
        return F.embedding(tokens_BT.to(self.weights.device), self.weights.embedding).float()

    def _run(self, x: Tensor, scored_BI: Tensor | None, commits: bool) -> Tensor:
        """fp32 hidden states (B, T, D), or (B, I, D) at the scored places, of embeddings x placed after the context."""
        weights, new = self.weights, x.shape[1]
        self._make_room(new)
        end = self._cached + new
        first, mask = self._visible(new)
        for i, layer in enumerate(weights.layers):
            normed = layer.norm_attention(x, weights.dtype)
            query, key, value = self._heads(F.linear(normed, layer.qkv, layer.qkv_bias), layer)
            self._keys[i][:, :, self._cached : end] = key.transpose(1, 2)
            self._values[i][:, :, self._cached : end] = value.transpose(1, 2)
            if scored_BI is not None and i == len(weights.layers) - 1:
                index = scored_BI.to(x.device)[:, :, None]
                x = x.gather(1, index.expand(-1, -1, x.shape[2]))
                query = query.gather(1, index[..., None].expand(-1, -1, *query.shape[2:]))
            keys, values = self._keys[i][:, :, first:end], self._values[i][:, :, first:end]
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2), keys.to(query.dtype), values.to(query.dtype), attn_mask=mask,
                enable_gqa=query.shape[2] != keys.shape[1],
            )  # fmt: skip
            x = _add(x, layer.gate_attention, F.linear(attended.transpose(1, 2).flatten(2), layer.projection))
            inner = activate(F.linear(layer.norm_mlp(x, weights.dtype), layer.fc1, layer.fc1_bias), weights.arch)
            x = _add(x, layer.gate_mlp, F.linear(inner, layer.fc2, layer.fc2_bias))
        if commits:
            self._cached, self._start = end, self._start + new
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        weights = self.weights
        normed = weights.head_norm(hidden, weights.dtype)
        logits = linear_fp32(normed.flatten(0, -2), weights.output, weights.output_bias)
        return logits.unflatten(0, normed.shape[:-1])[..., : weights.arch.vocab_size]

    def _heads(self, qkv: Tensor, layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, H, K) and keys, and values (B, T, G, K); rows by group: its queries, key, value."""
        arch = self.weights.arch
        size, width = arch.num_heads // arch.kv_heads, arch.head_width
        heads = qkv.unflatten(2, (arch.kv_heads, size + 2, width))
        turned = heads[..., : size + 1, :]
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = turned.split([size, 1], dim=3)
            turned = torch.cat([layer.q_norm(query, qkv.dtype), layer.k_norm(key, qkv.dtype)], dim=3)
        cos, sin = self._angles(qkv.shape[1])
        turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), sin)
        return turned[..., :size, :].flatten(2, 3), turned[..., size, :], heads[..., size + 1, :]

    def _visible(self, new: int) -> tuple[int, Tensor | None]:
        """First cached token that any new one sees, and a mask over the rest where they differ."""
        first = 0 if self.window is None else max(0, self._cached - (self.window - self.block_size))
        if new == self.block_size:
            return first, None  # one block: all of it sees the same
        position = torch.arange(first - self._cached, new, device=self.weights.device) + self._start
        block = position // self.block_size
        distance = block[self._cached - first :, None] - block[None, :]
        mask = distance >= 0
        return first, mask if self.window is None else mask & (distance < self.window // self.block_size)

    def _angles(self, new: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, 1, K); the sign of "rotate half" is in the sine. The same for all calls of a block."""
        place = (self._start, new)
        if self._rotary is None or self._rotary[0] != place:
            position = torch.arange(self._start, self._start + new, device=self.weights.device)
            angles = rotary_angles(position, self.weights.arch.head_width, self.weights.arch.rope)
            sin = angles.sin()
            sin[..., : self.weights.arch.head_width // 2] *= -1
            self._rotary = (place, angles.cos().to(self.weights.dtype), sin.to(self.weights.dtype))
        return self._rotary[1], self._rotary[2]

    def _make_room(self, new: int) -> None:
        """Move what can still be seen to the front of a full cache, or enlarge it where there is no window."""
        capacity = self._keys[0].shape[2]
        if self._cached + new <= capacity:
            return
        if self.window is None:
            extra = max(capacity, self._cached + new - capacity)
            self._keys = [F.pad(key, (0, 0, 0, extra)) for key in self._keys]
            self._values = [F.pad(value, (0, 0, 0, extra)) for value in self._values]
            return
        kept = min(self._cached, self.window - self.block_size)
        for buffer in (*self._keys, *self._values):
            buffer[:, :, :kept] = buffer[:, :, self._cached - kept : self._cached].clone()
        self._cached = kept
