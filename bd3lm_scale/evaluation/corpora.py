"""Entry: perplexity of one model on several prepared corpora, as in the paper's Tables 3-5.

    python -m bd3lm_scale.evaluate_corpora RUN_OR_CHECKPOINT_OR_HF [heldout] [NAME=SHARDS ...] [--set a.b=c ...]

`heldout` is the run's own validation split, scored as it was trained. Each NAME=SHARDS is a folder written by
tools/prepare_data.py with the model's tokenizer and no EOS between documents; its rows are wrapped in BOS ... EOS, as
published zero-shot metrics are. Results go to RUN/evaluation/NAME.json and are printed as one Markdown table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bd3lm_scale.errors import CheckpointError, ConfigError
from bd3lm_scale.evaluation.likelihood import evaluate
from bd3lm_scale.inference.loading import Loaded, load_model
from bd3lm_scale.inference.loading_hf import native_checkpoint
from bd3lm_scale.parallel.mesh import shutdown
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import set_up_logging

HELD_OUT = "heldout"


def parse_corpora(texts: Sequence[str]) -> dict[str, str | None]:
    """NAME=SHARDS arguments; None stands for the run's own validation split.

    Raises:
        ValueError: no `=`, a name that is no plain word, or a folder that is not there.
    """
    corpora: dict[str, str | None] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if text == HELD_OUT:
            corpora[name] = None
            continue
        if not folder or not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"{text}: not NAME=SHARDS; use for example ptb=data/ptb, or {HELD_OUT}")
        if "://" not in folder and not (Path(folder) / "validation").is_dir():
            raise ValueError(
                f"{text}: {folder} holds no validation split; prepare it with: tools/prepare_data.py FILES "
                f"--tokenizer TOKENIZER --output {folder} --validation-only --no-eos (docs/evaluation.md)"
            )
        corpora[name] = folder
    return corpora


def evaluate_corpus(loaded: Loaded, folder: str | None, rows: int | None, wrap: bool) -> dict[str, Any]:
    """Figures of one corpus. Collective."""
    config = loaded.config
    if folder is not None:
        # published figures are those of streams
        data = replace(config.data, path=folder, mixture=(), wrap_rows=wrap, packing="stream")
        loaded = replace(loaded, config=replace(config, data=data))
    likelihood = evaluate(loaded, "validation", rows).likelihood
    return vars(likelihood) | {
        "ppl_stderr": likelihood.ppl_stderr,
        "data": folder or config.data.path,
        "wrap_rows": loaded.config.data.wrap_rows,
        "context_length": config.data.context_length,
        "step": loaded.reader.meta["step"],
        "weights": loaded.weights,
    }


def results_folder(loaded: Loaded, chosen: Path | None) -> Path:
    """RUN/evaluation of a checkpoint inside a run folder."""
    run = loaded.reader.path.parent.parent
    if chosen is None and not (run / "config.yaml").is_file():
        raise ValueError("--output: the model is not in a run folder; say where the metrics go")
    return chosen or run / "evaluation"


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """One row per corpus."""
    lines = ["| corpus | PPL | ± | nats/token | tokens |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, r in results.items():
        lines.append(f"| {name} | {r['ppl']:.2f} | {r['ppl_stderr']:.2f} | {r['nelbo']:.4f} | {r['num_tokens']:,} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate each corpus; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bd3lm_scale.evaluate_corpora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="run folder, checkpoint folder or Hugging Face folder")
    parser.add_argument("corpora", nargs="*", default=[HELD_OUT], metavar="NAME=SHARDS")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="settings, e.g. evaluation.draws=4")
    parser.add_argument("--rows", type=int, help="score only the first ROWS rows of each corpus")
    parser.add_argument("--no-wrap", action="store_true", help="leave rows as they are, without BOS and EOS")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="this step's checkpoint, not the newest")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN/evaluation")
    args = parser.parse_args(argv)
    set_up_logging(None)
    results: dict[str, dict[str, Any]] = {}
    try:
        corpora = parse_corpora(args.corpora)
        with native_checkpoint(args.source, args.set) as (path, rest):
            loaded = load_model(path, rest, args.weights, args.checkpoint)
        output = results_folder(loaded, args.output)
        for name, folder in corpora.items():
            results[name] = evaluate_corpus(loaded, folder, args.rows, not args.no_wrap)
            if loaded.engine.mesh.is_main_rank:
                output.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"corpus": name, **results[name]}, indent=2)
                (output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    except (ConfigError, CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIG
    if loaded.engine.mesh.is_main_rank:
        print(markdown(results))
    shutdown()
    return ExitCode.FINISHED
