"""What each field may hold on its own: intervals for numbers, choices for names."""

import difflib
import math
from functools import reduce

from bd3lm_scale.config.schema import RunConfig

CHOICES = {
    "precision": ("fp32", "bf16"),
    "data.on_bad_shard": ("stop", "skip"),
    "diffusion.objective": ("bd3lm", "mdlm", "ar", "sedd"),
    "diffusion.schedule": ("loglinear", "cosine", "square", "square_root", "log"),
    "model.attention": ("auto", "flex", "chunked", "dense"),
    "parallel.recompute": ("none", "selective", "full"),
    "optim.schedule": ("constant", "cosine"),
    "optim.reduce_dtype": ("fp32", "bf16"),
    "train.init_weights": ("ema", "raw"),
    "evaluation.weights": ("ema", "raw"),
    "sampling.sampler": ("auto", "first_hitting", "ancestral", "confidence", "entropy", "ar", "analytic"),
    "sampling.cache_dtype": ("auto", "fp32", "bf16"),
    "sampling.weights": ("ema", "raw"),
    "runtime.device": ("auto", "cpu", "cuda"),
    "runtime.on_nan": ("skip", "rollback", "stop"),
    "logging.wandb": ("disabled", "offline", "online"),
}

# Mathematical intervals: a round bracket leaves its end out. null passes where the schema allows it.
INTERVALS = {
    "seed": "[0, 9223372036854775807]",
    "data.context_length": "[1, inf)",
    "data.shuffle_window": "[1, inf)",
    "data.workers": "[0, inf)",
    "data.prefetch_steps": "[1, inf)",
    "data.cache_size_gb": "(0, inf)",
    "data.retries": "[0, inf)",
    "data.timeout_seconds": "(0, inf)",
    "diffusion.block_size": "[1, inf)",
    "diffusion.clip_low": "[0, 1]",
    "diffusion.clip_high": "(0, 1]",
    "diffusion.time_epsilon": "(0, 0.5]",
    "diffusion.clip_search.step": "(0, 1]",
    "diffusion.clip_search.every_validations": "[1, inf)",
    "model.num_layers": "[1, inf)",
    "model.hidden_size": "[1, inf)",
    "model.num_heads": "[1, inf)",
    "model.cond_dim": "[1, inf)",
    "model.mlp_ratio": "[1, inf)",
    "model.dropout": "[0, 1)",
    "model.vocab_size": "[2, inf)",
    "parallel.tensor_parallel_size": "[1, inf)",
    "parallel.pipeline_parallel_size": "[1, inf)",
    "parallel.virtual_pipeline_parallel_size": "[1, inf)",
    "optim.lr": "(0, inf)",
    "optim.beta1": "[0, 1)",
    "optim.beta2": "[0, 1)",
    "optim.eps": "(0, inf)",
    "optim.weight_decay": "[0, inf)",
    "optim.grad_clip": "(0, inf)",
    "optim.warmup_steps": "[0, inf)",
    "optim.min_lr": "[0, inf)",
    "optim.ema_decay": "[0, 1)",
    "train.steps": "[1, inf)",
    "train.global_batch_size": "[1, inf)",
    "train.micro_batch_size": "[1, inf)",
    "train.threads": "[0, inf)",
    "train.time_limit_minutes": "(0, inf)",
    "evaluation.every_steps": "[1, inf)",
    "evaluation.rows": "[1, inf)",
    "evaluation.micro_batch_size": "[1, inf)",
    "evaluation.draws": "[1, inf)",
    "sampling.length": "[1, inf)",
    "sampling.num_samples": "[1, inf)",
    "sampling.batch_size": "[1, inf)",
    "sampling.steps": "[1, inf)",
    "sampling.nucleus_p": "(0, 1]",
    "sampling.top_k": "[1, inf)",
    "sampling.temperature": "[0, inf)",
    "sampling.threshold": "[0, inf)",
    "sampling.window": "[1, inf)",
    "sampling.min_entropy": "[0, inf)",
    "sampling.max_redraws": "[0, inf)",
    "sampling.seed": "[0, 9223372036854775807]",
    "checkpoint.every_steps": "[1, inf)",
    "checkpoint.keep_last": "[1, inf)",
    "checkpoint.keep_every": "[1, inf)",
    "runtime.max_skips": "[1, inf)",
    "runtime.max_rollbacks": "[0, inf)",
    "runtime.spike_factor": "(1, inf)",
    "runtime.collective_timeout_seconds": "(0, inf)",
    "runtime.hang_factor": "(1, inf)",
    "runtime.hang_min_seconds": "(0, inf)",
    "runtime.heartbeat_seconds": "(0, inf)",
    "runtime.silent_seconds": "(0, inf)",
    "runtime.straggler_factor": "(1, inf)",
    "logging.every_steps": "[1, inf)",
}


def value_of(config: RunConfig, name: str) -> object:
    """The value of a dotted field."""
    return reduce(getattr, name.split("."), config)


def is_inside(value: float, interval: str) -> bool:
    """Whether a number lies in an interval written as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and not math.isnan(value)


def range_problems(config: RunConfig) -> dict[str, str]:
    """For each field whose value is outside what it may hold: the line that says so."""
    found = {}
    defaults = RunConfig()
    for name, interval in INTERVALS.items():
        value = value_of(config, name)
        if isinstance(value, int | float) and not is_inside(value, interval):
            default = value_of(defaults, name)
            remedy = "null" if default is None else f"for example {default}"
            found[name] = f"{name} ({value}): must lie in {interval}; use {remedy}"
    for name, choices in CHOICES.items():
        value = str(value_of(config, name))
        if value not in choices:
            near = difflib.get_close_matches(value.lower(), choices, 1, 0.5)
            hint = f"use {near[0]} (did you mean that?)" if near else f"use {value_of(defaults, name)}"
            found[name] = f"{name} ({value}): must be one of {', '.join(choices)}; {hint}"
    return found
