"""Corpus to shards: read records, tokenize them on many processes, split, pack, write; resumable at each shard.

    inputs -> records -> units -> worker processes -> tokens -> train and validation shards -> manifests

After each shard the tokens that wait for the next ones are saved, and a line goes to progress.jsonl saying with which
unit to go on: a new run starts there and gives the same bytes. The manifests are written last, unless an input has
changed meanwhile. What is no document is listed in bad_records.jsonl, if it is to be left out.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from bd3lm_scale.data.chat import chat_format
from bd3lm_scale.data.index import IndexWriter, open_split
from bd3lm_scale.data.inputs import changed_inputs
from bd3lm_scale.data.packing import BAD, IGNORED, SPLITS, InputCursor, Packer, Run, Splitter, join
from bd3lm_scale.data.shards import MANIFEST, Manifest, shard_from_json, token_dtype, write_file
from bd3lm_scale.data.tokenizer import Tokenizer, identity_of
from bd3lm_scale.data.tokenizing import (
    Preparation,
    Tokens,
    Unit,
    load_tokenizer_for,
    num_documents,
    tokenized_units,
)

PROGRESS = "progress.jsonl"
BAD_RECORDS = "bad_records.jsonl"
_NAMED_CHANGES = 5


def prepare(
    task: Preparation,
    tokenizer_path: str,
    output: Path,
    workers: int,
    report: Callable[[Unit, int], None] = lambda unit, tokens: None,
) -> dict[str, Manifest]:
    """Write OUTPUT/{train,validation,tokenizer}; finished shards of an interrupted run are kept.

    Args:
        task: what to do.
        tokenizer_path: for `load_tokenizer`.
        output: the folder; ValueError if it holds a different preparation.
        workers: processes that tokenize; 0 does it in this one.
        report: called with each finished unit and the number of tokens so far.

    Returns:
        The manifest of each split that has tokens.
    """
    tokenizer = load_tokenizer_for(task, tokenizer_path)
    description = _description(task, tokenizer)
    finished = _finished(output, description)
    if finished is not None:
        return finished
    splitter = Splitter(task, num_documents(task) if task.validation_documents else 0)
    output.mkdir(parents=True, exist_ok=True)
    log = _ProgressLog(output / PROGRESS, description)
    bad = _BadRecords(output / BAD_RECORDS, log.head.num_bad)
    tokenizer.save(output / "tokenizer")
    dtype = token_dtype(tokenizer.vocab_size)
    packers = [Packer(s, output / s, dtype, task, log.indexes[s], log.pending(s, dtype)) for s in SPLITS]
    head = log.head
    for unit, tokens in tokenized_units(task, tokenizer_path, (head.file, head.record), workers):
        runs, head = splitter.split(unit, tokens, head)
        bad.add(unit, tokens)
        for packer, run in zip(packers, runs, strict=True):
            packer.add(run)
        for packer in packers:
            while packer.is_full:
                log.append(packer.split, packer.cut(), head, packers)
        report(unit, sum(packer.num_tokens for packer in packers))
    for packer in packers:
        while packer.num_pending:
            log.append(packer.split, packer.cut(), head, packers)
    _refuse_changes(output, description, _description(task, tokenizer))
    manifests = _manifests(task, tokenizer, log.indexes, head, description)
    finished = {split: log.indexes[split].finish(manifest) for split, manifest in manifests.items()}
    log.remove()
    return finished


def _description(task: Preparation, tokenizer: Tokenizer) -> dict:
    """What the bytes of the result depend on, and its hash."""
    description = {**task.describe(), "tokenizer": tokenizer.hash}
    if task.messages:
        description["chat_template"] = chat_format(tokenizer).hash
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    return {**description, "fingerprint": fingerprint}


def _manifests(
    task: Preparation, tokenizer: Tokenizer, indexes: dict[str, IndexWriter], head: InputCursor, description: dict
) -> dict[str, Manifest]:
    """What the manifests say beyond the shards, which the indexes know."""
    if not any(index.num_shards for index in indexes.values()):
        passed = {name: count for name, count in head.counts.items() if name.startswith((BAD, IGNORED))}
        seen = f" ({', '.join(f'{name}: {count:,}' for name, count in passed.items())})" if passed else ""
        raise ValueError(f"no text: the {len(task.files)} input files hold only empty documents, or none{seen}")
    preparation = {**description, "read": _what_was_read(task, head)}
    identity = replace(identity_of(tokenizer), chat_template=description.get("chat_template", ""))
    return {
        split: Manifest(
            split=split,
            dtype=token_dtype(tokenizer.vocab_size),
            chunk_tokens=task.chunk_tokens,
            num_tokens=0,
            num_documents=0,
            num_text_bytes=head.text_bytes[number],
            tokenizer=identity,
            shards=(),
            preparation=preparation,
        )
        for number, split in enumerate(SPLITS)
        if indexes[split].num_shards
    }


def _what_was_read(task: Preparation, head: InputCursor) -> dict:
    """What the manifests keep of the reading: files by kind, documents, and all that is not in the shards."""
    files = Counter(task.options.kind(path) for path in task.files)
    ignored = Counter(dict(task.ignored))
    ignored.update({n.removeprefix(IGNORED): count for n, count in head.counts.items() if n.startswith(IGNORED)})
    return {
        "files": dict(sorted(files.items(), key=str)),
        "documents": head.counts.get("documents", 0),
        "empty_documents": head.counts.get("empty documents", 0),
        "bad_records": {n.removeprefix(BAD): count for n, count in head.counts.items() if n.startswith(BAD)},
        "ignored": dict(sorted(ignored.items())),
    }


def _finished(output: Path, description: dict) -> dict[str, Manifest] | None:
    """The manifests of an equal preparation that is complete."""
    files = {split: output / split / MANIFEST for split in SPLITS}
    if (output / PROGRESS).exists() or not any(file.exists() for file in files.values()):
        return None
    manifests = {split: open_split(output / split) for split, file in files.items() if file.exists()}
    for manifest in manifests.values():
        _refuse_changes(output, manifest.preparation, description)
    return manifests


def _refuse_changes(output: Path, before: dict, now: dict) -> None:
    """ValueError, naming inputs and options, unless two descriptions of a preparation are the same."""
    if before.get("reading") != now["reading"]:
        raise ValueError(
            f"output {output}: was prepared by another version of this program, whose shards stay readable; "
            "choose another --output to prepare anew, or remove that folder first"
        )
    now = json.loads(json.dumps(now))
    reasons = []
    for key, value in now.items():
        if key in ("inputs", "validation_inputs"):
            reasons += changed_inputs(before.get(key, []), value)
        elif before.get(key) != value and not (key == "fingerprint" and reasons):
            reasons.append(f"another {key}")
    if reasons:
        more = f" and {len(reasons) - _NAMED_CHANGES} more" if len(reasons) > _NAMED_CHANGES else ""
        raise ValueError(
            f"output {output}: holds shards made from other inputs, options or another tokenizer: "
            f"{', '.join(reasons[:_NAMED_CHANGES])}{more}; choose another --output, or remove that folder first"
        )


class _BadRecords:
    """bad_records.jsonl: one line for each record that was left out.

    Args:
        path: where it lies; there only when there are such records.
        kept: lines that belong to finished shards; what follows is written again.
    """

    def __init__(self, path: Path, kept: int):
        self._path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")[:kept]
            if lines:
                write_file(path, "\n".join(lines) + "\n")
            else:
                path.unlink()

    def add(self, unit: Unit, tokens: Tokens) -> None:
        """List a unit's bad records, durably: the next line of progress.jsonl counts them."""
        if not tokens.bad:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for number, kind, reason in tokens.bad:
                record = unit.record + number + 1
                entry = {"file": unit.path, "record": record, "where": unit.records[number].where}
                file.write(json.dumps({**entry, "kind": kind, "reason": reason}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _indexes(output: Path, entries: list[dict]) -> dict[str, IndexWriter]:
    """The indexes of the shards that an interrupted run has noted; entries of an earlier version become records."""
    if any("token_members" in entry["shard"] for entry in entries):
        indexes = {split: IndexWriter(output / split) for split in SPLITS}
        for entry in entries:
            entry["shard"] = indexes[entry["split"]].append(shard_from_json(entry["shard"]))
        return indexes
    return {
        split: IndexWriter(output / split, [entry["shard"] for entry in entries if entry["split"] == split])
        for split in SPLITS
    }


class _ProgressLog:
    """progress.jsonl: one line per finished shard; pending-N.npz: the tokens that waited when N shards were done.

    Attributes:
        indexes: of the finished shards of each split.
        head: the unit to go on with.
    """

    def __init__(self, path: Path, description: dict):
        self._path = path
        self.head = InputCursor()
        # what follows the last newline was being written when the process died
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if not lines:
            lines = [json.dumps(description)]
        try:
            before, *entries = [json.loads(line) for line in lines]
            _refuse_changes(path.parent, before if isinstance(before, dict) else {}, description)
            self.indexes = _indexes(path.parent, entries)
            for entry in entries[-1:]:
                self.head = InputCursor.from_json(entry["head"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"{path}: damaged ({problem}); remove {path.parent} and prepare anew") from problem
        write_file(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in (before, *entries)))
        self._remove_pending(keep=self._num_shards)

    @property
    def _num_shards(self) -> int:
        return sum(index.num_shards for index in self.indexes.values())

    def _pending_file(self, num_shards: int) -> Path:
        return self._path.with_name(f"pending-{num_shards}.npz")

    def _remove_pending(self, keep: int | None) -> None:
        for file in self._path.parent.glob("pending-*.npz"):
            if keep is None or file != self._pending_file(keep):
                file.unlink()

    def pending(self, split: str, dtype: str) -> Run:
        """The tokens of a split that no finished shard holds."""
        if not self._num_shards:
            return join([], dtype)
        with np.load(self._pending_file(self._num_shards), allow_pickle=False) as arrays:
            return Run(arrays[f"{split}_ids"], arrays[f"{split}_document_starts"], arrays.get(f"{split}_is_target"))

    def append(self, split: str, shard: dict, head: InputCursor, packers: list[Packer]) -> None:
        """Note a shard that a packer has just added to its index."""
        arrays = {f"{packer.split}_{name}": array for packer in packers for name, array in vars(packer.pending).items()}
        with self._pending_file(self._num_shards).open("wb") as file:
            np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
            file.flush()
            os.fsync(file.fileno())
        entry = {"split": split, "shard": shard, "head": asdict(head)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._remove_pending(keep=self._num_shards)

    def remove(self) -> None:
        """The preparation is complete."""
        self._path.unlink()
        self._remove_pending(keep=None)
