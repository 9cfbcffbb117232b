#!/usr/bin/env python3
"""Turn a corpus into shards: OUTPUT/train, OUTPUT/validation, OUTPUT/tokenizer. That folder is data.path.

Interrupted, the same command goes on from the last finished shard; finished, it does nothing.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from bd3lm_scale.data import documents
from bd3lm_scale.data.demo_corpus import demo_documents
from bd3lm_scale.data.prepare import Preparation, prepare
from bd3lm_scale.data.shards import Manifest, write_file
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece

DEMO_VOCAB_SIZE = 4096


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    started_at = time.perf_counter()
    try:
        task = _demo_task(args) if args.demo else _task(args)
        manifests = prepare(task, args.tokenizer, Path(args.output), args.workers)
    except (ValueError, OSError, RuntimeError) as problem:
        print(f"prepare_data: {problem}", file=sys.stderr)
        return 1
    _print_counts(manifests, time.perf_counter() - started_at)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files or folders")
    parser.add_argument("--tokenizer", help="SentencePiece .model, BERT vocab.txt, GPT-2 or Hugging Face folder")
    parser.add_argument("--output", required=True)
    parser.add_argument("--demo", action="store_true", help="the demo corpus and its tokenizer in place of inputs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that tokenise; 0: this one")
    parser.add_argument("--field", default="text", help="field of the text in JSON and tables")
    parser.add_argument("--document", choices=("file", "line", "paragraph"), default="file", help="in .txt files")
    parser.add_argument("--validation-input", nargs="+", default=[], metavar="INPUT", help="goes to validation whole")
    parser.add_argument(
        "--validation-documents", type=int, default=0, metavar="N", help="hold out the last N documents"
    )
    parser.add_argument("--validation-fraction", type=float, metavar="F", help="hold out this share, chosen by hash")
    parser.add_argument("--no-eos", action="store_true", help="put no EOS between documents")
    parser.add_argument("--shard-tokens", type=int, default=1 << 25)
    parser.add_argument("--chunk-tokens", type=int, default=1 << 16)
    return parser


def _task(args) -> Preparation:
    if not args.inputs or not args.tokenizer:
        raise ValueError("give INPUT... and --tokenizer (or --demo)")
    fraction = args.validation_fraction
    if fraction is None:
        fraction = 0.0 if args.validation_documents or args.validation_input else 0.005
    return Preparation(
        inputs=tuple(documents.find_inputs(args.inputs)),
        validation_inputs=tuple(documents.find_inputs(args.validation_input)),
        validation_documents=args.validation_documents,
        validation_fraction=fraction,
        options=documents.Options(field=args.field, document=args.document),
        insert_eos=not args.no_eos,
        shard_tokens=args.shard_tokens,
        chunk_tokens=args.chunk_tokens,
    )


def _demo_task(args) -> Preparation:
    """Write the demo corpus and its tokenizer beside the shards, unless they are there."""
    folder = Path(args.output) / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "python_library.jsonl"
    if not corpus.exists():
        lines = [json.dumps({"text": text, "name": name}) for name, text in demo_documents()]
        write_file(corpus, "\n".join(lines) + "\n")
    args.tokenizer = str(folder / "tokenizer.model")
    if not Path(args.tokenizer).exists():
        texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
        train_sentencepiece(texts[::3], folder, vocab_size=DEMO_VOCAB_SIZE)
    args.workers = min(args.workers, 2)
    return Preparation(inputs=(str(corpus),), validation_fraction=0.05, shard_tokens=1 << 18, chunk_tokens=1 << 14)


def _print_counts(manifests: dict[str, Manifest], seconds: float) -> None:
    for split, manifest in manifests.items():
        print(
            f"{split}: {manifest.num_documents:,} documents, {manifest.num_text_bytes:,} bytes of text, "
            f"{manifest.num_tokens:,} tokens ({manifest.num_text_bytes / manifest.num_tokens:.2f} bytes each), "
            f"{len(manifest.shards)} shards"
        )
    print(f"{seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
