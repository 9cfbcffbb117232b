"""Corpus to shards: read records, tokenise them on many processes, split, pack, write; resumable at each shard.

    inputs -> records -> units of about 1 MB -> worker processes -> token runs -> train and validation shards

The result depends on inputs and options alone. Units come back in order, whatever the number of workers. After
each shard a line goes to progress.jsonl saying which unit the tokens not yet written begin with; a new run starts
there.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bd3lm_scale.data import documents
from bd3lm_scale.data.shards import (
    MANIFEST,
    Manifest,
    Shard,
    TokenizerIdentity,
    concatenate,
    manifest_from_json,
    manifest_to_json,
    shard_from_json,
    token_dtype,
    write_file,
    write_shard,
)
from bd3lm_scale.data.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")
PROGRESS = "progress.jsonl"
_UNIT_BYTES = 1 << 20
_UNIT_RECORDS = 1000
_UNITS_PER_WORKER = 4


@dataclass(frozen=True)
class Preparation:
    """What to prepare and how.

    Attributes:
        inputs: files of the corpus.
        validation_inputs: files that go to validation whole.
        validation_documents: this many last documents of `inputs` go to validation.
        validation_fraction: share of the documents, chosen by hash, that go to validation.
        insert_eos: end each document with EOS.
        shard_tokens, chunk_tokens: tokens per shard and per member.
    """

    inputs: tuple[str, ...]
    validation_inputs: tuple[str, ...] = ()
    validation_documents: int = 0
    validation_fraction: float = 0.0
    options: documents.Options = field(default_factory=documents.Options)
    insert_eos: bool = True
    shard_tokens: int = 1 << 25
    chunk_tokens: int = 1 << 16

    def describe(self) -> dict:
        """What the bytes of the result depend on, without the paths of this machine."""
        raw = asdict(self)
        for key in ("inputs", "validation_inputs"):
            raw[key] = [[Path(p).name, os.path.getsize(p)] for p in raw[key]]
        return raw


@dataclass(frozen=True)
class _Head:
    """A place between units, and the counts up to there."""

    file: int = 0
    record: int = 0
    documents: int = 0
    in_validation: bool = False
    text_bytes: tuple[int, int] = (0, 0)

    @property
    def place(self) -> tuple[int, int]:
        return self.file, self.record


@dataclass(frozen=True)
class _Unit:
    """Records that are tokenised together, and where they begin."""

    file: int
    record: int
    next_place: tuple[int, int]
    records: tuple[documents.Record, ...]
    where: str


@dataclass(frozen=True)
class _Tokens:
    """A tokenised unit; one entry per record in all arrays but `ids`."""

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    starts: np.ndarray
    hashes: np.ndarray


def prepare(task: Preparation, tokenizer_path: str, output: Path, workers: int, report=None) -> dict[str, Manifest]:
    """Write OUTPUT/{train,validation,tokenizer}; finished shards of an interrupted run are kept.

    Args:
        task: what to do.
        tokenizer_path: for `load_tokenizer`.
        output: the folder; ValueError if it holds a different preparation.
        workers: processes that tokenise; 0 does it in this one.
        report: called with (file number, files, tokens so far) after each unit.

    Returns:
        The manifest of each split that has tokens.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    description = {**task.describe(), "tokenizer": tokenizer.hash}
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    finished = _finished(output, fingerprint)
    if finished is not None:
        return finished
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output / "tokenizer")
    log = _ProgressLog(output / PROGRESS, fingerprint)
    dtype = token_dtype(tokenizer.vocab_size)
    packers = {s: _Packer(s, output / s, dtype, task, log.shards[s], log.heads[s]) for s in SPLITS}
    head = min((log.heads[s][0] for s in SPLITS), key=lambda h: h.place)
    split_of = _Splitter(task, _count_documents(task) if task.validation_documents else 0)
    for unit, tokens in _tokenised(task, tokenizer_path, head, workers):
        runs, following = split_of(unit, tokens, head)
        for number, split in enumerate(SPLITS):
            packers[split].add(head, *runs[number])
            while packers[split].is_full():
                log.append(split, packers[split].cut(), {s: packers[s].resume_point(following) for s in SPLITS})
        head = following
        if report:
            report(
                unit.file, len(task.inputs) + len(task.validation_inputs), sum(p.num_tokens for p in packers.values())
            )
    for split in SPLITS:
        while packers[split].pending_tokens:
            log.append(split, packers[split].cut(), {s: packers[s].resume_point(head) for s in SPLITS})
    manifests = _manifests(task, tokenizer, dtype, packers, head, {**description, "fingerprint": fingerprint})
    for split, manifest in manifests.items():
        write_file(output / split / MANIFEST, manifest_to_json(manifest))
    log.remove()
    return manifests


