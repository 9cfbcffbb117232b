"""What a report shows of a run, read from its metrics.jsonl and samples/ (a library of tools/report_run.py)."""

import json
import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bd3lm_scale.runtime.metrics import FILE_NAME, stream_metrics

MAX_SAMPLES = 4
MAX_SAMPLE_CHARACTERS = 4000


COLUMNS = ("loss", "tokens", "time", "tokens_per_second", "clip_low", "clip_high", "grad_norm", "lr")
"""What is drawn of the training lines."""


@dataclass(frozen=True)
class RunData:
    """A run's figures.

    Attributes:
        train: a column of numbers for "step" and each of COLUMNS, in order of step; the last attempt at a step wins;
            nan where a line did not say.
        validation: one row per validation, in order of step; the last attempt wins.
        attempts: (attempt, wall-clock time, step) of each attempt's first line.
        repeated_steps: training steps that were computed again after a restart.
        events: (step, what happened) of steps at which something did: skipped updates, rollbacks, ...
        speed: tokens per second of each training line, where it can be told.
        samples: (name, text).
    """

    train: dict[str, np.ndarray]
    validation: list[dict]
    attempts: list[tuple[str, float, int]]
    repeated_steps: int
    events: list[tuple[int, str]]
    speed: np.ndarray
    samples: list[tuple[str, str]]

    @property
    def num_steps(self) -> int:
        """Training steps with a line."""
        return len(self.train["step"])


def read_run(run_dir: Path) -> RunData:
    """Read a run folder, once and line by line: a million steps are columns of numbers, not a million objects.

    Raises:
        ValueError: if it holds no metrics.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{run_dir}: holds no {FILE_NAME}; use the folder a training run was given as run_dir")
    columns = {name: array("d") for name in ("step", "attempt", *COLUMNS)}
    others: dict[tuple, dict] = {}
    events: dict[tuple, str] = {}
    attempts: dict[str, tuple[str, float, int]] = {}
    for row in stream_metrics(path):
        attempt, key = str(row.get("attempt", "0")), (row["kind"], row["step"])
        attempts.setdefault(attempt, (attempt, _number(row.get("time", 0.0)), row["step"]))
        events.pop(key, None)
        if row.get("event"):
            events[key] = str(row["event"])
        if row["kind"] == "train":
            row["attempt"] = list(attempts).index(attempt)
            for name, column in columns.items():
                column.append(_number(row.get(name)))
        elif row["kind"] == "validation":
            others[key] = row
    if not attempts:
        raise ValueError(f"{path}: holds no figures yet; use it after the first training step")
    train, lines = _last_of_each_step(columns), len(columns["step"])
    return RunData(
        train=train,
        validation=sorted(others.values(), key=lambda row: row["step"]),
        attempts=list(attempts.values()),
        repeated_steps=lines - len(train["step"]),
        events=sorted((step, event) for (_, step), event in events.items()),
        speed=_speed(train),
        samples=_samples(run_dir / "samples"),
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _last_of_each_step(columns: dict[str, array]) -> dict[str, np.ndarray]:
    """The columns in order of step, of several lines of one step the last."""
    step = np.frombuffer(columns["step"], dtype=np.float64) if columns["step"] else np.zeros(0)
    order = np.argsort(step, kind="stable")
    order = order[np.append(step[order][1:] != step[order][:-1], True)[: len(order)]]
    return {name: np.frombuffer(column)[order] if column else np.zeros(0) for name, column in columns.items()}


def _speed(train: dict[str, np.ndarray]) -> np.ndarray:
    """Tokens per second: as logged, otherwise from the time between neighbouring lines of one attempt."""
    logged = train["tokens_per_second"]
    if len(logged) and not math.isnan(logged[0]):
        return logged[np.isfinite(logged)]
    tokens, seconds, attempt = (np.diff(train[name]) for name in ("tokens", "time", "attempt"))
    usable = (attempt == 0) & (seconds > 0)
    return tokens[usable] / seconds[usable]


def _row(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # a line torn by a crash


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
