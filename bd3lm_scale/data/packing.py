"""Tokenized documents to the shards of two splits: who goes where, and where one shard ends."""

from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bd3lm_scale.data.index import IndexWriter
from bd3lm_scale.data.shards import write_shard
from bd3lm_scale.data.tokenizing import Preparation, Tokens, Unit

SPLITS = ("train", "validation")
BAD, IGNORED = "bad: ", "ignored: "


@dataclass(frozen=True)
class InputCursor:
    """A place between units, and the counts up to there.

    Attributes:
        file, record: the unit that follows begins with this record of this file.
        documents: documents begun before it.
        in_validation: whether the last of them, which may go on, is held out.
        text_bytes: bytes of text before it that went to each split.
        counts: what was read before it: "documents", "empty documents", "bad: KIND", "ignored: KIND".
    """

    file: int = 0
    record: int = 0
    documents: int = 0
    in_validation: bool = False
    text_bytes: tuple[int, int] = (0, 0)
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, raw: dict) -> "InputCursor":
        """Out of its `dataclasses.asdict`, through JSON."""
        return cls(**{**raw, "text_bytes": tuple(raw["text_bytes"])})

    @property
    def num_bad(self) -> int:
        """Records so far that are no documents."""
        return sum(count for name, count in self.counts.items() if name.startswith(BAD))


@dataclass(frozen=True)
class Run:
    """Tokens of one split in order, the places among them where documents start, and which are targets (None: all)."""

    ids: np.ndarray
    document_starts: np.ndarray
    is_target: np.ndarray | None = None

    def cut(self, start: int, stop: int) -> "Run":
        """The tokens from `start` to `stop`."""
        low, high = np.searchsorted(self.document_starts, [start, stop])
        is_target = None if self.is_target is None else self.is_target[start:stop]
        return Run(self.ids[start:stop], self.document_starts[low:high] - start, is_target)


def join(runs: list[Run], dtype: str) -> Run:
    """Runs one after another."""
    ends = np.cumsum([len(run.ids) for run in runs], dtype=np.int64)
    starts = [run.document_starts + end - len(run.ids) for run, end in zip(runs, ends, strict=True)]
    marks = [run.is_target for run in runs if run.is_target is not None]
    return Run(
        np.concatenate([np.zeros(0, dtype), *(r.ids for r in runs)]),
        np.concatenate([np.zeros(0, int), *starts]),
        np.concatenate(marks) if marks else None,
    )


class Packer:
    """Collects one split's tokens and cuts them into shards of exactly shard_tokens (the last one excepted).

    Args:
        split: its name.
        folder: where the shards go.
        dtype: what ids are stored as.
        task: sizes.
        index: of the shards written so far.
        pending: tokens that are in none of them.
    """

    def __init__(self, split: str, folder: Path, dtype: str, task: Preparation, index: IndexWriter, pending: Run):
        self.split = split
        self.index = index
        self._folder, self._dtype, self._task = folder, dtype, task
        self._runs = deque([pending] if len(pending.ids) else [])
        self.num_pending = len(pending.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens in shards or waiting."""
        return self.index.num_tokens + self.num_pending

    @property
    def is_full(self) -> bool:
        """Whether a whole shard can be cut."""
        return self.num_pending >= self._task.shard_tokens

    @property
    def pending(self) -> Run:
        """The tokens that no shard holds yet."""
        return join(list(self._runs), self._dtype)

    def add(self, run: Run) -> None:
        """Append tokens."""
        if len(run.ids):
            self._runs.append(run)
            self.num_pending += len(run.ids)

    def cut(self) -> dict:
        """Write the next shard; its record in the index."""
        wanted = min(self._task.shard_tokens, self.num_pending)
        taken: list[Run] = []
        missing = wanted
        while missing:
            run = self._runs.popleft()
            taken.append(run.cut(0, min(missing, len(run.ids))))
            if len(run.ids) > missing:
                self._runs.appendleft(run.cut(missing, len(run.ids)))
            missing -= len(taken[-1].ids)
        self.num_pending -= wanted
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.split}-{self.index.num_shards:06d}.tar"
        whole = join(taken, self._dtype)
        shard = write_shard(
            self._folder,
            name,
            whole.ids,
            whole.document_starts,
            self._dtype,
            self._task.chunk_tokens,
            whole.is_target,
        )
        return self.index.append(shard)


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

    def split(self, unit: Unit, tokens: Tokens, head: InputCursor) -> tuple[list[Run], InputCursor]:
        """The tokens for each of SPLITS, and the head after the unit."""
        held_out = self._held_out(unit, tokens, head)
        token_held_out = np.repeat(held_out, tokens.lengths)
        runs = []
        for chosen in (False, True):
            lengths = np.where(held_out == chosen, tokens.lengths, 0)
            begins = tokens.starts & (lengths > 0)
            is_ours = token_held_out == chosen
            is_target = None if tokens.is_target is None else tokens.is_target[is_ours]
            runs.append(Run(tokens.ids[is_ours], (np.cumsum(lengths) - lengths)[begins], is_target))
        following = InputCursor(
            file=unit.next_place[0],
            record=unit.next_place[1],
            documents=head.documents + int(tokens.starts.sum()),
            in_validation=bool(held_out[-1]) if len(held_out) else head.in_validation,
            text_bytes=(
                head.text_bytes[0] + int(tokens.text_bytes[~held_out].sum()),
                head.text_bytes[1] + int(tokens.text_bytes[held_out].sum()),
            ),
            counts=_counted(head.counts, unit, tokens),
        )
        return runs, following

    def _held_out(self, unit: Unit, tokens: Tokens, head: InputCursor) -> np.ndarray:
        """Which records of the unit go to validation; a piece goes where its document's first piece went."""
        if unit.file >= len(self._task.inputs):
            return np.ones(len(tokens.starts), bool)
        if self._first_validation is not None:
            return head.documents + np.cumsum(tokens.starts) - 1 >= self._first_validation
        first = np.maximum.accumulate(np.where(tokens.starts, np.arange(len(tokens.starts)), -1))
        return np.where(first >= 0, tokens.hashes[first] < self._threshold, head.in_validation)


def _counted(before: dict[str, int], unit: Unit, tokens: Tokens) -> dict[str, int]:
    counts = Counter(before)
    is_bad = np.zeros(len(tokens.starts), bool)
    is_bad[[number for number, _, _ in tokens.bad]] = True
    counts["documents"] += int((tokens.starts & ~is_bad).sum())
    ends = np.array([record.ends_document for record in unit.records], bool)
    counts["empty documents"] += int((tokens.starts & ends & ~is_bad & (tokens.text_bytes == 0)).sum())
    for _, kind, _ in tokens.bad:
        counts[BAD + kind] += 1
    for kind, number in unit.ignored:
        counts[IGNORED + kind] += number
    return {name: count for name, count in sorted(counts.items()) if count}
