"""One table between our parameters and the published ones: names, shapes, and the two places where layouts differ.

    ours                                         published                       differs
    embedding.weight                             vocab_embed.embedding           vocabulary padded to a multiple of 128
    decoder.layers.{i}.self_attention.linear_qkv blocks.{i}.attn_qkv             rows by head, then q, k, v; published:
                                                                                 by q, k, v, then head
    head.output                                  output_layer.linear             vocabulary padded

Everything else is renamed only, so converting there and back is exact to the bit.

Shapes: V vocabulary, D hidden_size, C cond_dim, H heads, K = D / H.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3lm_scale.config.checks import padded_vocab_size
from bd3lm_scale.config.schema import RunConfig

TIME_FEATURES = 256
PREFIX = "backbone."
"""Before every published name in Hugging Face folders and Lightning checkpoints."""


@dataclass(frozen=True)
class Architecture:
    """What determines names and shapes.

    Attributes:
        vocab_size: V, ids including the mask, without padding.
        uses_adaln: False for autoregressive models.
        tied_head: our checkpoint stores the head's weight once, as the embedding.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    cond_dim: int
    mlp_ratio: int
    vocab_size: int
    uses_adaln: bool = True
    tied_head: bool = False

    @classmethod
    def of(cls, config: RunConfig, vocab_size: int) -> "Architecture":
        """Of a run's configuration and its tokenizer's vocabulary."""
        model = config.model
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_heads=model.num_heads,
            cond_dim=model.cond_dim,
            mlp_ratio=model.mlp_ratio,
            vocab_size=vocab_size,
            uses_adaln=config.uses_adaln,
            tied_head=model.tie_embeddings,
        )


@dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
        ours: its name in our checkpoints.
        published: its name in the published ones, without `backbone.`.
        shape: its published shape.
        kind: "plain", "qkv" (rows permuted) or "vocab" (rows padded in ours).
    """

    ours: str
    published: str
    shape: tuple[int, ...]
    kind: str = "plain"

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape in our checkpoints."""
        return (padded_vocab_size(self.shape[0]), *self.shape[1:]) if self.kind == "vocab" else self.shape


def table(arch: Architecture) -> list[Entry]:
    """Every parameter in the published order, which is also the order of the published lists of EMA weights.

    With a tied head, `output_layer.linear.weight` is a second entry for our `embedding.weight`.
    """
    width, cond, vocab = arch.hidden_size, arch.cond_dim, arch.vocab_size
    entries = [Entry("embedding.weight", "vocab_embed.embedding", (vocab, width), "vocab")]
    if arch.uses_adaln:
        entries += _linear("time_embedding.linear1", "sigma_map.mlp.0", (cond, TIME_FEATURES))
        entries += _linear("time_embedding.linear2", "sigma_map.mlp.2", (cond, cond))
    for i in range(arch.num_layers):
        entries += _layer(arch, f"decoder.layers.{i}.", f"blocks.{i}.")
    entries.append(Entry("head.norm.weight", "output_layer.norm_final.weight", (width,)))
    head = "embedding.weight" if arch.tied_head else "head.output.weight"
    entries.append(Entry(head, "output_layer.linear.weight", (vocab, width), "vocab"))
    entries.append(Entry("head.output.bias", "output_layer.linear.bias", (vocab,), "vocab"))
    if arch.uses_adaln:
        entries += _linear("head.modulation", "output_layer.adaLN_modulation", (2 * width, cond))
    return entries


def _linear(ours: str, published: str, shape: tuple[int, int]) -> list[Entry]:
    return [
        Entry(f"{ours}.weight", f"{published}.weight", shape),
        Entry(f"{ours}.bias", f"{published}.bias", shape[:1]),
    ]


def _layer(arch: Architecture, ours: str, published: str) -> list[Entry]:
    width, inner = arch.hidden_size, arch.mlp_ratio * arch.hidden_size
    attention = f"{ours}self_attention."
    entries = [
        Entry(f"{ours}input_layernorm.weight", f"{published}norm1.weight", (width,)),
        Entry(f"{attention}linear_qkv.weight", f"{published}attn_qkv.weight", (3 * width, width), "qkv"),
        Entry(f"{attention}linear_proj.weight", f"{published}attn_out.weight", (width, width)),
        Entry(f"{ours}pre_mlp_layernorm.weight", f"{published}norm2.weight", (width,)),
        *_linear(f"{ours}mlp.linear_fc1", f"{published}mlp.0", (inner, width)),
        *_linear(f"{ours}mlp.linear_fc2", f"{published}mlp.2", (width, inner)),
    ]
    if arch.uses_adaln:
        entries += _linear(f"{ours}modulation", f"{published}adaLN_modulation", (6 * width, arch.cond_dim))
    return entries


def to_published(entry: Entry, tensor: Tensor, arch: Architecture) -> Tensor:
    """Our tensor in the published layout."""
    if entry.kind == "qkv":
        head_major = tensor.unflatten(0, (arch.num_heads, 3, -1))
        return head_major.transpose(0, 1).reshape(entry.shape)
    return tensor[: entry.shape[0]] if entry.kind == "vocab" else tensor


def to_ours(entry: Entry, tensor: Tensor, arch: Architecture) -> Tensor:
    """A published tensor in our layout; padding rows are zero (their logits are masked anyway)."""
    if entry.kind == "qkv":
        return tensor.unflatten(0, (3, arch.num_heads, -1)).transpose(0, 1).reshape(entry.shape)
    if entry.kind == "vocab":
        padded = tensor.new_zeros(entry.our_shape)
        padded[: entry.shape[0]] = tensor
        return padded
    return tensor


def rotary_frequencies(arch: Architecture) -> Tensor:
    """The buffer `rotary_emb.inv_freq` of published checkpoints, (K/2,) float32, equal to theirs bit by bit."""
    head_width = arch.hidden_size // arch.num_heads
    return 1.0 / (10_000 ** (torch.arange(0, head_width, 2).float() / head_width))


def shape_problems(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    """One line per missing, extra or misshapen tensor."""
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [f"not expected: {name} {shape}" for name, shape in found.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {found[name]}, the configuration asks for {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return problems


def num_parameters(arch: Architecture) -> int:
    """Parameters of the exported model, the vocabulary's padding not counted."""
    return sum(math.prod(entry.shape) for entry in table(arch))
