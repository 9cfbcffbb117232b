"""Tokenised documents to the shards of two splits: who goes where, and where one shard ends."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bd3lm_scale.data.shards import Shard, write_shard
from bd3lm_scale.data.tokenising import Preparation, Tokens, Unit

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Head:
    """A place between units, and the counts up to there.

    Attributes:
        file, record: the unit that follows begins with this record of this file.
        documents: documents begun before it.
        in_validation: whether the last of them, which may go on, is held out.
        text_bytes: bytes of text before it that went to each split.
    """

    file: int = 0
    record: int = 0
    documents: int = 0
    in_validation: bool = False
    text_bytes: tuple[int, int] = (0, 0)

    @property
    def place(self) -> tuple[int, int]:
        """What heads are ordered by."""
        return self.file, self.record


@dataclass
class _Run:
    """Tokens of one unit for one split; those before `used` are in finished shards."""

    head: Head
    used: int
    ids: np.ndarray
    document_starts: np.ndarray


class Packer:
    """Collects one split's tokens and cuts them into shards of exactly shard_tokens (the last one excepted).

    Args:
        split: its name.
        folder: where the shards go.
        dtype: what ids are stored as.
        task: sizes.
        shards: finished ones.
        resume: head of the unit with the first token that is in none of them, and how many of its tokens are.
    """

    def __init__(
        self, split: str, folder: Path, dtype: str, task: Preparation, shards: list[Shard], resume: tuple[Head, int]
    ):
        self.shards = shards
        self.pending_tokens = 0
        self._split, self._folder, self._dtype, self._task = split, folder, dtype, task
        self._first, self._skip = resume
        self._runs: deque[_Run] = deque()

    @property
    def num_tokens(self) -> int:
        """Tokens in shards or waiting."""
        return sum(shard.num_tokens for shard in self.shards) + self.pending_tokens

    @property
    def is_full(self) -> bool:
        """Whether a whole shard can be cut."""
        return self.pending_tokens >= self._task.shard_tokens

    def add(self, head: Head, ids: np.ndarray, document_starts: np.ndarray) -> None:
        """Append a unit's tokens, unless finished shards hold them."""
        if head.place < self._first.place:
            return
        used = self._skip if head.place == self._first.place else 0
        if len(ids) > used:
            self._runs.append(_Run(head, used, ids, document_starts))
            self.pending_tokens += len(ids) - used

    def cut(self) -> Shard:
        """Write the next shard."""
        wanted = min(self._task.shard_tokens, self.pending_tokens)
        ids, starts, taken = [], [], 0
        while taken < wanted:
            run = self._runs[0]
            stop = min(run.used + wanted - taken, len(run.ids))
            low, high = np.searchsorted(run.document_starts, [run.used, stop])
            ids.append(run.ids[run.used : stop])
            starts.append(run.document_starts[low:high] - run.used + taken)
            taken += stop - run.used
            run.used = stop
            if stop == len(run.ids):
                self._runs.popleft()
        self.pending_tokens -= wanted
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{self._split}-{len(self.shards):06d}.tar"
        tokens, document_starts = np.concatenate(ids), np.concatenate(starts)
        shard = write_shard(self._folder, name, tokens, document_starts, self._dtype, self._task.chunk_tokens)
        self.shards.append(shard)
        return shard

    def resume_point(self, following: Head) -> tuple[Head, int]:
        """What `resume` has to be for a packer that goes on from the shards written so far."""
        return (self._runs[0].head, self._runs[0].used) if self._runs else (following, 0)


class Splitter:
    """Sends each document to train or validation.

    Args:
        task: the rule.
        num_documents: documents in task.inputs; needed for validation_documents only.
    """

    def __init__(self, task: Preparation, num_documents: int):
        self._task = task
        self._first_validation = num_documents - task.validation_documents if task.validation_documents else None
        self._threshold = round(task.validation_fraction * 2**32)
        if self._first_validation is not None and self._first_validation <= 0:
            raise ValueError(
                f"--validation-documents {task.validation_documents}: the inputs have only {num_documents} documents"
            )

    def split(self, unit: Unit, tokens: Tokens, head: Head) -> tuple[list[tuple[np.ndarray, np.ndarray]], Head]:
        """(ids, places where documents start) for each of SPLITS, and the head after the unit."""
        held_out = self._held_out(unit, tokens, head)
        token_held_out = np.repeat(held_out, tokens.lengths)
        runs = []
        for chosen in (False, True):
            lengths = np.where(held_out == chosen, tokens.lengths, 0)
            begins = tokens.starts & (lengths > 0)
            runs.append((tokens.ids[token_held_out == chosen], (np.cumsum(lengths) - lengths)[begins]))
        following = Head(
            file=unit.next_place[0],
            record=unit.next_place[1],
            documents=head.documents + int(tokens.starts.sum()),
            in_validation=bool(held_out[-1]),
            text_bytes=(
                head.text_bytes[0] + int(tokens.text_bytes[~held_out].sum()),
                head.text_bytes[1] + int(tokens.text_bytes[held_out].sum()),
            ),
        )
        return runs, following

    def _held_out(self, unit: Unit, tokens: Tokens, head: Head) -> np.ndarray:
        """Which records of the unit go to validation; a piece goes where its document's first piece went."""
        if unit.file >= len(self._task.inputs):
            return np.ones(len(tokens.starts), bool)
        if self._first_validation is not None:
            return head.documents + np.cumsum(tokens.starts) - 1 >= self._first_validation
        first = np.maximum.accumulate(np.where(tokens.starts, np.arange(len(tokens.starts)), -1))
        return np.where(first >= 0, tokens.hashes[first] < self._threshold, head.in_validation)
