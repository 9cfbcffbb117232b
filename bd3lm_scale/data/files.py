"""The two places shards come from: a folder on this machine, and a remote folder through the cache."""

import hashlib
import logging
import os
import queue
import threading
from pathlib import Path

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.cache import CacheFullError, FileCache, default_folder
from bd3lm_scale.data.shard_list import ShardEntry
from bd3lm_scale.data.storage import DamagedError, is_remote, join, transfer

_log = logging.getLogger(__name__)
_FETCH_THREADS = 4
_EVICTION_RACES = 3
_BYTES_PER_GB = 10**9


def open_cache(config: DataConfig) -> FileCache:
    """The node's cache of remote files."""
    folder = Path(config.cache_dir) if config.cache_dir else default_folder()
    return FileCache(folder, int(config.cache_size_gb * _BYTES_PER_GB))


class LocalFiles:
    """Shards in a local folder, read in place."""

    is_remote = False

    def __init__(self, folder: str):
        self.where = folder

    def open(self, shard: ShardEntry) -> int:
        """File descriptor of the shard. OSError or DamagedError."""
        return os.open(os.path.join(self.where, shard.name), os.O_RDONLY)

    def discard(self, shard: ShardEntry) -> bool:
        """Forget a damaged copy; whether opening the shard again may give a better one."""
        return False  # reading the same file again gives the same bytes

    def fetch_ahead(self, shards: list[ShardEntry]) -> None:
        """Nothing to fetch."""


class RemoteFiles:
    """Shards at a URL, cached whole under the SHA-256 of their content."""

    is_remote = True

    def __init__(self, dataset: str, split: str, cache: FileCache, timeout: float):
        self.where = dataset
        self._split = split
        self._cache = cache
        self._timeout = timeout
        self._ahead: queue.SimpleQueue[ShardEntry] | None = None
        self._asked: set[str] = set()

    def open(self, shard: ShardEntry) -> int:
        """File descriptor of the shard. OSError or DamagedError."""
        for _ in range(_EVICTION_RACES):
            path = self._cache.get(_key(shard), shard.size, lambda part: self._fetch(shard, part))
            if path is not None:
                try:
                    return os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    continue  # another process made room just then
        raise CacheFullError(
            f"cache {self._cache.folder}: files vanish before they are used; raise data.cache_size_gb to hold at least "
            "data.shuffle_window shards per dataset"
        )

    def discard(self, shard: ShardEntry) -> bool:
        """Forget a damaged copy; whether opening the shard again may give a better one."""
        self._cache.drop(_key(shard))
        return True

    def fetch_ahead(self, shards: list[ShardEntry]) -> None:
        """Fetch in the background; problems are left to whoever opens the shard."""
        wanted = [shard for shard in shards if shard.name not in self._asked]
        # no further than half the cache, or the shards ahead would push out those in use
        room, fitting = self._cache.limit_bytes // 2, []
        for shard in wanted:
            room -= shard.size
            if room >= 0:
                fitting.append(shard)
        self._asked = {shard.name for shard in shards}
        if not fitting:
            return
        if self._ahead is None:
            self._ahead = queue.SimpleQueue()
            for _ in range(_FETCH_THREADS):  # daemons: a transfer under way never keeps a process from ending
                threading.Thread(target=self._fetch_what_is_asked, args=(self._ahead,), daemon=True).start()
        for shard in fitting:
            self._ahead.put(shard)

    def _fetch_what_is_asked(self, ahead: "queue.SimpleQueue[ShardEntry]") -> None:
        while True:
            shard = ahead.get()
            try:
                self._cache.get(_key(shard), shard.size, lambda part, s=shard: self._fetch(s, part), wait=False)
            except Exception as problem:  # whoever opens the shard meets it again and says so; the thread goes on
                _log.debug("fetching %s ahead: %s", shard.name, problem)
                self._asked.discard(shard.name)

    def _fetch(self, shard: ShardEntry, part: Path) -> None:
        transfer(join(self.where, f"{self._split}/{shard.name}"), part, self._timeout, shard.size)
        with part.open("rb") as file:
            found = _digest(file)
        if found != shard.sha256:
            size = part.stat().st_size
            part.unlink()
            raise DamagedError(f"came with {size} bytes, SHA-256 {found[:16]}; the manifest says {shard.sha256[:16]}")


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _key(shard: ShardEntry) -> str:
    return f"{shard.sha256[:40]}.tar"


def open_files(dataset: str, split: str, config: DataConfig) -> LocalFiles | RemoteFiles:
    """The shard files of one split of a dataset folder."""
    if is_remote(dataset):
        return RemoteFiles(dataset, split, open_cache(config), config.timeout_seconds)
    return LocalFiles(os.path.join(dataset, split))
