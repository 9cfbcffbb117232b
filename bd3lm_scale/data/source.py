"""What rows come from: prepared shards, or text tokenized on the fly. Loads no torch."""

from typing import Protocol

import numpy as np

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.shard_source import ShardSource
from bd3lm_scale.data.shards import TokenizerIdentity
from bd3lm_scale.data.targets import RowLayout
from bd3lm_scale.data.text_source import TextSource


class Source(Protocol):
    """Rows of context_length tokens by global sample index."""

    config: DataConfig
    seed: int
    split: str
    excluded: tuple[str, ...]
    num_rows: int
    dtype: np.dtype
    tokenizer: TokenizerIdentity
    tokenizer_home: str
    """The dataset folder whose tokenizer is the run's."""
    has_layout: bool
    """Whether rows hold documents or tokens that are no targets; without, every row is one text to be predicted."""
    block_size: int
    """What documents begin at multiples of."""

    @property
    def data_hash(self) -> str:
        """Hash of what the rows are made of; "" for text tokenized on the fly."""
        ...

    def read(self, sample_index: np.ndarray) -> np.ndarray:
        """Rows (n, L) in `dtype` for int64 sample indices (n,)."""
        ...

    def layout(self, sample_index: np.ndarray) -> RowLayout:
        """Documents and targets of rows, where they have a layout; for int64 sample indices (n,)."""
        ...

    def num_targets(self, sample_index: np.ndarray) -> np.ndarray:
        """Targets of each row and how many of them begin a document, int64 (n, 2); no token is read."""
        ...

    @property
    def num_documents(self) -> int:
        """Documents of the split; 0 where that is not known."""
        ...

    def document_numbers(self, sample_index: np.ndarray) -> np.ndarray:
        """Which of them the documents of each packed row are, int64 (n, K), filled up with -1."""
        ...

    @property
    def padding_share(self) -> float:
        """Share of all positions that is padding."""
        ...

    @property
    def num_sound_rows(self) -> int:
        """Rows per epoch, or for validation those that lie in no excluded shard."""
        ...

    def by_weight(self, position: np.ndarray) -> np.ndarray:
        """The row (n,) at each place of an order whose first N places hold a mixture's datasets by weight."""
        ...

    def dataset_of(self, sample_index: np.ndarray) -> np.ndarray:
        """Number of the dataset, in a mixture's order, that each row (n,) comes from."""
        ...

    def shard_of(self, sample_index: int) -> str:
        """The name, as in `excluded`, of the shard that a row comes from."""
        ...

    def seek(self, origin: int) -> None:
        """Told the first sample index that the batch reader will ask for."""
        ...

    def without(self, excluded: tuple[str, ...]) -> "Source":
        """The same rows, but for those of exactly these shards."""
        ...

    def close(self) -> None:
        """Close all files."""
        ...


def open_source(config: DataConfig, seed: int, split: str, excluded: tuple[str, ...], block_size: int = 1) -> Source:
    """What `config` reads one split's rows from; documents of packed rows begin at multiples of block_size."""
    if config.stream_text:
        return TextSource(config, seed, split)
    return ShardSource(config, seed, split, excluded, block_size)
