"""Compressed files as plain ones: .gz, .bz2, .xz, .zst, each a run of frames, and cut off unless the last one ends."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from bd3lm_scale.data.storage import BlockFile

_READ_BYTES = 1 << 14
_BUFFER_BYTES = 1 << 16
_GZIP = 16 + zlib.MAX_WBITS
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` writes; a file needs no more than it asks for
SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_SHORT = {".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}


class DamagedFileError(ValueError):
    """A file that is not what its kind is, or ends too early."""


def decompressed(path: str, raw: io.RawIOBase | io.BytesIO) -> "io.BufferedReader[Any]":
    """The content of a file, decompressed if its name says that it is compressed. DamagedFileError while reading."""
    buffered = io.BufferedReader(raw, _BUFFER_BYTES)
    new_frame = _decompressor(path)
    return io.BufferedReader(BlockFile(_content(buffered, new_frame)), _BUFFER_BYTES) if new_frame else buffered


def open_local(path: str) -> io.BufferedReader:
    """The content of a local file. DamagedFileError while reading."""
    return decompressed(path, io.FileIO(path))


def is_compressed(path: str) -> bool:
    """Whether the name says so."""
    return _suffix(path) in SUFFIXES


def _suffix(path: str) -> str:
    end = "." + path.rpartition(".")[2].lower()
    return _SHORT.get(end, end)


def _decompressor(path: str) -> Callable[[], Any] | None:
    import zstandard

    return {
        ".gz": lambda: zlib.decompressobj(_GZIP),
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lzma.LZMADecompressor,
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj(),
    }.get(_suffix(path))


def _content(file: io.BufferedIOBase, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """Frame after frame. The libraries' own readers pass over a damaged second frame, or one that never ends."""
    import zstandard

    frame, ended = new_frame(), False
    with file:
        while compressed := file.read(_READ_BYTES):
            while compressed:
                if ended:
                    compressed = compressed.lstrip(b"\0")  # padding between frames
                    if not compressed:
                        break
                    frame, ended = new_frame(), False
                try:
                    block = frame.decompress(compressed)
                except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError) as problem:
                    raise DamagedFileError(f"damaged or cut off ({problem})") from problem
                ended = frame.eof
                compressed = frame.unused_data if ended else b""
                if block:
                    yield block
    if not ended:
        raise DamagedFileError("damaged or cut off (its compressed data does not end)")
