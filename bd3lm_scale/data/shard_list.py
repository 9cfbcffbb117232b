"""The shards of a split in order: a few columns of all of them, and each one's arrays, loaded when it is asked for."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import overload

import numpy as np

from bd3lm_scale.data.targets import check_runs, runs_member

TAR_BLOCK = 512
NPY_HEADER = 128
BLOCK_BYTES = 4096
"""Bytes of a chunk's tokens that one checksum stands for."""


@dataclass(frozen=True)
class ShardEntry:
    """What is known of a shard without loading its arrays."""

    name: str
    size: int
    sha256: str
    num_tokens: int
    num_documents: int


@dataclass(frozen=True, eq=False)
class Shard(ShardEntry):
    """One tar.

    Attributes:
        token_members, document_members, target_members: int64 (chunks, 3): offset of the data, size, crc32.
        block_crc32: uint32 (blocks,), of every BLOCK_BYTES of the first chunk's tokens, then of the second's, ...;
            None in manifests of version 1.
        document_starts: sorted int64 (documents,), places in the shard where a document begins; None in version 1.
        target_runs: int64 (runs, 2), [start, stop) of what is a target (data/targets.py); None: every token is.
    """

    token_members: np.ndarray
    document_members: np.ndarray
    block_crc32: np.ndarray | None = None
    document_starts: np.ndarray | None = None
    target_members: np.ndarray | None = None
    target_runs: np.ndarray | None = None

    def to_json(self) -> dict:
        """The shard's entry in a manifest of version 1."""
        members = {key: getattr(self, key).tolist() for key in ("token_members", "document_members")}
        return {field.name: getattr(self, field.name) for field in fields(ShardEntry)} | members


class ShardList(Sequence[Shard]):
    """Shards in order.

    Args:
        names: bytes (S,), as UTF-8.
        sizes, num_tokens, num_documents: int64 (S,).
        sha256s: uint8 (S, 32).
        load: a shard with its arrays, by its number and entry.
    """

    def __init__(
        self,
        names: np.ndarray,
        sizes: np.ndarray,
        sha256s: np.ndarray,
        num_tokens: np.ndarray,
        num_documents: np.ndarray,
        load: Callable[[int, ShardEntry], Shard],
    ):
        self.names, self.num_tokens, self.num_documents = names, num_tokens, num_documents
        self._sizes, self._sha256s, self._load = sizes, sha256s, load

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "ShardList":
        """Shards that are all in memory."""
        digests = b"".join(bytes.fromhex(shard.sha256) for shard in shards)
        return cls(
            np.array([shard.name.encode() for shard in shards], bytes),
            np.array([shard.size for shard in shards], np.int64),
            np.frombuffer(digests, np.uint8).reshape(-1, 32),
            np.array([shard.num_tokens for shard in shards], np.int64),
            np.array([shard.num_documents for shard in shards], np.int64),
            lambda number, entry: shards[number],
        )

    def __len__(self) -> int:
        return len(self.names)

    def entry(self, number: int) -> ShardEntry:
        """A shard without its arrays (ValueError for a name that leads out of its folder)."""
        return ShardEntry(
            name=plain_name(self.names[number].decode()),
            size=int(self._sizes[number]),
            sha256=self._sha256s[number].tobytes().hex(),
            num_tokens=int(self.num_tokens[number]),
            num_documents=int(self.num_documents[number]),
        )

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        place = range(len(self))[number]  # IndexError as of any sequence
        return self._load(place, self.entry(place))

    def __iter__(self) -> Iterator[Shard]:
        return (self[i] for i in range(len(self)))

    def find(self, names: Sequence[str]) -> list[int]:
        """Numbers of the shards with these names, ascending; other names are passed over."""
        return np.flatnonzero(np.isin(self.names, [name.encode() for name in names])).tolist() if names else []

    def identities(self, some: slice) -> list[list]:
        """[SHA-256, tokens] of some shards."""
        digits = self._sha256s[some].tobytes().hex()
        digests = [digits[i : i + 64] for i in range(0, len(digits), 64)]
        return [list(pair) for pair in zip(digests, self.num_tokens[some].tolist(), strict=True)]


