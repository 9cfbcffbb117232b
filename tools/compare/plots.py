"""The plots of a comparison, one function each (a library of compare_objectives.py)."""

from pathlib import Path

from matplotlib.figure import Figure

from compare.data import Outcome

INK, ACCENT = "#1f4e79", "#c05a1a"


def plot_ppl(found: dict[str, Outcome], path: Path) -> None:
    """Perplexity of every run, best first."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    runs = sorted(found.values(), key=lambda run: run.nelbo)
    errors = [run.figures["ppl"] * run.stderr for run in runs]
    colors = [ACCENT if "clipped" in run.label or "full" in run.label else INK for run in runs]
    axes.barh(range(len(runs)), [run.figures["ppl"] for run in runs], xerr=errors, color=colors, capsize=2)
    axes.set_yticks(range(len(runs)), [run.label for run in runs])
    axes.invert_yaxis()
    axes.set_xlabel("perplexity of held-out text (bound, or exact for AR and L'=1); orange: clipped")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_curves(found: dict[str, Outcome], path: Path) -> None:
    """Validations during training."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(found.values()):
        if run.name.endswith(("_again", "_slow", "_fast", "_gates")):
            continue
        is_clipped = "clipped" in run.name or "full" in run.name
        axes.errorbar(
            [row["step"] for row in run.validations],
            [row["nelbo"] for row in run.validations],
            yerr=[row["stderr"] for row in run.validations],
            label=run.label,
            color=f"C{index % 10}",
            linestyle="--" if is_clipped else "-",
            linewidth=1.2,
            capsize=2,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("NELBO (nats per token)")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_variance(runs: list[Outcome], path: Path) -> None:
    """Variance of a block's loss against the interval's place, one panel per block size."""
    figure = Figure(figsize=(3.4 * len(runs), 3.4), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, run in zip(panels, runs, strict=True):
        by_width: dict[float, list[tuple[float, float]]] = {}
        for label, value in run.figures["variance"]["tables"]["loglinear"].items():
            low, high = (float(part) for part in label.split("-"))
            by_width.setdefault(round(high - low if low > 0.01 else high, 2), []).append((low, value))
        for width, points in sorted(by_width.items()):
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=f"width {width:g}")
        axes.set_yscale("log")
        axes.set_title(run.label, fontsize=10)
        axes.set_xlabel("lower end of the interval")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("variance of a block's loss")
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
