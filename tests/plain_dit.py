"""The paper's DiT written down once more in plain torch, as an oracle: slow, dense, single-device, no engine.

Parameters are a dict with the names of the published checkpoints (without the prefix `backbone.`). Everything is
differentiable with respect to them.

Shapes: B rows, L tokens, P positions read, S tokens in a block, D width, H heads, K head width, C conditioning, V ids.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LayerCache = list[tuple[Tensor, Tensor]]


def random_parameters(
    vocab_size: int,
    hidden_size: int = 32,
    num_layers: int = 2,
    cond_dim: int = 16,
    seed: int = 0,
    is_ar: bool = False,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Random parameters of which none is zero (adaLN and head included)."""
    shapes = parameter_shapes(vocab_size, hidden_size, num_layers, cond_dim, is_ar)
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            value = 1.0 + 0.1 * noise
        elif name == "vocab_embed.embedding":
            value = noise
        else:
            value = scale * noise / math.sqrt(shape[-1]) if len(shape) == 2 else 0.1 * noise
        parameters[name] = value.to(dtype)
    return parameters


def parameter_shapes(
    vocab_size: int, hidden_size: int, num_layers: int, cond_dim: int, is_ar: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published order."""
    width, cond = hidden_size, cond_dim
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (vocab_size, width)}
    if not is_ar:
        shapes |= {"sigma_map.mlp.0.weight": (cond, 256), "sigma_map.mlp.0.bias": (cond,)}
        shapes |= {"sigma_map.mlp.2.weight": (cond, cond), "sigma_map.mlp.2.bias": (cond,)}
    for i in range(num_layers):
        layer: dict[str, tuple[int, ...]] = {
            "norm1.weight": (width,),
            "attn_qkv.weight": (3 * width, width),
            "attn_out.weight": (width, width),
            "norm2.weight": (width,),
            "mlp.0.weight": (4 * width, width),
            "mlp.0.bias": (4 * width,),
            "mlp.2.weight": (width, 4 * width),
            "mlp.2.bias": (width,),
        }
        if not is_ar:
            layer |= {"adaLN_modulation.weight": (6 * width, cond), "adaLN_modulation.bias": (6 * width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= {"output_layer.norm_final.weight": (width,)}
    shapes |= {"output_layer.linear.weight": (vocab_size, width), "output_layer.linear.bias": (vocab_size,)}
    if not is_ar:
        shapes |= {"output_layer.adaLN_modulation.weight": (2 * width, cond)}
        shapes |= {"output_layer.adaLN_modulation.bias": (2 * width,)}
    return shapes


@dataclass(frozen=True)
class PlainDiT:
    """The network as a pure function of its parameters.

    Attributes:
        parameters: tensors by published name.
        num_heads: H.
        time_conditioning: False replaces sigma by 0, as bd3lm and mdlm do.
    """

    parameters: dict[str, Tensor]
    num_heads: int
    time_conditioning: bool = False

    @property
    def num_layers(self) -> int:
        return sum(name.endswith(".attn_qkv.weight") for name in self.parameters)

    def logits(
        self, tokens_BP: Tensor, may_see_PP: Tensor, position_P: Tensor, sigma_B: Tensor | None = None
    ) -> Tensor:
        """Logits (B, P, V) under a dense mask, True = attend."""
        return self._run(tokens_BP, may_see_PP, position_P, sigma_B, past=None)[0]

    def training_logits(
        self, noisy_BL: Tensor, clean_BL: Tensor, block_size: int, sigma_B: Tensor | None = None
    ) -> Tensor:
        """One vectorized pass over [noisy ; clean]: logits (B, L, V) of the noisy half."""
        length = clean_BL.shape[1]
        position_P = torch.arange(length).repeat(2)
        mask = block_diffusion_mask(length, block_size)
        return self.logits(torch.cat([noisy_BL, clean_BL], 1), mask, position_P, sigma_B)[:, :length]

    def two_pass_logits(
        self, noisy_BL: Tensor, clean_BL: Tensor, block_size: int, sigma_B: Tensor | None = None
    ) -> Tensor:
        """The paper's Algorithm 1: a clean pass stores keys and values, each noisy block then reads the earlier ones.

        The blocks of the noisy pass are run one by one, so that nothing of the vectorized mask is shared.
        """
        length = clean_BL.shape[1]
        block_L = torch.arange(length) // block_size
        block_causal = block_L[:, None] >= block_L[None, :]
        _, cache = self._run(clean_BL, block_causal, torch.arange(length), sigma_B, past=None)
        parts = []
        for start in range(0, length, block_size):
            past = [(key[:, :, :start], value[:, :, :start]) for key, value in cache]
            everything = torch.ones(block_size, start + block_size, dtype=torch.bool)
            place = torch.arange(start, start + block_size)
            parts.append(self._run(noisy_BL[:, start : start + block_size], everything, place, sigma_B, past)[0])
        return torch.cat(parts, 1)

    def full_logits(self, tokens_BL: Tensor, sigma_B: Tensor | None = None) -> Tensor:
        """Everybody sees everybody (mdlm, sedd)."""
        length = tokens_BL.shape[1]
        return self.logits(tokens_BL, torch.ones(length, length, dtype=torch.bool), torch.arange(length), sigma_B)

    def causal_logits(self, tokens_BL: Tensor) -> Tensor:
        """Plain causal attention (ar)."""
        length = tokens_BL.shape[1]
        return self.logits(tokens_BL, torch.ones(length, length, dtype=torch.bool).tril(), torch.arange(length))

    def _run(
        self,
        tokens_BP: Tensor,
        may_see: Tensor,
        position_P: Tensor,
        sigma_B: Tensor | None,
        past: LayerCache | None,
    ) -> tuple[Tensor, LayerCache]:
        weights = self.parameters
        x_BPD = weights["vocab_embed.embedding"][tokens_BP]
        cond_BC = self._condition(len(tokens_BP), sigma_B)
        cache: LayerCache = []
        for i in range(self.num_layers):
            layer = {n.removeprefix(f"blocks.{i}."): w for n, w in weights.items() if n.startswith(f"blocks.{i}.")}
            earlier = past[i] if past is not None else None
            x_BPD, key_value = self._layer(layer, x_BPD, cond_BC, may_see, position_P, earlier)
            cache.append(key_value)
        shift, scale = _modulation(weights, "output_layer.", cond_BC, 2)
        h_BPD = _norm(x_BPD, weights["output_layer.norm_final.weight"]) * (1 + scale) + shift
        return F.linear(h_BPD, weights["output_layer.linear.weight"], weights["output_layer.linear.bias"]), cache

    def _condition(self, batch: int, sigma_B: Tensor | None) -> Tensor | None:
        weights = self.parameters
        if "sigma_map.mlp.0.weight" not in weights:
            return None
        dtype = weights["sigma_map.mlp.0.weight"].dtype
        if sigma_B is None or not self.time_conditioning:
            sigma_B = torch.zeros(batch)
        frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        angle = sigma_B.double()[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], 1).to(dtype)
        hidden = F.silu(F.linear(features, weights["sigma_map.mlp.0.weight"], weights["sigma_map.mlp.0.bias"]))
        return F.silu(F.linear(hidden, weights["sigma_map.mlp.2.weight"], weights["sigma_map.mlp.2.bias"]))

    def _layer(
        self,
        weights: dict[str, Tensor],
        x_BPD: Tensor,
        cond_BC: Tensor | None,
        may_see: Tensor,
        position_P: Tensor,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(weights, "", cond_BC, 6)
        batch, length, width = x_BPD.shape
        h_BPD = _norm(x_BPD, weights["norm1.weight"]) * (1 + scale1) + shift1
        qkv = F.linear(h_BPD, weights["attn_qkv.weight"]).reshape(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, P, K)
        query, key = _rotate(query, position_P), _rotate(key, position_P)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        attended = scores.masked_fill(~may_see, -torch.inf).softmax(-1) @ value
        mixed = F.linear(attended.transpose(1, 2).reshape(batch, length, width), weights["attn_out.weight"])
        x_BPD = x_BPD + gate1 * mixed
        h_BPD = _norm(x_BPD, weights["norm2.weight"]) * (1 + scale2) + shift2
        hidden = F.gelu(F.linear(h_BPD, weights["mlp.0.weight"], weights["mlp.0.bias"]), approximate="tanh")
        x_BPD = x_BPD + gate2 * F.linear(hidden, weights["mlp.2.weight"], weights["mlp.2.bias"])
        return x_BPD, (key, value)


def block_diffusion_mask(length: int, block_size: int) -> Tensor:
    """(2L, 2L) mask of [noisy ; clean], written as the union of the paper's three parts."""
    index = torch.arange(2 * length)
    clean, block = index >= length, (index % length) // block_size
    clean_q, clean_k, block_q, block_k = clean[:, None], clean[None, :], block[:, None], block[None, :]
    own_block = (clean_q == clean_k) & (block_q == block_k)
    offset_causal = ~clean_q & clean_k & (block_q > block_k)
    block_causal = clean_q & clean_k & (block_q >= block_k)
    return own_block | offset_causal | block_causal


def _modulation(weights: dict[str, Tensor], prefix: str, cond_BC: Tensor | None, parts: int) -> list[Tensor]:
    """Shift, scale[, gate, ...] as (B, 1, D); without conditioning shift 0, scale 0, gate 1."""
    if cond_BC is None:
        zero, one = torch.zeros(()), torch.ones(())
        return [zero, zero] if parts == 2 else [zero, zero, one, zero, zero, one]
    flat = F.linear(cond_BC, weights[prefix + "adaLN_modulation.weight"], weights[prefix + "adaLN_modulation.bias"])
    return list(flat[:, None].chunk(parts, dim=2))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, eps=1e-5)


def _rotate(x_BHPK: Tensor, position_P: Tensor) -> Tensor:
    """Rotary embedding, halves paired: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    width = x_BHPK.shape[-1]
    frequency = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = (position_P.double()[:, None] * frequency).repeat(1, 2)
    first, second = x_BHPK.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_BHPK * angle.cos().to(x_BHPK) + turned * angle.sin().to(x_BHPK)
