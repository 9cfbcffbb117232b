"""What a row costs: the model's own floating-point operations, without recomputation.

Matrix products over the positions the transformer really reads, and attention over exactly the pairs its visibility
allows; a multiply-add counts as two. Block diffusion's clean tokens are scored by nobody, so in the last layer they are
needed as keys and values only.
"""

from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.model.parameters import Architecture, padded_vocab_size, parameters
from bd3lm_scale.values import Interval


def attention_pairs(config: RunConfig) -> int:
    """Query-key pairs of one row in one layer: what the visibility rule allows, counted exactly."""
    length, size = config.data.context_length, config.block_size
    if config.diffusion.objective in ("mdlm", "sedd"):
        return length * length
    noisy = length * (length + size) // 2  # every position sees its own block and all earlier ones
    if config.diffusion.objective == "ar":
        return noisy
    return noisy + _clean_pairs(config)


def _clean_pairs(config: RunConfig) -> int:
    """Those of the clean queries: whole blocks, and what is read of the last one, which sees itself and all others."""
    clean, size = config.sequence_length - config.data.context_length, config.block_size
    whole = clean // size * size
    return whole * (whole + size) // 2 + (clean - whole) * clean


def forward_flops(config: RunConfig, vocab_size: int) -> dict[str, float]:
    """Floating-point operations of one row's forward pass, by part (a multiply-add counts as two)."""
    arch, length = Architecture.of(config, vocab_size), config.data.context_length
    matrices = [parameter for parameter in parameters(arch) if len(parameter.shape) == 2]
    # weights each position meets in all layers, and those a last layer's keys and values need
    products = sum(p.size for p in matrices if p.layer is not None and not p.is_modulation)
    keys_and_values = 2 * arch.kv_heads * arch.head_width * arch.hidden_size
    queries = arch.num_heads * arch.head_width
    pairs = attention_pairs(config)
    spares = config.scores_noisy_half_only
    clean = config.sequence_length - length
    spared_products = clean * (products // arch.num_layers - keys_and_values) if spares else 0
    spared_pairs = _clean_pairs(config) if spares else 0
    diffusion = config.diffusion
    mean_mask_rate = sum(Interval(diffusion.clip_low, diffusion.clip_high).floored(diffusion.time_epsilon)) / 2
    scored = length - 1 if config.diffusion.objective == "ar" else mean_mask_rate * length
    return {
        "linear layers": 2.0 * (config.sequence_length * products - spared_products),
        "attention": 4.0 * (arch.num_layers * pairs - spared_pairs) * queries,
        "conditioning": 2.0 * sum(p.size for p in matrices if p.is_modulation),
        "head": 2.0 * scored * arch.hidden_size * padded_vocab_size(vocab_size),
    }


def flops_per_token(config: RunConfig, vocab_size: int) -> float:
    """Training FLOPs per token of text: forward and twice as much backward."""
    return 3 * sum(forward_flops(config, vocab_size).values()) / config.data.context_length
