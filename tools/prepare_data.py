#!/usr/bin/env python3
"""Turn a corpus into shards: OUTPUT/train, OUTPUT/validation, OUTPUT/tokenizer. That folder is data.path.

Interrupted, the same command goes on from the last finished shard; finished, it does nothing.
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from bd3lm_scale.data.demo_corpus import demo_documents
from bd3lm_scale.data.detokenize import DETOKENIZERS
from bd3lm_scale.data.documents import FORMATS, Options
from bd3lm_scale.data.estimate import estimate
from bd3lm_scale.data.inputs import find_inputs, refuse_twice
from bd3lm_scale.data.packing import SPLITS
from bd3lm_scale.data.prepare import BAD_RECORDS, PROGRESS, prepare
from bd3lm_scale.data.records import JSON, TARS
from bd3lm_scale.data.shards import Manifest, write_file
from bd3lm_scale.data.tokenizing import Preparation, Unit, file_size
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece

DEMO_VOCAB_SIZE = 4096
DEFAULT_VALIDATION_FRACTION = 0.005
DEFAULT_FIELDS = {False: "text", True: "messages"}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    started_at = time.perf_counter()
    try:
        task = _demo_task(args) if args.demo else _task(args)
        if args.dry_run:
            _print_estimate(task, args)
            return 0
        manifests = _prepare_with_progress(task, args)
    except (ValueError, OSError, RuntimeError) as problem:
        print(f"prepare_data: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data: stopped; the same command goes on from the last finished shard", file=sys.stderr)
        return 130
    _print_counts(manifests, time.perf_counter() - started_at)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files, folders or URLs: .txt .jsonl[.gz|.zst] .parquet .tar, ...")
    add("--tokenizer", help="SentencePiece .model, BERT vocab.txt, GPT-2 or Hugging Face folder")
    add("--output", help="folder to write")
    add("--demo", action="store_true", help="the demo corpus and its tokenizer in place of INPUT and --tokenizer")
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenize (default: one per core)",
    )
    add("--format", choices=FORMATS, help="what the files are, whatever they are called (default: by name)")
    add("--field", help="field of the text in JSON objects and columns of tables (default: text; or messages)")
    add(
        "--messages",
        action="store_true",
        help="INPUT are conversations, JSON objects with a list of messages; only the assistant's answers are learnt",
    )
    add("--chat-template", metavar="FILE", help="Jinja template of conversations (default: the tokenizer's)")
    add("--document", choices=("file", "line", "paragraph"), default="file", help="what a document is in .txt files")
    add("--keep-newlines", action="store_true", help="with --document line: keep each line's newline")
    add("--detokenizer", choices=sorted(DETOKENIZERS), help="undo an evaluation set's tokenization")
    add("--validation-input", nargs="+", default=[], metavar="INPUT", help="files that go to validation whole")
    add("--validation-documents", type=int, default=0, metavar="N", help="hold out the last N documents")
    add("--validation-fraction", type=float, metavar="F", help="hold out this share of the documents, chosen by hash")
    add("--validation-only", action="store_true", help="everything goes to validation: an evaluation set")
    add(
        "--on-bad-record",
        choices=("stop", "skip"),
        default="stop",
        help="at what is no document: stop, or leave it out and list it in OUTPUT/bad_records.jsonl (default: stop)",
    )
    add("--no-eos", action="store_true", help="put no EOS after documents")
    add("--shard-tokens", type=int, default=1 << 25, help="tokens per shard (default: %(default)s)")
    add("--chunk-tokens", type=int, default=1 << 16, help="tokens per member of a shard (default: %(default)s)")
    add("--dry-run", action="store_true", help="tokenize a sample and print what the whole would be")
    return parser


def _task(args) -> Preparation:
    """The command line as a Preparation (ValueError naming the option)."""
    missing = [name for name in ("inputs", "tokenizer") if not getattr(args, name)]
    if missing or not (args.output or args.dry_run):
        raise ValueError("give INPUT..., --tokenizer and --output (or --demo and --output)")
    rules = [args.validation_input, args.validation_documents, args.validation_fraction, args.validation_only]
    if sum(bool(rule) for rule in rules) > 1:
        raise ValueError("--validation-input, -documents, -fraction and -only exclude each other; give one")
    if args.validation_documents < 0 or args.shard_tokens < 1 or args.chunk_tokens < 1 or args.workers < 0:
        raise ValueError("--validation-documents, --shard-tokens, --chunk-tokens and --workers must not be negative")
    fraction = args.validation_fraction
    if fraction is None:
        fraction = 0.0 if any(rules) else DEFAULT_VALIDATION_FRACTION
    if not 0 <= fraction < 1:
        raise ValueError(f"--validation-fraction {fraction}: must be at least 0 and below 1")
    options = Options(args.field or DEFAULT_FIELDS[args.messages], args.document, args.keep_newlines, args.format)
    ignored: Counter[str] = Counter()
    inputs = tuple(find_inputs(args.inputs, options, ignored))
    held_out = tuple(find_inputs(args.validation_input, options, ignored))
    refuse_twice([*inputs, *held_out])
    _check_messages(args, [*inputs, *held_out], options)
    return Preparation(
        inputs=() if args.validation_only else inputs,
        validation_inputs=inputs if args.validation_only else held_out,
        validation_documents=args.validation_documents,
        validation_fraction=fraction,
        options=options,
        detokenizer=args.detokenizer,
        insert_eos=not args.no_eos,
        on_bad_record=args.on_bad_record,
        shard_tokens=args.shard_tokens,
        chunk_tokens=args.chunk_tokens,
        ignored=tuple(sorted(ignored.items())),
        messages=args.messages,
        chat_template=args.chat_template,
    )


def _check_messages(args, paths: list[str], options: Options) -> None:
    """ValueError for what does not go with conversations, naming the option."""
    if args.chat_template and not args.messages:
        raise ValueError("--chat-template: is for conversations; give --messages as well")
    if not args.messages:
        return
    if args.detokenizer:
        raise ValueError("--detokenizer: undoes the tokenization of plain text; leave it out with --messages")
    other = next((path for path in paths if options.kind(path) not in (*JSON, *TARS)), None)
    if other is not None:
        raise ValueError(
            f"--messages: reads JSON lines ({', '.join(JSON)}, or tars of them), and {other} is another kind"
        )


def _demo_task(args) -> Preparation:
    """Write the demo corpus and its tokenizer beside the shards, unless they are there."""
    if not args.output:
        raise ValueError("--demo: give --output, for example data/demo")
    folder = Path(args.output) / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    corpus, model = folder / "python_library.jsonl", folder / "tokenizer.model"
    if not corpus.exists():
        lines = [json.dumps({"text": text, "name": name}) for name, text in demo_documents()]
        write_file(corpus, "\n".join(lines) + "\n")
    if not model.exists():
        texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").strip().split("\n")]
        train_sentencepiece(texts[::3], folder, vocab_size=DEMO_VOCAB_SIZE)
    args.tokenizer = str(model)
    return Preparation(inputs=(str(corpus),), validation_fraction=0.05, shard_tokens=1 << 18, chunk_tokens=1 << 14)


def _prepare_with_progress(task: Preparation, args) -> dict[str, Manifest]:
    sizes = [file_size(path) or 0 for path in task.files]
    before = [sum(sizes[:file]) for file in range(len(sizes))]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="preparing", disable=not sys.stderr.isatty()) as bar:

        def report(unit: Unit, tokens: int) -> None:
            bar.set_postfix_str(f"{tokens / 1e6:,.1f}M tokens", refresh=False)
            bar.update(before[unit.file] + unit.bytes_read - bar.n)

        try:
            return prepare(task, args.tokenizer, Path(args.output), args.workers, report)
        except ValueError:
            if not args.demo:
                raise
        # the demo's folder is ours: shards of an older version are made anew
        for name in (*SPLITS, "tokenizer"):
            shutil.rmtree(Path(args.output) / name, ignore_errors=True)
        for name in (PROGRESS, BAD_RECORDS):
            (Path(args.output) / name).unlink(missing_ok=True)
        return prepare(task, args.tokenizer, Path(args.output), args.workers, report)


def _print_counts(manifests: dict[str, Manifest], seconds: float) -> None:
    for split, manifest in manifests.items():
        print(
            f"{split}: {manifest.num_documents:,} documents, {manifest.num_text_bytes:,} bytes of text, "
            f"{manifest.num_tokens:,} tokens ({manifest.num_text_bytes / max(1, manifest.num_tokens):.2f} bytes each), "
            f"{len(manifest.shards)} shards"
            + (f", {manifest.num_targets:,} tokens of answers" if manifest.num_targets is not None else "")
        )
    _print_reading(next(iter(manifests.values())).preparation["read"])
    print(f"{seconds:.1f} s")


def _print_reading(read: dict) -> None:
    """What was read and what was not, by kind."""
    files = ", ".join(f"{count:,} {kind}" for kind, count in read["files"].items())
    print(f"read: {files}: {read['documents']:,} documents, {read['empty_documents']:,} of them empty")
    for name, what in (("ignored", "ignored"), ("bad_records", f"bad records left out, listed in {BAD_RECORDS}")):
        if read[name]:
            print(f"{what}: {', '.join(f'{count:,} {kind}' for kind, count in read[name].items())}")


def _print_estimate(task: Preparation, args) -> None:
    figures = dataclasses.asdict(estimate(task, args.tokenizer, max(1, args.workers)))
    for name, value in figures.items():
        print(f"{name:<20} {value:,.2f}" if isinstance(value, float) else f"{name:<20} {value:,}")


if __name__ == "__main__":
    sys.exit(main())
