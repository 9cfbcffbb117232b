"""The report of compare_objectives.py (a library of it): figures of finished runs -> Markdown tables and plots.

What stands below the line NOTES in an existing report was written by hand and is kept.
"""

import itertools
import math
from pathlib import Path
from typing import Any

from compare import noises
from compare.data import Outcome, read_outcome
from compare.plots import plot_curves, plot_ppl, plot_variance

NOTES = "<!-- Below this line nothing is generated. -->"
PAPER_ORDER = {
    "as in the paper, BD3-LM with clipping": ("ar", "block4_clipped", "block16_clipped", "mdlm", "sedd"),
    "nothing clipped": ("ar", "block4", "block16", "mdlm", "sedd"),
}
CLIPPED = (
    ("block1", "block1_full"),
    ("block4", "block4_clipped"),
    ("block16", "block16_clipped"),
    ("mdlm", "mdlm_clipped"),
)
TABLES = ("block4", "block16", "mdlm")


def write(output: Path, cases: list[dict[str, Any]], settings: dict[str, Any], report: Path) -> None:
    """Write REPORT and the plots in a folder of its name beside it.

    Args:
        output: folder of the runs.
        cases: those to show, finished, in order.
        settings: what they have in common.
        report: Markdown file.
    """
    found = {case["name"]: read_outcome(output, case) for case in cases}
    plots = report.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    sections = [head(found, settings), likelihoods(found, plots), order(found), clipping(found), exact(found)]
    sections += [intervals(found, plots), gradients(found)]
    old = report.read_text() if report.exists() else ""
    kept = old.partition(NOTES)[2] or "\n"
    sections.insert(1, noises.kept(old.partition(NOTES)[0]))
    text = "\n\n".join(section for section in sections if section)
    report.write_text(f"{text}\n\n{NOTES}{kept}")


def head(found: dict[str, Outcome], settings: dict[str, Any]) -> str:
    tokens = settings["steps"] * settings["rows_per_step"] * settings["context_length"]
    text = (
        ", ".join(Path(t).name for t in settings["text"]) if settings["text"] else settings["data"] or "the demo corpus"
    )
    first = next(iter(found.values())).figures
    steps, rows, length = (settings[name] for name in ("steps", "rows_per_step", "context_length"))
    return f"""# Results: every objective, one text, one budget

Written by `python tools/compare_objectives.py` (CPU, one thread); the same command makes it again.

* Text: {text}, tokenizer of {settings["vocab_size"]:,} ids, rows of {length} tokens.
* Model: {settings["layers"]} layers of width {settings["width"]}, 4 heads, dropout 0.
* Budget of every run: {steps:,} steps of {rows} rows = **{tokens:,} tokens**. AdamW, learning rate
  {settings["lr"]:g} with warm-up and cosine decay, EMA 0.98.
* Scored: {first["num_rows"]:,} held-out rows ({first["num_tokens"]:,} tokens), EMA weights, 4 noise draws per row where
  the likelihood is a bound. "+-" is one standard error over rows (documents and noise, `docs/method.md` section 5); it
  does not know how another seed would have trained."""


