#!/usr/bin/env python3
"""One run as one self-contained HTML page and PNGs: loss, likelihood, variance, clip interval, speed, restarts.

report_run.py RUN                       writes RUN/report/index.html and the figures beside it
report_run.py --paper-tables RUN...     the paper's tables for a set of runs (tools/report/paper_tables.py)
"""

import argparse
import base64
import html
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.summary import GPT2_VOCAB_SIZE
from bd3lm_scale.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from plan_run import GPUS, flops_per_token
from report import plots as figures_of
from report.data import RunData, read_run

MAX_EVENTS = 20

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .25em .9em; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child { text-align: left; }
img { max-width: 100%; } pre { background: #f6f6f6; padding: 1em; overflow-x: auto; white-space: pre-wrap; }
"""

FIGURES: tuple[tuple[str, str, Callable[[RunData], "figures_of.Figure | None"]], ...] = (
    ("loss", "Training loss", figures_of.loss),
    ("validation", "Held-out likelihood", figures_of.validation),
    ("variance", "Variance of the loss under every interval of times", figures_of.variance),
    ("clip", "Clip interval in force", figures_of.clip),
    ("speed", "Speed", figures_of.speed),
    ("optimizer", "Gradient norm and learning rate", figures_of.optimizer),
    ("restarts", "Progress and restarts", figures_of.restarts),
)


def headline(run: RunData, config: RunConfig | None) -> list[tuple[str, str]]:
    """The figures on top of the page, as (what, value)."""
    rows: list[tuple[str, str]] = []
    if config is not None:
        objective = config.diffusion.objective
        blocks = f", blocks of {config.block_size}" if objective == "bd3lm" else ""
        rows.append(("objective", f"{objective}{blocks}, rows of {config.data.context_length} tokens"))
        model = config.model
        rows.append(("model", f"{model.num_layers} layers, width {model.hidden_size}, {model.num_heads} heads"))
    if run.num_steps:
        rows.append(("steps", f"{run.train['step'][-1]:,.0f}"))
        rows.append(("tokens", f"{run.train['tokens'][-1]:,.0f}"))
        rows.append(("last loss (nats per token)", f"{figures_of.smooth(run.train['loss'])[-1]:.4f}"))
        if len(run.speed):
            rows.append(("tokens per second (median)", f"{np.median(run.speed):,.0f}"))
    if run.validation:
        best = min(run.validation, key=lambda row: row["nelbo"])
        last = run.validation[-1]
        error = last.get("stderr")
        plus_minus = f" ± {error:.4f}" if isinstance(error, float) and math.isfinite(error) else ""
        rows.append(("NELBO, last validation (nats per token)", f"{last['nelbo']:.4f}{plus_minus}"))
        rows.append(("perplexity, last validation", f"{last['ppl']:.2f}"))
        rows.append(("perplexity, best", f"{best['ppl']:.2f} at step {best['step']:,}"))
    rows.append(("restarts", f"{len(run.attempts) - 1}, {run.repeated_steps:,} steps computed twice"))
    rows += [(f"step {step:,}", event) for step, event in run.events[-MAX_EVENTS:]]
    return rows


def mfu(run: RunData, config: RunConfig, gpu: str, gpus: int) -> float:
    """Share of the GPUs' peak spent on the model's own FLOPs, at the median speed."""
    vocab_size = config.model.vocab_size or GPT2_VOCAB_SIZE
    peak = GPUS[gpu].fp32 if config.precision == "fp32" else GPUS[gpu].bf16
    return float(np.median(run.speed)) * flops_per_token(config, vocab_size) / (gpus * peak)


def write_report(run_dir: Path, output: Path, gpu: str | None = None, gpus: int = 1) -> Path:
    """Write the page and its figures; returns the page's path. With a kind of GPU and their number: MFU too.

    Raises:
        ValueError: if the folder holds no metrics.
    """
    run = read_run(run_dir)
    config = None
    if (run_dir / "config.yaml").is_file():
        config = load_config(run_dir / "config.yaml")
    output.mkdir(parents=True, exist_ok=True)
    figures = headline(run, config)
    if gpu is not None and config is not None and len(run.speed):
        figures.append((f"MFU on {gpus} {gpu}", f"{mfu(run, config, gpu, gpus):.1%}"))
    body = [f"<h1>{html.escape(run_dir.resolve().name)}</h1>", _table(figures)]
    for name, title, draw in FIGURES:
        figure = draw(run)
        if figure is None:
            continue
        path = output / f"{name}.png"
        figure.savefig(path, dpi=110)
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}">')
    for title, text in run.samples:
        body.append(f"<h2>Sample: {html.escape(title)}</h2><pre>{html.escape(text)}</pre>")
    if (run_dir / "config.yaml").is_file():
        body.append(f"<h2>Configuration</h2><pre>{html.escape((run_dir / 'config.yaml').read_text())}</pre>")
    page = output / "index.html"
    head = f'<meta charset="utf-8"><title>{html.escape(run_dir.resolve().name)}</title><style>{STYLE}</style>'
    page.write_text(f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n", encoding="utf-8")
    return page


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><td>{html.escape(what)}</td><td>{html.escape(value)}</td></tr>" for what, value in rows)
    return f"<table>{''.join(cells)}</table>"


def main(argv: list[str] | None = None) -> int:
    """Write the report of a run, or hand over to the paper's tables."""
    arguments = sys.argv[1:] if argv is None else argv
    if "--paper-tables" in arguments:
        script = Path(__file__).parent / "report" / "paper_tables.py"
        return subprocess.run([sys.executable, script, *(a for a in arguments if a != "--paper-tables")]).returncode
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="where to write (default: RUN/report)")
    parser.add_argument("--gpu", choices=sorted(GPUS), help="the kind of GPU it ran on, to show the MFU")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them")
    parser.add_argument("--paper-tables", action="store_true", help="the paper's tables 3-8 for several runs")
    args = parser.parse_args(arguments)
    try:
        page = write_report(args.run, args.output or args.run / "report", args.gpu, args.gpus)
    except (ConfigError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
