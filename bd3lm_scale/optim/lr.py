"""Learning rate as a pure function of the step."""

import math

from bd3lm_scale.config.schema import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Rate of 0-based optimizer step `step`: linear warm-up from 0, then constant or cosine to min_lr.

    The cosine ends at config.decay_steps, by default at total_steps; from there on the rate is min_lr. The first step
    of a warm-up has rate 0, as in the reference.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, (config.decay_steps or total_steps) - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))
