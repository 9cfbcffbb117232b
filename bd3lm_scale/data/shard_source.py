"""Token rows by global sample index: order, shards and mixture joined. Loads no torch: data workers start fast."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.dataset_folder import read_manifest
from bd3lm_scale.data.document_rows import DocumentRows
from bd3lm_scale.data.files import open_files
from bd3lm_scale.data.order import MixtureOrder, RowOrder, mixture_quota, weighted_order
from bd3lm_scale.data.reader import ShardReader
from bd3lm_scale.data.shard_list import ShardList
from bd3lm_scale.data.shards import Manifest, TokenizerIdentity, data_digest
from bd3lm_scale.data.targets import RowLayout, TargetIndex
from bd3lm_scale.errors import BadShardError, ConfigError, NoShardLeftError


@dataclass(frozen=True)
class _Dataset:
    """One split of one folder of shards; `packed` says which documents its rows hold, None where rows are a stream."""

    manifest: Manifest
    shards: ShardList
    reader: ShardReader
    order: RowOrder
    packed: DocumentRows | None

    @property
    def has_targets(self) -> bool:
        """Whether its shards say which tokens are targets."""
        return self.manifest.num_targets is not None

    def shard_name(self, number: int) -> str:
        """What errors and exclusions call the shard."""
        return self.reader.prefix + self.shards.entry(number).name


class ShardSource:
    """Rows of `context_length` tokens of one split, of one dataset or a mixture.

    Args:
        config: the run's data section.
        seed: the run's seed.
        split: "train" is shuffled and endless; "validation" is in natural order, dataset after dataset, and ends.
        excluded: names of damaged shards to go without.
        block_size: what documents of packed rows begin at multiples of.

    Attributes:
        num_rows: rows per epoch, of all datasets together.
        dtype: what rows are read as.
        tokenizer: the identity all datasets share, with the chat template of those that have one.
        tokenizer_home: the folder that has it.
        has_layout: whether rows are made of documents, or some tokens are no targets.
        is_packed: whether rows are made of documents.
    """

    def __init__(self, config: DataConfig, seed: int, split: str, excluded: tuple[str, ...] = (), block_size: int = 1):
        self.config = config
        self.seed = seed
        self.split = split
        self.excluded = excluded
        self.block_size = block_size
        self.is_packed = config.packing == "documents"
        self._datasets = tuple(_open_dataset(self, path, number) for number, path in enumerate(paths_of(config)))
        self.tokenizer, self.tokenizer_home = _same_tokenizer(config, [d.manifest.tokenizer for d in self._datasets])
        self.has_layout = self.is_packed or any(dataset.has_targets for dataset in self._datasets)
        self.dtype = np.dtype(self._datasets[0].manifest.dtype)
        self.num_rows = sum(d.order.num_rows for d in self._datasets)
        self._mixture = None
        if len(self._datasets) > 1:
            self._mixture = MixtureOrder(mixture_quota([m.weight for m in config.mixture]), seed)

    @property
    def data_hash(self) -> str:
        """Hash of all shards in order; a copy elsewhere has the same."""
        return data_digest(dataset.shards for dataset in self._datasets)

    def seek(self, origin: int) -> None:
        """Told where a batch reader begins; every row can be read at any time, so nothing to do."""

    def without(self, excluded: tuple[str, ...]) -> "ShardSource":
        """The same rows, but for those of exactly these shards. NoShardLeftError when that leaves no row."""
        return ShardSource(self.config, self.seed, self.split, excluded, self.block_size)

    def read(self, sample_index: np.ndarray) -> np.ndarray:
        """Rows (n, L) in the stored dtype for int64 sample indices (n,). BadShardError, ValueError."""
        source, shard, row, inner = self._locate(sample_index)
        fill = self.tokenizer.pad_token_id if self.is_packed else 0
        out = np.full((len(source), self.config.context_length), fill, self.dtype)
        for number in np.unique(source):
            dataset, chosen = self._datasets[number], source == number
            if self.split == "train" and dataset.reader.files.is_remote:
                needed = dataset.order.shards_needed(int(inner[chosen].min()))
                dataset.reader.files.fetch_ahead([dataset.shards.entry(i) for i in needed])
            out[chosen] = self._read(dataset, shard[chosen], row[chosen], inner[chosen], out[chosen])
        return out

    def _read(
        self, dataset: _Dataset, shard: np.ndarray, row: np.ndarray, inner: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Rows (n, L) of one dataset; `rows` are filled with padding."""
        if dataset.packed is None:
            length = row_payload(self.config)
            text = dataset.reader.read(shard, row * length, length)
            return wrap_rows(text, self.tokenizer) if self.config.wrap_rows else text
        little_endian = rows.astype(self.dtype.newbyteorder("<"), copy=False)
        dataset.reader.read_runs(
            little_endian.reshape(-1), dataset.packed.runs(shard, inner // dataset.order.num_rows, row)
        )
        return little_endian

    def layout(self, sample_index: np.ndarray) -> RowLayout:
        """The targets of rows, and their documents where they are packed, for int64 sample indices (n,). BadShardError.

        In a dataset without marks every token is one; BOS and EOS around a row of answers are none.
        """
        source, shard, row, inner = self._locate(sample_index)
        if self.is_packed:
            return self._documents_of_rows(source, shard, row, inner)
        out = RowLayout(np.ones((len(source), self.config.context_length), bool))
        length = row_payload(self.config)
        for chosen, targets in self._marked(source, shard):
            marks = targets.mark(row[chosen] * length, length)
            out.is_target[chosen] = np.pad(marks, ((0, 0), (1, 1))) if self.config.wrap_rows else marks
        return out

    def num_targets(self, sample_index: np.ndarray) -> np.ndarray:
        """Targets of rows, and how many of them begin a row; int64 (n, 2), from the index alone. BadShardError."""
        source, shard, row, inner = self._locate(sample_index)
        if self.is_packed:
            return self._tokens_of_rows(source, shard, row, inner)
        out = np.tile(np.array([self.config.context_length, 1], np.int64), (len(source), 1))
        length = row_payload(self.config)
        for chosen, targets in self._marked(source, shard):
            start = row[chosen] * length
            out[chosen, 0] = targets.count(start, length)
            out[chosen, 1] = 0 if self.config.wrap_rows else targets.count(start, 1)
        return out

    def _marked(self, source: np.ndarray, shard: np.ndarray) -> Iterator[tuple[np.ndarray, TargetIndex]]:
        """(which of the rows, their shard's targets), for every shard that has marks."""
        for number in np.unique(source):
            dataset = self._datasets[number]
            if dataset.has_targets:
                for one in np.unique(shard[source == number]):
                    yield np.flatnonzero((source == number) & (shard == one)), dataset.reader.targets(int(one))

    def _documents_of_rows(
        self, source: np.ndarray, shard: np.ndarray, row: np.ndarray, inner: np.ndarray
    ) -> RowLayout:
        """Which document each position of packed rows belongs to."""
        document = np.zeros((len(source), self.config.context_length), np.int32)
        for _, chosen, packed, rows in self._packed(source, shard, row, inner):
            document[chosen] = packed.layout(*rows)
        return RowLayout(document >= 0, document)

    def _tokens_of_rows(self, source: np.ndarray, shard: np.ndarray, row: np.ndarray, inner: np.ndarray) -> np.ndarray:
        """Tokens of packed rows, and how many of them begin a document; int64 (n, 2), from the index alone."""
        out = np.zeros((len(source), 2), np.int64)
        for _, chosen, packed, rows in self._packed(source, shard, row, inner):
            out[chosen] = packed.num_targets(*rows)
        return out

    def _packed(
        self, source: np.ndarray, shard: np.ndarray, row: np.ndarray, inner: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, DocumentRows, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """(number, which of the rows, what packs them, their shard, epoch and row) of each dataset."""
        for number in np.unique(source).tolist():
            dataset, chosen = self._datasets[number], np.flatnonzero(source == number)
            assert dataset.packed is not None, "only packed rows have a layout"
            yield number, chosen, dataset.packed, (shard[chosen], inner[chosen] // dataset.order.num_rows, row[chosen])

    @property
    def num_documents(self) -> int:
        """Documents of the split, dataset after dataset."""
        return sum(d.manifest.num_documents for d in self._datasets)

    def document_numbers(self, sample_index: np.ndarray) -> np.ndarray:
        """Which of them the documents of each packed row are, int64 (n, K), filled up with -1."""
        source, shard, row, inner = self._locate(sample_index)
        before = np.cumsum([0, *(d.manifest.num_documents for d in self._datasets)])
        parts = []
        for number, chosen, packed, rows in self._packed(source, shard, row, inner):
            owner, document = packed.documents(*rows)
            parts.append((chosen[owner], document + before[number]))
        owner, document = (np.concatenate(found) for found in zip(*parts, strict=True))
        order = np.argsort(owner, kind="stable")
        owner, document = owner[order], document[order]
        place = np.arange(len(owner)) - np.searchsorted(owner, owner)
        out = np.full((len(source), int(place.max()) + 1), -1, np.int64)
        out[owner, place] = document
        return out

    @property
    def padding_share(self) -> float:
        """Share of the positions of packed rows that is padding; 0 for a stream."""
        tokens = sum(d.manifest.num_tokens for d in self._datasets)
        return 1 - tokens / (self.num_rows * self.config.context_length) if self.is_packed else 0.0

    @property
    def num_sound_rows(self) -> int:
        """Rows per epoch, or for validation, where rows of excluded shards are not replaced by others, the rest."""
        return len(self._validation_order) if self._validation_order is not None else self.num_rows

    def by_weight(self, position: np.ndarray) -> np.ndarray:
        """The row (n,) at each place of an order whose first N places hold a mixture's datasets by weight."""
        return position if self._validation_order is None else self._validation_order[position]

    @cached_property
    def _validation_order(self) -> np.ndarray | None:
        """The sound validation rows; None where they are simply all rows in order."""
        if self.split == "train" or (len(self._datasets) == 1 and not self.excluded):
            return None
        weights = [m.weight for m in self.config.mixture] or [1.0]
        order = weighted_order(weights, [dataset.order.num_rows for dataset in self._datasets])
        source, shard, _, _ = self._locate(order)
        is_sound = np.ones(len(order), bool)
        for number, dataset in enumerate(self._datasets):
            is_sound &= (source != number) | ~np.isin(shard, sorted(dataset.order.excluded))
        return order[is_sound]

    def dataset_of(self, sample_index: np.ndarray) -> np.ndarray:
        """Number of the dataset, in a mixture's order, that each row (n,) comes from."""
        return self._locate(sample_index)[0]

    def shard_of(self, sample_index: int) -> str:
        """The name, as in `excluded`, of the shard that a row comes from."""
        source, shard, _, _ = self._locate(np.array([sample_index]))
        return self._datasets[source[0]].shard_name(int(shard[0]))

    def close(self) -> None:
        """Close all files."""
        for dataset in self._datasets:
            dataset.reader.close()

    def _locate(self, sample_index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Dataset, shard, row in the shard, and sample index within the dataset, each int64 (n,)."""
        index = np.asarray(sample_index, np.int64)
        is_natural = self.split == "validation"
        if is_natural and index.size and not 0 <= index.min() <= index.max() < self.num_rows:
            raise ValueError(f"validation row {index.max()} does not exist: there are {self.num_rows}")
        if is_natural:
            starts = np.concatenate([[0], np.cumsum([d.order.num_rows for d in self._datasets])])
            source = np.searchsorted(starts, index, side="right") - 1
            inner = index - starts[source]
        elif self._mixture is not None:
            source, inner = self._mixture.locate(index)
        else:
            source, inner = np.zeros_like(index), index
        shard, row = np.zeros_like(index), np.zeros_like(index)
        for number in np.unique(source):
            order, chosen = self._datasets[number].order, source == number
            find = order.locate_natural if is_natural else order.locate
            shard[chosen], row[chosen] = find(inner[chosen])
        return source, shard, row, inner


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


def _open_dataset(source: ShardSource, path: str, number: int) -> _Dataset:
    config, split = source.config, source.split
    manifest = read_manifest(config, path, split)
    prefix = f"{number}:" if config.mixture else ""
    shards = manifest.shards
    assert isinstance(shards, ShardList)
    reader = ShardReader(manifest, shards, open_files(path, split, config), config.retries, prefix)
    packed = _documents(source, path, reader, number) if source.is_packed else None
    rows = shards.num_tokens // row_payload(config) if packed is None else packed.rows_per_shard
    if not rows.sum():
        raise ValueError(
            f"data.path ({path}): no text: its {manifest.num_tokens} {split} tokens give no row of "
            f"data.context_length={config.context_length}; prepare more text or use shorter rows"
        )
    names = [name.removeprefix(prefix) for name in source.excluded if name.startswith(prefix)]
    damaged = frozenset(shards.find(names))
    if damaged and not np.delete(rows, sorted(damaged)).any():
        raise NoShardLeftError(path, [prefix + shards.entry(i).name for i in sorted(damaged)])
    order = RowOrder(rows, source.seed, config.shuffle_window, number, damaged)
    return _Dataset(manifest, shards, reader, order, packed)


def _documents(source: ShardSource, path: str, reader: ShardReader, number: int) -> DocumentRows:
    """Which documents the rows of a dataset hold (ConfigError where its shards cannot say where documents begin)."""
    if reader.manifest.num_targets is not None:
        reason = f"data.packing (documents): {path} holds conversations, rows of a stream; use data.packing=stream"
        raise ConfigError([reason], source="the data")
    if reader.files.is_remote and reader.shards[0].document_starts is None:
        reason = (
            f"data.packing (documents): {path} is remote and has no index that says where documents begin; "
            "prepare it anew, copy it to a local folder, or use data.packing=stream"
        )
        raise ConfigError([reason], source="the data")
    tokens = np.asarray(reader.shards.num_tokens, np.int64)
    seed = source.seed if source.split == "train" else None
    documents = np.cumsum([0, *reader.shards.num_documents])
    packed = DocumentRows(
        reader.document_starts, documents, tokens, source.config.context_length, source.block_size, seed, number
    )
    try:
        _ = packed.rows_per_shard
    except BadShardError as problem:
        reason = f"data.packing (documents): {problem}; without its documents no row is known: restore the shard"
        raise ConfigError([reason], source="the data") from problem
    return packed


def _same_tokenizer(config: DataConfig, identities: list[TokenizerIdentity]) -> tuple[TokenizerIdentity, str]:
    """The datasets' tokenizer, and the folder to take it from: one that has the chat template of conversations."""
    chosen = next((number for number, identity in enumerate(identities) if identity.chat_template), 0)
    for path, identity in zip(paths_of(config), identities, strict=True):
        if identity.hash != identities[0].hash:
            raise ValueError(
                f"data.mixture ({path}): made with tokenizer {identity.hash[:12]}, the first dataset with "
                f"{identities[0].hash[:12]}; prepare all of them with the same --tokenizer"
            )
        if identity.chat_template not in ("", identities[chosen].chat_template):
            raise ValueError(
                f"data.mixture ({path}): its conversations are written with another chat template than those before; "
                "prepare all of them with the same --chat-template"
            )
    return identities[chosen], paths_of(config)[chosen]
