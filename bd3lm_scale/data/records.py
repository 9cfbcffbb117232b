"""What passes between reading a corpus and tokenizing it: records, how to cut them, and what is wrong with some."""

import io
from collections import Counter
from dataclasses import dataclass

from bd3lm_scale.data.compressed import SUFFIXES as COMPRESSIONS

TEXT = (".txt", ".text")
JSON = (".jsonl", ".json", ".ndjson")
TABLES = (".parquet", ".arrow", ".feather")
TARS = (".tar", ".tgz", ".tbz2", ".txz", ".tzst")
KINDS = (*TEXT, *JSON, *TABLES, *TARS)
FORMATS = ("txt", "jsonl", "parquet", "arrow", "tar")
READABLE = f"{', '.join(KINDS)} (or these with {', '.join(COMPRESSIONS)} behind them)"


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


def _kind(name: str) -> str | None:
    lower = name.lower()
    for compression in COMPRESSIONS:
        lower = lower.removesuffix(compression)
    # `pipe:` commands need not end in the file's name: what they bring is taken for a tar
    return next((kind for kind in KINDS if lower.endswith(kind)), ".tar" if name.startswith("pipe:") else None)


class BadRecordError(ValueError):
    """Something in a corpus that is no document.

    Attributes:
        kind: what it is counted as, a few words.
        reason: what exactly is wrong.
    """

    def __init__(self, kind: str, reason: str = ""):
        self.kind = kind
        self.reason = reason or kind
        super().__init__(kind, self.reason)  # both, so that it survives the way from another process

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Record:
    """One document or piece of one; `data` is text as bytes, or a JSON object as bytes when `is_json`.

    Attributes:
        where: its place as a person looks for it: "line 3", "row 7", "member a/b.txt".
        line: the line of the file or member that it begins with.
        problem: why it is no document, where reading it has shown that already.
    """

    data: bytes
    is_json: bool = False
    starts_document: bool = True
    ends_document: bool = True
    where: str = ""
    line: int = 1
    problem: BadRecordError | None = None


class Meter:
    """How far the reading of a file has come, and what it has passed over.

    Attributes:
        ignored: members of archives that are no documents, by kind.
    """

    def __init__(self) -> None:
        self._file: io.RawIOBase | None = None
        self.ignored: Counter[str] = Counter()

    def watch(self, file: io.RawIOBase) -> io.RawIOBase:
        """Follow this file from now on."""
        self._file = file
        return file

    @property
    def num_bytes(self) -> int:
        """Bytes of the file (as stored, compressed perhaps) that have been read."""
        return self._file.tell() if self._file is not None and not self._file.closed else 0


_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_FEW, _MANY = 0.1, 0.4


def without_mark(head: bytes) -> bytes:
    """The bytes without UTF-8's byte order mark, which is no text."""
    return head.removeprefix(_UTF8_MARK)


def encoding_problem(head: bytes) -> BadRecordError | None:
    """What the first bytes of a text say against UTF-8; None when nothing."""
    name = next((name for mark, name in _OTHER_MARKS.items() if head.startswith(mark)), None)
    if name is None and len(head) >= 4:
        # without a mark, Latin letters betray themselves: zeros at every second byte, or at three of four
        zeros = [part.count(0) / len(part) for part in (head[start::4] for start in range(4))]
        low, *high = sorted(zeros)
        name = "UTF-32" if low < _FEW and min(high) > _MANY else None
        evens, odds = sorted(((zeros[0] + zeros[2]) / 2, (zeros[1] + zeros[3]) / 2))
        name = "UTF-16" if name is None and evens < _FEW and odds > _MANY else name
    return BadRecordError(name, f"text in {name}, not UTF-8 (iconv -f {name} -t UTF-8 converts it)") if name else None
