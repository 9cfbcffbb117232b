"""Documents out of files: what a corpus looks like before tokenization.

    paths -> input files -> records (raw, cheap to cut) -> texts (decoded where the tokenization runs)

    .txt  .jsonl  (.gz .zst)      .parquet      folders of datasets.save_to_disk      webdataset tars (.txt .json)

A record is a whole document, or a piece of one where a text file is too long to hold in memory. Files may be
remote (URL or pipe: command). Reading gives records in one fixed order.
"""

import gzip
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bd3lm_scale.data.storage import BlockFile, is_remote, open_sequential

_PIECE_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 16
_TABLE_ROWS = 1000
_TIMEOUT_SECONDS = 60.0
_JSON = (".jsonl", ".json", ".ndjson")
_TEXT = (".txt", ".text")
_TABLES = (".parquet", ".arrow")
_TARS = (".tar", ".tgz")
_KINDS = (*_TEXT, *_JSON, *_TABLES, *_TARS)
FORMATS = ("txt", "jsonl", "parquet", "arrow", "tar")
_COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Options:
    """How files become documents.

    Attributes:
        field: name of the text in JSON objects and table columns.
        document: "file", "line" or "paragraph" (blank line between): what a document is in .txt files.
        keep_newlines: keep the line's own newline with document="line".
        format: one of FORMATS, whatever the files are called; default: by their names.
    """

    field: str = "text"
    document: str = "file"
    keep_newlines: bool = False
    format: str | None = None

    def kind(self, name: str) -> str | None:
        """The suffix that stands for a file's format; None for a name that says nothing."""
        return f".{self.format}" if self.format else _kind(name)


BY_NAME = Options()
"""What a file is follows from its name, and a .txt file is one document."""


@dataclass(frozen=True)
class Record:
    """One document or piece of one; `data` is text as bytes, or a JSON object as bytes when `is_json`."""

    data: bytes
    is_json: bool = False
    starts_document: bool = True
    ends_document: bool = True


class Meter:
    """How far the reading of a file has come."""

    def __init__(self) -> None:
        self._file: io.RawIOBase | None = None

    def watch(self, file: io.RawIOBase) -> io.RawIOBase:
        """Follow this file from now on."""
        self._file = file
        return file

    @property
    def num_bytes(self) -> int:
        """Bytes of the file (as stored, compressed perhaps) that have been read."""
        return self._file.tell() if self._file is not None and not self._file.closed else 0


def find_inputs(paths: list[str], options: Options = BY_NAME) -> list[str]:
    """The files that `paths` name: folders in sorted order, braces ({0000..0099}), and * in object stores.

    ValueError when a path does not exist or holds nothing readable.
    """
    found: list[str] = []
    for name in [expanded for path in paths for expanded in _expanded(path)]:
        path = Path(name)
        if not (is_remote(name) or path.exists()):
            raise ValueError(f"input {name}: does not exist")
        if path.is_dir():
            found += _folder_files(path, options)
        elif options.kind(name):
            found.append(name)
        else:
            raise ValueError(
                f"input {name}: unknown kind; it must end in {', '.join(_KINDS)} (or .gz, .zst), or --format must say"
            )
    return found


def _expanded(name: str) -> list[str]:
    if "*" in name and is_remote(name) and not name.startswith(("pipe:", "http://", "https://")):
        import fsspec

        files, pattern = fsspec.core.url_to_fs(name)
        return sorted(files.unstrip_protocol(path) for path in files.glob(pattern))
    if Path(name).exists() or "{" not in name:
        return [name]
    import braceexpand

    return list(braceexpand.braceexpand(name))


def _folder_files(folder: Path, options: Options) -> list[str]:
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ValueError(
            f"input {folder}: holds several splits; give one of {', '.join(f'{folder}/{s}' for s in splits)}"
        )
    if (folder / "state.json").exists():
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("_indices_data_files"):
            raise ValueError(
                f"input {folder}: rows are selected by an index; call flatten_indices() before save_to_disk()"
            )
        return [str(folder / Path(entry["filename"]).name) for entry in state["_data_files"]]
    inside = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("."))
    files = [str(p) for p in inside if options.kind(p.name)]
    if not files:
        raise ValueError(f"input {folder}: no file inside ends in {', '.join(_KINDS)} (or .gz, .zst)")
    return files


def _kind(name: str) -> str | None:
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    # `pipe:` commands need not end in the file's name: what they bring is taken for a tar
    return next((kind for kind in _KINDS if name.endswith(kind)), ".tar" if name.startswith("pipe:") else None)


