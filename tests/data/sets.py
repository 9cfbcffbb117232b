"""Small sets of shards whose every token says where it lies."""

from pathlib import Path

import numpy as np

from bd3lm_scale.data.index import IndexWriter
from bd3lm_scale.data.shards import MANIFEST, Manifest, TokenizerIdentity, manifest_to_json, token_dtype, write_shard
from bd3lm_scale.data.tokenizer import identity_of, load_tokenizer

CHUNK_TOKENS = 16


def write_split(
    folder: Path,
    split: str,
    shards: list[np.ndarray],
    identity: TokenizerIdentity,
    chunk_tokens: int = CHUNK_TOKENS,
    version: int = 2,
) -> Manifest:
    """Shards of given tokens, each of them one document; version 1 is a manifest that lists them, without index."""
    target = folder / split
    target.mkdir(parents=True)
    dtype = token_dtype(identity.vocab_size)
    entries = tuple(
        write_shard(target, f"{split}-{i:06d}.tar", tokens, np.zeros(1, np.int64), dtype, chunk_tokens)
        for i, tokens in enumerate(shards)
    )
    total = sum(map(len, shards))
    manifest = Manifest(split, dtype, chunk_tokens, total, len(shards), 0, identity, entries, {})
    if version == 1:
        (target / MANIFEST).write_text(manifest_to_json(manifest))
        return manifest
    index = IndexWriter(target)
    for entry in entries:
        index.append(entry)
    return index.finish(manifest)


def write_set(
    folder: Path, tokenizer_path: Path, shard_lengths: list[int], offset: int = 0, version: int = 2
) -> list[np.ndarray]:
    """A folder as prepare_data writes it; token n of the whole set is (offset + n) mod vocabulary."""
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.save(folder / "tokenizer")
    identity = identity_of(tokenizer)
    ends = np.cumsum(shard_lengths)
    numbers = [np.arange(e - n, e) + offset for e, n in zip(ends, shard_lengths, strict=True)]
    shards = [n % tokenizer.vocab_size for n in numbers]
    write_split(folder, "train", shards, identity, version=version)
    write_split(folder, "validation", shards[:2], identity, version=version)
    return shards


def rows_of(shards: list[np.ndarray], length: int) -> list[tuple[int, ...]]:
    """All rows of `length`, in natural order."""
    return [tuple(s[i : i + length].tolist()) for s in shards for i in range(0, len(s) - length + 1, length)]