def _manifests(task, tokenizer: Tokenizer, dtype: str, packers, head: _Head, description: dict) -> dict[str, Manifest]:
    if not any(packer.shards for packer in packers.values()):
        raise ValueError(f"no text: {len(task.inputs)} input files hold no document that is not empty")
    identity = TokenizerIdentity(
        hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        files=tokenizer.file_names,
    )
    return {
        split: Manifest(
            split=split,
            dtype=dtype,
            chunk_tokens=task.chunk_tokens,
            num_tokens=sum(shard.num_tokens for shard in packers[split].shards),
            num_documents=sum(shard.num_documents for shard in packers[split].shards),
            num_text_bytes=head.text_bytes[number],
            tokenizer=identity,
            shards=tuple(packers[split].shards),
            preparation=description,
        )
        for number, split in enumerate(SPLITS)
        if packers[split].shards
    }


def _finished(output: Path, fingerprint: str) -> dict[str, Manifest] | None:
    """The manifests of an equal, complete preparation."""
    files = {split: output / split / MANIFEST for split in SPLITS}
    if (output / PROGRESS).exists() or not any(file.exists() for file in files.values()):
        return None
    manifests = {s: manifest_from_json(f.read_text(encoding="utf-8"), str(f)) for s, f in files.items() if f.exists()}
    if any(m.preparation.get("fingerprint") != fingerprint for m in manifests.values()):
        raise ValueError(
            f"output {output}: holds shards made from other inputs, options or another tokenizer; "
            "choose another --output, or remove that folder first"
        )
    return manifests


class _ProgressLog:
    """progress.jsonl: one line per finished shard with the places to resume at."""

    def __init__(self, path: Path, fingerprint: str):
        self._path = path
        self.shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self.heads: dict[str, tuple[_Head, int]] = {split: (_Head(), 0) for split in SPLITS}
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[0]) != fingerprint:
            raise ValueError(
                f"output {path.parent}: holds an unfinished preparation of other inputs or options; "
                "choose another --output, or remove that folder first"
            )
        for line in lines[1:]:
            entry = json.loads(line)
            self.shards[entry["split"]].append(shard_from_json(entry["shard"]))
            self.heads = {s: (_head(entry["heads"][s][0]), entry["heads"][s][1]) for s in SPLITS}
        if not lines:
            write_file(path, json.dumps(fingerprint) + "\n")
        else:
            write_file(path, "\n".join(lines) + "\n")  # without a torn last line

    def append(self, split: str, shard: Shard, heads: dict[str, tuple[_Head, int]]) -> None:
        entry = {"split": split, "shard": asdict(shard), "heads": {s: [asdict(h), n] for s, (h, n) in heads.items()}}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self._path.unlink()


def _head(raw: dict) -> _Head:
    return _Head(**{**raw, "text_bytes": tuple(raw["text_bytes"])})


class _Packer:
    """Collects one split's tokens and cuts them into shards of exactly shard_tokens (the last one excepted)."""

    def __init__(self, split: str, folder: Path, dtype: str, task: Preparation, shards: list[Shard], resume):
        self.shards = shards
        self.pending_tokens = 0
        self._split, self._folder, self._dtype, self._task = split, folder, dtype, task
        self._first, self._skip = resume
        self._runs: deque[list] = deque()  # [head of its unit, tokens used already, ids, document starts]

    @property
    def num_tokens(self) -> int:
        """Tokens packed or waiting."""
        return sum(shard.num_tokens for shard in self.shards) + self.pending_tokens

    def add(self, head: _Head, ids: np.ndarray, starts: np.ndarray) -> None:
        """Append a unit's tokens, unless finished shards hold them."""
        if head.place < self._first.place:
            return
        used = self._skip if head.place == self._first.place else 0
        if len(ids) > used:
            self._runs.append([head, used, ids, starts])
            self.pending_tokens += len(ids) - used

    def is_full(self) -> bool:
        return self.pending_tokens >= self._task.shard_tokens

    def cut(self) -> Shard:
        """Write the next shard."""
        wanted = min(self._task.shard_tokens, self.pending_tokens)
        ids, starts, taken = [], [], 0
        while taken < wanted:
            run = self._runs[0]
            stop = min(run[1] + wanted - taken, len(run[2]))
            ids.append(run[2][run[1] : stop])
            low, high = np.searchsorted(run[3], [run[1], stop])
            starts.append(run[3][low:high] - run[1] + taken)
            taken += stop - run[1]
            run[1] = stop
            if stop == len(run[2]):
                self._runs.popleft()
        self.pending_tokens -= wanted
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{self._split}-{len(self.shards):06d}.tar"
        shard = write_shard(
            self._folder, name, concatenate(ids, self._dtype), concatenate(starts, "int64"), self._dtype,
            self._task.chunk_tokens,
        )  # fmt: skip
        self.shards.append(shard)
        return shard

    def resume_point(self, following: _Head) -> tuple[_Head, int]:
        """Head of the unit with the first token not yet in a shard, and how many of its tokens are in one."""
        return (self._runs[0][0], self._runs[0][1]) if self._runs else (following, 0)


