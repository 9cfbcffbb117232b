"""Token rows by global sample index: order, shards and mixture joined. Loads no torch: data workers start fast."""

from dataclasses import dataclass

import numpy as np

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.files import open_files
from bd3lm_scale.data.order import MixtureOrder, RowOrder, mixture_quota
from bd3lm_scale.data.reader import ShardReader
from bd3lm_scale.data.shards import MANIFEST, Manifest, TokenizerIdentity, manifest_from_json
from bd3lm_scale.data.storage import is_remote, join, read_text
from bd3lm_scale.errors import NoShardLeftError


@dataclass(frozen=True)
class _Dataset:
    """One split of one folder of shards."""

    manifest: Manifest
    reader: ShardReader
    order: RowOrder


class ShardSource:
    """Rows of `context_length` tokens of one split, of one dataset or a mixture.

    Args:
        config: the run's data section.
        seed: the run's seed.
        split: "train" is shuffled and endless; "validation" is in natural order and ends.
        excluded: names of damaged training shards to go without.

    Attributes:
        num_rows: rows per epoch, of all datasets together.
        dtype: what rows are read as.
        tokenizer: the identity all datasets share.
    """

    def __init__(self, config: DataConfig, seed: int, split: str, excluded: tuple[str, ...] = ()):
        self.config = config
        self.seed = seed
        self.split = split
        self.excluded = excluded
        self._datasets = tuple(_open_dataset(self, path, number) for number, path in enumerate(paths_of(config)))
        self.tokenizer = _same_tokenizer(config, [d.manifest.tokenizer for d in self._datasets])
        self.dtype = np.dtype(self._datasets[0].manifest.dtype)
        self.num_rows = sum(d.order.num_rows for d in self._datasets)
        self._mixture = None
        if len(self._datasets) > 1:
            self._mixture = MixtureOrder(mixture_quota([m.weight for m in config.mixture]), seed)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """Those of this split, in the order of the datasets."""
        return tuple(dataset.manifest for dataset in self._datasets)

    def seek(self, origin: int) -> None:
        """Told where a batch reader begins; every row can be read at any time, so nothing to do."""

    def without(self, excluded: tuple[str, ...]) -> "ShardSource":
        """The same rows, but for those of exactly these shards. NoShardLeftError when that leaves no row."""
        return ShardSource(self.config, self.seed, self.split, excluded)

    def read(self, sample_index: np.ndarray) -> np.ndarray:
        """Rows (n, L) in the stored dtype for int64 sample indices (n,). BadShardError, ValueError."""
        sample_index = np.asarray(sample_index, np.int64)
        if self.split == "validation":
            return self._read_natural(sample_index)
        if self._mixture is None:
            return self._read_shuffled(self._datasets[0], sample_index)
        source, inner = self._mixture.locate(sample_index)
        return self._gather(source, inner, self._read_shuffled)

    def close(self) -> None:
        """Close all files."""
        for dataset in self._datasets:
            dataset.reader.close()

    def _read_natural(self, row: np.ndarray) -> np.ndarray:
        if row.size and not 0 <= row.min() <= row.max() < self.num_rows:
            raise ValueError(f"validation row {row.max()} does not exist: there are {self.num_rows}")
        starts = np.concatenate([[0], np.cumsum([d.order.num_rows for d in self._datasets])])
        source = np.searchsorted(starts, row, side="right") - 1
        return self._gather(source, row - starts[source], self._read_in_order)

    def _gather(self, source: np.ndarray, inner: np.ndarray, read) -> np.ndarray:
        out = np.zeros((len(inner), self.config.context_length), self.dtype)
        for number in np.unique(source):
            chosen = source == number
            out[chosen] = read(self._datasets[number], inner[chosen])
        return out

    def _read_shuffled(self, dataset: _Dataset, sample_index: np.ndarray) -> np.ndarray:
        if dataset.reader.files.is_remote and sample_index.size:
            needed = dataset.order.shards_needed(int(sample_index.min()))
            dataset.reader.files.fetch_ahead([dataset.manifest.shards[i] for i in needed])
        return self._read_rows(dataset, *dataset.order.locate(sample_index))

    def _read_in_order(self, dataset: _Dataset, row: np.ndarray) -> np.ndarray:
        row_start = np.concatenate([[0], np.cumsum(dataset.order.rows_per_shard)])
        shard = np.searchsorted(row_start, row, side="right") - 1
        return self._read_rows(dataset, shard, row - row_start[shard])

    def _read_rows(self, dataset: _Dataset, shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        length = row_payload(self.config)
        rows = dataset.reader.read(shard, row * length, length)
        return wrap_rows(rows, self.tokenizer) if self.config.wrap_rows else rows


def row_payload(config: DataConfig) -> int:
    """Tokens of text in a row of L: all of them, or two less when rows are wrapped in BOS and EOS."""
    return config.context_length - (2 if config.wrap_rows else 0)


def wrap_rows(rows: np.ndarray, tokenizer: TokenizerIdentity) -> np.ndarray:
    """(n, L - 2) rows as (n, L) with BOS before and EOS after each."""
    return np.pad(rows, ((0, 0), (1, 1)), constant_values=((0, 0), (tokenizer.bos_token_id, tokenizer.eos_token_id)))


def paths_of(config: DataConfig) -> tuple[str, ...]:
    """The dataset folders a configuration names, in mixture order (ValueError when it names none)."""
    if config.mixture and config.path:
        raise ValueError("data.path and data.mixture are both set; give one of them")
    paths = [m.path for m in config.mixture] if config.mixture else [config.path]
    if not all(paths):
        raise ValueError("data.path: not set; give the folder written by tools/prepare_data.py (make demo-data)")
    return tuple(str(path).removeprefix("file://") for path in paths)


def inside(folder: str, name: str) -> str:
    """The address of `name` in a dataset folder, local or remote."""
    return join(folder, name) if is_remote(folder) else f"{folder.rstrip('/')}/{name}"


def read_manifest(config: DataConfig, path: str, split: str) -> Manifest:
    """The manifest of one split of a dataset folder (ValueError when there is none)."""
    address = inside(path, f"{split}/{MANIFEST}")
    try:
        text = read_text(address, config.retries, config.timeout_seconds)
    except OSError as problem:
        raise ValueError(
            f"data.path ({path}): cannot read {split}/{MANIFEST} ({problem}); give a folder written by "
            "tools/prepare_data.py (make demo-data builds data/demo)"
        ) from problem
    return manifest_from_json(text, address)


def _open_dataset(source: ShardSource, path: str, number: int) -> _Dataset:
    config, split = source.config, source.split
    manifest = read_manifest(config, path, split)
    prefix = f"{number}:" if config.mixture else ""
    rows = np.array([shard.num_tokens // row_payload(config) for shard in manifest.shards], np.int64)
    if not rows.sum():
        raise ValueError(
            f"data.path ({path}): no text: its {manifest.num_tokens} {split} tokens give no row of "
            f"data.context_length={config.context_length}; prepare more text or use shorter rows"
        )
    damaged = frozenset(i for i, shard in enumerate(manifest.shards) if prefix + shard.name in source.excluded)
    if damaged and not np.delete(rows, sorted(damaged)).any():
        raise NoShardLeftError(path, [prefix + manifest.shards[i].name for i in sorted(damaged)])
    order = RowOrder(rows, source.seed, config.shuffle_window, number, damaged)
    reader = ShardReader(manifest, open_files(path, split, config), config.retries, prefix)
    return _Dataset(manifest, reader, order)


def _same_tokenizer(config: DataConfig, identities: list[TokenizerIdentity]) -> TokenizerIdentity:
    for path, identity in zip(paths_of(config), identities, strict=True):
        if identity.hash != identities[0].hash:
            raise ValueError(
                f"data.mixture ({path}): made with tokenizer {identity.hash[:12]}, the first dataset with "
                f"{identities[0].hash[:12]}; prepare all of them with the same --tokenizer"
            )
    return identities[0]
