#!/usr/bin/env python3
"""The paper's Tables 3 to 8 for a set of runs, as Markdown and PNG: tools/report_run.py --paper-tables RUN...

Reads what the commands of docs/evaluation.md leave in each run folder:
    evaluation/NAME.json            evaluate_corpora: held-out (Tables 3, 4) and zero-shot perplexity (Table 5)
    samples/*.evaluation.json       evaluate_generations: lengths (Table 6), generative perplexity (Table 7)
    metrics.jsonl                   last validation: variance of the NELBO (Table 8)
A cell nobody measured is a dash; the published figure of the same model stands beside ours where there is one.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.runtime.metrics import FILE_NAME, read_metrics

CORPORA: tuple[str, ...] = ("ptb", "wikitext", "lm1b", "lambada", "ag_news", "pubmed", "arxiv")
INK, ACCENT, FAINT = "#1f4e79", "#c05a1a", "#a9c4de"

# Published figures (Arriola et al. 2025), by model: what each table prints beside ours
HELD_OUT = {
    "lm1b": {"AR": 22.83, "SEDD": 32.68, "MDLM": 31.78, "BD3-LM 16": 30.60, "BD3-LM 8": 29.83, "BD3-LM 4": 28.23},
    "owt": {"AR": 17.54, "SEDD": 24.10, "MDLM": 22.98, "BD3-LM 16": 22.27, "BD3-LM 8": 21.68, "BD3-LM 4": 20.73},
}
ZERO_SHOT = {
    "AR": (81.07, 25.32, 51.14, 52.13, 52.11, 48.59, 41.22),
    "SEDD": (96.33, 35.98, 68.14, 48.93, 67.82, 45.39, 40.03),
    "MDLM": (90.96, 33.22, 64.94, 48.29, 62.78, 43.13, 37.89),
    "BD3-LM 4": (96.81, 31.31, 60.88, 50.03, 61.67, 42.52, 39.20),
}
LENGTHS = {"AR": (4008, 131_000), "SEDD": (1021, 1024), "BD3-LM 16": (798, 9982)}
GENERATION = {
    1024: {"AR": 14.1, "SEDD": 52.0, "MDLM": 46.8, "BD3-LM 16": 33.4, "BD3-LM 8": 30.4, "BD3-LM 4": 25.7},
    2048: {"AR": 13.2, "MDLM": 41.3, "BD3-LM 16": 31.5, "BD3-LM 8": 28.2, "BD3-LM 4": 23.6},
}


@dataclass(frozen=True)
class Run:
    """One run folder's figures.

    Attributes:
        name: the folder's.
        model: as the paper writes it: AR, SEDD, MDLM, BD3-LM 4, ...
        config: of the run.
        corpora: figures by corpus.
        generations: figures of each evaluated file of samples.
        validation: the last validation line, {} if there is none.
    """

    name: str
    model: str
    config: RunConfig
    corpora: dict[str, dict[str, Any]]
    generations: list[dict[str, Any]]
    validation: dict[str, Any]

    @property
    def label(self) -> str:
        """How the run is called in tables."""
        return f"{self.model} ({self.name})"


@dataclass(frozen=True)
class Table:
    """A table to print and to draw.

    Attributes:
        number: file name and heading, e.g. "Table 5".
        title: what it shows.
        columns: headings; the first column holds labels.
        rows: cells: text or figures; None is a dash.
        chart: (what the axis shows, columns that are drawn as bars, whether the axis is logarithmic).
    """

    number: str
    title: str
    columns: list[str]
    rows: list[list[Any]]
    chart: tuple[str, list[int], bool]


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        ValueError: it is none; names the folder.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: holds no config.yaml; give the folders that training runs wrote")
    config = load_config(folder / "config.yaml")
    metrics = read_metrics(folder / FILE_NAME) if (folder / FILE_NAME).is_file() else []
    validations = sorted((row for row in metrics if row["kind"] == "validation"), key=lambda row: row["step"])
    corpora = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "evaluation").glob("*.json"))}
    generations = [json.loads(path.read_text()) for path in sorted((folder / "samples").glob("*.evaluation.json"))]
    last = validations[-1] if validations else {}
    return Run(folder.resolve().name, model_name(config), config, corpora, generations, last)


def model_name(config: RunConfig) -> str:
    """The paper's name of a model."""
    objective = config.diffusion.objective
    return f"BD3-LM {config.block_size}" if objective == "bd3lm" else objective.upper()


