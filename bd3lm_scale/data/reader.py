"""Token rows out of shards on a local disk, by byte range; nothing is believed before its checksum has been compared.

A row is read in whole blocks of BLOCK_BYTES with a checksum each: what is read and what is verified stay in proportion
to the row, however few of a shard's rows this process reads. Shards of earlier versions have one checksum per member:
there a whole member is read once, the first time that it is touched.
"""

import io
import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from bd3lm_scale.data.shard_list import BLOCK_BYTES, Shard, ShardEntry, ShardList, blocks_per_chunk
from bd3lm_scale.data.shards import Manifest
from bd3lm_scale.data.storage import DamagedError, retrying
from bd3lm_scale.data.targets import TargetIndex
from bd3lm_scale.errors import BadShardError

Result = TypeVar("Result")

_OPEN_SHARDS = 64


class ShardFiles(Protocol):
    """Where shards come from: a folder, or a remote one through the cache."""

    where: str
    """What to call the place in messages."""
    is_remote: bool
    """Whether shards have to be fetched."""

    def open(self, shard: ShardEntry) -> int:
        """File descriptor of the shard, fetched first where it is remote. OSError or DamagedError."""
        ...

    def discard(self, shard: ShardEntry) -> bool:
        """Told that the shard's local copy is damaged; whether opening it again may give a better one."""
        ...

    def fetch_ahead(self, shards: list[ShardEntry]) -> None:
        """Hint that these will be opened soon."""
        ...


