"""A corpus cut into units of about a megabyte, tokenized on many processes, in order.

The units and their tokens depend on the task alone, not on the number of processes.
"""

import hashlib
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field

import numpy as np

from bd3lm_scale.data import documents
from bd3lm_scale.data.chat import chat_format, encode_record
from bd3lm_scale.data.detokenize import DETOKENIZERS
from bd3lm_scale.data.inputs import fingerprint
from bd3lm_scale.data.shards import token_dtype
from bd3lm_scale.data.storage import is_remote
from bd3lm_scale.data.tokenizer import Tokenizer, load_tokenizer

READING = 2
"""Changes when the same inputs and options no longer give the same tokens."""
_UNIT_BYTES = 1 << 20
# documents of any format go where the first piece of a long text goes
_HASHED_BYTES = 1 << 20
_UNIT_RECORDS = 1000
_UNITS_PER_WORKER = 4


@dataclass(frozen=True)
class Preparation:
    """What to prepare and how.

    Attributes:
        inputs: files of the corpus.
        validation_inputs: files that go to validation whole.
        validation_documents: this many last documents of `inputs` go to validation.
        validation_fraction: share of the documents of `inputs`, chosen by hash, that go to validation.
        options: how files become documents.
        detokenizer: one of DETOKENIZERS, or none.
        insert_eos: end each document with EOS.
        messages: documents are conversations, of which the assistant's answers are targets; options.field names them.
        chat_template: a file in place of the tokenizer's own chat template.
        on_bad_record: "stop" at what is no document, or "skip" and list it.
        shard_tokens, chunk_tokens: tokens per shard and per member.
        ignored: files beside the inputs that are not read, by kind; for the record only.
    """

    inputs: tuple[str, ...]
    validation_inputs: tuple[str, ...] = ()
    validation_documents: int = 0
    validation_fraction: float = 0.0
    options: documents.Options = field(default_factory=documents.Options)
    detokenizer: str | None = None
    insert_eos: bool = True
    on_bad_record: str = "stop"
    shard_tokens: int = 1 << 25
    chunk_tokens: int = 1 << 16
    ignored: tuple[tuple[str, int], ...] = ()
    messages: bool = False
    chat_template: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """All files, in the order they are read."""
        return self.inputs + self.validation_inputs

    def describe(self) -> dict:
        """What the bytes of the result depend on, without the paths of this machine."""
        raw = asdict(self)
        del raw["ignored"], raw["chat_template"]
        if not self.messages:
            del raw["messages"]
        for key in ("inputs", "validation_inputs"):
            raw[key] = [fingerprint(path) for path in raw[key]]
        return raw | {"reading": READING}


def load_tokenizer_for(task: Preparation, path: str) -> Tokenizer:
    """The tokenizer at `path`, with the task's chat template (ValueError where conversations have none)."""
    tokenizer = load_tokenizer(path, task.chat_template)
    if task.messages:
        chat_format(tokenizer)
    return tokenizer


def file_size(path: str) -> int | None:
    """Bytes of a local file; None for a remote one."""
    return None if is_remote(path) else os.path.getsize(path)