def read_records(
    path: str, options: Options, meter: Meter | None = None, timeout: float = _TIMEOUT_SECONDS
) -> Iterator[Record]:
    """Records of one file in order.

    Args:
        path: from `find_inputs`.
        options: how the file is cut into documents.
        meter: is kept up to date on how far the reading has come.
        timeout: seconds a remote file may stall.

    Raises:
        ValueError: damaged or malformed, naming the file.
        OSError: a remote file that cannot be had.
    """
    kind = options.kind(path)
    try:
        with (meter or Meter()).watch(open_sequential(path, timeout)) as raw:
            if kind in _TABLES:
                yield from _table_records(path, raw, options, is_parquet=kind == ".parquet")
                return
            with _decompressed(path, raw) as file:
                if kind in _TARS:
                    yield from _tar_records(file)
                elif kind in _JSON:
                    yield from (Record(line, is_json=True) for line in file if line.strip())
                else:
                    yield from _text_records(file, options)
    except (EOFError, gzip.BadGzipFile, tarfile.TarError) as problem:
        raise ValueError(f"{path}: damaged or cut off ({problem})") from problem


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
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def count_documents(path: str, options: Options) -> int:
    """How many documents a file holds, from its metadata where it has some."""
    if options.kind(path) == ".parquet" and not is_remote(path):
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    return sum(record.starts_document for record in read_records(path, options))


def _decompressed(path: str, raw: io.RawIOBase) -> io.BufferedIOBase:
    buffered = io.BufferedReader(raw, _BUFFER_BYTES)
    if path.endswith((".gz", ".tgz")):
        return io.BufferedReader(BlockFile(_gunzip(buffered)), _BUFFER_BYTES)
    if path.endswith(".zst"):
        return io.BufferedReader(BlockFile(_unzstd(buffered)), _BUFFER_BYTES)
    return buffered


def _gunzip(file: io.BufferedIOBase) -> Iterator[bytes]:
    with file, gzip.GzipFile(fileobj=file) as opened:
        while block := opened.read(_BUFFER_BYTES):
            yield block


def _unzstd(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Frame after frame; a file that ends inside one is an error, which the library's own reader passes over."""
    import zstandard

    frame, is_inside = zstandard.ZstdDecompressor().decompressobj(), False
    with file:
        while compressed := file.read(_BUFFER_BYTES):
            while compressed:
                try:
                    block = frame.decompress(compressed)
                except zstandard.ZstdError as problem:
                    raise EOFError(str(problem)) from problem
                compressed, is_inside = frame.unused_data, not frame.eof
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                if block:
                    yield block
    if is_inside:
        raise EOFError("the last zstandard frame is not complete")


def _text_records(file: io.BufferedIOBase, options: Options) -> Iterator[Record]:
    if options.document == "line":
        yield from (Record(line if options.keep_newlines else line.rstrip(b"\r\n")) for line in file)
    elif options.document == "paragraph":
        for is_blank, lines in itertools.groupby(file, key=lambda line: not line.strip()):
            if not is_blank:
                yield Record(b"".join(lines))
    else:
        yield from _pieces(file)


def _pieces(file: io.BufferedIOBase) -> Iterator[Record]:
    """A file as one document, in pieces of about a megabyte that end where a line does."""
    is_first, piece = True, file.read(_PIECE_BYTES) + file.readline()
    while True:
        following = file.read(_PIECE_BYTES)
        following += file.readline() if following else b""
        yield Record(piece, starts_document=is_first, ends_document=not following)
        if not following:
            return
        is_first, piece = False, following


def _tar_records(file: io.BufferedIOBase) -> Iterator[Record]:
    """The .txt member of each sample, or its .json member where it has no text. Nothing is ever extracted."""
    key, is_text_seen, waiting = None, False, None
    with tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            sample, _, extension = member.name.rpartition("/")[2].partition(".")
            sample = str(PurePosixPath(member.name).parent / sample)
            if sample != key:
                if waiting is not None and not is_text_seen:
                    yield Record(waiting, is_json=True)
                key, is_text_seen, waiting = sample, False, None
            content = tar.extractfile(member) if extension in ("txt", "json") else None
            if content is None:
                continue
            if extension == "json":
                waiting = content.read()
            else:
                is_text_seen = True
                yield Record(content.read())
    if waiting is not None and not is_text_seen:
        yield Record(waiting, is_json=True)


def _table_records(path: str, raw: io.RawIOBase, options: Options, is_parquet: bool) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet

    source = raw if raw.seekable() else io.BytesIO(raw.read())
    try:
        if is_parquet:
            table = pyarrow.parquet.ParquetFile(source)
            schema, batches = table.schema_arrow, None
        else:
            table = pa.ipc.open_stream(source)  # what datasets.save_to_disk writes
            schema, batches = table.schema, table
        if options.field not in schema.names:
            raise ValueError(f"{path}: no column {options.field!r}; name one of {', '.join(schema.names)} with --field")
        if batches is None:
            batches = table.iter_batches(batch_size=_TABLE_ROWS, columns=[options.field])
        for batch in batches:
            for text in batch.column(options.field):
                yield Record(_table_text(text.as_py(), path, options))
    except pa.ArrowInvalid as problem:
        raise ValueError(f"{path}: damaged or cut off ({problem})") from problem


def _table_text(value: object, path: str, options: Options) -> bytes:
    if value is None:
        return b""
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    raise ValueError(f"{path}: column {options.field!r} is not text but {type(value).__name__}")
