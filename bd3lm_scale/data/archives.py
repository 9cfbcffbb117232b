"""Tar archives of documents, webdataset's and others', read once from the beginning; nothing is ever extracted.

A sample is what webdataset takes for one: the members of one name up to its first dot. Its document is the text
member, or its JSON member where it has no text; the members of two samples may be interleaved. Whatever else lies in
the archive is counted, and an archive must end as archives do.
"""

import functools
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO

from bd3lm_scale.data.compressed import SUFFIXES, DamagedFileError, decompressed
from bd3lm_scale.data.records import BadRecordError, Record, encoding_problem, without_mark

_BLOCK = tarfile.BLOCKSIZE
_TEXT = ("txt", "text")
_LINES = ("jsonl", "ndjson")
_HEAD_BYTES = 4096


class _StrictInfo(tarfile.TarInfo):
    """A member's header. The library takes a damaged one for the archive's end; here it is an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        file = tar.fileobj
        assert file is not None
        offset = file.tell()
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            _check_end(file, offset)
            raise
        except (tarfile.HeaderError, ValueError, OverflowError) as problem:
            raise DamagedFileError(f"damaged or cut off at byte {offset} ({problem})") from problem
        if member.size < 0:
            raise DamagedFileError(f"damaged at byte {offset} (a member of {member.size} bytes)")
        return member


def _check_end(file, offset: int) -> None:
    """Two blocks of zeros end an archive, and nothing but zeros follows."""
    if len(second := file.read(_BLOCK)) < _BLOCK:
        raise DamagedFileError(f"damaged or cut off at byte {offset} (inside the mark that ends an archive)")
    while second:
        if second.strip(b"\0"):
            raise DamagedFileError(
                f"damaged at byte {offset} (a block of zeros, and data behind it; archives that were joined are "
                "given one by one)"
            )
        second = file.read(_BLOCK * 64)


def tar_records(
    file: io.BufferedReader, again: Callable[[], io.BufferedReader] | None, ignored: Counter[str]
) -> Iterator[Record]:
    """The documents of an archive in the order of its members.

    Args:
        file: the archive, decompressed.
        again: opens it a second time, to look ahead for texts that lie apart from their sample's other members; None
            where that is not possible: such archives are an error then.
        ignored: is told what is no document.

    Raises:
        DamagedFileError: naming the byte.
    """
    seen: set[tuple[str, bool]] = set()
    given: set[str] = set()
    later: set[str] | None = None
    waiting: tuple[str, Record] | None = None
    for name, content in _members(file, ignored):
        sample, extension = _sample(name)
        plain = _without_compression(extension)
        if plain in _LINES:
            yield from _lines(name, content)
        if plain not in (*_TEXT, "json"):
            continue
        is_text = plain != "json"
        if waiting is not None and waiting[0] != sample:
            later = _samples_with_text(again) if later is None and again else later or set()
            if waiting[0] in later:
                ignored[".json members beside a text"] += 1
            else:
                given.add(waiting[0])
                yield waiting[1]
            waiting = None
        if (sample, is_text) in seen:
            problem = BadRecordError("second document of a sample", f"a second document of sample {sample!r}")
            yield Record(b"", where=f"member {name}", problem=problem)
            continue
        seen.add((sample, is_text))
        if is_text:
            if sample in given:
                raise DamagedFileError(
                    f"member {name} lies apart from its sample's .json; sort the archive by name, or give a local file"
                )
            ignored[".json members beside a text"] += waiting is not None
            waiting = None
            yield _whole(name, content, is_json=False)
        elif (sample, True) in seen:
            ignored[".json members beside a text"] += 1
        else:
            waiting = sample, _whole(name, content, is_json=True)
    if waiting is not None:
        yield waiting[1]


def _members(file: IO[bytes], ignored: Counter[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and content of the members that hold documents; the others are counted."""
    with _opened(file) as tar:
        while member := _next(tar):
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # the library would keep every header
            if member.isdir():
                continue
            extension = _sample(member.name)[1]
            if any(part.startswith(".") for part in PurePosixPath(member.name).parts):
                ignored["hidden members of archives"] += 1
            elif _without_compression(extension) not in (*_TEXT, *_LINES, "json"):
                ignored[f".{extension} members of archives" if extension else "members of archives without suffix"] += 1
            elif not member.isreg():
                ignored["links in archives"] += 1
            else:
                yield member.name, functools.partial(_content, tar, member)


def _opened(file: IO[bytes]) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r|", tarinfo=_StrictInfo)
    except tarfile.TarError as problem:
        raise DamagedFileError(f"damaged or cut off at byte 0 ({problem})") from problem


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except tarfile.TarError as problem:
        raise _cut_off(tar, str(problem)) from problem


def _cut_off(tar: tarfile.TarFile, reason: str) -> DamagedFileError:
    assert tar.fileobj is not None
    return DamagedFileError(f"damaged or cut off at byte {tar.fileobj.tell()} ({reason})")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = tar.extractfile(member)
    assert opened is not None
    try:
        stored = opened.read()
    except tarfile.TarError as problem:
        raise _cut_off(tar, f"in member {member.name}: {problem}") from problem
    if len(stored) != member.size:
        raise _cut_off(tar, f"in member {member.name}")
    try:
        return decompressed(member.name, io.BytesIO(stored)).read()
    except DamagedFileError as problem:
        raise BadRecordError("damaged member", str(problem)) from problem


def _sample(name: str) -> tuple[str, str]:
    """The sample a member belongs to, and what follows its first dot."""
    path = PurePosixPath(name)
    base, _, extension = path.name.partition(".")
    return str(path.parent / base), extension.lower()


def _without_compression(extension: str) -> str:
    for suffix in SUFFIXES:
        extension = extension.removesuffix(suffix)
    return extension


def _samples_with_text(again: Callable[[], io.BufferedReader]) -> set[str]:
    with again() as file:
        found = ((_sample(name), name) for name, _ in _members(file, Counter()))
        return {sample for (sample, extension), _ in found if _without_compression(extension) in _TEXT}


def _whole(name: str, content: Callable[[], bytes], is_json: bool) -> Record:
    try:
        data = content()
    except BadRecordError as problem:
        return Record(b"", where=f"member {name}", problem=problem)
    problem = encoding_problem(data[:_HEAD_BYTES])
    return Record(without_mark(data), is_json=is_json, where=f"member {name}", problem=problem)


def _lines(name: str, content: Callable[[], bytes]) -> Iterator[Record]:
    whole = _whole(name, content, is_json=True)
    if whole.problem is not None:
        yield whole
        return
    for number, line in enumerate(whole.data.split(b"\n"), start=1):
        if line.strip():
            yield Record(line, is_json=True, where=f"member {name}, line {number}", line=number)