def held_out_tables(runs: Sequence[Run]) -> list[Table]:
    """Tables 3 and 4: held-out perplexity, one table per training corpus."""
    tables = []
    for path in sorted({str(run.config.data.path) for run in runs}):
        dataset = next((name for name in HELD_OUT if name in Path(path).name.lower()), None)
        number = {"lm1b": "Table 3", "owt": "Table 4"}.get(dataset or "", f"Tables 3 and 4 for {Path(path).name}")
        rows = []
        for run in runs:
            if str(run.config.data.path) != path:
                continue
            figures = run.corpora.get("heldout", run.validation)
            bound = "" if run.config.diffusion.objective == "ar" else "≤ "
            ppl, error = figures.get("ppl"), figures.get("stderr")
            stderr = ppl * error if ppl is not None and isinstance(error, float) and math.isfinite(error) else None
            source = "heldout" if "heldout" in run.corpora else "last validation"
            published = HELD_OUT.get(dataset or "", {}).get(run.model)
            rows.append(
                [run.label, bound, ppl, stderr, figures.get("num_tokens"), source if figures else None, published]
            )
        columns = ["model", "", "PPL", "± s.e.", "tokens scored", "from", "published"]
        tables.append(Table(number, f"held-out perplexity, {path}", columns, rows, ("perplexity", [2, 6], False)))
    return tables


def zero_shot_table(runs: Sequence[Run]) -> Table:
    """Table 5: perplexity on corpora that were not trained on."""
    found = {name for run in runs for name in run.corpora if name != "heldout"}
    names = [name for name in CORPORA if name in found] + sorted(found - set(CORPORA))
    rows: list[list[Any]] = []
    for run in runs:
        rows.append([run.label, *(run.corpora.get(name, {}).get("ppl") for name in names)])
    for model in dict.fromkeys(run.model for run in runs):
        if model in ZERO_SHOT and any(name in CORPORA for name in names):
            published = dict(zip(CORPORA, ZERO_SHOT[model], strict=True))
            rows.append([f"{model}, published (OWT)", *(published.get(name) for name in names)])
    chart = ("perplexity", list(range(1, len(names) + 1)), False)
    return Table("Table 5", "zero-shot perplexity", ["model", *names], rows, chart)


def length_table(runs: Sequence[Run]) -> Table:
    """Table 6: how long samples are that end by themselves."""
    rows = []
    for run in runs:
        for figures in run.generations:
            if figures.get("stop_at_eos"):
                median, longest = LENGTHS.get(run.model, (None, None))
                own = [figures.get("length_median"), figures.get("length_max")]
                rows.append([run.label, figures["num_samples"], *own, figures.get("length"), median, longest])
    columns = ["model", "documents", "median", "max", "limit", "published median (OWT)", "published max (OWT)"]
    return Table("Table 6", "tokens of documents that end by themselves", columns, rows, ("tokens", [2, 3], True))


def generation_table(runs: Sequence[Run]) -> Table:
    """Table 7: generative perplexity and number of function evaluations at fixed lengths."""
    rows = []
    for run in runs:
        for g in sorted(run.generations, key=lambda g: (g.get("length") or 0, g.get("sampler") or "")):
            if g.get("stop_at_eos"):
                continue
            published = GENERATION.get(g.get("length") or 0, {}).get(run.model)
            label = f"{run.label}, {g.get('sampler')}, L={g.get('length')}"
            own = [g.get("gen_ppl"), g.get("gen_ppl_stderr"), g.get("nfe"), g.get("forward_calls"), g.get("entropy")]
            rows.append([label, g["num_samples"], *own, g.get("judge"), published])
    columns = ["model", "samples", "Gen PPL", "± s.e.", "NFE", "forward calls", "entropy", "judge", "published (OWT)"]
    return Table("Table 7", "generative perplexity", columns, rows, ("generative perplexity", [2, 8], False))


