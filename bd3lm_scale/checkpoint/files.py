"""Files of a checkpoint: safetensors written as a stream with its SHA-256, and durable folder operations.

A safetensors file is an 8-byte little-endian header length, a JSON header and the raw data; any safetensors reader
opens ours. They are written here by hand because the data is hashed and written in one pass, in bounded memory.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bd3lm_scale.checkpoint.boxes import Box
from bd3lm_scale.runtime import faults

CHUNK_BYTES = 16 * 1024 * 1024
ITEM_BYTES = 4
DATA_FILE = re.compile(r"[A-Za-z0-9_-]+\.safetensors")


@dataclass(frozen=True)
class StoredBox:
    """A box of one tensor and where its float32 data begins in its file (bytes)."""

    kind: str
    name: str
    global_shape: tuple[int, ...]
    box: Box
    position: int = 0

    def to_json(self) -> list[Any]:
        """What the manifest holds about it."""
        return [self.kind, self.name, list(self.box.offset), list(self.box.shape), self.position]


@dataclass(frozen=True)
class DataFile:
    """One written file: what the manifest says about it."""

    name: str
    size_bytes: int
    sha256: str
    boxes: tuple[StoredBox, ...]


def write_data_file(path: Path, boxes: list[StoredBox], runs: Iterable[np.ndarray]) -> DataFile:
    """Write boxes as one safetensors file and fsync it.

    Args:
        path: the file to create.
        boxes: what the data is, in order.
        runs: 1-D float32 arrays whose concatenation is the concatenation of the boxes' elements.

    Raises:
        OSError: what the disk says.
        ValueError: the runs do not have the boxes' number of elements.
    """
    header, placed = _header(boxes)
    expected = len(header) + ITEM_BYTES * sum(b.box.volume for b in boxes)
    digest, written = hashlib.sha256(header), len(header)
    with open(path, "xb", buffering=0) as file:
        _write_all(file, memoryview(header))
        for run in runs:
            data = np.ascontiguousarray(run, dtype="<f4").data.cast("B") if run.size else memoryview(b"")
            for begin in range(0, len(data), CHUNK_BYTES):
                chunk = data[begin : begin + CHUNK_BYTES]
                _write_all(file, chunk)
                digest.update(chunk)
                written += len(chunk)
            faults.point("save:run_written")
        if written != expected:
            raise ValueError(f"{path.name}: {written} bytes of data for boxes of {expected}")
        os.fsync(file.fileno())
    return DataFile(path.name, written, digest.hexdigest(), tuple(placed))


def _write_all(file: Any, data: memoryview) -> None:
    """A raw write may be short (quota, limits); the rest is tried again so that the real error appears."""
    while data:
        data = data[file.write(data) :]


def _header(boxes: list[StoredBox]) -> tuple[bytes, list[StoredBox]]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for stored in boxes:
        end = begin + ITEM_BYTES * stored.box.volume
        key = f"{stored.kind}/{stored.name}@{','.join(map(str, stored.box.offset))}"
        entries[key] = {"dtype": "F32", "shape": list(stored.box.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    placed, position = [], len(header)
    for stored in boxes:
        placed.append(StoredBox(stored.kind, stored.name, stored.global_shape, stored.box, position))
        position += ITEM_BYTES * stored.box.volume
    return header, placed


def file_problem(
    path: Path, size_bytes: int, sha256: str | None, progress: Callable[[int], object] | None = None
) -> str | None:
    """Why the file is not what the manifest says (None: it is).

    Args:
        path: the file.
        size_bytes: its size in the manifest.
        sha256: its checksum there; None compares only the size.
        progress: called with the number of bytes read since the last call.
    """
    try:
        size = path.stat().st_size
        if size != size_bytes:
            return f"{path.name} has {size:,} bytes, the manifest says {size_bytes:,}"
        found = sha256 if sha256 is None else _hash(path, progress)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return None if found == sha256 else f"{path.name} does not have the SHA-256 of the manifest"


def _hash(path: Path, progress: Callable[[int], object] | None) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Create a text file and fsync it."""
    with open(path, "xb", buffering=0) as file:
        _write_all(file, memoryview(text.encode()))
        os.fsync(file.fileno())
