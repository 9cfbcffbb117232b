"""The training text as rows that any rank can ask for by number.

open_stream(config.data, seed) -> RowStream;   RowStream.read(sample_index) -> (n, L) token ids
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.dataset_folder import inside, read_manifest
from bd3lm_scale.data.files import open_cache
from bd3lm_scale.data.shard_source import paths_of, row_payload
from bd3lm_scale.data.shards import TokenizerIdentity
from bd3lm_scale.data.source import Source, open_source
from bd3lm_scale.data.storage import DamagedError, is_remote, retrying, transfer
from bd3lm_scale.data.tokenizer import identity_of, load_tokenizer
from bd3lm_scale.errors import BadShardError
from bd3lm_scale.values import Cursor, Targets

_START = Cursor()


@dataclasses.dataclass(frozen=True)
class RowStream:
    """Rows of context_length tokens, each a pure function of (seed, manifest, excluded shards, sample index).

    Attributes:
        source: what reads them, in this process; worker processes make their own.
        num_rows: rows per epoch (validation: sound rows there are).
        vocab_size: ids, the mask included.
        mask_token_id: id of the mask.
        tokenizer_path: local folder with the tokenizer the shards were made with.
        tokenizer_hash: its identity.
        data_hash: identity of the shards, wherever they lie; "" for text tokenized on the fly.
    """

    source: Source
    num_rows: int
    vocab_size: int
    mask_token_id: int
    tokenizer_path: str
    tokenizer_hash: str
    data_hash: str = ""

    def read(self, sample_index: np.ndarray) -> np.ndarray:
        """Rows (n, L) int64 for int64 global sample indices (n,). BadShardError when a shard is unreadable."""
        return self.source.read(sample_index).astype(np.int64)

    def read_held_out(self, position: np.ndarray) -> np.ndarray:
        """Validation rows (n, L) int64 at places below num_rows in the order of evaluation.

        The first N places hold a mixture's datasets by weight. BadShardError as for training rows.
        """
        index = self.source.by_weight(position)
        rows = self.read(index)
        self.refuse_mask(rows, index)
        return rows

    def set_of(self, position: np.ndarray) -> np.ndarray:
        """Number of the mixture's dataset (n,) that each row of `read_held_out` comes from."""
        return self.source.dataset_of(self.source.by_weight(position))

    def refuse_mask(self, rows: np.ndarray, sample_index: np.ndarray) -> None:
        """BadShardError where a text holds the mask: no model can predict it, and the loss would be infinite."""
        holds = (rows == self.mask_token_id).any(axis=1)
        if holds.any():
            index = int(sample_index[holds][0])
            reason = f"the mask, id {self.mask_token_id}, stands in its text (row {index} of the run); prepare it anew"
            raise BadShardError(self.source.shard_of(index), reason)

    def layout(self, sample_index: np.ndarray) -> dict[str, Any]:
        """Documents and targets of rows by their names in `Rows`; empty where each row is one text to be predicted."""
        if not self.source.has_layout:
            return {}
        found = self.source.layout(sample_index)
        fields = {"is_target_BL": torch.from_numpy(found.is_target)}
        if found.document is not None:
            fields["document_BL"] = torch.from_numpy(found.document.astype(np.int64))
        return fields

    def held_out_layout(self, position: np.ndarray) -> dict[str, Any]:
        """`layout` of validation rows at places in the order of evaluation."""
        return self.layout(self.source.by_weight(position))

    @property
    def num_documents(self) -> int:
        """Documents of the split, of all datasets together."""
        return self.source.num_documents

    def held_out_documents(self, position: np.ndarray) -> np.ndarray:
        """Numbers in the split of the documents of packed validation rows, int64 (n, K), filled up with -1."""
        return self.source.document_numbers(self.source.by_weight(position))

    def targets(self, sample_index: np.ndarray) -> Targets | None:
        """Of all these rows together; None where every token is one."""
        if not self.source.has_layout:
            return None
        tokens, first = self.source.num_targets(sample_index).sum(axis=0).tolist()
        return Targets(tokens, first)

    def held_out_targets(self, num_rows: int) -> Targets | None:
        """Of the first validation rows in the order of evaluation."""
        return self.targets(self.source.by_weight(np.arange(num_rows)))

    def without(self, excluded: tuple[str, ...]) -> "RowStream":
        """The same stream going without these shards (and only these)."""
        source = self.source.without(excluded)
        return dataclasses.replace(self, source=source, num_rows=source.num_sound_rows)

    def close(self) -> None:
        """Close all files."""
        self.source.close()


