#!/usr/bin/env python3
"""Train a SentencePiece tokenizer that loses nothing: decode(encode(text)) == text, spaces and newlines included."""

import argparse
import sys
import time
from collections.abc import Iterator

from bd3lm_scale.data import documents
from bd3lm_scale.data.inputs import find_inputs
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders, as for prepare_data.py")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, special ones included")
    parser.add_argument("--output", required=True, help="folder to write tokenizer.model to")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--max-bytes", type=int, default=100_000_000, help="train on the first so many bytes of text")
    parser.add_argument("--field", default="text", help="field of the text in JSON and tables")
    parser.add_argument("--format", choices=documents.FORMATS, help="what the files are, whatever they are called")
    parser.add_argument(
        "--on-bad-record",
        choices=("stop", "skip"),
        default="stop",
        help="at what is no document: stop, or leave it out (default: stop)",
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    started_at = time.perf_counter()
    try:
        options = documents.Options(field=args.field, format=args.format)
        texts = _texts(find_inputs(args.inputs, options), options, args.on_bad_record == "skip")
        train_sentencepiece(
            texts,
            args.output,
            vocab_size=args.vocab_size,
            model_type=args.model_type,
            max_bytes=args.max_bytes,
            seed=args.seed,
        )
        tokenizer = load_tokenizer(args.output)
    except (ValueError, OSError) as problem:
        print(f"train_tokenizer: {problem}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - started_at
    print(
        f"tokenizer in {args.output}: {tokenizer.vocab_size} ids, mask {tokenizer.mask_token_id}, "
        f"BOS {tokenizer.bos_token_id}, EOS {tokenizer.eos_token_id}, pad {tokenizer.pad_token_id}, {seconds:.1f} s"
    )
    return 0


def _texts(files: list[str], options: documents.Options, skips: bool) -> Iterator[str]:
    num_bad = 0
    for path in files:
        for number, record in enumerate(documents.read_records(path, options)):
            try:
                yield documents.record_text(record, options, f"{path}, record {number + 1}")
            except documents.BadRecordError as problem:
                if not skips:
                    raise ValueError(
                        f"{problem}; it is {record.where}; correct it, or leave it out with --on-bad-record skip"
                    ) from problem
                num_bad += 1
    if num_bad:
        print(f"bad records left out: {num_bad:,}")


if __name__ == "__main__":
    sys.exit(main())
