"""A decoder of the Llama and Qwen kind in plain torch, as an oracle: slow, dense, nothing shared with ours.

It has every choice of `model.*` that the paper's DiT (tests/plain_dit.py) does not make. Parameters are a dict with
the names of exported folders (without the prefix `backbone.`). Everything is differentiable with respect to them.

Shapes: B rows, P positions, D width, H query heads, G heads of keys and values, K head width, F inner width, V ids.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.plain_dit import PlainDiT


@dataclass(frozen=True)
class PlainDecoder(PlainDiT):
    """The network as a pure function of its parameters; passes and masks are PlainDiT's.

    Attributes:
        num_kv_heads: G.
        model: the fields of `model.*` that are not the DiT's.
    """

    num_kv_heads: int = 1
    model: dict | None = None

    def _says(self, name, default):
        return (self.model or {}).get(name, default)

    def _run(self, tokens_BP, may_see, position_P, sigma_B, past):
        weights = self.parameters
        x_BPD = weights["vocab_embed.embedding"][tokens_BP]
        cond_BC = self._condition(len(tokens_BP), sigma_B)
        cache = []
        for i in range(self.num_layers):
            layer = {n.removeprefix(f"blocks.{i}."): w for n, w in weights.items() if n.startswith(f"blocks.{i}.")}
            earlier = None if past is None else past[i]
            x_BPD, key_value = self._layer(layer, x_BPD, cond_BC, may_see, position_P, earlier)
            cache.append(key_value)
        h_BPD = self._modulated(
            x_BPD, weights["output_layer.norm_final.weight"], weights, "output_layer.", cond_BC, 0, 2
        )
        logits = h_BPD @ weights["output_layer.linear.weight"].T
        if "output_layer.linear.bias" in weights:
            logits = logits + weights["output_layer.linear.bias"]
        return logits, cache

    def _layer(self, weights, x_BPD, cond_BC, may_see, position_P, past):
        h_BPD = self._modulated(x_BPD, weights["norm1.weight"], weights, "", cond_BC, 0, 6)
        query, key, value = self._heads(weights, h_BPD)
        query, key = self._rotated(query, position_P), self._rotated(key, position_P)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        outputs = []
        for head in range(self.num_heads):
            group = head * self.num_kv_heads // self.num_heads
            scores = query[:, head] @ key[:, group].transpose(1, 2) / math.sqrt(query.shape[-1])
            outputs.append(scores.masked_fill(~may_see, -torch.inf).softmax(-1) @ value[:, group])
        mixed = torch.cat(outputs, dim=-1) @ weights["attn_out.weight"].T
        x_BPD = x_BPD + self._gate(weights, cond_BC, 2) * mixed
        h_BPD = self._modulated(x_BPD, weights["norm2.weight"], weights, "", cond_BC, 3, 6)
        inner = _affine(h_BPD, weights, "mlp.0")
        if self._says("mlp", "gelu") == "swiglu":
            half = inner.shape[-1] // 2
            gate, up = inner[..., :half], inner[..., half:]
            inner = gate / (1 + torch.exp(-gate)) * up
        else:
            inner = F.gelu(inner, approximate="tanh")
        return x_BPD + self._gate(weights, cond_BC, 5) * _affine(inner, weights, "mlp.2"), (key, value)

    def _heads(self, weights, h_BPD):
        """Queries (B, H, P, K), keys and values (B, G, P, K)."""
        flat = _affine(h_BPD, weights, "attn_qkv")
        width = flat.shape[-1] // (self.num_heads + 2 * self.num_kv_heads)
        sizes = [self.num_heads * width, self.num_kv_heads * width, self.num_kv_heads * width]
        query, key, value = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in flat.split(sizes, dim=-1))
        if self._says("qk_norm", False):
            query, key = self._norm(query, weights["q_norm.weight"]), self._norm(key, weights["k_norm.weight"])
        return query, key, value

    def _modulated(self, x_BPD, norm_weight, weights, prefix, cond_BC, first, count):
        normed = self._norm(x_BPD, norm_weight)
        if cond_BC is None:
            return normed
        shift, scale = self._modulation(weights, prefix, cond_BC, count)[first : first + 2]
        return normed * (1 + scale) + shift

    def _gate(self, weights, cond_BC, place):
        return 1.0 if cond_BC is None else self._modulation(weights, "", cond_BC, 6)[place]

    def _modulation(self, weights, prefix, cond_BC, count):
        return list(_affine(cond_BC, weights, f"{prefix}adaLN_modulation")[:, None].chunk(count, dim=2))

    def _norm(self, x, weight):
        eps = self._says("norm_eps", 1e-5)
        if self._says("norm", "layernorm") == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    def _rotated(self, x_BHPK, position_P):
        """Halves paired: (a, b) -> (a cos - b sin, b cos + a sin)."""
        half = x_BHPK.shape[-1] // 2
        angle = position_P.double()[:, None] * torch.tensor([self._frequency(j, half) for j in range(half)])
        cos, sin = angle.cos().to(x_BHPK), angle.sin().to(x_BHPK)
        a, b = x_BHPK[..., :half], x_BHPK[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def _frequency(self, j, half):
        """theta^(-j / half) after scaling, as its papers say it: in wavelengths."""
        frequency, kind = self._says("rope_theta", 10000.0) ** (-j / half), self._says("rope_scaling", "none")
        factor = self._says("rope_factor", 8.0)
        if kind == "linear":
            return frequency / factor
        if kind == "none":
            return frequency
        context = self._says("rope_original_context_length", 8192)
        low, high = self._says("rope_low_freq_factor", 1.0), self._says("rope_high_freq_factor", 4.0)
        wavelength = 2 * math.pi / frequency
        if wavelength > context / low:
            return frequency / factor
        if wavelength < context / high:
            return frequency
        smooth = (context / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / factor + smooth * frequency


def _affine(x, weights, name):
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def decoder_shapes(
    model: dict, vocab_size: int, width: int = 32, num_layers: int = 2, num_heads: int = 4, cond_dim: int = 16
) -> dict[str, tuple[int, ...]]:
    """Names and shapes in exported folders, in their order, for fields of `model.*`."""
    adaln, head = model.get("adaln", True), model.get("head_dim") or width // num_heads
    inner, groups = model.get("ffn_hidden_size") or 4 * width, model.get("num_kv_heads") or num_heads
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (vocab_size, width)}
    if adaln:
        shapes |= {"sigma_map.mlp.0.weight": (cond_dim, 256), "sigma_map.mlp.0.bias": (cond_dim,)}
        shapes |= {"sigma_map.mlp.2.weight": (cond_dim, cond_dim), "sigma_map.mlp.2.bias": (cond_dim,)}
    for i in range(num_layers):
        name, rows = f"blocks.{i}.", (num_heads + 2 * groups) * head
        first = 2 * inner if model.get("mlp") == "swiglu" else inner
        shapes |= {f"{name}norm1.weight": (width,), f"{name}attn_qkv.weight": (rows, width)}
        if model.get("qkv_bias"):
            shapes |= {f"{name}attn_qkv.bias": (rows,)}
        if model.get("qk_norm"):
            shapes |= {f"{name}q_norm.weight": (head,), f"{name}k_norm.weight": (head,)}
        shapes |= {f"{name}attn_out.weight": (width, num_heads * head), f"{name}norm2.weight": (width,)}
        shapes |= {f"{name}mlp.0.weight": (first, width)}
        if model.get("mlp_bias", True):
            shapes |= {f"{name}mlp.0.bias": (first,)}
        shapes |= {f"{name}mlp.2.weight": (width, inner)}
        if model.get("mlp_bias", True):
            shapes |= {f"{name}mlp.2.bias": (width,)}
        if adaln:
            shapes |= {f"{name}adaLN_modulation.weight": (6 * width, cond_dim)}
            shapes |= {f"{name}adaLN_modulation.bias": (6 * width,)}
    shapes |= {"output_layer.norm_final.weight": (width,), "output_layer.linear.weight": (vocab_size, width)}
    if model.get("head_bias", True):
        shapes |= {"output_layer.linear.bias": (vocab_size,)}
    if adaln:
        shapes |= {"output_layer.adaLN_modulation.weight": (2 * width, cond_dim)}
        shapes |= {"output_layer.adaLN_modulation.bias": (2 * width,)}
    return shapes


def random_decoder(shapes: dict[str, tuple[int, ...]], tied: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random float64 parameters of these shapes, none of them zero; a tied head is the embedding itself."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            parameters[name] = 1 + 0.1 * noise
        else:
            parameters[name] = noise / math.sqrt(shape[-1]) if len(shape) == 2 else 0.1 * noise
    if tied:
        parameters["output_layer.linear.weight"] = parameters["vocab_embed.embedding"]
    return parameters
