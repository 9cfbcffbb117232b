"""Which fields a resumed run may change: those that leave the trained model as it is."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from bd3lm_scale.config.schema import RunConfig

RESUME_MAY_CHANGE = (
    "run_dir", "data.path", "data.cache_dir", "data.cache_size_gb", "data.workers", "data.prefetch_steps",
    "data.retries", "data.timeout_seconds", "data.tokenizer", "data.on_bad_shard",
    "diffusion.clip_search.every_validations", "model.attention", "optim.zero_stage", "optim.reduce_dtype",
    "optim.decay_steps",
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


def keep_decay_steps(config: RunConfig, saved: Mapping[str, Any] | None) -> RunConfig:
    """The configuration with the end of its cosine fixed, so that a prolonged run goes on along the same curve.

    Args:
        config: of the run that starts; an end that it names stays.
        saved: the configuration kept in the checkpoint it resumes; None for a new run.
    """
    optim = config.optim
    if optim.schedule != "cosine" or optim.decay_steps is not None:
        return config
    kept = None if saved is None else saved["optim"].get("decay_steps") or saved["train"]["steps"]
    return replace(config, optim=replace(optim, decay_steps=kept or config.train.steps))


def decay_news(config: RunConfig, saved: Mapping[str, Any] | None) -> list[str]:
    """What a user should hear about the cosine's end when a run starts or goes on; `config` has it fixed."""
    optim, steps = config.optim, config.train.steps
    if optim.schedule != "cosine" or optim.decay_steps is None:
        return []
    news, end = [], optim.decay_steps
    if end <= optim.warmup_steps:
        news.append(f"the learning rate's cosine ends at step {end}, inside the warm-up of {optim.warmup_steps} steps")
    before = end if saved is None else saved["optim"].get("decay_steps") or saved["train"]["steps"]
    if before != end:
        news.append(f"the learning rate's cosine ended at step {before} and ends at step {end} from now on")
    if steps > end:
        news.append(
            f"the learning rate's cosine ends at step {end} and stays at optim.min_lr {optim.min_lr:g} up to step "
            f"{steps}; optim.decay_steps={steps} stretches it"
        )
    elif steps < end:
        news.append(f"the run ends at step {steps}, before the learning rate's cosine does (optim.decay_steps {end})")
    return news


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