def schedule_table(runs: Sequence[Run]) -> Table:
    """Table 8: perplexity and variance of the NELBO under each run's noise schedule."""
    rows = []
    for run in sorted(runs, key=lambda run: run.config.block_size):
        if run.config.diffusion.objective != "bd3lm":
            continue
        low, high = (
            run.validation.get(f"clip_{end}", getattr(run.config.diffusion, f"clip_{end}")) for end in ("low", "high")
        )
        is_clipped = high - low < 1.0 - 2 * run.config.diffusion.time_epsilon
        schedule = (
            f"{run.config.diffusion.schedule}, U[{low:g}, {high:g}]" if is_clipped else run.config.diffusion.schedule
        )
        variance = run.validation.get("variance", {})
        figures = run.corpora.get("heldout", run.validation)
        widest = variance.get(f"{run.config.diffusion.time_epsilon:g}-1")
        rows.append([run.label, schedule, figures.get("ppl"), variance.get(f"{low:g}-{high:g}"), widest])
    columns = ["model", "schedule", "PPL", "Var NELBO", "Var NELBO under U[0, 1]"]
    return Table("Table 8", "noise schedules", columns, rows, ("variance of the NELBO", [3, 4], False))


def markdown(tables: Sequence[Table]) -> str:
    """All tables on one page."""
    parts = ["# The paper's tables for these runs\n"]
    for table in tables:
        parts.append(f"## {table.number}: {table.title}\n")
        if not table.rows:
            parts.append("Nothing measured yet: see docs/evaluation.md.\n")
            continue
        align = ["---", *["---:"] * (len(table.columns) - 1)]
        lines = [table.columns, align, *([cell(value) for value in row] for row in table.rows)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        parts.append(f"![{table.title}]({file_name(table)})\n")
    return "\n".join(parts)


def cell(value: Any) -> str:
    """A figure as a table shows it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def file_name(table: Table) -> str:
    """table_5.png."""
    return table.number.lower().replace(" ", "_").replace("/", "_") + ".png"


def draw(table: Table) -> Figure:
    """The charted columns as horizontal bars, one group per row."""
    quantity, columns, is_log = table.chart
    height = max(2.2, 0.6 + len(table.rows) * (0.25 + 0.2 * len(columns)))
    figure = Figure(figsize=(9.0, height), layout="constrained")
    axes = figure.subplots()
    thickness = 0.8 / max(1, len(columns))
    colors = (INK, ACCENT, FAINT, "#6b8e23", "#7d5ba6", "#888888", "#c9a227", "#2a9d8f")
    for order, column in enumerate(columns):
        values = [row[column] if isinstance(row[column], int | float) else math.nan for row in table.rows]
        places = [index + (order - (len(columns) - 1) / 2) * thickness for index in range(len(values))]
        bars = axes.barh(places, values, thickness, label=table.columns[column], color=colors[order % len(colors)])
        axes.bar_label(bars, [cell(float(v)) if v == v else "" for v in values], padding=2, fontsize=7)
    axes.set_yticks(range(len(table.rows)), [str(row[0]) for row in table.rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(quantity)
    if is_log:
        axes.set_xscale("log")
        axes.set_xlim(left=1.0)  # bars compare only from a common origin
    axes.margins(x=0.12)
    axes.legend(fontsize=7)
    axes.set_title(f"{table.number}: {table.title}", fontsize=10)
    return figure


def write_tables(folders: Sequence[Path], output: Path) -> Path:
    """Write tables.md and one PNG per table with figures; returns the page's path."""
    runs = [read_run(folder) for folder in folders]
    tables = [
        *held_out_tables(runs),
        zero_shot_table(runs),
        length_table(runs),
        generation_table(runs),
        schedule_table(runs),
    ]
    output.mkdir(parents=True, exist_ok=True)
    for table in tables:
        if table.rows:
            draw(table).savefig(output / file_name(table), dpi=120)
    page = output / "tables.md"
    page.write_text(markdown(tables), encoding="utf-8")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, default=Path("paper_tables"), help="default: paper_tables")
    args = parser.parse_args(argv)
    try:
        page = write_tables(args.runs, args.output)
    except (ConfigError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
