#!/usr/bin/env python3
"""The whole in one line: text -> shards -> trained BD3-LM -> perplexity -> samples -> Hugging Face folder.

Runs the same commands a user would, one after the other, and ends with a table of what they found. What exists is
reused: data that is prepared, a run that is finished (or continued, if it was interrupted), an export.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bd3lm_scale.checkpoint.reader import find_checkpoint
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.runtime.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Demo:
    """One pass over all stages; collects the rows of the final table."""

    config_path: str
    overrides: list[str]
    config: RunConfig
    figures: dict[str, str] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """Where the run lives."""
        return Path(self.config.run_dir)

    def prepare(self) -> None:
        """Demo corpus, tokenizer and shards."""
        run("tools/prepare_data.py", "--demo", "--output", str(self.config.data.path))
        train, held_out = (
            open_stream(self.config.data, self.config.seed, s, block_size=self.config.document_block)
            for s in ("train", "validation")
        )
        length = self.config.data.context_length
        self.figures["training text"] = f"{train.num_rows * length:,} tokens, vocabulary {train.vocab_size:,}"
        self.figures["held-out text"] = f"{held_out.num_rows * length:,} tokens"
        self.figures["unigram PPL"] = f"{unigram_ppl(train, held_out):,.1f}"

    def train(self) -> None:
        """The training run; resumes or reuses what is there."""
        run("-m", "bd3lm_scale.train", self.config_path, *self.overrides)
        rows = [row for row in read_metrics(self.run_dir) if row["kind"] == "train"]
        rates = sorted(row["tokens_per_second"] for row in rows)
        self.figures["training"] = (
            f"{rows[-1]['step']} steps, loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}, "
            f"{rates[len(rates) // 2]:,.0f} tokens/s (median)"
        )

    def evaluate(self) -> None:
        """Perplexity on all held-out rows."""
        target = self.run_dir / "report" / "evaluation.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        run("-m", "bd3lm_scale.evaluate", str(self.run_dir), "--rows", "256", "--json", str(target))
        figures = json.loads(target.read_text())
        self.figures["held-out NELBO"] = f"{figures['nelbo']:.4f} +- {figures['stderr']:.4f} nats per token"
        self.figures["held-out PPL"] = f"{figures['ppl']:.1f} +- {figures['ppl'] * figures['stderr']:.1f}"

    def sample(self) -> None:
        """A few samples, printed and kept."""
        target = self.run_dir / "samples" / "demo.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        run(
            "-m", "bd3lm_scale.sample", str(self.run_dir), "--length", str(self.config.sampling.length),
            "--num-samples", str(self.config.sampling.num_samples), "--output", str(target),
        )  # fmt: skip
        self.figures["samples"] = str(target)

    def export(self) -> None:
        """Hugging Face folder, loaded back and compared by the converter itself."""
        target = self.run_dir / "hf"
        if target.exists() and newest_mtime(target) > newest_mtime(self.run_dir / "checkpoints"):
            print(f"{target} is up to date")
        else:
            if target.exists():
                target.rename(target.with_name(f"hf.before_{time.strftime('%Y%m%d_%H%M%S')}"))
            run("tools/convert_checkpoint.py", "to-hf", str(self.run_dir), str(target))
        difference = compare_logits(self.run_dir, target)
        self.figures["HF folder"] = f"{target} (largest logit difference {difference:.1e})"

    def table(self) -> str:
        """The figures, one per line."""
        width = max(map(len, self.figures))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.figures.items())


def run(*arguments: str) -> None:
    """One command of ours in a process of its own, shown before it starts; exits with its code if it fails."""
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def unigram_ppl(train, held_out) -> float:
    """Perplexity of held-out text under training token frequencies (add-one): what knowing nothing but counts gives."""
    counts = np.ones(train.vocab_size)
    counts += np.bincount(train.read(np.arange(train.num_rows)).ravel(), minlength=train.vocab_size)
    log_share = np.log(counts / counts.sum())
    return math.exp(-log_share[held_out.read(np.arange(held_out.num_rows))].mean())


def newest_mtime(folder: Path) -> float:
    """When anything in a folder was last written."""
    return max((path.stat().st_mtime for path in folder.rglob("*")), default=0.0)


def compare_logits(run_dir: Path, exported: Path) -> float:
    """Largest difference between the native model's logits and those of AutoModelForMaskedLM on random input."""
    from logit_check import compare
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(exported, trust_remote_code=True).float()
    comparison = compare(find_checkpoint(run_dir), model, "ema")
    if not comparison.fits("fp32"):
        sys.exit(f"{exported} does not compute what {run_dir} does: {comparison}")
    return comparison.difference


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields of the configuration to set")
    parser.add_argument("--config", default="configs/demo.yaml", help="YAML file (default: configs/demo.yaml)")
    parser.add_argument("--data-only", action="store_true", help="prepare the data and stop")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    try:
        demo = Demo(args.config, args.overrides, load_config(args.config, args.overrides))
    except ConfigError as problem:
        print(problem, file=sys.stderr)
        return 2
    started = time.perf_counter()
    stages: list[Callable[[], None]] = [demo.prepare]
    if not args.data_only:
        stages += [demo.train, demo.evaluate, demo.sample, demo.export]
    for stage in stages:
        before = time.perf_counter()
        stage()
        demo.figures[f"seconds: {stage.__name__}"] = f"{time.perf_counter() - before:,.0f}"
    demo.figures["seconds: all"] = f"{time.perf_counter() - started:,.0f}"
    if not args.data_only:
        demo.figures["run folder"] = f"{demo.run_dir} (config.yaml metrics.jsonl log.txt checkpoints/ samples/ hf/)"
    print(f"\n{demo.table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
