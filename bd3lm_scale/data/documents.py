"""Documents out of files: what a corpus looks like before tokenisation.

    paths -> input files -> records (raw, cheap to cut) -> texts (decoded where the tokenisation runs)

A record is a whole document, or a piece of one where a text file is too long to hold in memory. Reading gives
records in one fixed order; `start` skips to a place in it.
"""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PIECE_BYTES = 1 << 20
_SUFFIXES = (".txt", ".text", ".jsonl", ".json", ".ndjson", ".parquet")
_COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Options:
    """How files become documents.

    Attributes:
        field: name of the text in JSON objects and table columns.
        document: "file", "line" or "paragraph" (blank line between): what a document is in .txt files.
        keep_newlines: keep the line's own newline with document="line".
    """

    field: str = "text"
    document: str = "file"
    keep_newlines: bool = False


@dataclass(frozen=True)
class Record:
    """One document or piece of one; `data` is text as bytes, or a JSON object as bytes when `is_json`."""

    data: bytes
    is_json: bool = False
    starts_document: bool = True
    ends_document: bool = True


def find_inputs(paths: list[str]) -> list[str]:
    """The files that `paths` name, folders expanded in sorted order (ValueError when there are none)."""
    found: list[str] = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"input {name}: does not exist")
        if path.is_dir():
            inside = [str(p) for p in sorted(path.rglob("*")) if p.is_file() and _kind(p.name)]
            if not inside:
                raise ValueError(f"input {name}: no file inside ends in {', '.join(_SUFFIXES)} (or .gz, .zst)")
            found += inside
        elif _kind(path.name):
            found.append(name)
        else:
            raise ValueError(f"input {name}: unknown kind; it must end in {', '.join(_SUFFIXES)} (or .gz, .zst)")
    return found


def _kind(name: str) -> str | None:
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)


def read_records(path: str, options: Options) -> Iterator[Record]:
    """Records of one file in order."""
    kind = _kind(path)
    if kind in (".jsonl", ".json", ".ndjson"):
        with _open(path) as file:
            for line in file:
                if line.strip():
                    yield Record(line, is_json=True)
    else:
        with _open(path) as file:
            yield from _text_records(file, options)


def record_text(record: Record, options: Options, where: str) -> str:
    """The text of a record; invalid UTF-8 is replaced. ValueError naming `where` for malformed JSON."""
    if not record.is_json:
        return record.data.decode("utf-8", "replace")
    try:
        text = json.loads(record.data)[options.field]
    except ValueError as problem:
        raise ValueError(f"{where}: not a JSON object ({problem})") from problem
    except (KeyError, TypeError) as problem:
        raise ValueError(f"{where}: no field {options.field!r}; name the text's field with --field") from problem
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {options.field!r} is not text but {type(text).__name__}")
    # lone surrogates are legal in JSON and in nothing else
    return text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text


def _open(path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True))
    return open(path, "rb")


def _text_records(file: IO[bytes], options: Options) -> Iterator[Record]:
    if options.document == "line":
        for line in file:
            yield Record(line if options.keep_newlines else line.rstrip(b"\r\n"))
        return
    if options.document == "paragraph":
        yield from _paragraphs(file)
        return
    piece = _piece(file)
    is_first = True
    while True:
        following = _piece(file)
        yield Record(piece, starts_document=is_first, ends_document=not following)
        if not following:
            return
        piece, is_first = following, False


def _piece(file: IO[bytes]) -> bytes:
    """About a megabyte, ending at a line's end."""
    data = file.read(_PIECE_BYTES)
    return data + file.readline() if data else b""


def _paragraphs(file: IO[bytes]) -> Iterator[Record]:
    lines: list[bytes] = []
    for line in file:
        if line.strip():
            lines.append(line)
        elif lines:
            yield Record(b"".join(lines))
            lines = []
    if lines:
        yield Record(b"".join(lines))