class _Splitter:
    """Sends each document of a unit to train or validation."""

    def __init__(self, task: Preparation, num_documents: int):
        self._task = task
        self._first_validation = num_documents - task.validation_documents if task.validation_documents else None
        self._threshold = round(task.validation_fraction * 2**32)
        if self._first_validation is not None and self._first_validation <= 0:
            raise ValueError(
                f"--validation-documents {task.validation_documents}: the inputs have only {num_documents} documents"
            )

    def __call__(self, unit: _Unit, tokens: _Tokens, head: _Head) -> tuple[tuple, _Head]:
        """(ids, document starts) for each split, and the head of the next unit."""
        number = head.documents + np.cumsum(tokens.starts) - 1
        if unit.file >= len(self._task.inputs):
            held_out = np.ones(len(number), bool)
        elif self._first_validation is not None:
            held_out = number >= self._first_validation
        else:
            # a piece goes where its document's first piece went
            first = np.maximum.accumulate(np.where(tokens.starts, np.arange(len(number)), -1))
            held_out = np.where(first >= 0, tokens.hashes[first] < self._threshold, head.in_validation)
        token_held_out = np.repeat(held_out, tokens.lengths)
        runs = []
        for chosen in (False, True):
            ids = tokens.ids[token_held_out == chosen]
            before = np.cumsum(np.where(held_out == chosen, tokens.lengths, 0))
            begins = tokens.starts & (held_out == chosen) & (tokens.lengths > 0)
            runs.append((ids, (before - tokens.lengths)[begins]))
        following = _Head(
            file=unit.next_place[0],
            record=unit.next_place[1],
            documents=head.documents + int(tokens.starts.sum()),
            in_validation=bool(held_out[-1]) if len(held_out) else head.in_validation,
            text_bytes=(
                head.text_bytes[0] + int(tokens.text_bytes[~held_out].sum()),
                head.text_bytes[1] + int(tokens.text_bytes[held_out].sum()),
            ),
        )
        return tuple(runs), following


def _count_documents(task: Preparation) -> int:
    return sum(r.starts_document for path in task.inputs for r in documents.read_records(path, task.options))


def _units(task: Preparation, start: _Head) -> Iterator[_Unit]:
    """The corpus from `start` on, cut where a unit is large enough or a file ends."""
    files = task.inputs + task.validation_inputs
    for file in range(start.file, len(files)):
        skipped = start.record if file == start.file else 0
        records = itertools.islice(documents.read_records(files[file], task.options), skipped, None)
        number, batch, size = skipped, [], 0
        for record in records:
            batch.append(record)
            size += len(record.data)
            if size >= _UNIT_BYTES or len(batch) >= _UNIT_RECORDS:
                following = number + len(batch)
                yield _Unit(file, number, (file, following), tuple(batch), files[file])
                number, batch, size = following, [], 0
        if batch:
            yield _Unit(file, number, (file + 1, 0), tuple(batch), files[file])


_worker_state: dict = {}


def _start_worker(tokenizer_path: str, task: Preparation) -> None:
    _worker_state["tokenizer"] = load_tokenizer(tokenizer_path)
    _worker_state["task"] = task


def _tokenise(unit: _Unit) -> _Tokens:
    tokenizer, task = _worker_state["tokenizer"], _worker_state["task"]
    texts = [
        documents.record_text(record, task.options, f"{unit.where}, record {unit.record + i + 1}")
        for i, record in enumerate(unit.records)
    ]
    encoded = tokenizer.encode_batch(texts)
    if task.insert_eos:
        for record, text, ids in zip(unit.records, texts, encoded, strict=True):
            if record.ends_document and (text or not record.starts_document):
                ids.append(tokenizer.eos_token_id)
    flat = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, sum(map(len, encoded)))
    if flat.size and int(flat.max()) >= tokenizer.vocab_size:
        raise ValueError(f"{unit.where}: token id {int(flat.max())} >= vocabulary {tokenizer.vocab_size}")
    data = [text.encode() for text in texts]
    return _Tokens(
        ids=flat.astype(token_dtype(tokenizer.vocab_size)),
        lengths=np.array([len(ids) for ids in encoded], np.int64),
        text_bytes=np.array([len(d) for d in data], np.int64),
        starts=np.array([record.starts_document for record in unit.records], bool),
        hashes=np.array([int.from_bytes(hashlib.blake2b(d, digest_size=4).digest(), "little") for d in data], np.int64),
    )


def _tokenised(task: Preparation, tokenizer_path: str, start: _Head, workers: int) -> Iterator[tuple[_Unit, _Tokens]]:
    """Units and their tokens in order, a bounded number under way."""
    units = _units(task, start)
    if workers == 0:
        _start_worker(tokenizer_path, task)
        yield from ((unit, _tokenise(unit)) for unit in units)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_path, task)) as pool:
        under_way: deque = deque()
        try:
            while True:
                for unit in itertools.islice(units, workers * _UNITS_PER_WORKER - len(under_way)):
                    under_way.append((unit, pool.submit(_tokenise, unit)))
                if not under_way:
                    return
                unit, future = under_way.popleft()
                yield unit, future.result()
        except BrokenProcessPool as problem:
            raise RuntimeError(
                "a tokenising process was killed (out of memory?); run the same command again to go on from the last "
                "finished shard, with fewer --workers"
            ) from problem
        finally:
            pool.shutdown(cancel_futures=True)