def plain_name(name: str) -> str:
    """The name, unless it could lead out of its folder (ValueError)."""
    if not isinstance(name, str) or not name or name != Path(name).name or name.startswith(".") or "\0" in name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def blocks_per_chunk(chunk_tokens: int, itemsize: int) -> int:
    """Checksums of a whole chunk."""
    return -(-chunk_tokens * itemsize // BLOCK_BYTES)


def block_checksums(tokens: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """`Shard.block_crc32` of a shard's tokens, in the dtype they are stored in."""
    content, chunk_bytes = tokens.view(np.uint8).data, chunk_tokens * tokens.itemsize
    return np.array(
        [
            zlib.crc32(content[first : min(first + BLOCK_BYTES, start + chunk_bytes)])
            for start in range(0, len(content), chunk_bytes)
            for first in range(start, min(start + chunk_bytes, len(content)), BLOCK_BYTES)
        ],
        np.uint32,
    )


def check_shard(shard: Shard, dtype: str, chunk_tokens: int) -> None:
    """ValueError unless the shard is laid out as `write_shard` does."""
    itemsize = np.dtype(dtype).itemsize
    tokens, kinds = shard.token_members, [shard.token_members, shard.document_members]
    kinds += [] if shard.target_members is None else [shard.target_members]
    chunks = -(-shard.num_tokens // chunk_tokens)
    if {len(members) for members in kinds} != {chunks}:
        raise ValueError(f"{shard.name} has {len(tokens)} members for {chunks} chunks of tokens")
    lengths = np.full(chunks, chunk_tokens)
    lengths[-1] = shard.num_tokens - (chunks - 1) * chunk_tokens
    members = np.stack(kinds, axis=1).reshape(-1, 3)
    in_range = (members >= 0).all() and (members[:, :2] <= shard.size).all() and (members[:, 2] < 1 << 32).all()
    padded = -(-members[:, 1] // TAR_BLOCK) * TAR_BLOCK
    offsets = TAR_BLOCK + np.concatenate([[0], np.cumsum(padded[:-1] + TAR_BLOCK)])
    fits = (tokens[:, 1] == lengths * itemsize + NPY_HEADER).all() and (members[:, 0] == offsets).all()
    if not (in_range and fits and offsets[-1] + padded[-1] <= shard.size):
        raise ValueError(f"the members of {shard.name} do not lie where its tokens are")
    if shard.block_crc32 is not None:
        per_chunk = blocks_per_chunk(chunk_tokens, itemsize)
        wanted = per_chunk * (chunks - 1) + blocks_per_chunk(int(lengths[-1]), itemsize)
        if shard.block_crc32.shape != (wanted,):
            raise ValueError(f"{shard.name} has {len(shard.block_crc32)} checksums for {wanted} blocks")
    if shard.document_starts is not None:
        starts = shard.document_starts
        is_inside = not len(starts) or (starts[0] >= 0 and starts[-1] < shard.num_tokens)
        if len(starts) != shard.num_documents or not is_inside or (np.diff(starts) < 0).any():
            raise ValueError(f"{shard.name}: its documents do not begin where its tokens are")
    if shard.target_members is not None and shard.target_runs is not None:
        check_runs(shard.target_runs, shard.num_tokens, shard.name)
        for chunk, (_, size, crc32) in enumerate(shard.target_members.tolist()):
            data = runs_member(shard.target_runs, chunk * chunk_tokens, (chunk + 1) * chunk_tokens)
            if (len(data), zlib.crc32(data)) != (size, crc32):
                raise ValueError(f"{shard.name}: its target_runs are not those of its chunk {chunk}")
