"""Shards: ordinary webdataset tars of packed token chunks, and the manifest that makes them seekable.

    train/manifest.json        counts, dtype, tokenizer identity, SHA-256 and member index of every shard
    train/train-000000.tar     00000000.tokens.npy, 00000000.documents.npy, 00000001.tokens.npy, ...

A shard is one run of tokens cut into chunks of `chunk_tokens` (only its last chunk may be shorter), so token n
lies in chunk n // chunk_tokens: rows of any length are cut at load time without reading anything else.
`documents` holds the places in the chunk where a document begins. The bytes depend on the tokens alone.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORMAT = "bd3lm_scale.shards"
VERSION = 1
MANIFEST = "manifest.json"
_TAR_BLOCK = 512
_NPY_HEADER = 128
_LARGEST_COUNT = 1 << 62


@dataclass(frozen=True)
class TokenizerIdentity:
    """What the shards know about the tokenizer that made them."""

    hash: str
    vocab_size: int
    mask_token_id: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    files: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Shard:
    """One tar.

    Attributes:
        token_members, document_members: int64 (chunks, 3): offset of the data, size, crc32.
    """

    name: str
    size: int
    sha256: str
    num_tokens: int
    num_documents: int
    token_members: np.ndarray
    document_members: np.ndarray

    def to_json(self) -> dict:
        """The shard's entry in a manifest."""
        members = {key: getattr(self, key).tolist() for key in ("token_members", "document_members")}
        return {**vars(self), **members}


@dataclass(frozen=True)
class Manifest:
    """One split: its shards in order, and everything needed to read them."""

    split: str
    dtype: str
    chunk_tokens: int
    num_tokens: int
    num_documents: int
    num_text_bytes: int
    tokenizer: TokenizerIdentity
    shards: tuple[Shard, ...]
    preparation: dict


def token_dtype(vocab_size: int) -> str:
    """Smallest unsigned dtype that holds ids below `vocab_size`."""
    return next(name for name in ("uint8", "uint16", "uint32") if vocab_size <= np.iinfo(name).max + 1)


