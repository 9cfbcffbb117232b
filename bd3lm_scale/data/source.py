"""Token rows by global sample index: order, shards and mixture joined. Loads no torch: data workers start fast."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bd3lm_scale.config import DataConfig
from bd3lm_scale.data.order import MixtureOrder, RowOrder, mixture_quota
from bd3lm_scale.data.reader import ShardReader
from bd3lm_scale.data.shards import MANIFEST, Manifest, Shard, TokenizerIdentity, manifest_from_json


@dataclass(frozen=True)
class _Dataset:
    """One split of one folder of shards."""

    manifest: Manifest
    reader: ShardReader
    order: RowOrder
    prefix: str  # what its shard names begin with in a mixture


class RowSource:
    """Rows of `context_length` tokens of one split, of one dataset or a mixture.

    Args:
        config: the run's data section.
        seed: the run's seed.
        split: "train" is shuffled and endless; "validation" is in natural order and ends.
        excluded: names of damaged training shards to go without.
    """

    def __init__(self, config: DataConfig, seed: int, split: str, excluded: tuple[str, ...] = ()):
        self.config = config
        self.seed = seed
        self.split = split
        self.excluded = excluded
        self.datasets = tuple(
            _open_dataset(config, path, seed, split, number, excluded) for number, path in enumerate(paths_of(config))
        )
        self.tokenizer = _same_tokenizer(config, [d.manifest.tokenizer for d in self.datasets])
        self.dtype = self.datasets[0].manifest.dtype
        self.num_rows = sum(d.order.num_rows for d in self.datasets)
        self._mixture = None
        if len(self.datasets) > 1:
            self._mixture = MixtureOrder(mixture_quota([m.weight for m in config.mixture]), seed)

    def read(self, sample_index: np.ndarray) -> np.ndarray:
        """Rows (n, L) in the stored dtype for int64 sample indices (n,)."""
        sample_index = np.asarray(sample_index, np.int64)
        if self.split == "validation":
            return self._read_natural(sample_index)
        if self._mixture is None:
            return self._read_shuffled(self.datasets[0], sample_index)
        source, inner = self._mixture.locate(sample_index)
        return self._gather(source, inner, self._read_shuffled)

    def close(self) -> None:
        """Close all files."""
        for dataset in self.datasets:
            dataset.reader.close()

    def _read_natural(self, row: np.ndarray) -> np.ndarray:
        if row.size and not 0 <= row.min() <= row.max() < self.num_rows:
            raise ValueError(f"validation row {row.max()} does not exist: there are {self.num_rows}")
        starts = np.concatenate([[0], np.cumsum([d.order.num_rows for d in self.datasets])])
        source = np.searchsorted(starts, row, side="right") - 1
        return self._gather(source, row - starts[source], self._read_in_order)

    def _gather(self, source: np.ndarray, inner: np.ndarray, read) -> np.ndarray:
        out = np.zeros((len(inner), self.config.context_length), self.datasets[0].manifest.dtype)
        for number in np.unique(source):
            chosen = source == number
            out[chosen] = read(self.datasets[number], inner[chosen])
        return out

    def _read_shuffled(self, dataset: _Dataset, sample_index: np.ndarray) -> np.ndarray:
        return self._read_rows(dataset, *dataset.order.locate(sample_index))

    def _read_in_order(self, dataset: _Dataset, row: np.ndarray) -> np.ndarray:
        row_start = np.concatenate([[0], np.cumsum(dataset.order.rows_per_shard)])
        shard = np.searchsorted(row_start, row, side="right") - 1
        return self._read_rows(dataset, shard, row - row_start[shard])

    def _read_rows(self, dataset: _Dataset, shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        length = self.config.context_length
        return dataset.reader.read(shard, row * length, length)


def paths_of(config: DataConfig) -> tuple[str, ...]:
    """The dataset folders a configuration names, in mixture order (ValueError when it names none)."""
    if config.mixture and config.path:
        raise ValueError("data.path and data.mixture are both set; give one of them")
    paths = tuple(m.path for m in config.mixture) if config.mixture else (config.path,)
    if not all(paths):
        raise ValueError("data.path: not set; give the folder written by tools/prepare_data.py (make demo-data)")
    return tuple(str(path) for path in paths)


def read_manifest(path: str, split: str) -> Manifest:
    """The manifest of one split of a dataset folder."""
    file = Path(path) / split / MANIFEST
    if not file.exists():
        raise ValueError(
            f"data.path ({path}): no {split}/{MANIFEST} there; give a folder written by tools/prepare_data.py "
            "(make demo-data builds data/demo)"
        )
    return manifest_from_json(file.read_text(encoding="utf-8"), str(file))


def _open_dataset(
    config: DataConfig, path: str, seed: int, split: str, number: int, excluded: tuple[str, ...]
) -> _Dataset:
    manifest = read_manifest(path, split)
    folder = Path(path) / split
    prefix = f"{number}:" if config.mixture else ""
    rows = np.array([shard.num_tokens // config.context_length for shard in manifest.shards], np.int64)
    if not rows.sum():
        raise ValueError(
            f"data.path ({path}): no text: its {manifest.num_tokens} {split} tokens give no row of "
            f"data.context_length={config.context_length}; prepare more text or use shorter rows"
        )
    damaged = frozenset(i for i, shard in enumerate(manifest.shards) if prefix + shard.name in excluded)
    order = RowOrder(rows, seed, config.shuffle_window, number, damaged)

    def find(shard: Shard) -> Path:
        return folder / shard.name

    return _Dataset(manifest, ShardReader(manifest, find, lambda shard: False, config.retries), order, prefix)


def _same_tokenizer(config: DataConfig, identities: list[TokenizerIdentity]) -> TokenizerIdentity:
    for path, identity in zip(paths_of(config), identities, strict=True):
        if identity.hash != identities[0].hash:
            raise ValueError(
                f"data.mixture ({path}): made with tokenizer {identity.hash[:12]}, the first dataset with "
                f"{identities[0].hash[:12]}; prepare all of them with the same --tokenizer"
            )
    return identities[0]
