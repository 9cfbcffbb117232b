"""The layers of the exported BD3-LM models; depends on torch only.

Parameter names are those of the published checkpoints; what differs from the published network follows the fields
`norm`, `mlp`, `n_kv_heads`, `head_dim`, `qk_norm`, `rope` and the biases of the configuration.

Shapes: B rows, P positions, Q queries, J keys, D width, C conditioning width, H heads (fewer of keys and values where
groups share them), K head width, F inner width of the MLP, V ids including the mask.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def choose(field, value, choices):
    """What a field of the configuration names; ValueError where this code does not know it."""
    if value not in choices:
        raise ValueError(f"{field} ({value}): unknown to this code; use {' or '.join(choices)}")
    return choices[value]


NORMS = {"layernorm": F.layer_norm, "rmsnorm": F.rms_norm}


class Norm(nn.Module):
    """Layer norm or RMS norm in float32 with a weight and no bias; returns float32."""

    def __init__(self, config, width):
        super().__init__()
        self.function, self.eps = choose("norm", config.norm, NORMS), config.norm_eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        """Normalize the last dimension."""
        return self.function(x.float(), x.shape[-1:], eps=self.eps) * self.weight.float()


class SwiGLU(nn.Module):
    """Gate and value (..., 2F) to silu(gate) * value (..., F)."""

    def forward(self, x):
        """Elementwise."""
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


ACTIVATIONS = {
    "gelu": (1, lambda: nn.GELU(approximate="tanh")),
    "swiglu": (2, SwiGLU),
}
"""Of each kind of MLP: how many inner widths the first layer has, and the activation."""


def llama3(frequency, rope):
    """Frequencies of few turns in the original context are divided by the factor, those of many kept."""
    turns = rope["original_context_length"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / rope["factor"])


SCALINGS = {"none": lambda frequency, _: frequency, "linear": lambda f, rope: f / rope["factor"], "llama3": llama3}


class Rotary(nn.Module):
    """Rotary position angles, half-split (NeoX) layout."""

    def __init__(self, config):
        super().__init__()
        self.head_width, self.rope = config.head_dim, config.rope
        # In published checkpoints, so in ours. Never read: loaders may round it to bfloat16.
        self.register_buffer("inv_freq", self.frequencies("cpu").float())

    def frequencies(self, device):
        """theta^(-2j/K), slowed down where the configuration says so; float64 where the device has it."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        exponent = torch.arange(0, self.head_width, 2, device=device, dtype=dtype) / self.head_width
        scale = choose("rope.scaling", self.rope["scaling"], SCALINGS)
        return scale(self.rope["theta"] ** -exponent, self.rope)

    def forward(self, position_P):
        """Cosines and sines, float32 (P, K) each."""
        frequency = self.frequencies(position_P.device)
        angle = torch.outer(position_P.to(frequency.dtype), frequency)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().float(), angle.sin().float()


