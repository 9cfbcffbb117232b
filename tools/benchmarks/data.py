"""Reading shards: tokens per CPU-second, time to the first batch after a seek, memory of a worker; and preparing them.

The set is made of random tokens: 100 shards in a temporary folder. Rates are per CPU-second of the reading process.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.batches import BatchPlan, BatchReader
from bd3lm_scale.data.demo_corpus import demo_documents
from bd3lm_scale.data.index import IndexWriter
from bd3lm_scale.data.prepare import prepare
from bd3lm_scale.data.shards import Manifest, write_shard
from bd3lm_scale.data.stream import RowStream, open_stream
from bd3lm_scale.data.tokenizer import identity_of, load_tokenizer
from bd3lm_scale.data.tokenizing import Preparation
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece
from bd3lm_scale.values import Cursor

CHUNK_TOKENS = 1 << 16
VOCAB_SIZE = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `tools/benchmark.py data`."""
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--shard-tokens", type=int, default=1 << 20)
    parser.add_argument("--batch", type=int, default=256, help="rows per step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--documents", type=int, help="prepare only so many documents of the demo corpus")
    parser.add_argument("--folder", help="where the temporary set goes (default: the system's)")


def run(args: argparse.Namespace) -> dict:
    """Flat figures; see `docs/data.md` for what they mean."""
    figures: dict = {"shards": args.shards, "tokens": args.shards * args.shard_tokens}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder)
        tokenizer_file, corpus = _corpus(path, args.documents)
        figures |= _preparation(path, tokenizer_file, corpus)
        make_set(path / "set", str(tokenizer_file), args.shards, args.shard_tokens)
        for length in (128, 1024):
            figures |= _reading(path / "set", length, args)
        figures |= _packing(path / "set", args)
        figures |= _seeking(path / "set", args)
    return figures


def make_set(folder: Path, tokenizer_path: str, num_shards: int, shard_tokens: int) -> None:
    """A folder as prepare_data writes it, of random tokens."""
    tokenizer = load_tokenizer(tokenizer_path)
    identity = identity_of(tokenizer)
    tokenizer.save(folder / "tokenizer")
    for split, count in (("train", num_shards), ("validation", 1)):
        (folder / split).mkdir(parents=True)
        index = IndexWriter(folder / split)
        for number in range(count):
            tokens = np.random.default_rng(number).integers(0, identity.vocab_size, shard_tokens)
            lengths = np.random.default_rng(number).lognormal(6.0, 1.0, shard_tokens // 100).astype(np.int64) + 1
            starts = np.append(0, np.cumsum(lengths))
            starts = starts[starts < shard_tokens]
            name = f"{split}-{number:06d}.tar"
            index.append(write_shard(folder / split, name, tokens, starts, "uint16", CHUNK_TOKENS))
        index.finish(Manifest(split, "uint16", CHUNK_TOKENS, 0, 0, 0, identity, (), {}))


def _corpus(folder: Path, num_documents: int | None) -> tuple[Path, Path]:
    texts = [text for _, text in itertools.islice(demo_documents(), num_documents)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return train_sentencepiece(texts[::3], folder / "tokenizer", vocab_size=VOCAB_SIZE), corpus


def _preparation(folder: Path, tokenizer_file: Path, corpus: Path) -> dict:
    texts = [json.loads(line)["text"] for line in corpus.open()]
    tokenizer = load_tokenizer(tokenizer_file)
    started_at = time.process_time()
    for start in range(0, len(texts), 64):
        tokenizer.encode_batch(texts[start : start + 64])
    tokenizer_s = time.process_time() - started_at
    started_at = time.process_time()
    prepare(Preparation((str(corpus),)), str(tokenizer_file), folder / "prepared", workers=0)
    prepare_s = time.process_time() - started_at
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "tokenizer_mb_per_cpu_s": megabytes / tokenizer_s,
        "prepare_mb_per_cpu_s": megabytes / prepare_s,
        "prepare_share_of_tokenizer": tokenizer_s / prepare_s,
    }


def _reading(folder: Path, length: int, args: argparse.Namespace) -> dict:
    """First pass (every member is checked once) and steady state, in this process."""
    stream = open_stream(DataConfig(path=str(folder), context_length=length, workers=0), seed=1)
    batch = args.batch * 1024 // length
    first = _rate(stream, batch, length, range(args.steps))
    again = _rate(stream, batch, length, range(args.steps))
    stream.close()
    return {f"first_pass_mtokens_per_cpu_s_L{length}": first, f"steady_mtokens_per_cpu_s_L{length}": again}


def _rate(stream: RowStream, batch: int, length: int, steps: range) -> float:
    started_at = time.process_time()
    for step in steps:
        stream.read(np.arange(step * batch, (step + 1) * batch))
    return len(steps) * batch * length / (time.process_time() - started_at) / 1e6


def _packing(folder: Path, args: argparse.Namespace) -> dict:
    """Packed documents (403 tokens at the median): opening the set, which plans every shard, and reading."""
    data = DataConfig(path=str(folder), context_length=1024, workers=0, packing="documents")
    started_at = time.process_time()
    stream = open_stream(data, seed=1, block_size=4)
    planned = time.process_time() - started_at
    _rate(stream, args.batch, 1024, range(args.steps))
    started_at, index = time.process_time(), np.arange(args.steps * args.batch)
    for part in np.split(index, args.steps):
        stream.read(part)
        stream.layout(part)
        stream.targets(part)
    seconds = time.process_time() - started_at
    share = stream.source.padding_share
    stream.close()
    return {
        "packed_plan_s_per_million_documents": planned / stream.num_documents * 1e6,
        "packed_mtokens_per_cpu_s_L1024": len(index) * 1024 * (1 - share) / seconds / 1e6,
        "packed_padding_share_L1024": share,
    }


def _seeking(folder: Path, args: argparse.Namespace) -> dict:
    config = DataConfig(path=str(folder), context_length=1024)
    plan = BatchPlan(args.batch, args.batch)
    middle = Cursor(step=args.shards * args.shard_tokens // 1024 // args.batch // 2)
    started_at = time.perf_counter()
    reader = BatchReader(open_stream(config, seed=1), plan, middle, workers=2, prefetch_steps=2)
    next(reader)
    cold = time.perf_counter() - started_at
    list(itertools.islice(reader, 20))
    started_at = time.perf_counter()
    reader.seek(dataclasses.replace(middle, step=middle.step // 2))
    next(reader)
    warm = time.perf_counter() - started_at
    memory = max(child.memory_info().rss for child in psutil.Process().children())
    reader.close()
    return {"first_batch_s_new_reader": cold, "first_batch_s_after_seek": warm, "worker_rss_mb": memory / 1e6}
