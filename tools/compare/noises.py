"""Which noise learns best: intervals, `resample` and stratified counts, over paired seeds (for compare_objectives.py).

Runs of one seed share initial weights, rows and held-out noise, so differences are taken within a seed and their
standard error over seeds. Figures are kept in one JSON file beside the report; what it holds is not run again.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bd3lm_scale.runtime.metrics import read_metrics

DEFAULTS = {"vocab_size": 512, "steps": 500, "context_length": 64, "layers": 2, "width": 64, "lr": 3e-3, "rows": 256}
"""Of compare_objectives.py under --seeds: small enough for a hundred runs."""

SETTINGS = (*DEFAULTS, "rows_per_step", "text", "data", "document", "validation_fraction")
BASE = "paper_resample"
SECTIONS = ("noises", "conversions", "packing")
"""Parts of a report that are written by themselves, each between marks."""
BLOCK_SIZES = ("4", "8", "16", "L")
PAPER = {"4": (0.45, 0.95), "8": (0.45, 0.95), "16": (0.3, 0.8), "L": (0.0, 0.5)}
"""The intervals of the paper's Section 5; it names none for 8, which takes that of 4."""
SEARCHES = 3
"""Searches in a run whose interval is searched; it starts at the paper's."""


@dataclass(frozen=True)
class Noise:
    """One way to draw masks.

    Attributes:
        label: in the report.
        interval: clip interval; None: the paper's for the block size.
        is_searched: whether the search may move it.
        settings: of diffusion.
    """

    label: str
    interval: tuple[float, float] | None = None
    is_searched: bool = False
    settings: tuple[str, ...] = ()


RESAMPLE, STRATIFIED = ("diffusion.resample=true",), ("diffusion.mask_counts=stratified",)
NOISES = {
    "full": Noise("U[0, 1]", (0.0, 1.0)),
    "paper": Noise("the paper's interval"),
    BASE: Noise("the paper's interval, `resample`", settings=RESAMPLE),
    "searched": Noise("searched", is_searched=True),
    "searched_resample": Noise("searched, `resample`", is_searched=True, settings=RESAMPLE),
    "stratified": Noise("stratified counts, U[0, 1]", (0.0, 1.0), settings=STRATIFIED),
    "stratified_middle": Noise("stratified counts, U[.25, .75]", (0.25, 0.75), settings=STRATIFIED),
}


def run_all(args: Any, data: Path, output: Path, path: Path, call: Callable[[list[str]], None]) -> dict[str, Any]:
    """Train what the figures in `path` lack, seed by seed, and return all figures.

    Raises:
        ValueError: the file holds figures of other settings.
    """
    settings = {name: getattr(args, name) for name in SETTINGS}
    figures = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
    changed = [
        f"{n}: {figures['settings'].get(n)} -> {v}" for n, v in settings.items() if figures["settings"].get(n) != v
    ]
    if changed:
        raise ValueError(f"{path} holds figures of other settings ({'; '.join(changed)}); use another --report")
    wanted = [
        f"block{size}/{noise}/{seed}"
        for seed in range(1, args.seeds + 1)
        for size in BLOCK_SIZES
        for noise in NOISES
        if not args.noises or noise in args.noises
    ]
    for name in tqdm([name for name in wanted if name not in figures["runs"]], desc="runs", unit="run"):
        figures["runs"][name] = _run(name, args, data, output, call)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".unfinished")
        temporary.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
        temporary.rename(path)
    return figures


