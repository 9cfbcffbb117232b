"""Shards: ordinary webdataset tars of packed token chunks, and the manifest that makes them seekable.

    train/manifest.json        counts, dtype, tokenizer identity, and the digest of what index.bin says of every shard
    train/index.bin            data/index.py; manifests of version 1 list the shards themselves, here
    train/train-000000.tar     00000000.tokens.npy, 00000000.documents.npy, 00000001.tokens.npy, ...

A shard is one run of tokens cut into chunks of `chunk_tokens` (only its last chunk may be shorter), so token n
lies in chunk n // chunk_tokens: rows of any length are cut at load time without reading anything else.
`documents` holds the places in the chunk where a document begins. The bytes depend on the tokens alone.

Shards of conversations say which tokens are targets (version 3): 00000000.targets.npy has the runs of targets in the
chunk, uint32 (runs, 2), and the index those of the shard (data/targets.py). In all others every token is a target.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bd3lm_scale.data.shard_list import TAR_BLOCK, Shard, ShardList, block_checksums, check_shard, plain_name
from bd3lm_scale.data.targets import npy_bytes, runs_member, runs_of

FORMAT = "bd3lm_scale.shards"
VERSIONS = (1, 2, 3)
MANIFEST = "manifest.json"
_LARGEST_COUNT = 1 << 62
_DIGEST_SHARDS = 4096


@dataclass(frozen=True)
class TokenizerIdentity:
    """What the shards know about the tokenizer that made them.

    `chat_template` is the SHA-256 of the template that conversations were written with.
    """

    hash: str
    vocab_size: int
    mask_token_id: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    files: tuple[str, ...] = ()
    chat_template: str = ""

    def to_json(self) -> dict:
        """Its entry in a manifest; shards of plain text know no chat template."""
        return {key: value for key, value in vars(self).items() if key != "chat_template" or value}


@dataclass(frozen=True)
class Manifest:
    """One split: its shards in order (a ShardList, once it is read), and everything needed to read them.

    `num_targets` is None where every token is a target.
    """

    split: str
    dtype: str
    chunk_tokens: int
    num_tokens: int
    num_documents: int
    num_text_bytes: int
    tokenizer: TokenizerIdentity
    shards: Sequence[Shard]
    preparation: dict
    num_targets: int | None = None


def token_dtype(vocab_size: int) -> str:
    """Smallest unsigned dtype that holds ids below `vocab_size`."""
    return next(name for name in ("uint8", "uint16", "uint32") if vocab_size <= np.iinfo(name).max + 1)


def manifest_to_json(manifest: Manifest) -> str:
    """A manifest of version 1, which lists its shards: stable key order, one shard per line."""
    head = head_to_json(manifest, 1, _rows_digest(manifest))
    lines = ",\n".join(json.dumps(shard.to_json(), separators=(",", ":")) for shard in manifest.shards)
    return json.dumps(head, indent=1)[:-2] + ',\n "shards": [\n' + lines + "\n]\n}\n"


def head_to_json(manifest: Manifest, version: int, rows_digest: str) -> dict:
    """All of a manifest but what it says of its shards."""
    return {
        "format": FORMAT,
        "version": version,
        "split": manifest.split,
        "dtype": manifest.dtype,
        "chunk_tokens": manifest.chunk_tokens,
        "num_tokens": manifest.num_tokens,
        "num_documents": manifest.num_documents,
        **({} if manifest.num_targets is None else {"num_targets": manifest.num_targets}),
        "num_text_bytes": manifest.num_text_bytes,
        "rows_sha256": rows_digest,
        "tokenizer": manifest.tokenizer.to_json(),
        "preparation": manifest.preparation,
    }


def _rows_digest(manifest: Manifest) -> str:
    """Hash of all that decides which tokens a row has, and of the counts: a changed manifest gives no other rows."""
    digest = hashlib.sha256(json.dumps(counts_of(manifest)).encode())
    for shard in manifest.shards:
        digest.update(json.dumps([shard.name, shard.size, shard.sha256, shard.num_tokens]).encode())
        digest.update(shard.token_members.astype("<i8").tobytes() + shard.document_members.astype("<i8").tobytes())
    return digest.hexdigest()


def counts_of(manifest: Manifest) -> list:
    """What a manifest says of all its shards together, for its digest."""
    counts = [manifest.chunk_tokens, manifest.num_tokens, manifest.num_documents, manifest.num_text_bytes]
    counts += [] if manifest.num_targets is None else [manifest.num_targets]
    return [manifest.split, manifest.dtype, counts]


def data_digest(lists: Iterable[ShardList]) -> str:
    """Hash of the shards themselves, wherever they lie and whatever they are called."""
    # the JSON of [[[sha256, num_tokens], ...], ...], without ever holding it
    digest = hashlib.sha256(b"[")
    for number, shards in enumerate(lists):
        digest.update(b", [" if number else b"[")
        for start in range(0, len(shards), _DIGEST_SHARDS):
            some = shards.identities(slice(start, start + _DIGEST_SHARDS))
            digest.update((b", " if start else b"") + json.dumps(some).encode()[1:-1])
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()


def manifest_from_json(
    text: str, where: str, open_index: Callable[[Manifest, dict], ShardList] | None = None
) -> Manifest:
    """Parse and check a manifest.

    Args:
        text: its JSON.
        where: names it in errors.
        open_index: gives the shards of a manifest of a later version for its head and its entry "index"; without it the
            head alone is read, and `shards` stays empty.

    Raises:
        ValueError: it cannot be used.
    """
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT or raw["version"] not in VERSIONS:
            raise ValueError(f"format {raw['format']} version {raw['version']}, expected {FORMAT} version {VERSIONS}")
        is_listed = raw["version"] == 1
        manifest = _parse(raw, is_listed)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
        reason = f"no {problem}" if isinstance(problem, KeyError) else problem
        raise ValueError(f"{where}: not a usable manifest ({reason}); run tools/prepare_data.py again") from problem
    if manifest.dtype != token_dtype(manifest.tokenizer.vocab_size):
        raise ValueError(
            f"{where}: dtype {manifest.dtype} does not fit a vocabulary of {manifest.tokenizer.vocab_size}; "
            "run tools/prepare_data.py again"
        )
    try:
        if is_listed:
            for shard in manifest.shards:
                check_shard(shard, manifest.dtype, manifest.chunk_tokens)
            # the first manifests have no such hash
            if raw.get("rows_sha256", _rows_digest(manifest)) != _rows_digest(manifest):
                raise ValueError("its entries were changed: they do not give its rows_sha256")
        elif open_index is not None:
            manifest = replace(manifest, shards=open_index(manifest, raw))
        else:
            return manifest
        _check_totals(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        raise ValueError(f"{where}: not a usable manifest ({problem}); restore it, or prepare anew") from problem
    return manifest


def _parse(raw: dict, is_listed: bool) -> Manifest:
    return Manifest(
        split=_typed(raw, "split", str),
        dtype=_typed(raw, "dtype", str),
        chunk_tokens=whole(raw, "chunk_tokens", least=1),
        num_tokens=whole(raw, "num_tokens"),
        num_documents=whole(raw, "num_documents"),
        num_text_bytes=whole(raw, "num_text_bytes"),
        tokenizer=_identity(_typed(raw, "tokenizer", dict)),
        shards=ShardList.of([shard_from_json(e) for e in _typed(raw, "shards", list)]) if is_listed else (),
        preparation=_typed(raw, "preparation", dict),
        num_targets=whole(raw, "num_targets") if raw["version"] == 3 else None,
    )


def _typed(raw: dict, key: str, kind: type):
    if not isinstance(raw[key], kind):
        raise ValueError(f"{key} is {type(raw[key]).__name__}, not {kind.__name__}")
    return raw[key]


def whole(raw: dict, key: str, least: int = 0) -> int:
    """A whole number of an entry (ValueError)."""
    value = raw[key]
    if type(value) is not int or not least <= value < _LARGEST_COUNT:
        raise ValueError(f"{key} is {str(value)[:40]}, not a whole number from {least}")
    return value


def _identity(raw: dict) -> TokenizerIdentity:
    ids = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    size = whole(raw, "vocab_size", least=1)
    found = {key: whole(raw, key) for key in ids}
    for key, value in found.items():
        if value >= size:
            raise ValueError(f"{key} is {value}, the vocabulary has {size} ids")
    files = tuple(plain_name(name) for name in _typed(raw, "files", list))
    template = _typed(raw, "chat_template", str) if "chat_template" in raw else ""
    return TokenizerIdentity(_typed(raw, "hash", str), size, **found, files=files, chat_template=template)


def _check_totals(manifest: Manifest) -> None:
    """ValueError unless the shards are different ones and their counts add up."""
    shards = manifest.shards
    assert isinstance(shards, ShardList)
    if len(np.unique(shards.names)) != len(shards):
        raise ValueError("a shard is listed twice")
    for key in ("num_tokens", "num_documents"):
        total = int(getattr(shards, key).sum())
        if total != getattr(manifest, key):
            raise ValueError(f"{key} is {getattr(manifest, key)}, its shards have {total}")


def shard_from_json(entry: dict) -> Shard:
    """One entry of a manifest (ValueError, KeyError, TypeError when it is malformed)."""
    return Shard(
        name=plain_name(entry["name"]),
        size=whole(entry, "size", least=1),
        sha256=sha256_of(entry, "sha256"),
        num_tokens=whole(entry, "num_tokens", least=1),
        num_documents=whole(entry, "num_documents"),
        token_members=_members(entry["token_members"]),
        document_members=_members(entry["document_members"]),
    )


def sha256_of(entry: dict, key: str) -> str:
    """A SHA-256 in hexadecimal digits (ValueError)."""
    text = _typed(entry, key, str)
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"{key} is {text[:70]!r}")
    return text


def _members(entries: list) -> np.ndarray:
    members = np.array(entries)
    if members.dtype.kind != "i" or members.ndim != 2 or members.shape[1] != 3:
        raise ValueError("members are not triples of whole numbers: offset, size, checksum")
    return members.astype(np.int64)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file so that it is either absent, the old one, or complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


class _HashingFile(io.RawIOBase):
    """A write-only file that hashes what passes through."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def finish(self) -> None:
        """Make the content durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without any promise."""
        self._file.close()


