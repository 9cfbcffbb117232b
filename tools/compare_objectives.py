#!/usr/bin/env python3
"""Train every objective on one text with one token budget, and write what came out: tables and plots.

    python tools/compare_objectives.py                       the demo corpus
    python tools/compare_objectives.py --text FILE...        any text
    python tools/compare_objectives.py --seeds 4             which noise: every interval, resample and stratified counts

AR, blocks of 1, 4 and 16 tokens, MDLM and SEDD, with and without the clipped schedule, one after another on the CPU.
Interrupted, the same command goes on where it was; finished, it only writes the report again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compare import noises
from compare import report as compare_report
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
DEMO_CORPUS = ROOT / "data" / "demo" / "corpus" / "python_library.jsonl"
VALIDATIONS = 8
"""Validations during a run; the clipped runs choose their interval at each."""
FULL_MASKING = ("diffusion.clip_low=1", "diffusion.clip_high=1", "diffusion.clip_search.enabled=false")
MEASURE_ONLY = ("diffusion.clip_search.apply=false",)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: of its run folder.
        label: in the report.
        overrides: on top of the common settings.
        seed: of weights, data order and noise.
        draws: noise draws per validation row; 1 where the likelihood is exact.
        lr_factor: on the common learning rate.
        opens_gates: start with adaLN's gates at 1, so that the residual branches work from the first step, as AR's do.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    seed: int = 1
    draws: int = 4
    lr_factor: float = 1.0
    opens_gates: bool = False


def cases() -> list[Case]:
    """All runs, in the order they are made."""
    ar = Case("ar", "AR", ("diffusion.objective=ar",), draws=1)
    single = Case("block1_full", "L'=1, full masking", ("diffusion.block_size=1", *FULL_MASKING), draws=1)
    open_gates = replace(single, label="L'=1, full masking, open gates", opens_gates=True)
    mdlm = ("diffusion.objective=mdlm",)
    found = [
        ar,
        single,
        Case("block4", "L'=4", ("diffusion.block_size=4", *MEASURE_ONLY)),
        Case("block4_clipped", "L'=4, clipped", ("diffusion.block_size=4",)),
        Case("block16", "L'=16", ("diffusion.block_size=16", *MEASURE_ONLY)),
        Case("block16_clipped", "L'=16, clipped", ("diffusion.block_size=16",)),
        Case("mdlm", "MDLM", (*mdlm, *MEASURE_ONLY)),
        # one block per row: more draws, so that the search has as many blocks to choose from
        Case("mdlm_clipped", "MDLM, clipped", (*mdlm, "evaluation.draws=6")),
        Case("sedd", "SEDD", ("diffusion.objective=sedd", "diffusion.clip_search.enabled=false")),
        Case("block1", "L'=1", ("diffusion.block_size=1", *MEASURE_ONLY), draws=1),
        replace(ar, name="ar_again", label="AR, second seed", seed=2),
        replace(ar, name="ar_slow", label="AR, half the learning rate", lr_factor=0.5),
        replace(ar, name="ar_fast", label="AR, 2.5 x the learning rate", lr_factor=2.5),
        replace(single, name="block1_full_again", label="L'=1, full masking, second seed", seed=2),
        replace(open_gates, name="block1_gates"),
        replace(open_gates, name="block1_gates_again", label=f"{open_gates.label}, second seed", seed=2),
    ]
    return found


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    output = Path(args.output)
    if args.seeds:
        return _compare_noises(args, output)
    chosen = [case for case in cases() if not args.only or case.name in args.only]
    try:
        _remember(output, _settings(args))
        data = Path(args.data) if args.data else prepare(args, output)
        with tqdm(chosen, desc="runs", unit="run", position=0) as bar:
            for case in bar:
                bar.set_description(case.name)
                _run(case, args, data, output)
    except (ValueError, OSError, subprocess.CalledProcessError) as problem:
        print(f"compare_objectives: {problem}", file=sys.stderr)
        return 1
    report = Path(args.report)
    compare_report.write(output, [asdict(case) for case in chosen], _settings(args), report)
    print(f"{report} and the plots beside it are written")
    return 0


def _compare_noises(args: argparse.Namespace, output: Path) -> int:
    """The comparison of noises over paired seeds, in a section of its own."""
    output, report = output / "noises", Path(args.report)
    try:
        output.mkdir(parents=True, exist_ok=True)
        data = Path(args.data) if args.data else prepare(args, output)
        figures = noises.run_all(args, data, output, report.with_suffix("") / "noises.json", call)
    except (ValueError, OSError) as problem:
        print(f"compare_objectives: {problem}", file=sys.stderr)
        return 1
    noises.insert(report, noises.section(figures))
    print(f"the section on noises in {report} is written")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    if parser.parse_args(argv).seeds:
        parser.set_defaults(**noises.DEFAULTS)
    return parser.parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", metavar="FILE", help="text to compare on (default: the demo corpus)")
    source.add_argument("--data", help="shards that are prepared already, with their tokenizer")
    parser.add_argument("--output", default="runs/compare", help="runs, shards and figures (default: runs/compare)")
    parser.add_argument("--report", default="docs/results.md", help="the report (default: docs/results.md)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="ids of the tokenizer trained on the text")
    parser.add_argument("--validation-fraction", type=float, default=0.05)
    parser.add_argument("--document", default="file", help="file | line | paragraph: what a document is in .txt files")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of every run")
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=384, help="validation rows that are scored at the end")
    parser.add_argument("--noise-draws", type=int, default=12, help="draws per gradient probe")
    parser.add_argument(
        "--seeds", type=int, default=0, help="compare noises over so many paired seeds instead (smaller runs)"
    )
    parser.add_argument("--noises", nargs="+", choices=list(noises.NOISES), help="with --seeds: just these")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in cases()], help="just these runs")
    return parser


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the figures."""
    names = (
        "text",
        "data",
        "document",
        "vocab_size",
        "validation_fraction",
        "steps",
        "rows_per_step",
        "context_length",
        "layers",
    )
    return {name: getattr(args, name) for name in (*names, "width", "lr", "rows", "noise_draws")}


