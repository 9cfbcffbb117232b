"""Whole documents in rows: which piece of which document stands where, from the index alone. Loads no torch.

    where documents of a shard start -> pieces of at most L tokens -> best fit into rows of L, each piece from the
    beginning of a block -> ShardRows

A shard is packed by itself, so a damaged one costs its own rows only. How many rows it gives, and how long the pieces
of each row are, follows from the lengths of its documents; which of the pieces that fill equally many blocks it is
changes from epoch to epoch. So the order of the rows (data/order.py) is sought in as for streams.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bd3lm_scale.rng import derive_key, permute

_KEPT_PLANS = 128


@dataclass(eq=False)
class ShardRows:
    """The rows of one shard; pieces lie in the order of rows and of places inside them.

    Attributes:
        first: (R + 1,) number of each row's first piece, and of pieces in all.
        start: (P,) first token of each piece in the shard.
        length: (P,) tokens of each piece.
        place: (P,) where in its row it begins.
    """

    first: np.ndarray
    start: np.ndarray
    length: np.ndarray
    place: np.ndarray

    @cached_property
    def tokens(self) -> np.ndarray:
        """(R,) tokens in each row, padding not counted."""
        return np.add.reduceat(self.length, self.first[:-1])

    def pieces(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of `row` (n,), piece), both (pieces in all of them,)."""
        count = self.first[row + 1] - self.first[row]
        owner = np.repeat(np.arange(len(row)), count)
        inner = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        return owner, self.first[row][owner] + inner


