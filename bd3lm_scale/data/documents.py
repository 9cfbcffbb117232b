"""Documents out of files: what a corpus looks like before tokenization.

    paths -> input files -> records (raw, cheap to cut) -> texts (decoded where the tokenization runs)

    .txt  .jsonl  (.gz .bz2 .xz .zst)   .parquet .arrow   folders of datasets.save_to_disk   tars of .txt .json members

A record is a whole document, or a piece of one where a text file is too long to hold in memory. Files may be
remote (URL or pipe: command). Reading gives records in one fixed order.
"""

import codecs
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator

from bd3lm_scale.data.archives import tar_records
from bd3lm_scale.data.compressed import DamagedFileError, decompressed, is_compressed, open_local
from bd3lm_scale.data.inputs import find_inputs
from bd3lm_scale.data.records import (
    BY_NAME,
    FORMATS,
    JSON,
    TABLES,
    TARS,
    BadRecordError,
    Meter,
    Options,
    Record,
    encoding_problem,
    without_mark,
)
from bd3lm_scale.data.storage import is_remote, open_sequential
from bd3lm_scale.data.tables import table_records

__all__ = [
    "BY_NAME", "FORMATS", "BadRecordError", "Meter", "Options", "Record",
    "find_inputs", "read_records", "record_object", "record_text",
]  # fmt: skip

_PIECE_BYTES = 1 << 20
_HEAD_BYTES = 4096
_TIMEOUT_SECONDS = 60.0
# before a lone space or newline between visible ASCII: see Tokenizer.cuts_at_spaces
_CUT = re.compile(rb"[!-~](?=[ \n][!-~])")


def read_records(
    path: str,
    options: Options,
    meter: Meter | None = None,
    timeout: float = _TIMEOUT_SECONDS,
    whole: bool = False,
) -> Iterator[Record]:
    """Records of one file in order.

    Args:
        path: from `find_inputs`.
        options: how the file is cut into documents.
        meter: is kept up to date on how far the reading has come, and on what is passed over.
        timeout: seconds a remote file may stall.
        whole: every record is a whole document, however long.

    Raises:
        ValueError: the file is damaged, naming it. What is wrong with single documents stands in their records.
        OSError: a remote file that cannot be had.
    """
    kind, meter = options.kind(path), meter or Meter()
    try:
        with meter.watch(open_sequential(path, timeout)) as raw:
            if kind in TABLES:
                is_direct = raw.seekable() and not is_compressed(path)
                source = raw if is_direct else io.BytesIO(decompressed(path, raw).read())
                yield from table_records(source, options, is_parquet=kind == ".parquet")
                return
            with decompressed(path, raw) as file:
                again = None if is_remote(path) else functools.partial(open_local, path)
                if kind in TARS:
                    yield from tar_records(file, again, meter.ignored)
                elif kind in JSON:
                    yield from _json_records(file)
                else:
                    yield from _text_records(file, options, None if whole else again)
    except DamagedFileError as problem:
        raise ValueError(f"{path}: {problem}") from problem


def record_text(record: Record, options: Options, where: str = "") -> str:
    """The text of a record. BadRecordError, naming `where`, for what is no text."""
    try:
        return _text(record, options)
    except BadRecordError as problem:
        place = f"{where}: " if where else ""
        raise BadRecordError(problem.kind, f"{place}{problem.reason}") from problem


def record_object(record: Record, options: Options) -> dict:
    """The JSON object of a record, which has the field that the options name. BadRecordError for what is none."""
    if record.problem is not None:
        raise record.problem
    try:
        entry = json.loads(record.data if record.data.isascii() else _decoded(record.data, record.line))
    except RecursionError as problem:
        raise BadRecordError("not a JSON object", "not a JSON object (nested too deeply)") from problem
    except BadRecordError:
        raise
    except ValueError as problem:
        reason = str(problem).replace("line 1 ", "")
        raise BadRecordError("not a JSON object", f"not a JSON object ({reason})") from problem
    if not isinstance(entry, dict):
        raise BadRecordError("not a JSON object", f"not a JSON object but {type(entry).__name__}")
    if options.field not in entry:
        raise BadRecordError("no such field", f"no field {options.field!r}; name the text's field with --field")
    return entry


