"""The report's figures, one function each: RunData -> Figure, or None where there is nothing to show."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from report.data import RunData

SIZE = (9.0, 3.6)
INK, FAINT, ACCENT = "#1f4e79", "#a9c4de", "#c05a1a"


def smooth(values: Sequence[float], weight: float = 0.97) -> list[float]:
    """Exponential moving average without the bias towards its start; non-finite values are passed over."""
    out, total, mass = [], 0.0, 0.0
    for value in values:
        if value - value == 0:  # neither nan nor infinite
            total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        out.append(total / mass if mass else value)
    return out


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _column(rows: Sequence[dict], name: str) -> list[float]:
    return [row[name] for row in rows]


def loss(run: RunData) -> Figure | None:
    """Training loss against steps, with its running mean."""
    if not run.train:
        return None
    figure, axes = _axes("step", "loss (nats per token)")
    steps, values = _column(run.train, "step"), _column(run.train, "loss")
    axes.plot(steps, values, color=FAINT, linewidth=0.8, label="per step")
    axes.plot(steps, smooth(values), color=INK, label="running mean")
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
    rows = [row for row in run.train if "clip_low" in row and "clip_high" in row]
    if not rows:
        return None
    figure, axes = _axes("step", "diffusion time")
    low, high = _column(rows, "clip_low"), _column(rows, "clip_high")
    axes.fill_between(_column(rows, "step"), low, high, step="post", color=FAINT)
    axes.set_ylim(0, 1)
    return figure


def speed(run: RunData) -> Figure | None:
    """Tokens per second."""
    if not run.speed:
        return None
    figure, axes = _axes("training line", "tokens per second")
    axes.plot(run.speed, color=FAINT, linewidth=0.8)
    axes.plot(smooth(run.speed), color=INK)
    axes.set_ylim(bottom=0)
    return figure


def optimizer(run: RunData) -> Figure | None:
    """Gradient norm before clipping, and learning rate."""
    rows = [row for row in run.train if "grad_norm" in row and "lr" in row]
    if not rows:
        return None
    figure, axes = _axes("step", "gradient norm")
    steps, norms = _column(rows, "step"), _column(rows, "grad_norm")
    axes.plot(steps, norms, color=FAINT, linewidth=0.8)
    axes.plot(steps, smooth(norms), color=INK)
    axes.set_yscale("log")
    right = axes.twinx()
    right.plot(steps, _column(rows, "lr"), color=ACCENT, linestyle="--")
    right.set_ylabel("learning rate (dashed)", color=ACCENT)
    return figure


def restarts(run: RunData) -> Figure | None:
    """Steps against wall-clock time; a line marks the start of each attempt."""
    rows = [row for row in run.train if "time" in row]
    if not rows:
        return None
    figure, axes = _axes("hours since the start", "step")
    began = min(start for _, start, _ in run.attempts)
    axes.plot(
        [(row["time"] - began) / 3600 for row in rows], _column(rows, "step"), color=INK, marker=".", markersize=2
    )
    for attempt, start, _ in run.attempts[1:]:
        axes.axvline((start - began) / 3600, color=ACCENT, linestyle=":")
        axes.annotate(attempt, ((start - began) / 3600, 0), color=ACCENT, fontsize=8)
    return figure