def pack_documents(document_starts: np.ndarray, num_tokens: int, length: int, block_size: int, key: int) -> ShardRows:
    """Pack one shard.

    Args:
        document_starts: int64, where documents begin; what lies before the first one ends a document of another shard.
        num_tokens: of the shard.
        length: L, tokens of a row, a multiple of block_size.
        block_size: pieces begin at multiples of it.
        key: decides which of equally long pieces go together, and the order of the rows.
    """
    start, size = _cut(document_starts, num_tokens, length)
    shuffled = permute(np.arange(len(size)), len(size), key)
    order = shuffled[np.argsort(-(-(-size // block_size))[shuffled], kind="stable")]
    row, slot, num_rows = _best_fit(-(-size[order] // block_size), length // block_size)
    row = permute(row, num_rows, key + 1)
    by_row = np.lexsort((slot, row))
    order = order[by_row]
    first = np.searchsorted(row[by_row], np.arange(num_rows + 1))
    return ShardRows(first, start[order], size[order], slot[by_row] * block_size)


def count_rows(document_starts: np.ndarray, num_tokens: int, length: int, block_size: int) -> int:
    """How many rows `pack_documents` makes, under every key."""
    _, size = _cut(document_starts, num_tokens, length)
    return _best_fit(np.sort(-(-size // block_size))[::-1], length // block_size)[2]


def _cut(document_starts: np.ndarray, num_tokens: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of tokens of each piece."""
    edges = np.unique(np.concatenate([[0], document_starts, [num_tokens]]))
    count = -(-np.diff(edges) // length)
    inner = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start = np.repeat(edges[:-1], count) + inner * length
    return start, np.minimum(length, np.repeat(edges[1:], count) - start)


def _best_fit(size: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Best fit for falling sizes: each goes where it leaves least room. (bin, first place in it) of each, and bins.

    Equal sizes are placed together, so the cost is that of different sizes and not of pieces.
    """
    row, slot = np.zeros_like(size), np.zeros_like(size)
    free: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # bins by the room they have
    room = np.zeros(capacity + 1, np.int64)
    num_rows = done = 0
    rising = -size
    while done < len(size):
        wanted = int(size[done])
        end = int(np.searchsorted(rising, -wanted, side="right"))
        while done < end:
            best = wanted + int(np.argmax(room[wanted:] > 0))
            if not room[best]:
                per_row = capacity // wanted
                opened = -(-(end - done) // per_row)
                best, count = capacity, min(opened, end - done)
                bins = np.arange(num_rows, num_rows + count)
                num_rows += count
            else:
                count = min(int(room[best]), end - done)
                bins = _take(free[best], count)
                room[best] -= count
            row[done : done + count], slot[done : done + count] = bins, capacity - best
            done += count
            if best > wanted:
                free[best - wanted].append(bins)
                room[best - wanted] += count
    return row, slot, num_rows


def _take(stack: list[np.ndarray], count: int) -> np.ndarray:
    """The last `count` bins of a stack."""
    taken: list[np.ndarray] = []
    while count:
        bins = stack.pop()
        if len(bins) > count:
            stack.append(bins[:-count])
            bins = bins[-count:]
        taken.append(bins)
        count -= len(bins)
    return np.concatenate(taken)


@dataclass
class DocumentRows:
    """The packed rows of one dataset's shards; remembers the plans used last.

    Attributes:
        document_starts: of a shard by number.
        documents_before: int64 (S + 1,), documents that start in earlier shards.
        tokens_per_shard: int64 (S,).
        length: L.
        block_size: pieces begin at multiples of it.
        seed: the run's; None for validation, whose rows are the same for every seed.
        source: number of the dataset in a mixture, 0 alone.
    """

    document_starts: Callable[[int], np.ndarray]
    documents_before: np.ndarray
    tokens_per_shard: np.ndarray
    length: int
    block_size: int
    seed: int | None
    source: int = 0
    _plans: OrderedDict[tuple[int, int], ShardRows] = field(default_factory=OrderedDict, repr=False)

    @cached_property
    def rows_per_shard(self) -> np.ndarray:
        """int64 (S,), the same in every epoch."""
        counts = [
            count_rows(self.document_starts(shard), int(tokens), self.length, self.block_size)
            for shard, tokens in enumerate(self.tokens_per_shard)
        ]
        return np.array(counts, np.int64)

    def plan(self, shard: int, epoch: int) -> ShardRows:
        """The rows of a shard in an epoch (validation: in every one)."""
        epoch = 0 if self.seed is None else epoch
        if (shard, epoch) in self._plans:
            self._plans.move_to_end((shard, epoch))
        else:
            key = derive_key(self.seed or 0, "packing" if self.seed is not None else "held-out packing", self.source,
                             epoch, shard)  # fmt: skip
            tokens = int(self.tokens_per_shard[shard])
            plan = pack_documents(self.document_starts(shard), tokens, self.length, self.block_size, key)
            self._plans[shard, epoch] = plan
            if len(self._plans) > _KEPT_PLANS:
                self._plans.popitem(last=False)
        return self._plans[shard, epoch]

    def layout(self, shard: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Number of each position's document in its row, int32 (n, L); -1: padding."""
        document = np.full((len(row), self.length), -1, np.int32)
        flat = document.reshape(-1)
        for owner, plan, piece in self._pieces(shard, epoch, row):
            size = plan.length[piece]
            inner = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
            place = np.repeat(owner * self.length + plan.place[piece], size) + inner
            is_new = np.append(True, owner[1:] != owner[:-1])
            number = np.arange(len(owner)) - np.maximum.accumulate(np.where(is_new, np.arange(len(owner)), 0))
            flat[place] = np.repeat(number, size)
        return document

    def runs(self, shard: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Of each piece: shard, first token there, place among the rows laid end to end, length; int64 (4, pieces)."""
        found = []
        for owner, plan, piece in self._pieces(shard, epoch, row):
            place = owner * self.length + plan.place[piece]
            found.append(np.stack([shard[owner], plan.start[piece], place, plan.length[piece]]))
        return np.concatenate(found, axis=1) if found else np.zeros((4, 0), np.int64)

    def documents(self, shard: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of the rows, number of the document in the dataset) of each piece, in the order of their places."""
        owners, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for owner, plan, piece in self._pieces(shard, epoch, row):
            number = int(shard[owner[0]])
            # what stands before a shard's first start goes on from the shard before
            inner = np.searchsorted(self.document_starts(number), plan.start[piece], side="right") - 1
            owners.append(owner)
            numbers.append(np.maximum(0, self.documents_before[number] + inner))
        return np.concatenate(owners), np.concatenate(numbers)

    def num_targets(self, shard: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> np.ndarray:
        """int64 (n, 2): tokens of each row, and how many of them begin a piece."""
        out = np.zeros((len(row), 2), np.int64)
        for chosen, plan in self._by_plan(shard, epoch):
            rows = row[chosen]
            out[chosen] = np.stack([plan.tokens[rows], plan.first[rows + 1] - plan.first[rows]], axis=1)
        return out

    def _by_plan(self, shard: np.ndarray, epoch: np.ndarray):
        """(which of the rows, their plan), plan by plan."""
        both = np.stack([shard, epoch], axis=1)
        for number, turn in np.unique(both, axis=0).tolist():
            yield np.flatnonzero((shard == number) & (epoch == turn)), self.plan(number, turn)

    def _pieces(self, shard: np.ndarray, epoch: np.ndarray, row: np.ndarray):
        """(owner among the rows, plan, piece) of all pieces, plan by plan."""
        for chosen, plan in self._by_plan(shard, epoch):
            owner, piece = plan.pieces(row[chosen])
            yield chosen[owner], plan, piece
