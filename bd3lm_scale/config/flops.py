"""What a row costs: the model's own floating-point operations, without recomputation.

Matrix products over the positions the transformer really reads, and attention over exactly the pairs its visibility
allows; a multiply-add counts as two. Block diffusion's clean half is scored by nobody, so in the last layer it is
needed as keys and values only.
"""

from bd3lm_scale.config.checks import padded_vocab_size
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.values import Interval


def attention_pairs(config: RunConfig) -> int:
    """Query-key pairs of one row in one layer: what the visibility rule allows, counted exactly."""
    length, size = config.data.context_length, config.block_size
    if config.diffusion.objective in ("mdlm", "sedd"):
        return length * length
    causal = length * (length + size) // 2  # every position sees its own block and all earlier ones
    return 2 * causal if config.diffusion.objective == "bd3lm" else causal


def forward_flops(config: RunConfig, vocab_size: int) -> dict[str, float]:
    """Floating-point operations of one row's forward pass, by part (a multiply-add counts as two)."""
    model, length = config.model, config.data.context_length
    width = model.hidden_size
    products = (4 + 2 * model.mlp_ratio) * width * width  # weights each position meets in a layer
    pairs = attention_pairs(config)
    two_halves = config.diffusion.objective == "bd3lm"
    spared_products = length * (products - 2 * width * width) if two_halves else 0
    spared_pairs = pairs // 2 if two_halves else 0
    diffusion = config.diffusion
    mean_mask_rate = sum(Interval(diffusion.clip_low, diffusion.clip_high).floored(diffusion.time_epsilon)) / 2
    scored = length - 1 if config.diffusion.objective == "ar" else mean_mask_rate * length
    return {
        "linear layers": 2.0 * (model.num_layers * config.sequence_length * products - spared_products),
        "attention": 4.0 * (model.num_layers * pairs - spared_pairs) * width,
        "conditioning": 2.0 * model.cond_dim * width * (6 * model.num_layers + 2) if config.uses_adaln else 0.0,
        "head": 2.0 * scored * width * padded_vocab_size(vocab_size),
    }


def flops_per_token(config: RunConfig, vocab_size: int) -> float:
    """Training FLOPs per token of text: forward and twice as much backward."""
    return 3 * sum(forward_flops(config, vocab_size).values()) / config.data.context_length
