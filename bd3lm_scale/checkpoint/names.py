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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bd3lm_scale.model.parameters import QKV, VOCABULARY, Architecture, padded_vocab_size, parameters
from bd3lm_scale.model.rotary import inverse_frequencies

PREFIX = "backbone."
"""Before every published name in Hugging Face folders and Lightning checkpoints."""


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
        return (padded_vocab_size(self.shape[0]), *self.shape[1:]) if self.kind == VOCABULARY else self.shape


def table(arch: Architecture) -> list[Entry]:
    """Every parameter in the published order, which is also the order of the published lists of EMA weights.

    With a tied head, `output_layer.linear.weight` is a second entry for our `embedding.weight`.
    """
    renamed = {"head.output.weight": "embedding.weight"} if arch.tied_head else {}
    return [
        Entry(
            ours=renamed.get(parameter.name, parameter.name),
            published=parameter.published,
            shape=parameter.shape,
            kind=parameter.rows,
        )
        for parameter in parameters(replace(arch, tied_head=False), arch.vocab_size)
    ]


def to_published(entry: Entry, tensor: Tensor, arch: Architecture) -> Tensor:
    """Our tensor in the published layout."""
    if entry.kind == QKV:
        groups = tensor.unflatten(0, (arch.kv_heads, arch.num_heads // arch.kv_heads + 2, arch.head_width))
        return torch.cat([part.flatten(0, 2) for part in groups.split(_heads_of_a_group(arch), dim=1)])
    return tensor[: entry.shape[0]] if entry.kind == VOCABULARY else tensor


def to_ours(entry: Entry, tensor: Tensor, arch: Architecture) -> Tensor:
    """A published tensor in our layout; padding rows are zero (their logits are masked anyway)."""
    if entry.kind == QKV:
        heads = tensor.unflatten(0, (-1, arch.head_width)).split([arch.kv_heads * n for n in _heads_of_a_group(arch)])
        return torch.cat([part.unflatten(0, (arch.kv_heads, -1)) for part in heads], dim=1).flatten(0, 2)
    if entry.kind == VOCABULARY:
        padded = tensor.new_zeros(entry.our_shape)
        padded[: entry.shape[0]] = tensor
        return padded
    return tensor


def _heads_of_a_group(arch: Architecture) -> list[int]:
    """Query, key and value heads that share keys and values."""
    return [arch.num_heads // arch.kv_heads, 1, 1]


def rotary_frequencies(arch: Architecture) -> Tensor:
    """The buffer `rotary_emb.inv_freq` of published checkpoints, (K/2,) float32, equal to theirs bit by bit."""
    return inverse_frequencies(arch.head_width, arch.rope)


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
