"""The index of a split: what is known of each shard, in one file that is mapped into memory and not parsed.

    index.bin    [arrays of shard 0][arrays of shard 1]...[table]
    arrays       a safetensors blob: token_members, document_members, block_crc32, document_starts; and in shards of
                 conversations (version 3) target_members, target_runs
    table        one fixed-size record per shard (RECORD), the SHA-256 of its arrays among them

manifest.json holds a digest of its counts, of where the table lies, and of the table. So the table is verified when the
index is opened, and a shard's arrays when the shard is: memory and time do not grow with what is in them. A manifest of
version 1 is turned into such a file once per node (`convert`), with the head of the manifest behind the table.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from bd3lm_scale.data.http import DamagedError
from bd3lm_scale.data.shard_list import BLOCK_BYTES, Shard, ShardEntry, ShardList, check_shard
from bd3lm_scale.data.shards import MANIFEST, Manifest, counts_of, head_to_json, manifest_from_json, whole, write_file

INDEX = "index.bin"
_PART = ".index.part"
_ARRAYS = ("token_members", "document_members", "block_crc32", "document_starts", "target_members", "target_runs")
_TAIL_BYTES = 32 + 8  # a SHA-256 and a length


def _record(name_bytes: int) -> np.dtype:
    return np.dtype(
        [
            ("name", f"S{name_bytes}"),
            ("size", "<i8"),
            ("sha256", "u1", 32),
            ("num_tokens", "<i8"),
            ("num_documents", "<i8"),
            ("arrays_start", "<i8"),
            ("arrays_size", "<i8"),
            ("arrays_sha256", "u1", 32),
        ]
    )


class IndexWriter:
    """Writes index.bin shard by shard; what has been appended survives the process.

    Args:
        folder: of the split; made with the first shard.
        kept: records that `append` returned in an earlier process; what was appended after them is dropped.

    Attributes:
        num_tokens: tokens of all shards so far.
    """

    def __init__(self, folder: Path, kept: Iterable[dict] = ()):
        self._folder = folder
        self._records = list(kept)
        self.num_tokens = sum(record["num_tokens"] for record in self._records)
        if self._records:
            if not (folder / _PART).exists():  # the process died between the index and the manifest
                (folder / INDEX).rename(folder / _PART)
            end = _end(self._records)
            if (folder / _PART).stat().st_size < end:
                raise ValueError(f"{folder / _PART}: shorter than progress.jsonl says; remove {folder.parent}")
            os.truncate(folder / _PART, end)

    @property
    def num_shards(self) -> int:
        """Shards so far."""
        return len(self._records)

    def append(self, shard: Shard) -> dict:
        """Write a shard's arrays, durably; its record, fit for JSON."""
        content, record = _entry(shard, _end(self._records))
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / _PART).open("ab" if self._records else "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if shard.target_runs is not None:
            record["num_targets"] = int(np.diff(shard.target_runs).sum())
        self._records.append(record)
        self.num_tokens += shard.num_tokens
        return record

    def finish(self, manifest: Manifest) -> Manifest:
        """Complete index.bin and write manifest.json beside it.

        Args:
            manifest: its counts of tokens and documents and its shards are taken from here.

        Returns:
            What `open_split` gives.
        """
        totals = {key: sum(record[key] for record in self._records) for key in ("num_tokens", "num_documents")}
        if self._records and "num_targets" in self._records[0]:
            totals["num_targets"] = sum(record["num_targets"] for record in self._records)
        manifest = replace(manifest, shards=(), **totals)
        table = _table(self._records)
        with (self._folder / _PART).open("ab") as file:
            file.write(table.tobytes())
            file.flush()
            os.fsync(file.fileno())
        (self._folder / _PART).rename(self._folder / INDEX)
        write_file(self._folder / MANIFEST, json.dumps(_head(manifest, table), indent=1) + "\n")
        return open_split(self._folder)


def _entry(shard: Shard, start: int) -> tuple[bytes, dict]:
    """A shard's arrays as they stand in the index from byte `start` on, and its record."""
    arrays = {key: getattr(shard, key) for key in _ARRAYS if getattr(shard, key) is not None}
    content = save({key: np.ascontiguousarray(array) for key, array in arrays.items()})
    record = {field.name: getattr(shard, field.name) for field in fields(ShardEntry)}
    digest = hashlib.sha256(content).hexdigest()
    return content, {**record, "arrays_start": start, "arrays_size": len(content), "arrays_sha256": digest}


def _end(records: list[dict]) -> int:
    return records[-1]["arrays_start"] + records[-1]["arrays_size"] if records else 0


def _table(records: list[dict]) -> np.ndarray:
    names = [record["name"].encode() for record in records]
    table = np.zeros(len(records), _record(max(map(len, names), default=1)))
    table["name"] = names
    for key in ("size", "num_tokens", "num_documents", "arrays_start", "arrays_size"):
        table[key] = [record[key] for record in records]
    for key in ("sha256", "arrays_sha256"):
        digests = b"".join(bytes.fromhex(record[key]) for record in records)
        table[key] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    return table


def _head(manifest: Manifest, table: np.ndarray) -> dict:
    """A manifest of version 2, or of version 3 where only some tokens are targets."""
    start = int((table["arrays_start"] + table["arrays_size"]).max(initial=0))
    place = {
        "file": INDEX,
        "size": start + table.nbytes,
        "table_start": start,
        "num_shards": len(table),
        "name_bytes": table.dtype["name"].itemsize,
        "block_bytes": BLOCK_BYTES,
    }
    head = head_to_json(manifest, 2 if manifest.num_targets is None else 3, _digest(manifest, place, table))
    return {**head, "index": place}


def _digest(manifest: Manifest, place: dict, table: np.ndarray) -> str:
    return hashlib.sha256(json.dumps([counts_of(manifest), place]).encode() + b"\n" + table.tobytes()).hexdigest()


def open_split(folder: Path) -> Manifest:
    """The manifest in a local folder of shards, with its shards (ValueError, OSError)."""
    text = (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")
    return manifest_from_json(
        text, str(folder / MANIFEST), lambda manifest, raw: open_index(folder / INDEX, manifest, raw)
    )


def open_index(path: Path, manifest: Manifest, raw: dict) -> ShardList:
    """The shards of a manifest of version 2.

    Args:
        path: the index, which may hold more behind its table.
        manifest: without its shards.
        raw: the same as JSON.

    Raises:
        ValueError: it is not the index that the manifest means.
        OSError: it cannot be read.
    """
    place = raw["index"]
    try:
        start, count = whole(place, "table_start"), whole(place, "num_shards")
        width, block_bytes = whole(place, "name_bytes", least=1), whole(place, "block_bytes", least=1)
    except (KeyError, TypeError) as problem:
        raise ValueError(f"its entry index has no usable {problem}") from problem
    file = _OpenFile(path)
    record = _record(min(width, 1 << 10))
    if os.fstat(file.descriptor).st_size < start + count * record.itemsize:
        raise ValueError(f"{path.name} is cut off")
    table = file.mapped(record, start, count)
    if _digest(manifest, place, table) != raw.get("rows_sha256"):
        raise ValueError(f"{path.name} is damaged, or of another preparation: it does not give rows_sha256")
    if block_bytes != BLOCK_BYTES:
        raise ValueError(f"block_bytes is {block_bytes}, this version reads {BLOCK_BYTES}")
    begins, sizes = table["arrays_start"], table["arrays_size"]
    if (begins < 0).any() or (sizes < 0).any() or (begins > start).any() or (begins + sizes > start).any():
        raise ValueError(f"{path.name}: arrays lie outside of it")
    names, size, sha256 = table["name"], table["size"], table["sha256"]
    loader = _loader(file, path, table, manifest)
    return ShardList(names, size, sha256, table["num_tokens"], table["num_documents"], loader)


class _OpenFile:
    """A file that stays open, although another process may remove its name, until nobody has this object."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def mapped(self, record: np.dtype, start: int, count: int) -> np.ndarray:
        """Records (count,) from byte `start` on, in memory that all processes share."""
        if not count:
            return np.zeros(0, record)
        with os.fdopen(os.dup(self.descriptor), "rb", buffering=0) as file:
            return np.memmap(file, record, "r", start, (count,))


def _loader(file: _OpenFile, path: Path, table: np.ndarray, manifest: Manifest) -> Callable[[int, ShardEntry], Shard]:
    """Reads a shard's arrays with positioned reads: pages of a mapping would stay in this process's memory."""

    def load_shard(number: int, entry: ShardEntry) -> Shard:
        record = table[number]
        content = os.pread(file.descriptor, int(record["arrays_size"]), int(record["arrays_start"]))
        if hashlib.sha256(content).digest() != record["arrays_sha256"].tobytes():
            raise DamagedError(f"its entry in {path} is damaged; restore that file")
        try:
            arrays = load(content)
            members = arrays["token_members"], arrays["document_members"]
            more = [arrays.get(key) for key in _ARRAYS[2:]]
            if {array is not None for array in more[2:]} != {manifest.num_targets is not None}:
                raise ValueError("it says which tokens are targets, unlike its manifest, or does not")
            counts = entry.num_tokens, entry.num_documents
            shard = Shard(entry.name, entry.size, entry.sha256, *counts, *members, *more)
            check_shard(shard, manifest.dtype, manifest.chunk_tokens)
        except (SafetensorError, KeyError, TypeError, ValueError) as problem:
            raise DamagedError(f"its entry in {path} cannot be used ({problem}); prepare anew") from problem
        return shard

    return load_shard


def convert(manifest: Manifest, source_digest: str, path: Path) -> None:
    """Write a manifest of version 1 as an index with the head behind it.

    Args:
        manifest: with its shards.
        source_digest: SHA-256 of the file it came from.
        path: what to write.
    """
    records: list[dict] = []
    with path.open("wb") as file:
        for shard in manifest.shards:
            content, record = _entry(shard, _end(records))
            file.write(content)
            records.append(record)
        table = _table(records)
        file.write(table.tobytes())
        head = json.dumps(_head(replace(manifest, shards=(), preparation={}), table)).encode()
        file.write(head + _tail(head, source_digest))


def open_converted(path: Path, source_digest: str, where: str) -> Manifest:
    """What `convert` wrote (DamagedError unless it is from this very file, whole)."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        tail = os.pread(file.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        length = int.from_bytes(tail[32:], "little")
        head = os.pread(file.fileno(), min(length, size), max(0, size - _TAIL_BYTES - length))
    if tail != _tail(head, source_digest):
        raise DamagedError(f"{path}: damaged")
    try:
        return manifest_from_json(head.decode(), where, lambda manifest, raw: open_index(path, manifest, raw))
    except ValueError as problem:
        raise DamagedError(f"{path}: {problem}") from problem


def _tail(head: bytes, source_digest: str) -> bytes:
    return hashlib.sha256(source_digest.encode() + head).digest() + len(head).to_bytes(8, "little")
