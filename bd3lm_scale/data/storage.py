"""Bytes from anywhere: local paths, http(s), object stores (fsspec), pipe: commands (webdataset); with retries.

A remote folder is a URL; a pipe is a command with {} where the path below the folder goes, as in
`pipe:ssh host cat /corpus/{}`.
"""

import errno
import io
import logging
import os
import random
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from bd3lm_scale.data.http import DamagedError, TransferError, from_http

__all__ = [
    "BlockFile", "DamagedError", "TransferError", "is_remote", "join", "open_file", "open_sequential", "read_text",
    "retrying", "transfer",
]  # fmt: skip

Result = TypeVar("Result")

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 30.0
_BLOCK = 1 << 20
# one that brings this much before it breaks off may go on at once
_GOOD_PROGRESS = 1 << 20
LARGEST_SMALL_FILE = 1 << 30
"""Manifests and tokenizers are smaller."""
# asking again cannot help against these
_LASTING_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENOSPC, errno.EINVAL}
_log = logging.getLogger(__name__)


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


def open_file(path: str) -> int:
    """File descriptor of a local file. OSError, also for a folder, a pipe or a device, whose bytes might never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", path)
    return descriptor


def read_text(address: str, retries: int, timeout: float) -> str:
    """A small text file, local or remote. FileNotFoundError or a lasting TransferError when there is none."""

    def action() -> str:
        if not is_remote(address):
            with open(open_file(address), encoding="utf-8") as file:
                return file.read()
        received = bytearray()
        for block in _open(address, 0, timeout)[1]:
            received += block
            if len(received) > LARGEST_SMALL_FILE:
                raise TransferError(f"{address}: larger than {LARGEST_SMALL_FILE:,} bytes", is_lasting=True)
        return received.decode("utf-8")

    return retrying(action, retries)


def transfer(address: str, destination: Path, timeout: float, size: int = LARGEST_SMALL_FILE) -> None:
    """Copy a remote file to `destination`, going on where an earlier attempt broke off if the server can.

    A connection that breaks off again and again is no failure while each brings a good part.

    Args:
        address: what to copy.
        destination: what has come stays there for the next attempt.
        timeout: seconds without progress.
        size: the file has no more bytes than this, and no more are ever written.

    Raises:
        TransferError: the file cannot be completed now.
        DamagedError: more comes than `size`.
    """
    with destination.open("ab") as file:
        furthest = file.tell()
        while True:
            try:
                start, blocks = _open(address, file.tell(), timeout)
                if start < file.tell():
                    file.seek(file.truncate(start))
                for block in blocks:
                    if file.tell() + len(block) > size:
                        file.truncate(0)
                        raise DamagedError(f"{address}: brings more than the {size:,} bytes it should have")
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
        return from_http(address, offset, timeout)
    return 0, _from_filesystem(address)


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
