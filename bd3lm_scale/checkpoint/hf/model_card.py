"""The README of an exported model: what it is, how it was trained, how to use it. Plain text from plain values."""

import math
from typing import Any

from bd3lm_scale.config.schema import RunConfig

OBJECTIVES = {
    "bd3lm": "block-diffusion language model (BD3-LM)",
    "mdlm": "masked diffusion language model (MDLM)",
    "sedd": "score-entropy discrete diffusion model (SEDD)",
    "ar": "autoregressive language model",
}

USAGE = """```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "."  # this folder, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()

prompt = tokenizer(["def main():"], return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=128, top_p=0.9, seed=1)
print(tokenizer.decode(ids[0], skip_special_tokens=True))

score = model.score(prompt["input_ids"])  # score.nats, score.nats_stderr, score.perplexity
```"""


def model_card(fields: dict[str, Any], num_parameters: int, weights: str, training: dict[str, str]) -> str:
    """Markdown with a metadata header.

    Args:
        fields: the content of config.json.
        num_parameters: without the vocabulary's padding.
        weights: "ema" or "raw".
        training: from `training_rows`; empty for a model whose training is not known here.
    """
    objective = fields["objective"]
    tags = "\n".join(f"- {tag}" for tag in dict.fromkeys(("bd3lm", objective, "text-generation", "text-diffusion")))
    rows = {
        "Parameters": f"{num_parameters:,}",
        "Context length": f"{fields['model_length']:,} tokens",
        "Block size": f"{fields['block_size']} tokens" if objective == "bd3lm" else "-",
        "Layers, width, heads": f"{fields['n_blocks']}, {fields['hidden_dim']}, {fields['n_heads']}",
        "Vocabulary": f"{fields['vocab_size']:,} ids, the mask is {fields['mask_token_id']}",
        "Weights": f"{'exponential moving average' if weights == 'ema' else 'raw'}, {fields['torch_dtype']}",
    }
    how = f"## Training\n\n{markdown_table(training)}\n" if training else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{tags}\n---\n\n"
        f"# {OBJECTIVES[objective][0].upper()}{OBJECTIVES[objective][1:]}\n\n"
        f"The method: Block Diffusion, arXiv 2503.09573. Written by bd3lm_scale.\n\n"
        f"## Model\n\n{markdown_table(rows)}\n{how}"
        f"## Use\n\nNeeds `torch` and `transformers` (4.49 or later).\n\n{USAGE}\n"
    )


def training_rows(fields: dict[str, Any], config: RunConfig, figures: dict[str, Any]) -> dict[str, str]:
    """What the card says of the training: settings of the run, then `figures` (label to value)."""
    optim = config.optim
    return {
        "Optimizer steps": f"{fields['training']['step']:,}",
        "Tokens": f"{fields['training']['tokens']:,}",
        "Rows per step": f"{config.train.global_batch_size:,}",
        "Learning rate": f"{optim.lr:g}, {optim.warmup_steps:,} steps of warm-up, then {optim.schedule}",
        "EMA decay": f"{optim.ema_decay:g}",
        "Noise": noise(fields, config),
        **{label: number(value) for label, value in figures.items()},
    }


def noise(fields: dict[str, Any], config: RunConfig) -> str:
    """One line on the noise schedule and the interval that times are drawn from."""
    if fields["objective"] == "ar":
        return "-"
    interval = f"times from U[{fields['sampling_eps_min']:g}, {fields['sampling_eps_max']:g}]"
    return f"{config.diffusion.schedule}, {interval}"


def number(value: Any) -> str:
    """A figure with four significant digits; anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.4g}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown_table(rows: dict[str, str]) -> str:
    """A two-column table."""
    return "| | |\n| --- | --- |\n" + "".join(f"| {label} | {value} |\n" for label, value in rows.items())
