"""Which fields a resumed run may change: those that leave the trained model as it is."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bd3lm_scale.config.schema import RunConfig

RESUME_MAY_CHANGE = (
    "run_dir", "data.path", "data.cache_dir", "data.cache_size_gb", "data.workers", "data.prefetch_steps",
    "data.retries", "data.timeout_seconds", "data.tokenizer", "data.on_bad_shard",
    "diffusion.clip_search.every_validations", "model.attention", "optim.zero_stage", "optim.reduce_dtype",
    "train.steps", "train.micro_batch_size", "train.init_from", "train.init_weights", "train.exact_resume",
    "train.deterministic", "train.compile", "train.threads", "train.time_limit_minutes",
    "parallel.", "evaluation.", "sampling.", "checkpoint.", "runtime.", "logging.",
)  # fmt: skip
"""Fields (sections end in a dot) that may differ between a checkpoint and the run that resumes it."""


def resume_differences(saved: Mapping[str, Any], now: RunConfig) -> list[str]:
    """What forbids resuming a checkpoint saved under another configuration, one line per field.

    Args:
        saved: the configuration kept in the checkpoint (config_load.to_dict).
        now: the configuration of the run that wants to resume.
    """
    before, after = _flat({**asdict(RunConfig()), **saved}), _flat(asdict(now))
    defaults = _flat(asdict(RunConfig()))
    found = []
    for name in [*after, *(n for n in before if n not in after)]:
        was, value = before.get(name, defaults.get(name)), after.get(name)
        if was == value or name.startswith(RESUME_MAY_CHANGE):
            continue
        if name == "model.vocab_size" and None in (was, value):
            continue  # null means: whatever the tokenizer has; the weights' shapes decide
        found.append(
            f"{name} ({_show(value)}): the checkpoint was trained with {_show(was)}; "
            f"use {name}={_show(was)}, or another run_dir"
        )
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to plain values; mixtures keep their weights and lose their paths, which may move."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif f"{prefix}{key}" == "data.mixture":
            flat["data.mixture"] = [source["weight"] for source in value]
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple | list) else value
    return flat


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
