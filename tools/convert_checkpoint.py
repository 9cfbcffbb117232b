#!/usr/bin/env python3
"""Convert checkpoints; every conversion ends with a comparison of logits and appears whole or not at all.

    to-hf          RUN|CHECKPOINT DST    a Hugging Face folder, from any layout, without GPUs
    from-hf        FOLDER DST            native weights, from our exports, published BD3-LM checkpoints, and decoders
                                         (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
    from-lightning FILE.ckpt DST         native weights and EMA, from the reference implementation's checkpoints
    reshard        RUN|CHECKPOINT DST    the same checkpoint in other files, or its weights alone
    verify         PATH                  checksums, shapes and finite numbers of a run, a checkpoint or a HF folder

from-hf and from-lightning take `a.b=c` for what a source does not say (data.context_length=1024, mask_token_id=103).
"""

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from bd3lm_scale.checkpoint.hf.decoders import import_decoder, is_other_architecture
from bd3lm_scale.checkpoint.hf.export import ExportReport, export_hf
from bd3lm_scale.checkpoint.hf.importing import import_hf
from bd3lm_scale.checkpoint.hf.mask_token import write_tokenizer
from bd3lm_scale.checkpoint.hf.tokenizer_files import copy_tokenizer
from bd3lm_scale.checkpoint.lightning import import_lightning
from bd3lm_scale.checkpoint.reader import CheckpointReader, find_checkpoint, open_checkpoint
from bd3lm_scale.checkpoint.reshard import CONTENTS, reshard
from bd3lm_scale.checkpoint.verify import verify
from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.data.chat import chat_format
from bd3lm_scale.data.tokenizer import Tokenizer, load_tokenizer
from bd3lm_scale.errors import CheckpointError
from bd3lm_scale.runtime.metrics import read_metrics

MEGABYTE = 1e6


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # one process, whatever launched it
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        os.environ.pop(name, None)
    try:
        return args.run(args)
    except (ValueError, CheckpointError, OSError) as problem:
        print(f"convert_checkpoint {args.command}: {problem}", file=sys.stderr)
        return 1


# ---- to Hugging Face -----------------------------------------------------------------------------------------------


def to_hf(args: argparse.Namespace) -> int:
    """Export, load back, compare, rename; then publish if asked to."""
    quieten()
    from bd3lm_scale.inference.loading import find_tokenizer

    checkpoint = find_checkpoint(args.source, args.step)
    reader = open_checkpoint(checkpoint)
    config = from_dict(reader.meta["config"])
    tokenizer = _tokenizer(args.tokenizer or find_tokenizer(checkpoint, config))
    figures = training_figures(checkpoint, reader)
    with appearing(Path(args.destination)) as folder:
        report = export_hf(
            reader,
            folder,
            weights=args.weights,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            tokenizer=tokenizer,
            figures=figures,
            sampler=args.sampler,
            end_of_turn=chat_format(tokenizer).end_of_turn() if tokenizer and tokenizer.chat_template else None,
        )
        if not args.no_check:
            _check_logits(checkpoint, lambda check: check.load_exported(folder), report.weights, args.dtype)
    _print_export(args.destination, checkpoint, report)
    if args.push:
        push(Path(args.destination), args.push, is_private=not args.public)
    return 0


def training_figures(checkpoint: Path, reader: CheckpointReader) -> dict[str, Any]:
    """Label to value for the model card: the last figures of the run's metrics up to the checkpoint's step."""
    runs = (checkpoint.parent.parent, Path(reader.meta["config"]["run_dir"]))
    found = next((run / "metrics.jsonl" for run in runs if (run / "metrics.jsonl").is_file()), None)
    if found is None:
        return {}
    rows = [row for row in read_metrics(found) if row.get("step", 0) <= reader.meta.get("step", 0)]
    last = {row["kind"]: row for row in sorted(rows, key=lambda row: row["step"])}
    names = {
        ("train", "loss"): "Training loss (nats per token)",
        ("validation", "nelbo"): "Validation NELBO (nats per token)",
        ("validation", "ppl"): "Validation perplexity",
    }
    return {label: last[kind][name] for (kind, name), label in names.items() if name in last.get(kind, {})}


