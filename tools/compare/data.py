"""What a comparison shows of a finished run (a library of compare_objectives.py)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3lm_scale.config.flops import flops_per_token
from bd3lm_scale.config.load import load_config
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.runtime.metrics import read_metrics


@dataclass(frozen=True)
class Outcome:
    """A finished run: what it is called, its likelihood and variances, its validations, its cost and its interval."""

    name: str
    label: str
    figures: dict[str, Any]
    validations: list[dict]
    flops_per_token: float
    interval: tuple[float, float]

    @property
    def nelbo(self) -> float:
        """Nats per token."""
        return self.figures["nelbo"]

    @property
    def stderr(self) -> float:
        """Of nelbo, over rows."""
        return self.figures["stderr"]


def read_outcome(output: Path, case: dict[str, Any]) -> Outcome:
    """Read the run and the figures of one case."""
    folder = output / case["name"]
    config = load_config(folder / "config.yaml")
    validations = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "validation"]
    vocab_size = open_stream(config.data, config.seed, "validation").vocab_size
    return Outcome(
        name=case["name"],
        label=case["label"],
        figures=json.loads((output / "figures" / f"{case['name']}.json").read_text()),
        validations=validations,
        flops_per_token=flops_per_token(config, vocab_size),
        interval=(validations[-1]["clip_low"], validations[-1]["clip_high"]),
    )