class _OpenShard:
    """One shard file: where its chunks lie, and which of them have been checked."""

    def __init__(self, file: int, shard: Shard, manifest: Manifest):
        size = os.fstat(file).st_size
        if size != shard.size:
            os.close(file)
            raise DamagedError(f"has {size} bytes, the manifest says {shard.size}")
        self.file = file
        self.close = weakref.finalize(self, os.close, file)  # also where a reader is dropped without being closed
        self.members = shard.token_members.tolist()
        self.document_members = shard.document_members.tolist()
        self.num_tokens = shard.num_tokens
        self.itemsize = np.dtype(manifest.dtype).itemsize
        self.chunk_tokens = manifest.chunk_tokens
        self.vocab_size = manifest.tokenizer.vocab_size
        lengths = [min(self.chunk_tokens, shard.num_tokens - k * self.chunk_tokens) for k in range(len(self.members))]
        # the tokens are the tail of the member, after the .npy header
        self.first_byte = [o + size - n * self.itemsize for (o, size, _), n in zip(self.members, lengths, strict=True)]
        self.end_byte = [first + n * self.itemsize for first, n in zip(self.first_byte, lengths, strict=True)]
        self.is_checked = bytearray(len(self.members))
        self.blocks = None if shard.block_crc32 is None else shard.block_crc32.tolist()
        self.blocks_per_chunk = blocks_per_chunk(self.chunk_tokens, self.itemsize)

    def check(self, chunk: int) -> None:
        """Read a whole member and compare checksum and id range (DamagedError)."""
        offset = self.members[chunk][0]
        data = self._member(self.members, chunk)
        self.check_ids(memoryview(data)[self.first_byte[chunk] - offset :], chunk)
        self.is_checked[chunk] = 1

    def _member(self, members: list[list[int]], chunk: int) -> bytes:
        """A whole member, as its checksum wants it (DamagedError)."""
        offset, size, crc32 = members[chunk]
        data = os.pread(self.file, size, offset)
        if len(data) != size:
            raise DamagedError(f"ends inside chunk {chunk}")
        if zlib.crc32(data) != crc32:
            raise DamagedError(f"flipped bytes in chunk {chunk}: checksum {zlib.crc32(data):08x} is not {crc32:08x}")
        return data

    def document_starts(self) -> np.ndarray:
        """Where documents begin in the shard, int64 and rising; no token is read (DamagedError)."""
        found = [np.zeros(0, np.int64)]
        for chunk in range(len(self.document_members)):
            data = self._member(self.document_members, chunk)
            try:
                starts = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            except ValueError as problem:
                raise DamagedError(f"no list of documents in chunk {chunk}: {problem}") from problem
            found.append(starts.astype(np.int64) + chunk * self.chunk_tokens)
        joined = np.concatenate(found)
        if len(joined) and (joined.min() < 0 or joined.max() >= self.num_tokens or (np.diff(joined) < 0).any()):
            raise DamagedError(f"its documents do not begin at rising places among its {self.num_tokens} tokens")
        return joined

    def check_ids(self, data: memoryview, chunk: int) -> None:
        """DamagedError where a token is none."""
        largest = int(np.frombuffer(data, f"<u{self.itemsize}").max(initial=0))
        if largest >= self.vocab_size:
            raise DamagedError(f"token id {largest} in chunk {chunk}, the vocabulary is {self.vocab_size}")

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill `out`, bytes, with the tokens from `start` on."""
        done, wanted = 0, len(out)
        while done < wanted:
            chunk, inside = divmod(start + done // self.itemsize, self.chunk_tokens)
            stop = min(wanted, done + (self.chunk_tokens - inside) * self.itemsize)
            if self.blocks is None:
                self._read_checked_member(out[done:stop], chunk, inside * self.itemsize)
            else:
                self._read_blocks(out[done:stop], chunk, inside * self.itemsize, self.blocks)
            done = stop

    def _read_checked_member(self, out: memoryview, chunk: int, offset: int) -> None:
        if not self.is_checked[chunk]:
            self.check(chunk)
        if os.preadv(self.file, [out], self.first_byte[chunk] + offset) != len(out):
            raise DamagedError(f"ends inside chunk {chunk}")

    def _read_blocks(self, out: memoryview, chunk: int, offset: int, blocks: list[int]) -> None:
        first, chunk_bytes = offset // BLOCK_BYTES, self.end_byte[chunk] - self.first_byte[chunk]
        begin = first * BLOCK_BYTES
        end = min(-(-(offset + len(out)) // BLOCK_BYTES) * BLOCK_BYTES, chunk_bytes)
        data = memoryview(os.pread(self.file, end - begin, self.first_byte[chunk] + begin))
        if len(data) != end - begin:
            raise DamagedError(f"ends inside chunk {chunk}")
        place = chunk * self.blocks_per_chunk + first
        for number, at in enumerate(range(0, len(data), BLOCK_BYTES)):
            found, crc32 = zlib.crc32(data[at : at + BLOCK_BYTES]), blocks[place + number]
            if found != crc32:
                raise DamagedError(f"flipped bytes in chunk {chunk}: checksum {found:08x} is not {crc32:08x}")
        out[:] = data[offset - begin : offset - begin + len(out)]
        self.check_ids(out, chunk)


@dataclass(eq=False)
class ShardReader:
    """Reads runs of tokens from the shards of one split.

    Attributes:
        manifest: describes them all.
        shards: each of them.
        files: where they come from.
        retries: times a failing read is repeated, with growing pauses.
        prefix: what shard names begin with in errors (the dataset's number in a mixture).
    """

    manifest: Manifest
    shards: ShardList
    files: ShardFiles
    retries: int
    prefix: str = ""
    _open: OrderedDict[int, _OpenShard] = field(default_factory=OrderedDict, repr=False)
    _targets: OrderedDict[int, TargetIndex] = field(default_factory=OrderedDict, repr=False)

    def read(self, shard: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
        """Tokens start[i] ... start[i] + length of shard[i], as (n, length) in the stored dtype.

        BadShardError when a shard stays unreadable after all retries.
        """
        out = np.empty((len(shard), length), np.dtype(self.manifest.dtype).newbyteorder("<"))
        size = np.full_like(shard, length)
        self.read_runs(out.reshape(-1), np.stack([shard, start, np.arange(len(shard)) * length, size]))
        return out

    def read_runs(self, out: np.ndarray, runs: np.ndarray) -> None:
        """Fill places of `out`, flat and little-endian in the stored dtype, with runs of tokens. BadShardError.

        Args:
            out: what no run names stays as it is.
            runs: int64 (4, runs): shard, first token there, place in `out`, and length of each.
        """
        view, size = out.view(np.uint8).data, out.itemsize
        # in file order, so that a spinning disk or a network file system sees few jumps
        for shard, start, place, length in runs.T[np.lexsort((runs[1], runs[0]))].tolist():
            self._try(shard, lambda a=start, p=place, n=length, s=shard: self._opened(s).read_into(
                view[p * size : (p + n) * size], a))  # fmt: skip

    def document_starts(self, number: int) -> np.ndarray:
        """Where documents begin in a shard, int64 (documents,): from the index, or its small members. BadShardError."""
        indexed = self._indexed(number).document_starts
        if indexed is not None:
            return np.asarray(indexed, np.int64)
        return self._try(number, lambda: self._opened(number).document_starts())

    def targets(self, number: int) -> TargetIndex:
        """The targets of a shard of a manifest that has some; only the index is read. BadShardError."""
        if number not in self._targets:
            runs = self._indexed(number).target_runs
            assert runs is not None, "a manifest with targets has them in every shard"
            self._targets[number] = TargetIndex(runs)
            if len(self._targets) > _OPEN_SHARDS:
                self._targets.popitem(last=False)
        self._targets.move_to_end(number)
        return self._targets[number]

    def close(self) -> None:
        """Close all files."""
        for number in list(self._open):
            self._forget(number)

    def _indexed(self, number: int) -> Shard:
        """What the index holds of a shard (BadShardError)."""
        try:
            return self.shards[number]
        except (OSError, DamagedError) as problem:
            raise BadShardError(self.prefix + self.shards.entry(number).name, str(problem)) from problem

    def _try(self, number: int, action: Callable[[], Result]) -> Result:
        """What `action` makes of a shard, repeated where that may help (BadShardError)."""

        def recover(problem: Exception) -> bool:
            self._forget(number)
            return not isinstance(problem, DamagedError) or self.files.discard(self.shards.entry(number))

        try:
            return retrying(action, self.retries, recover)
        except (OSError, DamagedError) as problem:
            self._forget(number)
            name = self.prefix + self.shards.entry(number).name
            raise BadShardError(name, f"{problem} (in {self.files.where})") from problem

    def _opened(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        self._open[number] = _OpenShard(self.files.open(shard), shard, self.manifest)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return self._open[number]

    def _forget(self, number: int) -> None:
        if number in self._open:
            self._open.pop(number).close()