def _text(record: Record, options: Options) -> str:
    if not record.is_json and record.problem is None:
        return _decoded(record.data, record.line)
    text = record_object(record, options)[options.field]
    if text is None:
        raise BadRecordError("null", f"field {options.field!r} is null")
    if not isinstance(text, str):
        raise BadRecordError("not text", f"field {options.field!r} is not text but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        found = f"\\u{ord(text[problem.start]):04x}"
        raise BadRecordError("half a character", f"field {options.field!r} has {found}, half a character") from problem
    return text


def _decoded(data: bytes, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise _not_utf8(data, problem, first_line) from problem


def _not_utf8(data: bytes, problem: UnicodeDecodeError, first_line: int) -> BadRecordError:
    line = first_line + data.count(b"\n", 0, problem.start)
    reason = f"byte 0x{data[problem.start]:02x} in line {line} is not UTF-8 ({problem.reason})"
    return BadRecordError("not UTF-8", reason)


def count_documents(path: str, options: Options) -> int:
    """How many documents a file holds, from its metadata where it has some."""
    if options.kind(path) == ".parquet" and not (is_remote(path) or is_compressed(path)):
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    return sum(record.starts_document for record in read_records(path, options))


def _head(file: io.BufferedReader) -> bytes:
    """The first bytes, without taking them."""
    return file.peek(_HEAD_BYTES)[:_HEAD_BYTES]


def _json_records(file: io.BufferedReader) -> Iterator[Record]:
    if problem := encoding_problem(_head(file)):
        yield Record(b"", where="the whole file", problem=problem)
        return
    for number, line in enumerate(file, start=1):
        content = without_mark(line) if number == 1 else line
        if content.strip():
            yield Record(content, is_json=True, where=f"line {number}", line=number)


def _text_records(
    file: io.BufferedReader, options: Options, again: Callable[[], io.BufferedReader] | None
) -> Iterator[Record]:
    if problem := encoding_problem(_head(file)):
        yield Record(b"", where="the whole file", problem=problem)
        return
    if options.document == "file":
        yield from _pieces(file, again)
        return
    lines = ((number, line if number > 1 else without_mark(line)) for number, line in enumerate(file, start=1))
    if options.document == "line":
        for number, line in lines:
            data = line if options.keep_newlines else line.rstrip(b"\r\n")
            yield Record(data, where=f"line {number}", line=number)
    else:
        for is_blank, group in itertools.groupby(lines, key=lambda numbered: not numbered[1].strip()):
            if not is_blank:
                numbered = list(group)
                data, number = b"".join(line for _, line in numbered), numbered[0][0]
                yield Record(data, where=f"the paragraph at line {number}", line=number)


def _pieces(file: io.BufferedReader, again: Callable[[], io.BufferedReader] | None) -> Iterator[Record]:
    """A file as one document: in one record if it is short or cannot be read again, else in pieces of a megabyte."""
    beginning = file.read(_PIECE_BYTES)
    if again is None or len(beginning) < _PIECE_BYTES:
        yield Record(without_mark(beginning) + file.read(), where="the whole file")
        return
    # nothing of a document is taken before all of it is known to be sound
    blocks = itertools.chain([beginning], iter(lambda: file.read(_PIECE_BYTES), b""))
    if problem := _check_text(blocks):
        yield Record(b"", where="the whole file", problem=problem)
        return
    with again() as second:
        yield from _cut(second)


def _check_text(blocks: Iterator[bytes]) -> BadRecordError | None:
    """What keeps the blocks from being UTF-8 together."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    for block in itertools.chain(blocks, [b""]):
        held = decoder.getstate()[0]
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as problem:
            return _not_utf8(held + block, problem, line)
        line += block.count(b"\n")
    return None


def _cut(file: io.BufferedReader) -> Iterator[Record]:
    """Pieces that end before a lone space or newline."""
    is_first, piece, searched = True, without_mark(file.read(_PIECE_BYTES)), _PIECE_BYTES
    while block := file.read(_PIECE_BYTES):
        piece += block
        while cut := _CUT.search(piece, searched):
            yield Record(piece[: cut.end()], starts_document=is_first, ends_document=False, where="the whole file")
            is_first, piece, searched = False, piece[cut.end() :], _PIECE_BYTES
        searched = max(_PIECE_BYTES, len(piece) - 2)
    yield Record(piece, starts_document=is_first, where="the whole file")
