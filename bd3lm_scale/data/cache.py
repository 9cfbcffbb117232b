"""Whole remote files on local disk, shared by all processes of a node, the least recently used going first.

    CACHE/<key>            complete files; CACHE/.<key>.part  what has come of one under way
    CACHE/.locks/          who fetches what (advisory locks vanish with their process)

Removing a file that another process has open is harmless: it keeps what it opened.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

_LOCK_FILES = 256
_EVICTION_LOCK = "eviction"
_log = logging.getLogger(__name__)


class CacheFullError(RuntimeError):
    """No room for a file, even after removing all others."""


def default_folder() -> Path:
    """A folder of this user on the node's own disk: never in a home, which nodes may share.

    Raises:
        ValueError: another user has made a folder of that name.
    """
    base = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    folder = Path(base) / f"bd3lm_scale-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(
            f"data.cache_dir (by default {folder}): cannot be made ({problem}); name a folder"
        ) from problem
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(f"data.cache_dir (by default {folder}): belongs to another user; name a folder of yours")
    return folder


class FileCache:
    """A folder of fetched files.

    Args:
        folder: where they lie; made when missing.
        limit_bytes: the files together stay below this.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder = folder
        self.limit_bytes = limit_bytes
        try:
            (folder / ".locks").mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ValueError(
                f"data.cache_dir ({folder}): cannot be made ({problem}); name a folder that can"
            ) from problem

    def get(self, key: str, size: int, fetch: Callable[[Path], None], wait: bool = True) -> Path | None:
        """Path of the file `key`, fetched if it is not there; the caller should open it at once.

        Args:
            key: a plain file name.
            size: how many bytes it will have.
            fetch: writes the file to a path that may hold the beginning from an earlier attempt, and checks it.
            wait: False returns None where another process is fetching this file already.

        Raises:
            CacheFullError: the disk or the cache has no room.
            Whatever `fetch` raises.
        """
        if not key or key != os.path.basename(key) or key.startswith("."):
            raise ValueError(f"cache key {key!r} is not a plain file name")
        path = self.folder / key
        if self._touch(path):
            return path
        with self._lock(f"{zlib.crc32(key.encode()) % _LOCK_FILES:02x}", wait) as is_mine:
            if not is_mine:
                return None
            if not self._touch(path):
                self._fetch(path, size, fetch)
        return path

    def drop(self, key: str) -> None:
        """Remove a file, damaged perhaps."""
        (self.folder / key).unlink(missing_ok=True)

    def _fetch(self, path: Path, size: int, fetch: Callable[[Path], None]) -> None:
        part = path.with_name(f".{path.name}.part")
        self._make_room(size, self.limit_bytes)
        try:
            try:
                fetch(part)
            except OSError as problem:
                if problem.errno != errno.ENOSPC:
                    raise
                _log.warning("no space left in the cache %s; emptying it", self.folder)
                self._make_room(self.limit_bytes, self.limit_bytes)
                fetch(part)
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise
            part.unlink(missing_ok=True)
            raise CacheFullError(
                f"cache {self.folder}: no space for a file of {size:,} bytes ({shutil.disk_usage(self.folder).free:,} "
                "free); free some, or name another data.cache_dir"
            ) from problem
        part.rename(path)

    def _make_room(self, size: int, limit: int) -> None:
        """Remove the least recently used files until `size` more fit below `limit`."""
        if size > limit:
            raise CacheFullError(
                f"cache {self.folder}: a file of {size:,} bytes is larger than all of it; raise data.cache_size_gb"
            )
        with self._lock(_EVICTION_LOCK, wait=True):
            entries, under_way = [], 0
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(".part"):
                        under_way += status.st_size
                    elif not entry.name.startswith("."):
                        entries.append((status.st_mtime, status.st_size, entry.path))
            total = under_way + sum(entry[1] for entry in entries)
            for _, num_bytes, path in sorted(entries):
                if total + size <= limit:
                    return
                Path(path).unlink(missing_ok=True)
                total -= num_bytes

    @staticmethod
    def _touch(path: Path) -> bool:
        """Whether the file is there; marks it as used now."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool) -> Iterator[bool]:
        file = os.open(self.folder / ".locks" / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(file)
