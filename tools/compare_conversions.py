#!/usr/bin/env python3
"""Convert an autoregressive model to block diffusion in several ways, and compare with training from scratch.

    python tools/compare_conversions.py              the demo corpus, two seeds; goes on where it was

For every seed: a Llama-like model (RMSNorm, SwiGLU, grouped heads, tied) is trained autoregressively, then converted
with a tenth of its tokens to blocks of 4 and of 16, with predictions at their own position or one before it
(shift_targets), at the final block size at once or over smaller ones (block_size_schedule). From scratch: the same
network and all tokens.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare import noises
from compare_objectives import prepare
from tqdm import tqdm

from bd3lm_scale.runtime.metrics import read_metrics

SIZES = (4, 16)
WAYS = {
    "plain": "converted, own position",
    "plain_schedule": "converted, own position, block-size schedule",
    "shift": "converted, shifted",
    "shift_schedule": "converted, shifted, block-size schedule",
    "scratch": "from scratch, all tokens",
}
BEFORE = {4: (1,), 16: (1, 4)}
"""Block sizes of the schedule before the final one, each for an equal part of the steps."""
SETTINGS = (
    "steps", "rows_per_step", "context_length", "layers", "width", "lr", "conversion_lr", "rows", "vocab_size",
    "validation_fraction", "document", "text",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    output, report = Path(args.output), Path(args.report)
    try:
        output.mkdir(parents=True, exist_ok=True)
        figures = run_all(args, output, report.with_suffix("") / "conversions.json")
    except (ValueError, OSError, subprocess.CalledProcessError) as problem:
        print(f"compare_conversions: {problem}", file=sys.stderr)
        return 1
    noises.insert(report, section(figures), "conversions")
    print(f"the section on conversions in {report} is written")
    return 0


def run_all(args: argparse.Namespace, output: Path, path: Path) -> dict[str, Any]:
    """Train what the figures in `path` lack, seed by seed; ValueError where it holds figures of other settings."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    figures = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": {}}
    changed = [f"{n}: {figures['settings'].get(n)} -> {v}" for n, v in settings.items() if figures["settings"][n] != v]
    if changed:
        raise ValueError(f"{path} holds figures of other settings ({'; '.join(changed)}); use another --report")
    data = prepare(args, output)
    wanted = [f"{name}/{seed}" for seed in range(1, args.seeds + 1) for name in names()]
    for name in tqdm([name for name in wanted if name not in figures["runs"]], desc="runs", unit="run"):
        figures["runs"][name] = run(name, args, data, output)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".unfinished")
        temporary.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
        temporary.rename(path)
    return figures


def names() -> list[str]:
    """The runs of a seed, in the order they are made."""
    return ["ar", *(f"block{size}/{way}" for way in WAYS for size in SIZES)]


def run(name: str, args: argparse.Namespace, data: Path, output: Path) -> dict[str, Any]:
    """One training run; its likelihood bound on held-out rows at the end."""
    *kind, seed = name.split("/")
    run_dir, tenth = output / name.replace("/", "_"), args.steps // 10
    is_ar, way = kind == ["ar"], kind[-1]
    is_conversion = way not in ("ar", "scratch")
    steps = tenth if is_conversion else args.steps if is_ar else args.steps + tenth
    diffusion: dict[str, Any] = {"objective": "ar"}
    if not is_ar:
        size = int(kind[0].removeprefix("block"))
        diffusion = {"block_size": size, "shift_targets": way.startswith("shift"), "clip_search": {"enabled": False}}
        if way.endswith("schedule"):
            part = steps // (len(BEFORE[size]) + 1)
            diffusion["block_size_schedule"] = [
                {"block_size": before, "steps": part, **({"clip_low": 1, "clip_high": 1} if before == 1 else {})}
                for before in BEFORE[size]
            ]
    settings = common(args, data) | {"run_dir": str(run_dir), "seed": int(seed), "diffusion": diffusion}
    lr = args.conversion_lr if is_conversion else args.lr
    settings["optim"] = {
        "lr": lr, "warmup_steps": max(1, steps // 20), "schedule": "cosine", "min_lr": lr / 10, "ema_decay": 0.9,
    }  # fmt: skip
    settings["train"] |= {"steps": steps, "init_from": str(output / f"ar_{seed}") if is_conversion else None}
    settings["evaluation"]["every_steps"] = settings["checkpoint"]["every_steps"] = steps
    config = output / f"{run_dir.name}.yaml"
    config.write_text(json.dumps(settings, indent=1))  # YAML reads JSON
    train(str(config))
    found = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "validation"]
    return {"nelbo": found[-1]["nelbo"], "stderr": found[-1]["stderr"], "steps": steps}


