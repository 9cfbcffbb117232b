"""What `generate` is asked for: every option and every field of a GenerationConfig is honoured or refused by name."""

import math
from dataclasses import dataclass, fields

import torch
from transformers import GenerationConfig

from .inputs_bd3lm import is_whole

BLOCK_SAMPLERS = ("first_hitting", "ancestral", "confidence", "entropy")
SAMPLERS = {
    "bd3lm": BLOCK_SAMPLERS,
    "mdlm": BLOCK_SAMPLERS,
    "sedd": ("analytic",),
    "ar": ("ar", *BLOCK_SAMPLERS),  # with one token at a time they are all the same
}
WITHOUT_EFFECT = {
    "transformers_version", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "compile_config", "disable_compile",
    "low_memory", "return_legacy_cache", "prefill_chunk_size", "renormalize_logits", "max_cache_len",
}  # fmt: skip
"""Fields that change no text whatever they say."""
NEUTRAL = {
    "num_beams": 1, "num_beam_groups": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "diversity_penalty": 0.0, "min_length": 0, "min_new_tokens": 0,
    "min_p": 0.0, "guidance_scale": 1.0,
}  # fmt: skip
"""Values of fields that are not supported at which they ask for nothing."""
NOT_SUPPORTED = (
    "logits_processor", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "assistant_tokenizer",
    "negative_prompt_ids", "negative_prompt_attention_mask", "use_model_defaults", "custom_generate",
    "past_key_values", "inputs_embeds", "position_ids", "output_attentions", "output_hidden_states",
)  # fmt: skip
"""Arguments of transformers' generate that may only be empty here."""


@dataclass
class Settings:
    """What `generate` takes besides the prompt; defaults come from generation_config.json.

    Attributes:
        max_new_tokens: tokens added to each prompt.
        max_length: in its place, columns of the prompt and new tokens together.
        num_return_sequences: samples per prompt.
        do_sample: false takes the most likely token (temperature 0).
        temperature, top_k, top_p: top_p keeps the tokens whose cumulative probability does not exceed it.
        sampler: first_hitting | ancestral | confidence | entropy (sedd has its analytic one, ar goes token by token).
        num_steps: steps per region of ancestral and sedd.
        threshold: confidence (entropy): tokens of at least this probability (at most this entropy) go together.
        use_cache: keep keys and values of finished blocks (bd3lm, ar).
        stop_at_eos: a row ends after its first new EOS.
        eos_token_id, bos_token_id, pad_token_id: default: the generation config's; eos_token_id may list several.
        seed: of the draws; None draws from torch's global generator.
        fill: put text in place of the masks in input_ids and add none.
        max_time: seconds after which every row ends, looked at after each region.
        stop_strings: a row ends with the token that completes one of them; needs `tokenizer`.
        tokenizer: for stop_strings.
        return_dict_in_generate: return a GenerateOutput.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    num_return_sequences: int = 1
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    sampler: str = "first_hitting"
    num_steps: int = 128
    threshold: float = 0.9
    use_cache: bool = True
    stop_at_eos: bool = True
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    seed: int | None = None
    fill: bool = False
    max_time: float | None = None
    stop_strings: str | list[str] | None = None
    tokenizer: object = None
    return_dict_in_generate: bool = False

    @property
    def eos_ids(self):
        """Every id that ends a row."""
        ids = self.eos_token_id if self.stop_at_eos and not self.fill else None
        return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [int(ids)]

    @property
    def padding_id(self):
        """What rows are filled up with: padding, else the first EOS, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        ids = self.eos_token_id
        return (ids[0] if isinstance(ids, list | tuple) else ids) if ids else 0

    def problems(self, objective):
        """Every value that cannot be obeyed, as one line each."""
        found = []

        def need(name, is_good, remedy):
            try:
                is_bad = not is_good(getattr(self, name))
            except (TypeError, ValueError):
                is_bad = True
            if is_bad:
                found.append(f"{name} ({getattr(self, name)}): {remedy}")

        need("temperature", lambda t: math.isfinite(t) and t >= 0, "use a number of at least 0 (0 is greedy)")
        need("top_p", lambda p: 0 < p <= 1, "use a number in (0, 1]; 1 keeps every token")
        need("top_k", lambda k: k is None or (is_whole(k) and k >= 0), "use an integer; 0 keeps every token")
        for name in ("max_new_tokens", "max_length", "num_steps", "num_return_sequences"):
            need(name, lambda n: n is None or (is_whole(n) and n >= 1), "must be an integer of at least 1")
        need("seed", lambda s: s is None or (is_whole(s) and -(2**63) <= s < 2**64), "use an integer of 64 bits")
        ids = "use an id, or a list of ids"
        need("eos_token_id", lambda e: e is None or all(map(is_whole, e if isinstance(e, list | tuple) else [e])), ids)
        for name in ("bos_token_id", "pad_token_id"):
            need(name, lambda i: i is None or is_whole(i), "use an id")
        for name in ("do_sample", "use_cache", "stop_at_eos", "fill", "return_dict_in_generate"):
            need(name, lambda value: value in (True, False), "use true or false")
        need("threshold", math.isfinite, "use a number")
        need("max_time", lambda s: s is None or s > 0, "use a number of seconds above 0")
        allowed = SAMPLERS[objective]
        need("sampler", lambda s: s in allowed, f"unknown for a {objective} model; use {' or '.join(allowed)}")
        if self.stop_strings and self.tokenizer is None:
            found.append(f"stop_strings ({self.stop_strings}): also pass tokenizer=")
        return found