def rotate(x_BHPK, cos_PK, sin_PK):
    """Rotate queries or keys, in float32."""
    x = x_BHPK.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos_PK + torch.cat([-second, first], dim=-1) * sin_PK).to(x_BHPK.dtype)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: modulations (each block begins as the identity) and the head."""


def project(linear, x):
    """A linear layer in its own dtype, result in float32 (the residual stream is float32 in every dtype)."""
    return linear(x.to(linear.weight.dtype)).float()


class DiTBlock(nn.Module):
    """Attention and MLP with adaptive layer norm (paper, Appendix C); without it for autoregressive models."""

    def __init__(self, config, index):
        super().__init__()
        width, inner, head = config.hidden_dim, config.ffn_hidden_size, config.head_dim
        self.index = index
        self.heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
        self.dropout = config.dropout
        self.norm1 = Norm(config, width)
        self.attn_qkv = nn.Linear(width, sum(self.heads) * head, bias=config.qkv_bias)
        self.q_norm = Norm(config, head) if config.qk_norm else None
        self.k_norm = Norm(config, head) if config.qk_norm else None
        self.attn_out = nn.Linear(config.n_heads * head, width, bias=False)
        self.norm2 = Norm(config, width)
        widths, activation = choose("mlp", config.mlp, ACTIVATIONS)
        self.mlp = nn.Sequential(
            nn.Linear(width, widths * inner, bias=config.mlp_bias),
            activation(),
            nn.Linear(inner, width, bias=config.mlp_bias),
        )
        if config.adaln:
            self.adaLN_modulation = ZeroLinear(config.cond_dim, 6 * width)

    def forward(self, x_BPD, cond_BC, rotation, visible, cache=None, commit=False):
        """One block; `rotation` is (cos, sin), `visible` a bool mask that broadcasts to (B, H, Q, J), or None."""
        if cond_BC is None:
            shift1 = scale1 = shift2 = scale2 = 0.0
            gate1 = gate2 = 1.0
        else:
            modulation = project(self.adaLN_modulation, cond_BC)[:, None]
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h_BPD = self.attend(self.norm1(x_BPD) * (1 + scale1) + shift1, rotation, visible, cache, commit)
        x_BPD = x_BPD + gate1 * F.dropout(h_BPD, self.dropout, self.training)
        h_BPD = (self.norm2(x_BPD) * (1 + scale2) + shift2).to(self.attn_out.weight.dtype)
        return x_BPD + gate2 * F.dropout(self.mlp(h_BPD).float(), self.dropout, self.training)

    def attend(self, h_BPD, rotation, visible, cache, commit):
        """Multi-head attention over the given positions and the cache."""
        qkv = self.attn_qkv(h_BPD.to(self.attn_qkv.weight.dtype))
        heads_BHPK = qkv.unflatten(-1, (sum(self.heads), -1)).transpose(1, 2)
        q, k, v = heads_BHPK.split(self.heads, dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.extend(self.index, k, v, commit)
        # a group of query heads shares each head of keys and values
        is_grouped = q.shape[1] != k.shape[1]
        out_BHPK = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=is_grouped)
        return project(self.attn_out, out_BHPK.transpose(1, 2).flatten(2))


class TimestepEmbedder(nn.Module):
    """Noise level (B,) to a conditioning vector (B, C)."""

    num_features = 256

    def __init__(self, cond_dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.num_features, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma_B):
        """Sinusoidal features through two layers."""
        half = self.num_features // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=sigma_B.device, dtype=torch.float32) / half)
        angle = sigma_B[:, None].float() * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype)).float()


class Embedding(nn.Module):
    """Token embedding; a bare parameter named as in the published checkpoints."""

    def __init__(self, vocab_size, width):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, token_BP):
        """Look up, as float32."""
        return F.embedding(token_BP, self.embedding).float()


class OutputLayer(nn.Module):
    """Final adaptive norm and head."""

    def __init__(self, config):
        super().__init__()
        self.norm_final = Norm(config, config.hidden_dim)
        self.linear = ZeroLinear(config.hidden_dim, config.vocab_size, bias=config.head_bias)
        if config.adaln:
            self.adaLN_modulation = ZeroLinear(config.cond_dim, 2 * config.hidden_dim)

    def forward(self, x_BPD, cond_BC):
        """Logits, float32 (B, P, V)."""
        h = self.norm_final(x_BPD)
        if cond_BC is not None:
            shift, scale = project(self.adaLN_modulation, cond_BC)[:, None].chunk(2, dim=-1)
            h = h * (1 + scale) + shift
        return project(self.linear, h)


class Backbone(nn.Module):
    """The diffusion transformer."""

    def __init__(self, config):
        super().__init__()
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        if config.adaln:
            self.sigma_map = TimestepEmbedder(config.cond_dim)
        self.rotary_emb = Rotary(config)
        self.blocks = nn.ModuleList(DiTBlock(config, i) for i in range(config.n_blocks))
        self.output_layer = OutputLayer(config)
        self.gradient_checkpointing = False  # set by transformers, with _gradient_checkpointing_func

    def encode(self, given, position_P, cond_BC, visible, cache=None, commit=False):
        """Hidden states after the embedding and after every block, (B, P, D) each; given: ids or embeddings."""
        x_BPD = given.float() if given.is_floating_point() else self.vocab_embed(given)
        rotation = self.rotary_emb(position_P)
        hidden = [x_BPD]
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and cache is None:
                x_BPD = self._gradient_checkpointing_func(block.__call__, x_BPD, cond_BC, rotation, visible)
            else:
                x_BPD = block(x_BPD, cond_BC, rotation, visible, cache=cache, commit=commit)
            hidden.append(x_BPD)
        return hidden
