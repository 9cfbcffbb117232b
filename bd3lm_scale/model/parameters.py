"""The network described once: its sizes, and for every parameter its name, shape, start, cut and published form.

Whatever needs to know a parameter reads this table: initialization, the planner's sizes and FLOPs, optimizer slices,
checkpoints, conversion and fast decoding. `build_chunks` compares the model itself with it, the export the Hugging Face
class. Arithmetic only: neither torch nor Megatron is imported.

Shapes: V vocabulary padded to a multiple of 128, D hidden_size, C cond_dim, H query heads, G key/value heads, K head
width, F inner width of the MLP.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this inside, independently of the layout."""
TIME_FEATURES = 256
"""Cosines and sines of the noise level that enter the time embedding."""
GATED_MLPS = {
    "gelu": False,
    "swiglu": True,
}
"""Kinds of MLP: whether a gate of the same width as the inner layer multiplies its activation."""

UNIFORM, ZEROS, ONES = "uniform", "zeros", "ones"
WHOLE, POSITIONS, HEADS = "whole", "positions", "heads"
PLAIN, QKV, VOCABULARY = "plain", "qkv", "vocab"


def padded_vocab_size(vocab_size: int) -> int:
    """The number of embedding rows: the vocabulary padded to a multiple of VOCAB_MULTIPLE."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class Rope:
    """Rotary positions: theta^(-2j/K), slowed down for long contexts.

    Attributes:
        theta: base of the frequencies.
        scaling: none | linear (all divided by factor) | llama3 (slow ones divided, fast ones kept, a ramp between).
        factor, low_freq_factor, high_freq_factor, original_context_length: of the scaling.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


DEFAULT_ROPE = Rope()