def likelihoods(found: dict[str, Outcome], plots: Path) -> str:
    base = found["ar"].flops_per_token if "ar" in found else math.nan
    lines = [
        "## Likelihood",
        "",
        "| | PPL | nats per token | noise alone | FLOPs per token / AR | interval at the end |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for run in found.values():
        noise = run.figures["noise_stderr"]
        bound = "" if noise is None else "<= "
        interval = "-" if run.name.startswith("ar") else _interval(run.interval)
        lines.append(
            f"| {run.label} | {bound}{run.figures['ppl']:.2f} +- {run.figures['ppl'] * run.stderr:.2f} "
            f"| {run.nelbo:.4f} +- {run.stderr:.4f} | {'exact' if noise is None else f'{noise:.4f}'} "
            f"| {run.flops_per_token / base:.2f} | {interval} |"
        )
    plot_ppl(found, plots / "ppl.png")
    plot_curves(found, plots / "curves.png")
    lines += ["", f"![perplexity]({plots.name}/ppl.png)", "", f"![learning curves]({plots.name}/curves.png)"]
    return "\n".join(lines)


def order(found: dict[str, Outcome]) -> str:
    """The paper's order, neighbour by neighbour."""
    lines = ["## The paper's order", "", "Tables 3 and 4 of the paper: AR < L'=4 < L'=16 < MDLM < SEDD. Here:"]
    for title, names in PAPER_ORDER.items():
        runs = [found[name] for name in names if name in found]
        if len(runs) < 2:
            continue
        lines += ["", f"| {title} | difference (nats) | standard error | so here? |", "|---|---|---|---|"]
        for better, worse in itertools.pairwise(runs):
            difference, error = _difference(better, worse)
            verdict = "within error"
            if abs(difference) > 2 * error:
                verdict = "yes" if difference > 0 else "**no, the reverse**"
            lines.append(f"| {better.label} < {worse.label} | {difference:+.4f} | {error:.4f} | {verdict} |")
    return "\n".join(lines) if len(lines) > 3 else ""


def clipping(found: dict[str, Outcome]) -> str:
    pairs = [(found[a], found[b]) for a, b in CLIPPED if a in found and b in found]
    if not pairs:
        return ""
    lines = [
        "## With and without the clipped schedule",
        "",
        "| | U[0, 1] | clipped | interval | gain (nats) |",
        "|---|---|---|---|---|",
    ]
    for full, clipped in pairs:
        difference, error = _difference(clipped, full)
        lines.append(
            f"| {full.label} | {full.figures['ppl']:.2f} | {clipped.figures['ppl']:.2f} "
            f"| {_interval(clipped.interval)} | {difference:+.4f} +- {error:.4f} |"
        )
    lines += ["", "A positive gain: clipping helped. For L'=1 clipped means full masking, U[1, 1]."]
    return "\n".join(lines)


def exact(found: dict[str, Outcome]) -> str:
    """L'=1 with full masking against AR, seed by seed."""
    if not all(name in found for name in ("ar", "ar_again")):
        return ""
    ar = (found["ar"], found["ar_again"])
    lines = ["| | seed 1 | seed 2 | mean difference | standard error | equal? |", "|---|---|---|---|---|---|"]
    lines.append(f"| AR | {ar[0].nelbo:.4f} | {ar[1].nelbo:.4f} | | | |")
    for name in ("block1_full", "block1_gates"):
        if not all(n in found for n in (name, f"{name}_again")):
            continue
        single = (found[name], found[f"{name}_again"])
        gaps = [s.nelbo - a.nelbo for s, a in zip(single, ar, strict=True)]
        difference, error = sum(gaps) / 2, math.hypot((gaps[0] - gaps[1]) / 2, ar[0].stderr, single[0].stderr)
        verdict = "within two standard errors" if abs(difference) < 2 * error else "**no**"
        lines.append(
            f"| {single[0].label} | {single[0].nelbo:.4f} | {single[1].nelbo:.4f} | {difference:+.4f} | {error:.4f} "
            f"| {verdict} |"
        )
    return "\n".join(
        [
            "## L'=1 with full masking against AR",
            "",
            "The same likelihood, factorized the same way, through two networks. AR reads a token and predicts",
            "the next one; L'=1 predicts at a masked position that reads the clean ones, with adaLN, at more cost.",
            "adaLN's gates start at 0; open gates start at 1, as if AR had gates. Nats per token; differences are",
            "taken within a seed, which decides the order of the text for both.",
            "",
            *lines,
        ]
    )


def intervals(found: dict[str, Outcome], plots: Path) -> str:
    """The variance of a block's loss under every interval, of the models trained on U[0, 1]."""
    runs = [found[name] for name in TABLES if name in found]
    if not runs:
        return ""
    tables = {run.name: run.figures["variance"]["tables"]["loglinear"] for run in runs}
    least = {name: min(table.values()) for name, table in tables.items()}
    lines = [
        "## Variance of a block's loss by interval",
        "",
        "Models trained on U[0, 1], loglinear schedule; the least in bold.",
        "",
    ]
    lines += ["| interval | " + " | ".join(run.label for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for label in tables[runs[0].name]:
        cells = []
        for run in runs:
            value = tables[run.name][label]
            cells.append(f"**{value:.3f}**" if value == least[run.name] else f"{value:.3f}")
        lines.append(f"| {label.replace('-', ' to ')} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The best interval of each schedule, and its variance (trained under loglinear; the others in closed form):",
        "",
    ]
    schedules = list(runs[0].figures["variance"]["tables"])
    lines += ["| | " + " | ".join(schedules) + " |", "|---" * (len(schedules) + 1) + "|"]
    for run in runs:
        cells = []
        for schedule in schedules:
            table = run.figures["variance"]["tables"][schedule]
            best = min(table, key=lambda label, table=table: table[label])
            cells.append(f"{best.replace('-', ' to ')}: {table[best]:.3f}")
        lines.append(f"| {run.label} | " + " | ".join(cells) + " |")
    single = found.get("block1") or found.get("block1_full")
    if single is not None:
        cells = [
            f"U[{k.replace('-', ', ')}]: {v:.2f}" for k, v in single.figures["variance"]["tables"]["loglinear"].items()
        ]
        lines += ["", f"L'=1: {'; '.join(cells)}."]
    plot_variance(runs, plots / "variance.png")
    lines += ["", f"![variance by interval]({plots.name}/variance.png)"]
    return "\n".join(lines)


def gradients(found: dict[str, Outcome]) -> str:
    lines = ["## Variance of the gradient", ""]
    rows = next(iter(found.values())).figures["variance"]["probe_rows"]
    draws = max(p["gradient"]["count"] for run in found.values() for p in run.figures["variance"]["probes"])
    lines.append(
        f"One step on the same {rows} held-out rows, {draws} noise draws: variance of the batch loss, trace of the "
        "gradient's covariance, and that times the FLOPs of a draw (`docs/method.md` section 7)."
    )
    lines += [
        "",
        "| | interval | loss variance | gradient variance | mean gradient | variance x FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for run in found.values():
        for probe in run.figures["variance"]["probes"]:
            gradient = probe["gradient"]
            if gradient["variance"] == 0:
                continue
            lines.append(
                f"| {run.label} | {probe['interval'].replace('-', ' to ')} | {probe['loss']['variance']:.2e} "
                f"| {gradient['variance']:.3g} | {gradient['mean_norm']:.3g} | {gradient['variance_per_flop']:.2e} |"
            )
    lines += [
        "",
        "AR and L'=1 with full masking draw nothing: their variance is 0, what remains is the choice of rows.",
    ]
    return "\n".join(lines)


def _difference(better: Outcome, worse: Outcome) -> tuple[float, float]:
    """How many nats `worse` is behind, and a standard error; the runs score the same rows, so it is an upper bound."""
    return worse.nelbo - better.nelbo, math.hypot(better.stderr, worse.stderr)


def _interval(interval: tuple[float, float]) -> str:
    return f"U[{interval[0]:g}, {interval[1]:g}]"