def _remember(output: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix figures of different settings in one folder."""
    path = output / "settings.json"
    if path.exists():
        saved = json.loads(path.read_text())
        changed = [
            f"{name}: {saved.get(name)} -> {value}" for name, value in settings.items() if saved.get(name) != value
        ]
        if changed:
            raise ValueError(f"{output} holds runs with other settings ({'; '.join(changed)}); use another --output")
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def prepare(args: argparse.Namespace, output: Path) -> Path:
    """Tokenizer and shards of the text; what is there already stays."""
    data, tokenizer = output / "data", output / "tokenizer"
    texts = args.text or [str(DEMO_CORPUS)]
    if not args.text and not DEMO_CORPUS.exists():
        call([str(ROOT / "tools" / "prepare_data.py"), "--demo", "--output", str(DEMO_CORPUS.parents[1])])
    if not tokenizer.exists():
        temporary = output / ".tokenizer"
        shutil.rmtree(temporary, ignore_errors=True)
        size = ["--vocab-size", str(args.vocab_size), "--output", str(temporary)]
        call([str(ROOT / "tools" / "train_tokenizer.py"), *texts, *size])
        temporary.rename(tokenizer)
    options = ["--tokenizer", str(tokenizer), "--output", str(data), "--workers", "0", "--shard-tokens", str(1 << 18)]
    options += ["--document", args.document, "--chunk-tokens", str(1 << 14)]
    options += ["--validation-fraction", str(args.validation_fraction)]
    call([str(ROOT / "tools" / "prepare_data.py"), *texts, *options])
    return data


def _run(case: Case, args: argparse.Namespace, data: Path, output: Path) -> None:
    """Train and evaluate one case, unless its figures are there."""
    figures = output / "figures" / f"{case.name}.json"
    if figures.exists():
        return
    run_dir, lr = output / case.name, args.lr * case.lr_factor
    rows = min(192, args.rows)
    steps, per_step = args.steps, args.rows_per_step
    settings = {
        "run_dir": str(run_dir), "seed": case.seed, "precision": "fp32",
        "data": {"path": str(data), "context_length": args.context_length, "workers": 0},
        "model": {"num_layers": args.layers, "hidden_size": args.width, "num_heads": 4, "cond_dim": 32, "dropout": 0.0},
        "optim": {"lr": lr, "warmup_steps": max(1, steps // 20), "schedule": "cosine", "min_lr": lr / 10,
                  "ema_decay": 0.98},
        "train": {"steps": steps, "global_batch_size": per_step, "micro_batch_size": per_step, "threads": 1},
        "evaluation": {"every_steps": max(1, steps // VALIDATIONS), "rows": rows, "micro_batch_size": 16},
        "checkpoint": {"every_steps": max(1, steps // 2), "keep_last": 1},
        "logging": {"every_steps": 10},
        "runtime": {"device": "cpu"},
    }  # fmt: skip
    config = output / f"{case.name}.yaml"
    config.write_text(json.dumps(settings, indent=1))  # YAML reads JSON
    overrides = list(case.overrides)
    if case.opens_gates:
        start = output / f"{case.name}_start"
        shutil.rmtree(start, ignore_errors=True)
        call([str(ROOT / "tools" / "compare_gates.py"), str(config), str(start), *overrides])
        overrides.append(f"train.init_from={start}")
    call(["-m", "bd3lm_scale.train", str(config), *overrides])
    figures.parent.mkdir(exist_ok=True)
    temporary = figures.with_suffix(".unfinished")
    score = ["--rows", str(args.rows), "--variance", "--noise-draws", str(args.noise_draws), "--json", str(temporary)]
    call(["-m", "bd3lm_scale.evaluate", str(run_dir), *score, f"evaluation.draws={case.draws}", "runtime.device=cpu"])
    temporary.rename(figures)


def call(arguments: list[str]) -> None:
    """Run Python with these arguments on one thread; what it prints is kept in sight."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, check=False)
    if done.returncode:
        raise ValueError(f"failed with exit code {done.returncode}: python {shlex.join(arguments)}")


if __name__ == "__main__":
    sys.exit(main())