@dataclass(frozen=True)
class Unit:
    """Records that are tokenized together.

    Attributes:
        file, record: where the first one lies.
        next_place: (file, record) of the unit that follows.
        records: the records; none where a file's last unit was full.
        path: the file's name, for messages.
        bytes_read: how much of the file, as stored, had been read for it.
        ignored: with a file's last unit, what in the file is no document.
    """

    file: int
    record: int
    next_place: tuple[int, int]
    records: tuple[documents.Record, ...]
    path: str
    bytes_read: int
    ignored: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """A tokenized unit; one entry per record in all arrays but `ids`.

    Attributes:
        ids: all tokens.
        lengths: tokens of each record.
        text_bytes: bytes of UTF-8 text.
        starts: whether a document starts here.
        hashes: 32-bit hashes of the beginning of the text, as int64.
        bad: (record of the unit, kind, reason) of each that is no document; it has no tokens.
        is_target: of all tokens, whether they are targets; None: all are.
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    starts: np.ndarray
    hashes: np.ndarray
    bad: tuple[tuple[int, str, str], ...] = ()
    is_target: np.ndarray | None = None


def cut_units(task: Preparation, position: tuple[int, int] = (0, 0), whole: bool = False) -> Iterator[Unit]:
    """The corpus from the record at `position` on; `whole`: no document is cut into pieces."""
    for file in range(position[0], len(task.files)):
        path = task.files[file]
        number = position[1] if file == position[0] else 0
        meter = documents.Meter()
        batch: list[documents.Record] = []
        size = 0
        for record in itertools.islice(_records(path, task, meter, whole), number, None):
            batch.append(record)
            size += len(record.data)
            if size >= _UNIT_BYTES or len(batch) >= _UNIT_RECORDS:
                following = number + len(batch)
                yield Unit(file, number, (file, following), tuple(batch), path, meter.num_bytes)
                number, batch, size = following, [], 0
        ignored = tuple(sorted(meter.ignored.items()))
        yield Unit(file, number, (file + 1, 0), tuple(batch), path, file_size(path) or 0, ignored)


def _records(path: str, task: Preparation, meter: documents.Meter, whole: bool) -> Iterator[documents.Record]:
    """The records of a file; with on_bad_record=skip, damage ends it with a bad record."""
    try:
        yield from documents.read_records(path, task.options, meter, whole=whole)
    except ValueError as problem:
        if task.on_bad_record == "stop":
            raise
        reason = str(problem).removeprefix(f"{path}: ")
        damage = documents.BadRecordError("damaged file", f"{reason}; nothing behind it was read")
        yield documents.Record(b"", where="the file", problem=damage)


def tokenize(unit: Unit, task: Preparation, tokenizer: Tokenizer) -> Tokens:
    """Tokens of a unit (ValueError naming file and record for what is no document, unless such are skipped)."""
    bad: dict[int, documents.BadRecordError] = {}
    is_target: list[bool] | None = [] if task.messages else None
    if is_target is None:
        texts, encoded = _encode_texts(unit, task, tokenizer, bad)
    else:
        texts, encoded = _encode_conversations(unit, task, tokenizer, bad, is_target)
    if bad and task.on_bad_record == "stop":
        raise ValueError(_first_bad(unit, bad))
    ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, sum(map(len, encoded)))
    if ids.size and int(ids.max()) >= tokenizer.vocab_size:
        raise ValueError(f"{unit.path}: token id {int(ids.max())} is outside the vocabulary of {tokenizer.vocab_size}")
    data = [b"" if number in bad else text.encode() for number, text in enumerate(texts)]
    hashes = [int.from_bytes(hashlib.blake2b(text[:_HASHED_BYTES], digest_size=4).digest(), "little") for text in data]
    return Tokens(
        ids=ids.astype(token_dtype(tokenizer.vocab_size)),
        lengths=np.array([len(ids) for ids in encoded], np.int64),
        text_bytes=np.array([len(text) for text in data], np.int64),
        starts=np.array([record.starts_document for record in unit.records], bool),
        hashes=np.array(hashes, np.int64),
        bad=tuple((number, problem.kind, problem.reason) for number, problem in sorted(bad.items())),
        is_target=None if is_target is None else np.array(is_target, bool),
    )


def _encode_texts(
    unit: Unit, task: Preparation, tokenizer: Tokenizer, bad: dict[int, documents.BadRecordError]
) -> tuple[list[str], list[list[int]]]:
    """Text and ids of each record, EOS included."""
    texts = []
    for number, record in enumerate(unit.records):
        text = ""
        try:
            text = documents.record_text(record, task.options)
        except documents.BadRecordError as problem:
            bad[number] = problem
        texts.append(DETOKENIZERS[task.detokenizer](text) if task.detokenizer and number not in bad else text)
    encoded = _encode(texts, tokenizer, bad)
    if task.insert_eos:
        for number, (record, ids) in enumerate(zip(unit.records, encoded, strict=True)):
            # nothing ends where nothing began: an empty document leaves no trace
            if record.ends_document and number not in bad and (ids or not record.starts_document):
                ids.append(tokenizer.eos_token_id)
    return texts, encoded


def _encode_conversations(
    unit: Unit,
    task: Preparation,
    tokenizer: Tokenizer,
    bad: dict[int, documents.BadRecordError],
    is_target: list[bool],
) -> tuple[list[str], list[list[int]]]:
    """Text and ids of each conversation; its targets join `is_target`.

    A conversation ends with EOS, which is a target only where no token of the template's has ended its last answer.
    """
    texts: list[str] = []
    encoded: list[list[int]] = []
    for number, record in enumerate(unit.records):
        try:
            found = encode_record(record, task.options, chat_format(tokenizer))
        except documents.BadRecordError as problem:
            bad[number] = problem
            texts.append("")
            encoded.append([])
            continue
        if task.insert_eos and found.ids[-1] != tokenizer.eos_token_id:
            found.ids.append(tokenizer.eos_token_id)
            found.is_target.append(found.ends_open)
        texts.append(found.text)
        encoded.append(found.ids)
        is_target += found.is_target
    return texts, encoded


def _encode(texts: list[str], tokenizer: Tokenizer, bad: dict[int, documents.BadRecordError]) -> list[list[int]]:
    """Ids of each text; one that the tokenizer cannot write joins the bad ones."""
    try:
        return tokenizer.encode_batch(texts)
    except ValueError:
        encoded: list[list[int]] = []
        for number, text in enumerate(texts):
            try:
                encoded.append(tokenizer.encode(text))
            except ValueError as problem:
                bad[number] = documents.BadRecordError("no tokens for it", str(problem))
                encoded.append([])
        return encoded


def _first_bad(unit: Unit, bad: dict[int, documents.BadRecordError]) -> str:
    number = min(bad)
    return (
        f"{unit.path}, record {unit.record + number + 1}: {bad[number].reason}; it is {unit.records[number].where}; "
        "correct it, or leave what is no document out with --on-bad-record skip"
    )


def num_documents(task: Preparation) -> int:
    """Documents in task.inputs, bad ones included."""
    if task.on_bad_record == "stop":
        return sum(documents.count_documents(path, task.options) for path in task.inputs)
    found = (_records(path, task, documents.Meter(), whole=True) for path in task.inputs)
    return sum(record.starts_document for records in found for record in records)


def must_stay_whole(task: Preparation, tokenizer: Tokenizer) -> bool:
    """Whether a long text has other tokens in pieces."""
    return bool(task.detokenizer) or not tokenizer.cuts_at_spaces


_in_worker: dict = {}


def _start_worker(task: Preparation, tokenizer_path: str) -> None:
    _in_worker.update(task=task, tokenizer=load_tokenizer_for(task, tokenizer_path))


def _tokenize_in_worker(unit: Unit) -> Tokens:
    return tokenize(unit, _in_worker["task"], _in_worker["tokenizer"])


def tokenized_units(
    task: Preparation, tokenizer_path: str, position: tuple[int, int], workers: int
) -> Iterator[tuple[Unit, Tokens]]:
    """Units from `position` on and their tokens, in order; a bounded number is under way at any time.

    Args:
        task: what to do.
        tokenizer_path: for `load_tokenizer`.
        position: (file, record) to begin at.
        workers: processes; 0 tokenizes in this one.
    """
    tokenizer = load_tokenizer_for(task, tokenizer_path)
    units = cut_units(task, position, whole=must_stay_whole(task, tokenizer))
    if workers == 0:
        yield from ((unit, tokenize(unit, task, tokenizer)) for unit in units)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (task, tokenizer_path))
    under_way: deque = deque()
    try:
        while True:
            for unit in itertools.islice(units, workers * _UNITS_PER_WORKER - len(under_way)):
                under_way.append((unit, pool.submit(_tokenize_in_worker, unit)))
            if not under_way:
                return
            unit, future = under_way.popleft()
            yield unit, future.result()
    except BrokenProcessPool as problem:
        raise RuntimeError(
            "a tokenizing process was killed (out of memory?); run the same command again to go on from the last "
            "finished shard, with fewer --workers"
        ) from problem
    finally:
        pool.shutdown(cancel_futures=True)