def push(folder: Path, name: str, is_private: bool) -> None:
    """Upload an export to a hub; uses the login of huggingface_hub."""
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(name, private=is_private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as problem:
        raise OSError(
            f"--push {name}: {str(problem).splitlines()[0]}; the export in {folder} is complete. "
            "Log in with `hf auth login` and upload it, or try again"
        ) from problem
    print(f"published   {name} ({'private' if is_private else 'public'})")


def _print_export(destination: str, checkpoint: Path, report: ExportReport) -> None:
    files = f"{len(report.weight_files)} file{'s' if len(report.weight_files) > 1 else ''}"
    kind = "none found: add one with --tokenizer" if report.tokenizer is None else report.tokenizer.kind
    print(f"exported    {checkpoint} -> {destination}")
    print(f"weights     {report.weights}, {report.num_parameters:,} parameters")
    print(f"size        {report.size_bytes / MEGABYTE:,.1f} MB in {files}")
    print(f"tokenizer   {kind}")
    print(f'load with   AutoModelForMaskedLM.from_pretrained("{destination}", trust_remote_code=True)')


# ---- to native -----------------------------------------------------------------------------------------------------


def from_hf(args: argparse.Namespace) -> int:
    """Import a Hugging Face folder as native weights."""
    source = Path(args.source)
    if is_other_architecture(source):
        return from_decoder(args, source)
    tensors, meta = import_hf(source, args.overrides)
    with appearing(Path(args.destination)) as folder:
        write_weights(folder, tensors, meta)
        has_tokenizer = _add_tokenizer(args.tokenizer, folder / "tokenizer", meta, source)
        if not args.no_check:
            _check_logits(folder, lambda check: check.load_exported(source), "raw", "fp32")
    _print_import(args, meta, has_tokenizer)
    return 0


def from_decoder(args: argparse.Namespace, source: Path) -> int:
    """Import a Llama or Qwen folder as native weights of objective ar, with a mask token."""
    tokenizer = source if args.tokenizer is None else Path(args.tokenizer)
    decoder = import_decoder(source, tokenizer, args.overrides)
    with appearing(Path(args.destination)) as folder:
        write_weights(folder, decoder.weights, decoder.meta)
        has_tokenizer = write_tokenizer(tokenizer, folder / "tokenizer", decoder.mask)
        if has_tokenizer:
            check_tokenizer(folder / "tokenizer", decoder.meta)
        if not args.no_check:
            rows = decoder.mask.vocab_size
            _check_logits(folder, lambda check: check.load_decoder(source, rows), "raw", "fp32")
    _print_import(args, decoder.meta, has_tokenizer)
    print(f"mask        {decoder.mask.text} ({decoder.mask.token_id}): {decoder.mask.origin}")
    return 0


def from_lightning(args: argparse.Namespace) -> int:
    """Import a Lightning checkpoint as native weights and EMA."""
    tensors, meta = import_lightning(args.source, args.overrides)
    with appearing(Path(args.destination)) as folder:
        write_weights(folder, tensors, meta)
        has_tokenizer = _add_tokenizer(args.tokenizer, folder / "tokenizer", meta)
        reader, config = open_checkpoint(folder), from_dict(meta["config"])
        if not args.no_check:
            for weights in ("raw", "ema") if "ema" in reader.kinds() else ("raw",):
                _check_logits(
                    folder,
                    lambda check, weights=weights: check.from_published_weights(reader, config, weights),
                    weights,
                    "fp32",
                )
    _print_import(args, meta, has_tokenizer)
    return 0


def _print_import(args: argparse.Namespace, meta: dict[str, Any], has_tokenizer: bool) -> None:
    diffusion, model = meta["config"]["diffusion"], meta["config"]["model"]
    print(f"imported    {args.source} -> {args.destination}")
    print(
        f"model       {diffusion['objective']}, {model['num_layers']} layers, width {model['hidden_size']}, "
        f"context {meta['config']['data']['context_length']}, vocabulary {meta['vocab_size']:,}, "
        f"mask {meta['mask_token_id']}, step {meta['step']:,}"
    )
    print(f"tokenizer   {'copied' if has_tokenizer else 'none found: add one with --tokenizer'}")
    print(f"use with    evaluate {args.destination} --data SHARDS, or train ... train.init_from={args.destination}")


# ---- reshard and verify --------------------------------------------------------------------------------------------


def run_reshard(args: argparse.Namespace) -> int:
    """The same checkpoint in other files."""
    with appearing(Path(args.destination)) as folder:
        report = reshard(args.source, folder, args.files, args.contents)
    print(str(report).replace(str(folder), args.destination))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """0 when everything is whole, 1 otherwise."""
    source = Path(args.source)
    if (source / "config.json").is_file():
        return _verify_hf(source)
    reports = verify(source, args.step)
    if args.json:
        print(json.dumps([report.as_dict() for report in reports], indent=2))
    else:
        print("\n\n".join(str(report) for report in reports))
    return 0 if all(report.is_valid for report in reports) else 1


def _verify_hf(source: Path) -> int:
    """Names, shapes and finite numbers of a Hugging Face folder."""
    if is_other_architecture(source):
        decoder = import_decoder(source)
        tensors, meta = decoder.weights, decoder.meta
    else:
        tensors, meta = import_hf(source)
    count, bad = 0, []
    for name, _, tensor in tensors:
        count += 1
        if not bool(torch.isfinite(tensor).all()):
            bad.append(f"  - {name}: holds numbers that are not finite")
    print(f"folder      {source}: {count} tensors, vocabulary {meta['vocab_size']:,}")
    print("\n".join(["result      DAMAGED", *bad] if bad else ["result      valid"]))
    return 1 if bad else 0


# ---- shared --------------------------------------------------------------------------------------------------------


@contextmanager
def appearing(destination: Path) -> Iterator[Path]:
    """A temporary folder name beside `destination` that becomes it at the end, or leaves nothing behind."""
    if destination.exists():
        raise ValueError(f"{destination} exists; choose another destination or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.parent / f".converting_{destination.name}_{os.getpid()}"
    try:
        yield temporary
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenizer(path: str | Path | None) -> Tokenizer | None:
    return None if path is None else load_tokenizer(path)


def _add_tokenizer(given: str | None, folder: Path, meta: dict[str, Any], source: Path | None = None) -> bool:
    """Put the given tokenizer, or the source's own, into `folder`; False if there is none."""
    if given is not None:
        load_tokenizer(given).save(folder)
    elif source is None or not copy_tokenizer(source, folder):
        return False
    check_tokenizer(folder, meta)
    return True


def check_tokenizer(folder: Path, meta: dict[str, Any]) -> None:
    """ValueError where the tokenizer's ids or mask are not the model's."""
    found = load_tokenizer(folder)
    if (found.vocab_size, found.mask_token_id) != (meta["vocab_size"], meta["mask_token_id"]):
        raise ValueError(
            f"the tokenizer has {found.vocab_size} ids with mask {found.mask_token_id}, the model "
            f"{meta['vocab_size']} with mask {meta['mask_token_id']}; give the right one with --tokenizer, "
            "or say mask_token_id=N"
        )


def _check_logits(checkpoint: Path, load: Callable[[Any], Any], weights: str, dtype: str) -> None:
    quieten()
    sys.path.insert(0, str(Path(__file__).parent))
    import logit_check

    found = logit_check.compare(checkpoint, load(logit_check), weights)
    print(f"check       {weights}: {found}")
    if not found.fits(dtype):
        raise ValueError(f"the converted model is not the same model: {found}; nothing was written")


def quieten() -> None:
    """Before Megatron is imported (late, for it takes seconds): its advice on missing accelerators is no news here."""
    warnings.filterwarnings("ignore", message=".*Apex.*")
    disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str, source: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help)
        sub.set_defaults(run=run)
        sub.add_argument("source", metavar=source)
        return sub

    sub = command("to-hf", to_hf, "write a Hugging Face folder", "RUN_OR_CHECKPOINT")
    sub.add_argument("destination", metavar="DESTINATION")
    sub.add_argument("--weights", choices=("ema", "raw"), default="ema")
    sub.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    sub.add_argument("--max-shard-size", default="5GB", metavar="SIZE")
    sub.add_argument("--step", type=int, help="this step's checkpoint of a run; default: the newest")
    sub.add_argument("--tokenizer", metavar="PATH", help="default: the run's")
    sub.add_argument("--sampler", metavar="NAME", help="what generate uses by default; default: the run's")
    sub.add_argument("--push", metavar="OWNER/NAME", help="upload with huggingface_hub as a private repository")
    sub.add_argument("--public", action="store_true", help="with --push: make it public")
    for name, run, source in (("from-hf", from_hf, "FOLDER"), ("from-lightning", from_lightning, "FILE.ckpt")):
        sub = command(name, run, "write native weights", source)
        sub.add_argument("destination", metavar="DESTINATION")
        sub.add_argument("overrides", nargs="*", metavar="a.b=c", help="what the source does not say")
        sub.add_argument("--tokenizer", metavar="PATH", help="folder of the tokenizer, if the source has none")
    for name in ("to-hf", "from-hf", "from-lightning"):
        commands.choices[name].add_argument("--no-check", action="store_true", help="do not compare logits")
    sub = command("reshard", run_reshard, "rewrite a checkpoint", "RUN_OR_CHECKPOINT")
    sub.add_argument("destination", metavar="DESTINATION")
    sub.add_argument("--files", type=int, default=1, metavar="N")
    sub.add_argument("--contents", choices=CONTENTS, default="all")
    sub = command("verify", run_verify, "is it whole?", "PATH")
    sub.add_argument("--step", type=int)
    sub.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