def settings_of(own, passed, options, objective):
    """Settings from the model's GenerationConfig, one passed to the call (or None) and the call's options.

    Later ones go first; what they leave open the earlier decide. ValueError lists all that cannot be obeyed.
    """
    known = {field.name for field in fields(Settings)}
    defaults = GenerationConfig().to_dict()
    unknown = sorted(set(options) - known - set(defaults) - set(NOT_SUPPORTED) - WITHOUT_EFFECT - set(NEUTRAL))
    if unknown:
        raise ValueError(f"generate: unknown options {unknown}; known are {sorted(known)}")
    layers = [_set_fields(own)] + ([] if passed is None or passed is own else [_set_fields(passed, defaults)])
    options = {name: _plain(value) for name, value in options.items() if value is not None}
    values = {}
    for layer in (*layers, options):
        for first, second in (("max_new_tokens", "max_length"), ("max_length", "max_new_tokens")):
            if layer.get(first) is not None:
                values.pop(second, None)
                if first == "max_new_tokens":
                    layer.pop("max_length", None)
        values |= {name: value for name, value in layer.items() if value is not None}
    refused = sorted(name for name, value in values.items() if name not in known and _asks(name, value, defaults))
    if objective in ("sedd", "ar") and "sampler" not in options and values.get("sampler") in BLOCK_SAMPLERS:
        values["sampler"] = SAMPLERS[objective][0]  # what earlier exports say of every model
    settings = Settings(**{name: value for name, value in values.items() if name in known})
    if objective in ("sedd", "ar") and "sampler" not in values:
        settings.sampler = SAMPLERS[objective][0]
    found = [f"{name} ({values[name]}): not supported here; leave it out" for name in refused]
    if settings.fill:
        asked = options if passed is None or passed is own or _is_copy(passed) else {**passed.to_diff_dict(), **options}
        lengths = [name for name in ("max_new_tokens", "max_length") if asked.get(name) is not None]
        found += [f"{name} ({asked[name]}): fill=True adds no tokens; leave it out" for name in lengths]
    found += settings.problems(objective)
    if found:
        raise ValueError("generate: " + "\n  ".join(found))
    return settings


def _set_fields(config, defaults=None):
    """The fields a GenerationConfig sets. `defaults` (of transformers) count for one that a caller made.

    transformers 4 fills every field with a default, so what was set to one cannot be told apart. In a configuration
    that a caller made those defaults are meant (greedy, 20 tokens, top_k 50), as in transformers' own generate; in the
    model's own, and in copies of it that pipelines make, they are not.
    """
    said = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
    if hasattr(config, "threshold"):  # of an export, which says all of this
        said |= {"do_sample": config.do_sample, "top_k": config.top_k}
    if defaults is not None and not _is_copy(config) and defaults.get("do_sample") is not None:
        said.setdefault("do_sample", config.do_sample)
        if config.do_sample:
            said.setdefault("top_k", config.top_k)
        if config.max_new_tokens is None:
            said.setdefault("max_length", config.max_length)
    return said


def _is_copy(config):
    """Whether a GenerationConfig is the model's own or made of it, as pipelines do."""
    return hasattr(config, "num_steps") or getattr(config, "_from_model_config", False)


def _plain(value):
    """Tensors of ids as the integers they hold."""
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _asks(name, value, defaults):
    """Whether a field that is not supported asks for anything."""
    if name in WITHOUT_EFFECT or value is None or value is False or (isinstance(value, list | dict) and not value):
        return False
    return name in NOT_SUPPORTED or value != NEUTRAL.get(name, defaults.get(name))
