"""Token rows out of shards on a local disk, by byte range; every member is checked once before it is believed."""

import errno
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bd3lm_scale.data.shards import BadShardError, Manifest, Shard

_OPEN_SHARDS = 64
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 30.0
# asking again cannot help against these
_LASTING_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR}


def pauses(retries: int):
    """Seconds to wait before each retry: doubling, at most half a minute."""
    return [min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS) for attempt in range(retries)]


class DamagedError(Exception):
    """A shard's bytes are not what the manifest says."""


class _OpenShard:
    """One shard file: where its chunks lie, and which of them have been checked."""

    def __init__(self, path: Path, shard: Shard, manifest: Manifest):
        self.file = os.open(path, os.O_RDONLY)
        size = os.fstat(self.file).st_size
        if size != shard.size:
            os.close(self.file)
            raise DamagedError(f"{path} has {size} bytes, the manifest says {shard.size}")
        self.path = path
        self.members = shard.token_members
        self.itemsize = np.dtype(manifest.dtype).itemsize
        self.chunk_tokens = manifest.chunk_tokens
        self.vocab_size = manifest.tokenizer.vocab_size
        lengths = [min(self.chunk_tokens, shard.num_tokens - k * self.chunk_tokens) for k in range(len(self.members))]
        # the tokens are the tail of the member, after the .npy header
        self.first_byte = [o + size - n * self.itemsize for (o, size, _), n in zip(self.members, lengths, strict=True)]
        self.is_checked = bytearray(len(self.members))

    def close(self) -> None:
        os.close(self.file)

    def check(self, chunk: int) -> None:
        """Read a whole member and compare checksum and id range (DamagedError)."""
        offset, size, crc32 = self.members[chunk]
        data = os.pread(self.file, size, offset)
        if len(data) != size:
            raise DamagedError(f"{self.path} ends inside chunk {chunk}")
        if zlib.crc32(data) != crc32:
            raise DamagedError(f"{self.path} has flipped bytes in chunk {chunk} (checksum {crc32:08x})")
        tokens = np.frombuffer(data, f"<u{self.itemsize}", offset=self.first_byte[chunk] - offset)
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            raise DamagedError(f"{self.path} holds token id {int(tokens.max())} >= vocabulary {self.vocab_size}")
        self.is_checked[chunk] = 1

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill `out` (n,) with tokens start ... start + n."""
        done = 0
        while done < len(out):
            chunk, inside = divmod(start + done, self.chunk_tokens)
            if not self.is_checked[chunk]:
                self.check(chunk)
            stop = min(len(out), done + self.chunk_tokens - inside)
            piece = out[done:stop]
            got = os.preadv(self.file, [memoryview(piece)], self.first_byte[chunk] + inside * self.itemsize)
            if got != piece.nbytes:
                raise DamagedError(f"{self.path} ends inside chunk {chunk}")
            done = stop


class ShardReader:
    """Reads runs of tokens from the shards of one split.

    Args:
        manifest: describes the shards.
        find: gives the local path of a shard, fetching it first where it is remote; OSError or DamagedError
            when it cannot.
        discard: told that the local copy of a shard is damaged, so that `find` may fetch a new one; returns
            whether trying again is any use.
        retries: times a failing read is repeated, with growing pauses.
    """

    def __init__(
        self,
        manifest: Manifest,
        find: Callable[[Shard], Path],
        discard: Callable[[Shard], bool],
        retries: int = 5,
    ):
        self.manifest = manifest
        self._find = find
        self._discard = discard
        self._retries = retries
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def read(self, shard: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
        """Tokens start[i] ... start[i] + length of shard[i], as (n, length) in the stored dtype.

        BadShardError when a shard stays unreadable after all retries.
        """
        out = np.empty((len(shard), length), np.dtype(self.manifest.dtype))
        # in file order, so that a spinning disk or a network file system sees few jumps
        for i in np.lexsort((start, shard)).tolist():
            self._read_row(out[i], int(shard[i]), int(start[i]))
        return out

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _read_row(self, out: np.ndarray, number: int, start: int) -> None:
        try:
            self._opened(number).read_into(out, start)
            return
        except (OSError, DamagedError) as problem:
            reason = problem
        for pause in pauses(self._retries):
            self._forget(number)
            if isinstance(reason, DamagedError):
                if not self._discard(self.manifest.shards[number]):
                    break
            elif reason.errno in _LASTING_ERRORS:
                break
            time.sleep(pause)
            try:
                self._opened(number).read_into(out, start)
                return
            except (OSError, DamagedError) as problem:
                reason = problem
        self._forget(number)
        raise BadShardError(self.manifest.shards[number].name, str(reason)) from reason

    def _opened(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.manifest.shards[number]
        self._open[number] = _OpenShard(self._find(shard), shard, self.manifest)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return self._open[number]

    def _forget(self, number: int) -> None:
        if number in self._open:
            self._open.pop(number).close()
