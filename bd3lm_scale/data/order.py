"""The sample order as a pure function: which row of which shard the global sample index g means.

    g -> (epoch, index in the epoch) -> shards permuted per epoch -> rows permuted inside a window of shards

Nothing has state, so seeking costs nothing, and neither ranks nor workers nor batch sizes can enter.
"""

from dataclasses import dataclass, field

import numpy as np

from bd3lm_scale.rng import derive_key, mix64, permute

MIXTURE_PERIOD = 1 << 16
_MASK64 = (1 << 64) - 1
_CACHED_EPOCHS = 4
_MAX_SUBSTITUTION_ROUNDS = 10_000


@dataclass(frozen=True)
class _EpochTable:
    """One epoch's shards in reading order, cut into windows."""

    shard: np.ndarray  # (S,) shard numbers in the epoch's order
    row_start: np.ndarray  # (S + 1,) rows before each of them
    window_start: np.ndarray  # (W + 1,) rows before each window


@dataclass
class RowOrder:
    """The order of one dataset; remembers the last epochs' tables.

    Attributes:
        rows_per_shard: int64 (S,), in manifest order.
        seed: the run's seed.
        window: shards whose rows are permuted together.
        source: number of the dataset in a mixture, 0 alone.
        excluded: numbers of damaged shards, never all that have rows; their rows are replaced, no other row moves.
    """

    rows_per_shard: np.ndarray
    seed: int
    window: int
    source: int = 0
    excluded: frozenset[int] = frozenset()
    _tables: dict[int, _EpochTable] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        """Rows per epoch."""
        return int(self.rows_per_shard.sum())

    def locate(self, sample_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row in the shard of each sample, both int64 like `sample_index` (n,)."""
        epoch, place = np.divmod(np.asarray(sample_index, np.int64), self.num_rows)
        shard = np.zeros_like(place)
        row = np.zeros_like(place)
        for number in np.unique(epoch):
            chosen = epoch == number
            shard[chosen], row[chosen] = self._locate_in_epoch(int(number), place[chosen])
        return self._substitute(sample_index, shard, row) if self.excluded else (shard, row)

    def locate_natural(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and row in the shard, both int64 (n,), of the rows (n,) in manifest order."""
        row_start = np.concatenate([[0], np.cumsum(self.rows_per_shard)])
        shard = np.searchsorted(row_start, row, side="right") - 1
        return shard, row - row_start[shard]

    def shards_needed(self, sample_index: int) -> list[int]:
        """Shards of the window that holds this sample and of the next one, which the epoch's end may cut off."""
        epoch, place = divmod(int(sample_index), self.num_rows)
        table = self._table(epoch)
        window = int(np.searchsorted(table.window_start, place, side="right")) - 1
        needed = table.shard[window * self.window : (window + 2) * self.window].tolist()
        return [shard for shard in needed if shard not in self.excluded and self.rows_per_shard[shard]]

    def _table(self, epoch: int) -> _EpochTable:
        if epoch not in self._tables:
            count = len(self.rows_per_shard)
            key = derive_key(self.seed, "shards", self.source, epoch)
            shard = permute(np.arange(count), count, key)
            row_start = np.concatenate([[0], np.cumsum(self.rows_per_shard[shard])])
            window_start = np.append(row_start[: count : self.window], row_start[-1])
            while len(self._tables) >= _CACHED_EPOCHS:
                self._tables.pop(next(iter(self._tables)))
            self._tables[epoch] = _EpochTable(shard, row_start, window_start)
        return self._tables[epoch]

    def _locate_in_epoch(self, epoch: int, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = self._table(epoch)
        window = np.searchsorted(table.window_start, place, side="right") - 1
        for number in np.unique(window):
            chosen = window == number
            start, stop = table.window_start[number], table.window_start[number + 1]
            key = derive_key(self.seed, "rows", self.source, epoch, int(number))
            place[chosen] = start + permute(place[chosen] - start, int(stop - start), key)
        slot = np.searchsorted(table.row_start, place, side="right") - 1
        return table.shard[slot], place - table.row_start[slot]

    def _substitute(self, sample_index, shard, row) -> tuple[np.ndarray, np.ndarray]:
        """Replace rows of excluded shards by hashed others.

        Each sample has its own endless sequence of candidates and takes the first that is not excluded, so
        excluding one more shard moves nothing but that shard's rows and what had been replaced by them.
        """
        row_start = np.concatenate([[0], np.cumsum(self.rows_per_shard)])
        excluded = np.array(sorted(self.excluded))
        base = np.uint64(derive_key(self.seed, "substitute", self.source) & _MASK64)
        bad = np.isin(shard, excluded)
        for attempt in range(_MAX_SUBSTITUTION_ROUNDS):
            if not bad.any():
                return shard, row
            words = mix64(np.asarray(sample_index)[bad].astype(np.uint64) ^ base)
            words = mix64(words ^ np.uint64(attempt))
            candidate = (words % np.uint64(row_start[-1])).astype(np.int64)
            shard[bad] = np.searchsorted(row_start, candidate, side="right") - 1
            row[bad] = candidate - row_start[shard[bad]]
            bad = np.isin(shard, excluded)
        raise ValueError(f"data: only {row_start[-1]} rows, nearly all excluded as damaged; restore the shards")


@dataclass(frozen=True)
class MixtureOrder:
    """Which source, and which of its samples, each global sample is: weights hold exactly in every period.

    Each run of MIXTURE_PERIOD samples gives source i its `quota[i]` slots, permuted anew per period; source i's
    samples are used in order, each exactly once.
    """

    quota: np.ndarray
    seed: int

    def locate(self, sample_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source number and sample index within the source, int64 like `sample_index` (n,)."""
        period, place = np.divmod(np.asarray(sample_index, np.int64), MIXTURE_PERIOD)
        slot = np.zeros_like(place)
        for number in np.unique(period):
            chosen = period == number
            key = derive_key(self.seed, "mixture", int(number))
            slot[chosen] = permute(place[chosen], MIXTURE_PERIOD, key)
        start = np.concatenate([[0], np.cumsum(self.quota)])
        source = np.searchsorted(start, slot, side="right") - 1
        return source, period * self.quota[source] + slot - start[source]


def weighted_order(weights: list[float], rows: list[int]) -> np.ndarray:
    """The rows of several datasets, each once: any first N hold the datasets by weight, as far as these reach.

    Args:
        weights: of the datasets, positive.
        rows: how many rows each of them has.

    Returns:
        int64 (sum of rows,): numbers of the rows when the datasets lie one after another.
    """
    source = np.repeat(np.arange(len(rows)), rows)
    inner = np.concatenate([np.arange(count) for count in rows])
    # row k of a dataset stands where its share reaches k + 1/2
    return np.lexsort((source, (inner + 0.5) / np.asarray(weights, np.float64)[source]))


def mixture_quota(weights: list[float]) -> np.ndarray:
    """Slots per period for positive weights, by largest remainder; int64, sums to MIXTURE_PERIOD."""
    share = np.asarray(weights, np.float64)
    if not (np.isfinite(share).all() and (share > 0).all()):
        raise ValueError(f"data.mixture: weights {weights} must be positive; leave a dataset out instead of weight 0")
    exact = share / share.sum() * MIXTURE_PERIOD
    quota = np.floor(exact).astype(np.int64)
    rest = MIXTURE_PERIOD - int(quota.sum())
    quota[np.argsort(quota - exact, kind="stable")[:rest]] += 1
    if not quota.all():
        raise ValueError(f"data.mixture: a weight of {weights} is below 1/{MIXTURE_PERIOD} of the sum; leave it out")
    return quota
