"""Bytes from anywhere: local paths, http(s), object stores (fsspec), pipe: commands (webdataset); with retries.

A remote folder is a URL; a pipe is a command with {} where the path below the folder goes, as in
`pipe:ssh host cat /corpus/{}`.
"""

import errno
import http.client
import io
import logging
import random
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 30.0
_BLOCK = 1 << 20
# a transfer that brings less than this within one timeout has stalled
_LEAST_PROGRESS = 1 << 16
# one that brings this much before it breaks off may go on at once
_GOOD_PROGRESS = 1 << 20
# asking again cannot help against these
_LASTING_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENOSPC}
_TRANSIENT_STATUS = {408, 425, 429}
_log = logging.getLogger(__name__)


class TransferError(OSError):
    """Bytes that could not be had; `is_lasting` says that asking again is no use."""

    def __init__(self, reason: str, is_lasting: bool = False):
        super().__init__(reason)
        self.is_lasting = is_lasting


class DamagedError(Exception):
    """Bytes that are not what the manifest says."""


def is_remote(path: str) -> bool:
    """Whether `path` is a URL or a pipe and not a local path."""
    return path.startswith("pipe:") or "://" in path


def join(folder: str, name: str) -> str:
    """The address of `name` (slashes allowed) below a remote folder."""
    if not folder.startswith("pipe:"):
        return folder.rstrip("/") + "/" + name
    if "{}" not in folder:
        raise ValueError(f"{folder}: put {{}} where the name of the file goes, as in 'pipe:ssh host cat /corpus/{{}}'")
    return folder.replace("{}", shlex.quote(name))


def retrying(action: Callable[[], Result], retries: int, recover: Callable[[Exception], bool] | None = None) -> Result:
    """The result of `action`, repeated after OSError and DamagedError with doubling pauses.

    Args:
        action: what to try, retries + 1 times at most.
        retries: a lasting error is raised at once, whatever this says.
        recover: called before each repetition; False ends it.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except (OSError, DamagedError) as problem:
            lasting = isinstance(problem, OSError) and _is_lasting(problem)
            if lasting or attempt == retries or (recover and not recover(problem)):
                raise
            # spread out, so that a thousand ranks do not come back in the same instant
            pause = min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS) * random.uniform(0.75, 1.25)
            _log.info("%s; trying again in %.1f s", problem, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _is_lasting(problem: OSError) -> bool:
    return problem.is_lasting if isinstance(problem, TransferError) else problem.errno in _LASTING_ERRORS


def read_text(address: str, retries: int, timeout: float) -> str:
    """A small text file, local or remote. FileNotFoundError or a lasting TransferError when there is none."""

    def action() -> str:
        if not is_remote(address):
            return Path(address).read_text(encoding="utf-8")
        return b"".join(_open(address, 0, timeout)[1]).decode("utf-8")

    return retrying(action, retries)


def transfer(address: str, destination: Path, timeout: float) -> None:
    """Copy a remote file to `destination`, going on where an earlier attempt broke off if the server can.

    A connection that breaks off again and again is no failure while each brings a good part. TransferError when
    the file cannot be completed now; what has come stays in `destination` for the next attempt.
    """
    with destination.open("ab") as file:
        furthest = file.tell()
        while True:
            try:
                start, blocks = _open(address, file.tell(), timeout)
                if start < file.tell():
                    file.seek(file.truncate(start))
                for block in blocks:
                    file.write(block)
                    file.flush()  # kept, even if this process is killed
                return
            except TransferError as problem:
                if problem.is_lasting or file.tell() < furthest + _GOOD_PROGRESS:
                    raise
                furthest = file.tell()


class BlockFile(io.RawIOBase):
    """Blocks of bytes as a file that can be read once, from the beginning to the end."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._rest = memoryview(b"")
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes given out so far."""
        return self._position

    def readinto(self, buffer) -> int:
        """Fill part of `buffer`; 0 at the end."""
        if not self._rest:
            self._rest = memoryview(next(self._blocks, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        return count


def open_sequential(address: str, timeout: float) -> io.RawIOBase:
    """A local or remote file to read once from the beginning; `tell()` counts what has been read."""
    if is_remote(address):
        return BlockFile(_open(address, 0, timeout)[1])
    return open(address, "rb", buffering=0)


def _open(address: str, offset: int, timeout: float) -> tuple[int, Iterator[bytes]]:
    """Where the bytes begin (`offset`, or 0 where a server cannot skip) and the bytes."""
    if address.startswith("pipe:"):
        return 0, _from_pipe(address)
    if address.startswith(("http://", "https://")):
        return _from_http(address, offset, timeout)
    return 0, _from_filesystem(address)


def _from_http(url: str, offset: int, timeout: float) -> tuple[int, Iterator[bytes]]:
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as problem:
        problem.close()
        if problem.code == 416:  # nothing is missing any more
            return offset, iter(())
        is_lasting = 400 <= problem.code < 500 and problem.code not in _TRANSIENT_STATUS
        raise TransferError(f"{url}: HTTP {problem.code} {problem.reason}", is_lasting) from problem
    except (OSError, http.client.HTTPException) as problem:
        raise TransferError(f"{url}: {getattr(problem, 'reason', problem)}") from problem
    start = offset if response.status == 206 else 0
    return start, _http_blocks(url, response, timeout)


def _http_blocks(url: str, response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    length = response.headers.get("Content-Length")
    expected = None if length is None else int(length)
    received, checked, checked_at = 0, 0, time.monotonic()
    with response:
        while expected is None or received < expected:
            try:
                block = response.read1(_BLOCK)
            except (OSError, http.client.HTTPException) as problem:
                raise TransferError(f"{url}: {problem} after {received} bytes") from problem
            if not block:
                break
            received += len(block)
            yield block
            now = time.monotonic()
            if now - checked_at > timeout:
                if received - checked < _LEAST_PROGRESS and received != expected:
                    raise TransferError(f"{url}: slow: {received - checked} bytes in {now - checked_at:.1f} s")
                checked, checked_at = received, now
    if expected is not None and received < expected:
        raise TransferError(f"{url}: cut off after {received} of {expected} bytes")


def _from_pipe(command: str) -> Iterator[bytes]:
    from webdataset.gopen import gopen

    try:
        with gopen(command, "rb") as pipe:
            while block := pipe.read(_BLOCK):
                yield block
    except (OSError, RuntimeError, ValueError) as problem:
        raise TransferError(f"{command}: {problem}") from problem


def _from_filesystem(url: str) -> Iterator[bytes]:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            while block := file.read(_BLOCK):  # pyright: ignore[reportAttributeAccessIssue]
                yield block
    except (ImportError, ValueError) as problem:
        # fsspec says which package to install
        raise TransferError(f"{url}: {problem}", is_lasting=True) from problem
    except OSError as problem:
        raise TransferError(f"{url}: {problem}", is_lasting=_is_lasting(problem)) from problem