def write_shard(
    folder: Path,
    name: str,
    tokens: np.ndarray,
    document_starts: np.ndarray,
    dtype: str,
    chunk_tokens: int,
    is_target: np.ndarray | None = None,
) -> Shard:
    """Write one shard atomically and return its manifest entry.

    Args:
        folder: where the tar goes; an older file of that name is replaced.
        name: file name of the shard.
        tokens: ids (n,), n >= 1.
        document_starts: sorted places in `tokens` where a document begins.
        dtype: what the ids are stored as; ValueError if one does not fit.
        chunk_tokens: tokens per member.
        is_target: bool (n,), which tokens are targets; None: all of them, and nothing is written about it.
    """
    if int(tokens.max()) > np.iinfo(dtype).max:
        raise ValueError(f"token id {int(tokens.max())} does not fit {dtype}; the tokenizer's vocab_size is too small")
    tokens = tokens.astype(np.dtype(dtype).newbyteorder("<"))
    temporary = folder / f".{name}.tmp"
    file = _HashingFile(temporary)
    token_members, document_members, target_members = [], [], []
    target_runs = None if is_target is None else runs_of(is_target)
    try:
        with tarfile.open(mode="w|", fileobj=file, format=tarfile.USTAR_FORMAT, bufsize=1 << 20) as tar:
            for chunk, start in enumerate(range(0, len(tokens), chunk_tokens)):
                stop = min(start + chunk_tokens, len(tokens))
                low, high = np.searchsorted(document_starts, [start, stop])
                starts = (document_starts[low:high] - start).astype("<u4")
                token_members.append(_add_member(tar, f"{chunk:08d}.tokens.npy", npy_bytes(tokens[start:stop])))
                document_members.append(_add_member(tar, f"{chunk:08d}.documents.npy", npy_bytes(starts)))
                if target_runs is not None:
                    runs = runs_member(target_runs, start, stop)
                    target_members.append(_add_member(tar, f"{chunk:08d}.targets.npy", runs))
        file.finish()
    except BaseException:
        file.abandon()
        temporary.unlink(missing_ok=True)
        raise
    temporary.rename(folder / name)
    return Shard(
        name=name,
        size=file.size,
        sha256=file.digest.hexdigest(),
        num_tokens=len(tokens),
        num_documents=len(document_starts),
        token_members=_members(token_members),
        document_members=_members(document_members),
        block_crc32=block_checksums(tokens, chunk_tokens),
        document_starts=np.asarray(document_starts, np.int64),
        target_members=None if target_runs is None else _members(target_members),
        target_runs=target_runs,
    )


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int, int]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))
    padded = -(-len(data) // TAR_BLOCK) * TAR_BLOCK
    return tar.offset - padded, len(data), zlib.crc32(data)