@dataclass(frozen=True)
class Architecture:
    """What determines the parameters and the function of the network. None: derived, see the properties.

    Attributes:
        vocab_size: ids including the mask, without padding.
        uses_adaln: adaptive layer norm driven by the time embedding.
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
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    mlp: str = "gelu"
    ffn_hidden_size: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = True
    head_bias: bool = True
    rope: Rope = DEFAULT_ROPE

    @classmethod
    def of(cls, config: Any, vocab_size: int) -> "Architecture":
        """Of a run's configuration (RunConfig, which stands above this module) and its tokenizer's vocabulary."""
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
            norm=model.norm,
            norm_eps=model.norm_eps,
            mlp=model.mlp,
            ffn_hidden_size=model.ffn_hidden_size,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            qk_norm=model.qk_norm,
            qkv_bias=model.qkv_bias,
            mlp_bias=model.mlp_bias,
            head_bias=model.head_bias,
            rope=Rope(
                model.rope_theta,
                model.rope_scaling,
                model.rope_factor,
                model.rope_low_freq_factor,
                model.rope_high_freq_factor,
                model.rope_original_context_length,
            ),
        )

    @property
    def inner(self) -> int:
        """F."""
        return self.ffn_hidden_size or self.mlp_ratio * self.hidden_size

    @property
    def kv_heads(self) -> int:
        """G; as many as query heads unless they are grouped."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """K."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def gates(self) -> bool:
        """Whether the MLP has a gate."""
        return GATED_MLPS[self.mlp]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the whole model.

    Attributes:
        name: global name, as in checkpoints; layers count over all pipeline stages.
        shape: global shape.
        published: its name in Hugging Face folders, without `backbone.`.
        fan_in: inputs of the linear layer it belongs to.
        start: initial value: "uniform" in +-1/sqrt(fan_in), "zeros" or "ones".
        shard_dim: the dimension tensor-parallel ranks cut; None where they hold copies.
        parts: sizes along shard_dim of the parts that are cut each for itself (gate, up); empty: cut as one.
        gradient: what the gradient on one tensor-parallel rank covers: "whole"; "positions", its share of them under
            sequence parallelism; "heads", its attention heads. Shares are added over the ranks.
        decays: its class of weight decay: True for matrices, False for the weights of norms and for biases, which
            `optim.weight_decay_on=matrices` leaves alone.
        rows: its published rows: "plain" the same; "qkv" ordered by q, k, v, then head; "vocab" without padding.
        layer: the layer that holds it; None for the ends of the model.
    """

    name: str
    shape: tuple[int, ...]
    published: str
    fan_in: int = 1
    start: str = UNIFORM
    shard_dim: int | None = None
    parts: tuple[int, ...] = ()
    gradient: str = WHOLE
    decays: bool = True
    rows: str = PLAIN
    layer: int | None = None

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def is_modulation(self) -> bool:
        """Computed once for a row, not for each of its positions."""
        return ".modulation." in self.name

    @property
    def is_at_head(self) -> bool:
        """Held by the last pipeline stage."""
        return self.name.startswith("head.")

    def shard_shape(self, tensor_size: int) -> tuple[int, ...]:
        """Its shape on one of tensor_size ranks."""
        shape = list(self.shape)
        if self.shard_dim is not None:
            shape[self.shard_dim] //= tensor_size
        return tuple(shape)


@lru_cache(maxsize=64)
def parameters(arch: Architecture, vocabulary_rows: int | None = None) -> tuple[Parameter, ...]:
    """Every parameter in the published order, which is also the order of the published lists of EMA weights.

    Args:
        arch: the network.
        vocabulary_rows: of embedding and head; default: the padded vocabulary.
    """
    rows = padded_vocab_size(arch.vocab_size) if vocabulary_rows is None else vocabulary_rows
    width, cond = arch.hidden_size, arch.cond_dim
    embedding = Parameter(
        "embedding.weight", (rows, width), "vocab_embed.embedding", width, shard_dim=0, rows=VOCABULARY
    )
    found = [embedding]
    if arch.uses_adaln:
        found += _linear("time_embedding.linear1", "sigma_map.mlp.0", (cond, TIME_FEATURES))
        found += _linear("time_embedding.linear2", "sigma_map.mlp.2", (cond, cond))
    for layer in range(arch.num_layers):
        found += _layer(arch, layer)
    # its rows are gathered before the head, so each rank has its whole gradient
    found.append(_norm("head.norm.weight", "output_layer.norm_final.weight", width))
    output = {"fan_in": width, "start": ZEROS, "shard_dim": 0, "rows": VOCABULARY}
    if not arch.tied_head:
        found.append(Parameter("head.output.weight", (rows, width), "output_layer.linear.weight", **output))
    if arch.head_bias:
        found.append(Parameter("head.output.bias", (rows,), "output_layer.linear.bias", decays=False, **output))
    if arch.uses_adaln:
        found += _linear("head.modulation", "output_layer.adaLN_modulation", (2 * width, cond), start=ZEROS)
    return tuple(found)


def _layer(arch: Architecture, layer: int) -> list[Parameter]:
    """The parameters of one layer."""
    ours, published = f"decoder.layers.{layer}.", f"blocks.{layer}."
    attention, mlp = f"{ours}self_attention.", f"{ours}mlp."
    width, inner, head = arch.hidden_size, arch.inner, arch.head_width
    queries, keys = arch.num_heads * head, arch.kv_heads * head
    gate_and_up = (inner, inner) if arch.gates else ()
    found = [
        _norm(f"{ours}input_layernorm.weight", f"{published}norm1.weight", width, POSITIONS, layer),
        *_linear(
            f"{attention}linear_qkv", f"{published}attn_qkv", (queries + 2 * keys, width), arch.qkv_bias,
            shard_dim=0, rows=QKV, layer=layer,
        ),
    ]  # fmt: skip
    if arch.qk_norm:
        found += [
            _norm(f"{attention}{one}_layernorm.weight", f"{published}{one}_norm.weight", head, HEADS, layer)
            for one in "qk"
        ]
    found += [
        *_linear(f"{attention}linear_proj", f"{published}attn_out", (width, queries), False, shard_dim=1, layer=layer),
        _norm(f"{ours}pre_mlp_layernorm.weight", f"{published}norm2.weight", width, POSITIONS, layer),
        *_linear(
            f"{mlp}linear_fc1", f"{published}mlp.0", (sum(gate_and_up) or inner, width), arch.mlp_bias,
            shard_dim=0, parts=gate_and_up, layer=layer,
        ),
        *_linear(f"{mlp}linear_fc2", f"{published}mlp.2", (width, inner), arch.mlp_bias, shard_dim=1, layer=layer),
    ]  # fmt: skip
    if arch.uses_adaln:
        shape = (6 * width, arch.cond_dim)
        found += _linear(f"{ours}modulation", f"{published}adaLN_modulation", shape, start=ZEROS, layer=layer)
    return found


def _norm(name: str, published: str, width: int, gradient: str = WHOLE, layer: int | None = None) -> Parameter:
    return Parameter(name, (width,), published, start=ONES, gradient=gradient, decays=False, layer=layer)


def _linear(
    name: str,
    published: str,
    shape: tuple[int, int],
    bias: bool = True,
    *,
    start: str = UNIFORM,
    shard_dim: int | None = None,
    parts: tuple[int, ...] = (),
    rows: str = PLAIN,
    layer: int | None = None,
) -> list[Parameter]:
    """A linear layer's weight and bias. A bias added after the sum over ranks (cut inputs) is whole on each of them."""
    outputs, inputs = shape
    weight = Parameter(
        f"{name}.weight", shape, f"{published}.weight", inputs, start, shard_dim, parts, rows=rows, layer=layer
    )
    if not bias:
        return [weight]
    after_sum = shard_dim == 1
    return [
        weight,
        Parameter(
            f"{name}.bias", (outputs,), f"{published}.bias", inputs, start,
            None if after_sum else shard_dim, parts, POSITIONS if after_sum else WHOLE, decays=False, rows=rows,
            layer=layer,
        ),
    ]  # fmt: skip