def train(config: str) -> None:
    """The train command in a process that is forked from this one, where everything is imported already."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from bd3lm_scale import train as command

    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(command.main([config])))
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"python -m bd3lm_scale.train {config}: failed with exit code {process.exitcode}")


def common(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """What all runs share: a network without adaptive norms, whose parameters fit every objective."""
    rows = args.rows_per_step
    return {
        "precision": "fp32",
        "data": {"path": str(data), "context_length": args.context_length, "workers": 0},
        "model": {
            "num_layers": args.layers, "hidden_size": args.width, "num_heads": 4, "num_kv_heads": 2, "dropout": 0.0,
            "adaln": False, "norm": "rmsnorm", "norm_eps": 1e-6, "mlp": "swiglu", "ffn_hidden_size": 3 * args.width,
            "mlp_bias": False, "head_bias": False, "tie_embeddings": True,
        },
        "train": {"global_batch_size": rows, "micro_batch_size": rows, "threads": 1},
        "evaluation": {"rows": args.rows, "micro_batch_size": 32, "draws": 4},
        "checkpoint": {"keep_last": 1},
        "logging": {"every_steps": 10, "progress": False},
        "runtime": {"device": "cpu"},
    }  # fmt: skip


def section(figures: dict[str, Any]) -> str:
    """The figures as a table: nats per token, and the difference from training from scratch within seeds."""
    settings, runs = figures["settings"], figures["runs"]
    per_step = settings["rows_per_step"] * settings["context_length"]
    tenth = settings["steps"] // 10
    lines = [
        "## Converted from an autoregressive model",
        "",
        f"Written by `python tools/compare_conversions.py`. {settings['layers']} layers of width {settings['width']} "
        f"(RMSNorm, SwiGLU, grouped heads, tied), rows of {settings['context_length']} tokens, "
        f"{settings['vocab_size']} ids. AR: {settings['steps'] * per_step:,} tokens, learning rate "
        f"{settings['lr']:g}; converted with {tenth * per_step:,} more, {settings['conversion_lr']:g}; from scratch: "
        f"{(settings['steps'] + tenth) * per_step:,} at {settings['lr']:g}. Schedules: blocks of 1 (fully masked), "
        "then 4 (for 16), in equal parts. Full interval for all others, EMA weights, "
        f"{settings['rows']} held-out rows, 4 noise draws. Differences are within seeds, negative is better; +- is the "
        "standard error over seeds.",
        "",
        "| L' | model | seeds | nats per token | difference from scratch |",
        "|---|---|---|---|---|",
    ]
    for name, label in [("ar", "AR"), *((f"block{s}/{way}", text) for s in SIZES for way, text in WAYS.items())]:
        mine, base = _by_seed(runs, name), _by_seed(runs, f"{name.partition('/')[0]}/scratch")
        if mine:
            size = name.partition("/")[0].removeprefix("block")
            differences = [mine[seed] - base[seed] for seed in mine if seed in base and not name.endswith("scratch")]
            shown = noises.mean_and_error(differences, sign="+") if differences else ""
            cells = [
                "" if name == "ar" else size,
                label,
                str(len(mine)),
                noises.mean_and_error([*mine.values()]),
                shown,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_remarks(runs)])


def _by_seed(runs: dict[str, Any], name: str) -> dict[str, float]:
    return {n.rpartition("/")[2]: runs[n]["nelbo"] for n in sorted(runs) if n.rpartition("/")[0] == name}


def _remarks(runs: dict[str, Any]) -> list[str]:
    """What the choices change, within seeds: the shift, the schedule."""
    found = []
    for label, better, base in (
        ("Shifted instead of own positions", "shift", "plain"),
        ("Schedule, own positions", "plain_schedule", "plain"),
        ("Schedule, shifted", "shift_schedule", "shift"),
    ):
        for size in SIZES:
            mine, other = _by_seed(runs, f"block{size}/{better}"), _by_seed(runs, f"block{size}/{base}")
            differences = [mine[seed] - other[seed] for seed in mine if seed in other]
            if differences:
                spread = noises.mean_and_error(differences, sign="+")
                found.append(f"* {label}, L' = {size}: {spread} nats per token ({len(differences)} seeds).")
    seeds = {name.rpartition("/")[2] for name in runs}
    missing = [f"{name}/{seed}" for name in names() for seed in sorted(seeds) if f"{name}/{seed}" not in runs]
    return [*found, f"* Not run yet: {', '.join(missing)}; the same command makes them."] if missing else found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text to compare on (default: the demo corpus)")
    parser.add_argument("--output", default="runs/compare_conversions", help="runs and shards")
    parser.add_argument("--report", default="docs/results.md", help="the report (default: docs/results.md)")
    parser.add_argument("--vocab-size", type=int, default=512, help="ids of the tokenizer trained on the text")
    parser.add_argument("--validation-fraction", type=float, default=0.05)
    parser.add_argument("--document", default="file", help="file | line | paragraph: what a document is in .txt files")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of the autoregressive model")
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--conversion-lr", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=192, help="held-out rows that are scored at the end")
    parser.add_argument("--seeds", type=int, default=2)
    return parser


if __name__ == "__main__":
    sys.exit(main())