def manifest_to_json(manifest: Manifest) -> str:
    """The manifest as it is stored: stable key order, one shard per line."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "split": manifest.split,
        "dtype": manifest.dtype,
        "chunk_tokens": manifest.chunk_tokens,
        "num_tokens": manifest.num_tokens,
        "num_documents": manifest.num_documents,
        "num_text_bytes": manifest.num_text_bytes,
        "rows_sha256": _rows_digest(manifest),
        "tokenizer": vars(manifest.tokenizer),
        "preparation": manifest.preparation,
    }
    lines = ",\n".join(json.dumps(shard.to_json(), separators=(",", ":")) for shard in manifest.shards)
    return json.dumps(head, indent=1)[:-2] + ',\n "shards": [\n' + lines + "\n]\n}\n"


def _rows_digest(manifest: Manifest) -> str:
    """Hash of all that decides which tokens a row has, and of the counts: a changed manifest gives no other rows."""
    counts = [manifest.chunk_tokens, manifest.num_tokens, manifest.num_documents, manifest.num_text_bytes]
    digest = hashlib.sha256(json.dumps([manifest.split, manifest.dtype, counts]).encode())
    for shard in manifest.shards:
        digest.update(json.dumps([shard.name, shard.size, shard.sha256, shard.num_tokens]).encode())
        digest.update(shard.token_members.astype("<i8").tobytes() + shard.document_members.astype("<i8").tobytes())
    return digest.hexdigest()


def data_digest(manifests: Iterable[Manifest]) -> str:
    """Hash of the shards themselves, wherever they lie and whatever they are called."""
    shards = [[[shard.sha256, shard.num_tokens] for shard in manifest.shards] for manifest in manifests]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def manifest_from_json(text: str, where: str) -> Manifest:
    """Parse and check a manifest; `where` names it in errors (ValueError)."""
    try:
        raw = json.loads(text)
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise ValueError(f"format {raw['format']} version {raw['version']}, expected {FORMAT} version {VERSION}")
        manifest = _parse(raw)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
        reason = f"no {problem}" if isinstance(problem, KeyError) else problem
        raise ValueError(f"{where}: not a usable manifest ({reason}); run tools/prepare_data.py again") from problem
    if manifest.dtype != token_dtype(manifest.tokenizer.vocab_size):
        raise ValueError(
            f"{where}: dtype {manifest.dtype} does not fit a vocabulary of {manifest.tokenizer.vocab_size}; "
            "run tools/prepare_data.py again"
        )
    try:
        _check_layout(manifest)
        # manifests of earlier versions have no such hash
        if raw.get("rows_sha256", _rows_digest(manifest)) != _rows_digest(manifest):
            raise ValueError("its entries were changed: they do not give its rows_sha256")
    except ValueError as problem:
        raise ValueError(f"{where}: not a usable manifest ({problem}); restore it, or prepare anew") from problem
    return manifest


def _parse(raw: dict) -> Manifest:
    return Manifest(
        split=_typed(raw, "split", str),
        dtype=_typed(raw, "dtype", str),
        chunk_tokens=_count(raw, "chunk_tokens", least=1),
        num_tokens=_count(raw, "num_tokens"),
        num_documents=_count(raw, "num_documents"),
        num_text_bytes=_count(raw, "num_text_bytes"),
        tokenizer=_identity(_typed(raw, "tokenizer", dict)),
        shards=tuple(shard_from_json(entry) for entry in _typed(raw, "shards", list)),
        preparation=_typed(raw, "preparation", dict),
    )


def _typed(raw: dict, key: str, kind: type):
    if not isinstance(raw[key], kind):
        raise ValueError(f"{key} is {type(raw[key]).__name__}, not {kind.__name__}")
    return raw[key]


def _count(raw: dict, key: str, least: int = 0) -> int:
    value = raw[key]
    if type(value) is not int or not least <= value < _LARGEST_COUNT:
        raise ValueError(f"{key} is {str(value)[:40]}, not a whole number from {least}")
    return value


def _identity(raw: dict) -> TokenizerIdentity:
    ids = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    size = _count(raw, "vocab_size", least=1)
    found = {key: _count(raw, key) for key in ids}
    for key, value in found.items():
        if value >= size:
            raise ValueError(f"{key} is {value}, the vocabulary has {size} ids")
    files = tuple(_plain_name(name) for name in _typed(raw, "files", list))
    return TokenizerIdentity(hash=_typed(raw, "hash", str), vocab_size=size, files=files, **found)


def _check_layout(manifest: Manifest) -> None:
    """ValueError unless every shard is laid out as `write_shard` does, and the counts add up."""
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in manifest.shards:
        tokens, documents = shard.token_members, shard.document_members
        chunks = -(-shard.num_tokens // manifest.chunk_tokens)
        if len(tokens) != chunks or len(documents) != chunks:
            raise ValueError(f"{shard.name} has {len(tokens)} members for {chunks} chunks of tokens")
        lengths = np.full(chunks, manifest.chunk_tokens)
        lengths[-1] = shard.num_tokens - (chunks - 1) * manifest.chunk_tokens
        members = np.stack([tokens, documents], axis=1).reshape(-1, 3)
        in_range = (members >= 0).all() and (members[:, :2] <= shard.size).all() and (members[:, 2] < 1 << 32).all()
        padded = -(-members[:, 1] // _TAR_BLOCK) * _TAR_BLOCK
        offsets = _TAR_BLOCK + np.concatenate([[0], np.cumsum(padded[:-1] + _TAR_BLOCK)])
        fits = (tokens[:, 1] == lengths * itemsize + _NPY_HEADER).all() and (members[:, 0] == offsets).all()
        if not (in_range and fits and offsets[-1] + padded[-1] <= shard.size):
            raise ValueError(f"the members of {shard.name} do not lie where its tokens are")
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) != len(names):
        raise ValueError("a shard is listed twice")
    for key in ("num_tokens", "num_documents"):
        total = sum(getattr(shard, key) for shard in manifest.shards)
        if total != getattr(manifest, key):
            raise ValueError(f"{key} is {getattr(manifest, key)}, its shards have {total}")


def shard_from_json(entry: dict) -> Shard:
    """One entry of a manifest (ValueError, KeyError, TypeError when it is malformed)."""
    sha256 = _typed(entry, "sha256", str)
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256 is {sha256[:70]!r}")
    return Shard(
        name=_plain_name(entry["name"]),
        size=_count(entry, "size", least=1),
        sha256=sha256,
        num_tokens=_count(entry, "num_tokens", least=1),
        num_documents=_count(entry, "num_documents"),
        token_members=_members(entry["token_members"]),
        document_members=_members(entry["document_members"]),
    )


def _plain_name(name: str) -> str:
    """The name, unless it could lead out of its folder (ValueError)."""
    if not isinstance(name, str) or not name or name != Path(name).name or name.startswith(".") or "\0" in name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


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


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def write_shard(
    folder: Path, name: str, tokens: np.ndarray, document_starts: np.ndarray, dtype: str, chunk_tokens: int
) -> Shard:
    """Write one shard atomically and return its manifest entry.

    Args:
        folder: where the tar goes; an older file of that name is replaced.
        name: file name of the shard.
        tokens: ids (n,), n >= 1.
        document_starts: sorted places in `tokens` where a document begins.
        dtype: what the ids are stored as; ValueError if one does not fit.
        chunk_tokens: tokens per member.
    """
    if int(tokens.max()) > np.iinfo(dtype).max:
        raise ValueError(f"token id {int(tokens.max())} does not fit {dtype}; the tokenizer's vocab_size is too small")
    tokens = tokens.astype(np.dtype(dtype).newbyteorder("<"))
    temporary = folder / f".{name}.tmp"
    file = _HashingFile(temporary)
    token_members, document_members = [], []
    try:
        with tarfile.open(mode="w|", fileobj=file, format=tarfile.USTAR_FORMAT, bufsize=1 << 20) as tar:
            for chunk, start in enumerate(range(0, len(tokens), chunk_tokens)):
                stop = min(start + chunk_tokens, len(tokens))
                low, high = np.searchsorted(document_starts, [start, stop])
                starts = (document_starts[low:high] - start).astype("<u4")
                token_members.append(_add_member(tar, f"{chunk:08d}.tokens.npy", _npy(tokens[start:stop])))
                document_members.append(_add_member(tar, f"{chunk:08d}.documents.npy", _npy(starts)))
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
    )


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int, int]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))
    padded = -(-len(data) // _TAR_BLOCK) * _TAR_BLOCK
    return tar.offset - padded, len(data), zlib.crc32(data)