def _run(name: str, args: Any, data: Path, output: Path, call: Callable[[list[str]], None]) -> dict[str, Any]:
    block, kind, seed = name.split("/")
    size, noise, steps, rows = block.removeprefix("block"), NOISES[kind], args.steps, args.rows_per_step
    run_dir = output / name.replace("/", "_")
    low, high = noise.interval or PAPER[size]
    settings = {
        "run_dir": str(run_dir), "seed": int(seed), "precision": "fp32",
        "data": {"path": str(data), "context_length": args.context_length, "workers": 0},
        "model": {"num_layers": args.layers, "hidden_size": args.width, "num_heads": 4, "cond_dim": 16, "dropout": 0.0},
        "optim": {"lr": args.lr, "warmup_steps": max(1, steps // 20), "schedule": "cosine", "min_lr": args.lr / 10,
                  "ema_decay": 0.98},
        "train": {"steps": steps, "global_batch_size": rows, "micro_batch_size": rows, "threads": 1},
        "diffusion": {"clip_low": low, "clip_high": high, "clip_search": {"enabled": noise.is_searched}},
        "evaluation": {"every_steps": max(1, steps // (SEARCHES + 1)) if noise.is_searched else steps,
                       "rows": args.rows, "micro_batch_size": 32, "draws": 4},
        "checkpoint": {"every_steps": 2 * steps, "keep_last": 1},
        "logging": {"every_steps": 50, "progress": False},
        "runtime": {"device": "cpu"},
    }  # fmt: skip
    config = output / f"{run_dir.name}.yaml"
    config.write_text(json.dumps(settings, indent=1))  # YAML reads JSON
    shape = "diffusion.objective=mdlm" if size == "L" else f"diffusion.block_size={size}"
    call(["-m", "bd3lm_scale.train", str(config), shape, *noise.settings])
    found = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "validation"]
    return {
        "nelbo": found[-1]["nelbo"],
        "stderr": found[-1]["stderr"],
        "intervals": [[row["clip_low"], row["clip_high"]] for row in found],
    }


def section(figures: dict[str, Any]) -> str:
    """The figures as a table: nats per token, and the difference from the paper's recipe within seeds."""
    settings, runs = figures["settings"], figures["runs"]
    tokens = settings["steps"] * settings["rows_per_step"] * settings["context_length"]
    lines = [
        "## Which noise",
        "",
        "Written by `python tools/compare_objectives.py --seeds 4`, which runs what is missing here. "
        f"{settings['layers']} layers of width {settings['width']}, rows of {settings['context_length']} tokens, "
        f"{settings['vocab_size']} ids, {tokens:,} tokens per run, learning rate {settings['lr']:g}; "
        f"scored on {settings['rows']} held-out rows, 4 noise draws, U[0, 1] for all.",
        "Runs of one seed share weights, rows and held-out noise. Differences are from the paper's recipe (interval "
        "with `resample`), within seeds; negative is better; +- is the standard error over seeds.",
        "",
        "| L' | noise | interval at the end | seeds | nats per token | difference |",
        "|---|---|---|---|---|---|",
    ]
    for size in BLOCK_SIZES:
        for kind, noise in NOISES.items():
            by_seed = _by_seed(runs, size, kind)
            if by_seed:
                ends = sorted({tuple(run["intervals"][-1]) for run in by_seed.values()})
                shown = ", ".join(f"U[{low:g}, {high:g}]" for low, high in ends)
                values = [run["nelbo"] for run in by_seed.values()]
                cells = [size, noise.label, shown, str(len(values)), mean_and_error(values)]
                lines.append("| " + " | ".join([*cells, _difference(runs, size, kind)]) + " |")
    return "\n".join(lines)


def _by_seed(runs: dict[str, Any], size: str, kind: str) -> dict[str, Any]:
    prefix = f"block{size}/{kind}/"
    return {name.removeprefix(prefix): runs[name] for name in sorted(runs) if name.startswith(prefix)}


def _difference(runs: dict[str, Any], size: str, kind: str) -> str:
    mine, base = _by_seed(runs, size, kind), _by_seed(runs, size, BASE)
    differences = [mine[seed]["nelbo"] - base[seed]["nelbo"] for seed in mine if seed in base]
    return "" if kind == BASE or not differences else mean_and_error(differences, sign="+")


def mean_and_error(values: list[float], sign: str = "") -> str:
    """Mean and standard error over seeds, as text; one seed has no error."""
    mean = f"{statistics.fmean(values):{sign}.3f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def insert(report: Path, text: str, name: str = "noises") -> None:
    """Put the section `name` into the report in place of the one there, or at its end."""
    old = report.read_text() if report.exists() else ""
    begin, end = marks(name)
    block = f"{begin}\n{text}\n{end}"
    if begin in old:
        before, _, rest = old.partition(begin)
        new = before + block + rest.partition(end)[2]
    else:
        new = f"{old.rstrip()}\n\n{block}\n".lstrip()
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(new)


def marks(name: str) -> tuple[str, str]:
    """Where a section begins and ends."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def kept(report: str) -> str:
    """Such sections with their marks, out of a report that is about to be written again; empty if there are none."""
    found = []
    for begin, end in map(marks, SECTIONS):
        if begin in report:
            found.append(begin + report.partition(begin)[2].partition(end)[0] + end)
    return "\n\n".join(found)
