"""The report's figures, one function each: RunData -> Figure, or None where there is nothing to show."""

from array import array
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.data import RunData

SIZE = (9.0, 3.6)
MAX_POINTS = 4000
INK, FAINT, ACCENT = "#1f4e79", "#a9c4de", "#c05a1a"


def smooth(values: np.ndarray, weight: float = 0.97) -> np.ndarray:
    """Exponential moving average without the bias towards its start; non-finite values are passed over."""
    out, total, mass = array("d"), 0.0, 0.0
    for value in array("d", values.tobytes()):
        if value - value == 0:  # neither nan nor infinite
            total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        out.append(total / mass if mass else value)
    return np.frombuffer(out) if out else np.zeros(0)


def thinned(*columns: np.ndarray) -> list[np.ndarray]:
    """The same few thousand points of each column, evenly spaced, the first and the last among them."""
    count = len(columns[0])
    if count <= MAX_POINTS:
        return list(columns)
    chosen = np.linspace(0, count - 1, MAX_POINTS).round().astype(int)
    return [column[chosen] for column in columns]


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _column(rows: Sequence[dict], name: str) -> list[float]:
    return [row[name] for row in rows]


def _drawable(run: RunData, *names: str) -> list[np.ndarray]:
    """Training columns where all of them say something; shorter than the run, or empty."""
    there = ~np.any([np.isnan(run.train[name]) for name in names[1:]], axis=0)
    return [run.train[name][there] for name in names]


def loss(run: RunData) -> Figure | None:
    """Training loss against steps, with its running mean."""
    if not run.num_steps:
        return None
    figure, axes = _axes("step", "loss (nats per token)")
    steps, values = run.train["step"], run.train["loss"]
    steps, values, mean = thinned(steps, values, smooth(values))
    axes.plot(steps, values, color=FAINT, linewidth=0.8, label="per step")
    axes.plot(steps, mean, color=INK, label="running mean")
    axes.legend()
    return figure


def validation(run: RunData) -> Figure | None:
    """Held-out NELBO with its standard error, and perplexity."""
    if not run.validation:
        return None
    figure, axes = _axes("step", "NELBO (nats per token)")
    steps = _column(run.validation, "step")
    errors = [row.get("stderr") or 0.0 for row in run.validation]
    axes.errorbar(steps, _column(run.validation, "nelbo"), yerr=errors, color=INK, marker="o", markersize=3, capsize=2)
    right = axes.twinx()
    right.plot(steps, _column(run.validation, "ppl"), color=ACCENT, linestyle="--")
    right.set_ylabel("perplexity (dashed)", color=ACCENT)
    right.set_yscale("log")
    return figure


def variance(run: RunData) -> Figure | None:
    """The last variance table: one bar per interval [low, high], sorted; the shortest bar is the best."""
    tables = [row["variance"] for row in run.validation if row.get("variance")]
    rows = [(name, value) for name, value in tables[-1].items() if isinstance(value, float)] if tables else []
    if not rows:
        return None
    rows.sort(key=lambda row: row[1])
    figure, axes = _axes("interval of times", "variance of a block's loss")
    axes.bar(range(len(rows)), [row[1] for row in rows], color=[ACCENT, *[FAINT] * (len(rows) - 1)])
    axes.set_xticks(range(len(rows)), [name for name, _ in rows], rotation=90, fontsize=7)
    return figure


def clip(run: RunData) -> Figure | None:
    """Which times training draws from, over the run."""
    steps, low, high = thinned(*_drawable(run, "step", "clip_low", "clip_high"))
    if not len(steps):
        return None
    figure, axes = _axes("step", "diffusion time")
    axes.fill_between(steps, low, high, step="post", color=FAINT)
    axes.set_ylim(0, 1)
    return figure


def speed(run: RunData) -> Figure | None:
    """Tokens per second."""
    if not len(run.speed):
        return None
    figure, axes = _axes("training line", "tokens per second")
    line, speed, mean = thinned(np.arange(len(run.speed)), run.speed, smooth(run.speed))
    axes.plot(line, speed, color=FAINT, linewidth=0.8)
    axes.plot(line, mean, color=INK)
    axes.set_ylim(bottom=0)
    return figure


def optimizer(run: RunData) -> Figure | None:
    """Gradient norm before clipping, and learning rate."""
    steps, norms, rate = _drawable(run, "step", "grad_norm", "lr")
    if not len(steps):
        return None
    figure, axes = _axes("step", "gradient norm")
    steps, norms, rate, mean = thinned(steps, norms, rate, smooth(norms))
    axes.plot(steps, norms, color=FAINT, linewidth=0.8)
    axes.plot(steps, mean, color=INK)
    axes.set_yscale("log")
    right = axes.twinx()
    right.plot(steps, rate, color=ACCENT, linestyle="--")
    right.set_ylabel("learning rate (dashed)", color=ACCENT)
    return figure


def restarts(run: RunData) -> Figure | None:
    """Steps against wall-clock time; a line marks the start of each attempt."""
    steps, seconds = thinned(*_drawable(run, "step", "time"))
    if not len(steps):
        return None
    figure, axes = _axes("hours since the start", "step")
    began = min(start for _, start, _ in run.attempts)
    axes.plot((seconds - began) / 3600, steps, color=INK, marker=".", markersize=2)
    for attempt, start, _ in run.attempts[1:]:
        axes.axvline((start - began) / 3600, color=ACCENT, linestyle=":")
        axes.annotate(attempt, ((start - began) / 3600, 0), color=ACCENT, fontsize=8)
    return figure
