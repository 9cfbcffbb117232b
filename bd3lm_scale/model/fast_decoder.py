"""Cached decoding without the training model's machinery: the same function as CachedDecoder, a third of the time.

Decoding a block is a few hundred small operations, and in Megatron's modules most of the time goes to calling them.
Here a layer is written out once more in plain operations on the model's own weights. The network is not told the time,
so its modulation is a constant: scale and shift are folded into the layer norms. The last layer computes queries, and
all that follows them, only at the places that are asked for. For one tensor-parallel rank; the tests hold it to
CachedDecoder's figures.

Shapes: B rows, S tokens in a block, T tokens of a call, I scored places, D width, H heads, K head width, V ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3lm_scale.model.denoiser import Denoiser
from bd3lm_scale.model.embedding import rotary_angles
from bd3lm_scale.model.head import linear_fp32

_EPS = 1e-5
_PREFILL = 1024


@dataclass(frozen=True)
class _Norm:
    """Layer norm and modulation in one: (x - mean) / std * weight + shift."""

    weight: Tensor
    shift: Tensor | None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.shift, _EPS).to(dtype)


@dataclass(frozen=True)
class _Layer:
    """One layer's weights; gates are None without adaLN (1)."""

    norm_attention: _Norm
    qkv: Tensor
    projection: Tensor
    gate_attention: Tensor | None
    norm_mlp: _Norm
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    gate_mlp: Tensor | None


def _norm(weight: Tensor, shift: Tensor | None, scale: Tensor | None) -> _Norm:
    weight = weight.detach().float()
    return _Norm(weight, None) if shift is None or scale is None else _Norm(weight * (1 + scale), shift)


def _add(x: Tensor, gate: Tensor | None, update: Tensor) -> Tensor:
    return x + update.float() if gate is None else torch.addcmul(x, gate, update.float())


class FastWeights:
    """A whole model's weights prepared for decoding; shared by all decoders of it.

    Args:
        model: one pipeline stage, one tensor-parallel rank.
    """

    @torch.no_grad()
    def __init__(self, model: Denoiser) -> None:
        config = model.config
        if config.tensor_model_parallel_size != 1 or config.pipeline_model_parallel_size != 1:
            raise ValueError("decoding without Megatron needs the whole model on one rank; use CachedDecoder")
        if config.uses_adaln and config.time_conditioning:
            raise ValueError("a network that reads the time has no constant modulation; use CachedDecoder")
        self.device = model.embedding.weight.device
        self.dtype = config.params_dtype
        self.num_heads, self.head_width = config.num_attention_heads, config.head_width
        self.rope = config.architecture.rope
        self.vocab_size = config.vocab_size
        self.embedding = model.embedding.weight.detach()
        conditioning = model.condition(torch.zeros(1, device=self.device))
        self.layers = [self._layer(layer, conditioning) for layer in model.decoder.layers]
        shift, scale = (None, None)
        if conditioning is not None:
            shift, scale = model.head.modulation(conditioning).float()[0].chunk(2)
        self.head_norm = _norm(model.head.norm.weight, shift, scale)
        tied = model.tied_weight()
        output = cast(Tensor, model.head.output.weight if tied is None else tied).detach()
        self.output = output if output.is_cuda else output.float()  # widened once, not in every call
        bias = cast(Tensor, model.head.output.bias).detach()
        self.output_bias = bias.masked_fill(cast(Tensor, model.head.is_excluded), float("-inf"))

    @staticmethod
    def _layer(layer: Any, conditioning: Tensor | None) -> _Layer:
        parts: Sequence[Tensor | None] = [None] * 6
        if conditioning is not None:
            parts = layer.modulation(conditioning).float()[0].chunk(6)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        attention, mlp = layer.self_attention, layer.mlp
        return _Layer(
            norm_attention=_norm(layer.input_layernorm.weight, shift_a, scale_a),
            qkv=attention.linear_qkv.weight.detach(),
            projection=attention.linear_proj.weight.detach(),
            gate_attention=gate_a,
            norm_mlp=_norm(layer.pre_mlp_layernorm.weight, shift_m, scale_m),
            fc1=mlp.linear_fc1.weight.detach(),
            fc1_bias=mlp.linear_fc1.bias.detach(),
            fc2=mlp.linear_fc2.weight.detach(),
            fc2_bias=mlp.linear_fc2.bias.detach(),
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
        shape = (batch_size, weights.num_heads, capacity, weights.head_width)
        self._keys = [torch.empty(shape, dtype=cache_dtype, device=weights.device) for _ in weights.layers]
        self._values = [torch.empty(shape, dtype=cache_dtype, device=weights.device) for _ in weights.layers]
        self._cached = 0  # tokens in the cache
        self._start = 0  # absolute position of the next token
        self._rotary: tuple[tuple[int, int], Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Committed tokens per row."""
        return self._start

    @torch.no_grad()
    def denoise(self, block_BS: Tensor, scored_BI: Tensor | None = None) -> Tensor:
        """float32 logits (B, S, V), or (B, I, V) at int64 scored_BI; mask and padding ids are -inf."""
        return self._logits(self._run(block_BS.to(self.weights.device), scored_BI, commits=False))

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
        return [self._run(tokens, None, commits=True) for tokens in pieces][-1]

    def _run(self, tokens_BT: Tensor, scored_BI: Tensor | None, commits: bool) -> Tensor:
        """fp32 hidden states (B, T, D), or (B, I, D) at the scored places, of tokens placed after the context."""
        weights, new = self.weights, tokens_BT.shape[1]
        self._make_room(new)
        end = self._cached + new
        first, mask = self._visible(new)
        cos, sin = self._angles(new)
        x = F.embedding(tokens_BT, weights.embedding).float()
        for i, layer in enumerate(weights.layers):
            normed = layer.norm_attention(x, weights.dtype)
            heads = F.linear(normed, layer.qkv).unflatten(2, (weights.num_heads, 3, weights.head_width))
            rotated = heads[..., :2, :]
            rotated = torch.addcmul(rotated * cos, rotated.roll(weights.head_width // 2, -1), sin)
            query = rotated[..., 0, :]
            self._keys[i][:, :, self._cached : end] = rotated[..., 1, :].transpose(1, 2)
            self._values[i][:, :, self._cached : end] = heads[..., 2, :].transpose(1, 2)
            if scored_BI is not None and i == len(weights.layers) - 1:
                index = scored_BI.to(x.device)[:, :, None]
                x = x.gather(1, index.expand(-1, -1, x.shape[2]))
                query = query.gather(1, index[..., None].expand(-1, -1, *query.shape[2:]))
            keys, values = self._keys[i][:, :, first:end], self._values[i][:, :, first:end]
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2), keys.to(query.dtype), values.to(query.dtype), attn_mask=mask
            )
            x = _add(x, layer.gate_attention, F.linear(attended.transpose(1, 2).flatten(2), layer.projection))
            inner = F.gelu(F.linear(layer.norm_mlp(x, weights.dtype), layer.fc1, layer.fc1_bias), approximate="tanh")
            x = _add(x, layer.gate_mlp, F.linear(inner, layer.fc2, layer.fc2_bias))
        if commits:
            self._cached, self._start = end, self._start + new
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        weights = self.weights
        normed = weights.head_norm(hidden, weights.dtype)
        logits = linear_fp32(normed.flatten(0, -2), weights.output, weights.output_bias)
        return logits.unflatten(0, normed.shape[:-1])[..., : weights.vocab_size]

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
            angles = rotary_angles(position, self.weights.head_width, self.weights.rope)
            sin = angles.sin()
            sin[..., : self.weights.head_width // 2] *= -1
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
