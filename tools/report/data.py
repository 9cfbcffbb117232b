"""What a report shows of a run, read from its metrics.jsonl and samples/ (a library of tools/report_run.py)."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from bd3lm_scale.runtime.metrics import FILE_NAME, read_metrics

MAX_SAMPLES = 4
MAX_SAMPLE_CHARACTERS = 4000


@dataclass(frozen=True)
class RunData:
    """A run's figures.

    Attributes:
        train, validation: one row per step, in order of step; the last attempt at a step wins.
        attempts: (attempt, wall-clock time, step) of each attempt's first line.
        repeated_steps: training steps that were computed again after a restart.
        events: (step, what happened) of steps at which something did: skipped updates, rollbacks, ...
        speed: tokens per second of each training row, where it can be told.
        samples: (name, text).
    """

    train: list[dict]
    validation: list[dict]
    attempts: list[tuple[str, float, int]]
    repeated_steps: int
    events: list[tuple[int, str]]
    speed: list[float]
    samples: list[tuple[str, str]]


def read_run(run_dir: Path) -> RunData:
    """Read a run folder.

    Raises:
        ValueError: if it holds no metrics.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{run_dir}: holds no {FILE_NAME}; use the folder a training run was given as run_dir")
    rows = sorted(read_metrics(path), key=lambda row: row["step"])
    lines = [row for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if (row := _row(line))]
    if not rows or not lines:
        raise ValueError(f"{path}: holds no figures yet; use it after the first training step")
    attempts: dict[str, tuple[str, float, int]] = {}
    for row in lines:
        attempt = str(row.get("attempt", "0"))
        attempts.setdefault(attempt, (attempt, float(row.get("time", 0.0)), row["step"]))
    train = [row for row in rows if row["kind"] == "train"]
    return RunData(
        train=train,
        validation=[row for row in rows if row["kind"] == "validation"],
        attempts=list(attempts.values()),
        repeated_steps=sum(row["kind"] == "train" for row in lines) - len(train),
        events=[(row["step"], str(row["event"])) for row in rows if row.get("event")],
        speed=_speed(train),
        samples=_samples(run_dir / "samples"),
    )


def _row(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # a line torn by a crash


def _speed(train: list[dict]) -> list[float]:
    """Tokens per second: as logged, otherwise from the time between neighbouring lines of one attempt."""
    if train and "tokens_per_second" in train[0]:
        return [row["tokens_per_second"] for row in train]
    pairs = [(a, b) for a, b in itertools.pairwise(train) if a.get("attempt") == b.get("attempt")]
    return [(b["tokens"] - a["tokens"]) / (b["time"] - a["time"]) for a, b in pairs if b["time"] > a["time"]]


def _samples(folder: Path) -> list[tuple[str, str]]:
    paths = sorted(folder.glob("*.txt")) + sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    found: list[tuple[str, str]] = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".jsonl":
            rows = [row for line in text.splitlines() if (row := _row(line))]
            found += [(f"{path.name}, {i}", str(row["text"])) for i, row in enumerate(rows) if "text" in row]
        else:
            found.append((path.name, text))
    return [(name, text[:MAX_SAMPLE_CHARACTERS]) for name, text in found[:MAX_SAMPLES]]
