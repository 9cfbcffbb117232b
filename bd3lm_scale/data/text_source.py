"""Third-party webdataset tars of text, tokenized on the fly: for quick trials, not exactly resumable.

The stream begins at a shard that depends on the seed and the sample index it starts from; every reader that starts
there gives the same rows, so ranks agree, but a resumed run reads other text than an uninterrupted one.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator

import numpy as np

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.documents import BY_NAME, BadRecordError, read_records, record_text
from bd3lm_scale.data.inputs import find_inputs
from bd3lm_scale.data.shard_source import row_payload, wrap_rows
from bd3lm_scale.data.shards import token_dtype
from bd3lm_scale.data.targets import RowLayout
from bd3lm_scale.data.tokenizer import identity_of, load_tokenizer
from bd3lm_scale.rng import derive_key, permute

ENDLESS_ROWS = 1 << 40
_VALIDATION_SHARE = 0.02
_VALIDATION_ROWS = 64
_log = logging.getLogger(__name__)


class TextSource:
    """Rows out of text shards.

    Args:
        config: data.path names the shards: a folder, a file, or a URL or pipe: command with braces ({0000..0099}).
        seed: the order of the shards depends on it.
        split: "train", or "validation": the first rows of the held-out documents, chosen by hash.
    """

    def __init__(self, config: DataConfig, seed: int, split: str):
        if not config.tokenizer or not config.path:
            raise ValueError("data.stream_text needs data.path (text shards) and data.tokenizer; set both")
        self.config = config
        self.seed = seed
        self.split = split
        self.excluded: tuple[str, ...] = ()
        self.has_layout, self.tokenizer_home = False, config.path
        self.block_size, self.padding_share, self.num_documents = 1, 0.0, 0
        self._tokenizer = load_tokenizer(config.tokenizer)
        self.tokenizer = identity_of(self._tokenizer)
        self.dtype = np.dtype(token_dtype(self.tokenizer.vocab_size))
        self._shards = find_inputs([config.path])
        self._validation = self._held_out_rows() if split == "validation" else None
        self.num_rows = ENDLESS_ROWS if self._validation is None else len(self._validation)
        self._origin = self._next = 0
        self._rows: Iterator[np.ndarray] | None = None

    @property
    def data_hash(self) -> str:
        """Not known before all of the text has been read."""
        return ""

    def seek(self, origin: int) -> None:
        """Start the stream anew at this sample index, unless that is where it started."""
        if origin != self._origin:
            self._origin, self._rows = origin, None

    def without(self, excluded: tuple[str, ...]) -> "TextSource":
        """The same stream: it passes over damaged shards by itself."""
        return self

    def read(self, sample_index: np.ndarray) -> np.ndarray:
        """Rows (n, L) for int64 sample indices (n,); cheap in ascending order only."""
        if self._validation is not None:
            return self._validation[sample_index]
        out = np.zeros((len(sample_index), row_payload(self.config)), self.dtype)
        for i in np.argsort(sample_index, kind="stable").tolist():
            wanted = int(sample_index[i])
            if self._rows is None or wanted < self._next:
                self._rows, self._next = self._endless_rows(), self._origin
            if wanted < self._origin:
                raise ValueError(f"text stream: row {wanted} lies before its start {self._origin}; seek first")
            out[i] = next(itertools.islice(self._rows, wanted - self._next, None))
            self._next = wanted + 1
        return wrap_rows(out, self.tokenizer) if self.config.wrap_rows else out

    def layout(self, sample_index: np.ndarray) -> RowLayout:
        """Refused by the configuration: the text is a stream."""
        raise ValueError("data.stream_text (true): its rows are a stream; use data.packing=stream")

    def num_targets(self, sample_index: np.ndarray) -> np.ndarray:
        """See `layout`."""
        raise ValueError("data.stream_text (true): its rows are a stream; use data.packing=stream")

    def document_numbers(self, sample_index: np.ndarray) -> np.ndarray:
        """See `layout`."""
        raise ValueError("data.stream_text (true): its rows are a stream; use data.packing=stream")

    @property
    def num_sound_rows(self) -> int:
        """All of them."""
        return self.num_rows

    def by_weight(self, position: np.ndarray) -> np.ndarray:
        """The rows as they are."""
        return position

    def dataset_of(self, sample_index: np.ndarray) -> np.ndarray:
        """All text is one dataset."""
        return np.zeros_like(sample_index)

    def shard_of(self, sample_index: int) -> str:
        """The text as a whole: rows do not know where they come from."""
        return str(self.config.path)

    def close(self) -> None:
        """Forget the position in the stream."""
        self._rows = None

    def _endless_rows(self) -> Iterator[np.ndarray]:
        """Rows from the origin on: the shards in a new order each time through."""
        count = len(self._shards)
        for epoch in itertools.count():
            order = permute(np.arange(count), count, derive_key(self.seed, "text", self._origin, epoch))
            has_rows = False
            for row in self._pack(self._texts([self._shards[i] for i in order], held_out=False)):
                has_rows = True
                yield row
            if not has_rows:
                raise ValueError(f"data.path ({self.config.path}): no text in {count} shards")

    def _held_out_rows(self) -> np.ndarray:
        texts = self._texts(self._shards, held_out=True)
        rows = list(itertools.islice(self._pack(texts), _VALIDATION_ROWS))
        if not rows:
            raise ValueError(
                f"data.path ({self.config.path}): too little text to hold a validation row out of it; "
                "use tools/prepare_data.py, or more text"
            )
        return wrap_rows(np.stack(rows), self.tokenizer) if self.config.wrap_rows else np.stack(rows)

    def _texts(self, shards: list[str], held_out: bool) -> Iterator[str]:
        for shard in shards:
            bad: list[str] = []
            try:
                for record in read_records(shard, BY_NAME, timeout=self.config.timeout_seconds, whole=True):
                    try:
                        text = record_text(record, BY_NAME, record.where)
                    except BadRecordError as problem:
                        bad.append(str(problem))
                        continue
                    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
                    if (word < _VALIDATION_SHARE * 2**32) == held_out:
                        yield text
            except (OSError, ValueError) as problem:
                _log.warning("text shard %s: %s; going on with the next", shard, problem)
            if bad:
                _log.warning("text shard %s: left out %d bad records, the first: %s", shard, len(bad), bad[0])

    def _pack(self, texts: Iterator[str]) -> Iterator[np.ndarray]:
        length = row_payload(self.config)
        pending: list[int] = []
        for text in texts:
            try:
                ids = self._tokenizer.encode(text)
            except ValueError as problem:
                _log.warning("left out a document: %s", problem)
                continue
            # nothing ends where nothing began
            pending += [*ids, self.tokenizer.eos_token_id] if ids else []
            whole = len(pending) // length * length
            for start in range(0, whole, length):
                yield np.array(pending[start : start + length], self.dtype)
            del pending[:whole]