def open_stream(
    config: DataConfig, seed: int, split: str = "train", cursor: Cursor = _START, *, block_size: int = 1
) -> RowStream:
    """Open one split of the data that `config` names.

    Args:
        config: the run's data section.
        seed: the run's seed; the order of the training rows depends on it.
        split: "train" (permuted per epoch, endless) or "validation" (natural order, num_rows rows).
        cursor: only its excluded_shards matter here; a stream has no position.
        block_size: what documents of packed rows begin at multiples of (`RunConfig.document_block`).

    Raises:
        ValueError: nothing usable there, naming the folder and the remedy.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split {split!r}: use train or validation")
    source = open_source(config, seed, split, tuple(cursor.excluded_shards), block_size)
    identity = source.tokenizer
    folder = _tokenizer_folder(config, identity, source.tokenizer_home)
    return RowStream(
        source,
        source.num_sound_rows,
        identity.vocab_size,
        identity.mask_token_id,
        folder,
        identity.hash,
        source.data_hash,
    )


def bytes_per_token(config: DataConfig, split: str) -> float | None:
    """UTF-8 bytes of text per token of a row, over a whole split.

    None for text tokenized on the fly, and where only some tokens are targets: nobody has counted their bytes.
    """
    if config.stream_text:
        return None
    manifests = [read_manifest(config, path, split) for path in paths_of(config)]
    if any(manifest.num_targets is not None for manifest in manifests):
        return None
    text_bytes, tokens = sum(m.num_text_bytes for m in manifests), sum(m.num_tokens for m in manifests)
    return text_bytes / tokens * row_payload(config) / config.context_length


def _tokenizer_folder(config: DataConfig, identity: TokenizerIdentity, path: str) -> str:
    """Local folder of the tokenizer in the dataset at `path`; ValueError unless it is the one that made the shards."""
    if config.stream_text and config.tokenizer:
        folder = _kept(config, identity, load_tokenizer(config.tokenizer).save)
    elif is_remote(path):
        folder = _kept(config, identity, lambda folder: _fetch_tokenizer(config, identity, path, folder))
    else:
        folder = Path(inside(path, "tokenizer"))
    found = load_tokenizer(folder)
    if found.hash != identity.hash:
        raise ValueError(
            f"data.path ({path}): the shards were made with tokenizer {identity.hash[:12]}, but {folder} holds "
            f"{found.hash[:12]}; put the right one back, or run tools/prepare_data.py again"
        )
    template = hashlib.sha256((found.chat_template or "").encode()).hexdigest()
    if identity.chat_template not in ("", template):
        raise ValueError(f"data.path ({path}): its tokenizer has another chat template than its manifest; restore it")
    if dataclasses.replace(identity_of(found), files=()) != dataclasses.replace(identity, files=(), chat_template=""):
        raise ValueError(f"data.path ({path}): its manifest has other special ids than its tokenizer; restore it")
    return str(folder)


def _fetch_tokenizer(config: DataConfig, identity: TokenizerIdentity, path: str, folder: Path) -> None:
    for name in identity.files:
        address = inside(path, f"tokenizer/{name}")
        try:
            retrying(lambda a=address, n=name: transfer(a, folder / n, config.timeout_seconds), config.retries)
        except (OSError, DamagedError) as problem:
            raise ValueError(f"data.path: cannot read tokenizer/{name} ({problem}); copy the whole folder") from problem


def _kept(config: DataConfig, identity: TokenizerIdentity, fill: Callable[[Path], None]) -> Path:
    """A folder in the cache that `fill` has written once for all processes of the node."""
    cache = open_cache(config).folder
    folder = cache / f".tokenizer-{identity.hash[:16]}{identity.chat_template[:16]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix=".filling-") as temporary:
            full = Path(temporary) / "tokenizer"
            full.mkdir()
            fill(full)
            try:
                full.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    return folder
