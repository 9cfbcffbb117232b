"""Evaluate: the likelihood of held-out text under a trained model.

    python -m bd3lm_scale.evaluate RUN_OR_CHECKPOINT [--data SHARDS] [--variance] [a.b=c ...]

Works in any layout: start it alone or under torchrun, with parallel.* overrides.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from bd3lm_scale.data.stream import RowStream, bytes_per_token, open_stream
from bd3lm_scale.diffusion.likelihood import DocumentSums
from bd3lm_scale.errors import BadShardError, CheckpointError, ConfigError
from bd3lm_scale.evaluation.variance import VarianceReport, format_report, measure_variance
from bd3lm_scale.inference.loading import Loaded, load_model
from bd3lm_scale.parallel.mesh import shutdown
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import set_up_logging
from bd3lm_scale.validation import Validation, validate
from bd3lm_scale.values import Interval


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bd3lm_scale.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", help="run folder or checkpoint folder")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="e.g. evaluation.draws=4")
    parser.add_argument("--data", metavar="SHARDS", help="prepared shards to score (default: the run's validation set)")
    parser.add_argument("--split", default="validation", help="validation | train (default: validation)")
    parser.add_argument("--rows", type=int, help="score only the first ROWS rows (default: all)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which weights (default: ema)")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="this step's checkpoint, not the newest")
    parser.add_argument("--variance", action="store_true", help="also the variance of the loss and of its gradient")
    parser.add_argument("--noise-draws", type=int, default=16, metavar="N", help="draws per gradient probe")
    parser.add_argument("--json", metavar="FILE", help="also write the metrics here")
    parser.add_argument(
        "--per-document", metavar="FILE.jsonl", help="also the loss of each document; with data.packing=documents"
    )
    args = parser.parse_intermixed_args(argv)
    set_up_logging(None)
    try:
        overrides = [*args.overrides, *([f"data.path={args.data}"] if args.data else [])]
        loaded = load_model(args.source, overrides, args.weights, args.checkpoint)
        if args.per_document and loaded.config.data.packing != "documents":
            raise ConfigError(["--per-document: rows of a stream have no documents; add data.packing=documents"])
        result = evaluate(loaded, args.split, args.rows)
        variance = _variance(loaded, result, args) if args.variance else None
    except (ConfigError, CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIG
    if loaded.engine.mesh.is_main_rank:
        print(report(loaded, result))
        metrics = dict(vars(result.likelihood))
        if result.documents is not None:
            error, low, high = result.documents.bootstrap(loaded.config.seed)
            print(f"bootstrap   {error:.4f} over documents, 95% in [{low:.4f}, {high:.4f}] nats per token")
            metrics |= {"bootstrap_stderr": error, "bootstrap_low": low, "bootstrap_high": high}
            if args.per_document:
                write_documents(Path(args.per_document), result.documents)
        if result.by_set:
            metrics["sets"] = {name: vars(figures) for name, figures in result.by_set.items()}
        if variance is not None:
            print(format_report(variance))
            metrics["variance"] = variance.as_dict()
        if args.json:
            Path(args.json).write_text(json.dumps(metrics, indent=2) + "\n")
    shutdown()
    return ExitCode.FINISHED


def evaluate(loaded: Loaded, split: str = "validation", rows: int | None = None) -> Validation:
    """Score a split of the data in the loaded configuration."""
    config, stream = loaded.config, _open(loaded, split)
    if stream.vocab_size != loaded.reader.meta["vocab_size"] or stream.tokenizer_hash != loaded.reader.meta.get(
        "tokenizer_hash", stream.tokenizer_hash
    ):
        raise ConfigError(
            [
                f"data.path ({config.data.path}): prepared with another tokenizer than the model's; "
                f"prepare the text with --tokenizer {loaded.tokenizer_path}"
            ]
        )
    total = stream.num_rows if rows is None else min(rows, stream.num_rows)
    with tqdm(total=total, unit="row", disable=not loaded.engine.mesh.is_main_rank) as bar:
        try:
            result = validate(
                loaded.engine,
                config,
                stream,
                rows=rows,
                draws=config.evaluation.draws,
                beat=lambda done: bar.update(done - bar.n),
            )
        except BadShardError as error:  # on every rank
            raise ConfigError([f"data.path ({config.data.path}): {error}"], source="the data") from error
    likelihood, density = result.likelihood, bytes_per_token(config.data, split)
    if density is None:
        return result
    return replace(result, likelihood=replace(likelihood, bits_per_byte=likelihood.bits_per_token / density))


def write_documents(path: Path, documents: DocumentSums) -> None:
    """One line of JSON for each document that was scored, by its number in the split."""
    with path.open("w", encoding="utf-8") as file:
        for number in torch.nonzero(documents.tokens_D > 0).flatten().tolist():
            tokens, nats = int(documents.tokens_D[number]), documents.nats_DJ[number]
            record = {"document": number, "tokens": tokens, "nats": float(nats.mean())}
            record |= {"nelbo": record["nats"] / tokens, "draws": len(nats)}
            file.write(json.dumps(record) + "\n")


def _variance(loaded: Loaded, result: Validation, args: argparse.Namespace) -> VarianceReport:
    diffusion, saved = loaded.config.diffusion, loaded.reader.meta.get("clip", {})
    low, high = saved.get("low", diffusion.clip_low), saved.get("high", diffusion.clip_high)
    in_force = Interval(low, high).floored(loaded.engine.process.time_epsilon)
    stream = _open(loaded, args.split)
    return measure_variance(
        loaded.engine, loaded.config, stream, result, in_force, rows=args.rows, draws=args.noise_draws
    )


def _open(loaded: Loaded, split: str) -> RowStream:
    config = loaded.config
    return open_stream(config.data, config.seed, split, block_size=config.document_block)


def _text_name(loaded: Loaded) -> str:
    data = loaded.config.data
    return f"a mixture of {len(data.mixture)}" if data.mixture else str(data.path)


def report(loaded: Loaded, result: Validation) -> str:
    """The metrics as a small table."""
    metrics = result.likelihood
    clusters = "rows" if result.documents is None else "documents"
    bound = "NLL " if loaded.config.diffusion.objective == "ar" else "NELBO"
    noise = "" if metrics.noise_stderr is None else f" (noise alone {metrics.noise_stderr:.4f})"
    per_byte = "" if metrics.bits_per_byte is None else f"    bits/byte  {metrics.bits_per_byte:.4f}"
    return "\n".join(
        [
            f"checkpoint  {loaded.reader.path} (step {loaded.reader.meta['step']}, {loaded.weights} weights)",
            f"text        {_text_name(loaded)}: {metrics.num_rows:,} {clusters}, {metrics.num_tokens:,} tokens",
            f"{bound}       {metrics.nelbo:.4f} +- {metrics.stderr:.4f} nats per token{noise}",
            f"PPL         {metrics.ppl:.3f} +- {metrics.ppl_stderr:.3f}",
            f"bits/token  {metrics.bits_per_token:.4f}" + per_byte,
            *(
                f"  PPL {figures.ppl:.3f} +- {figures.ppl_stderr:.3f}  {name} ({figures.num_rows:,} rows)"
                for name, figures in result.by_set.items()
            ),
        ]
    )
