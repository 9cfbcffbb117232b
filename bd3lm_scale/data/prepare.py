"""Corpus to shards: read records, tokenise them on many processes, split, pack, write; resumable at each shard.

    inputs -> records -> units -> worker processes -> tokens -> train and validation shards -> manifests

After each shard a line goes to progress.jsonl saying which unit the tokens not yet written begin with; a new run
starts there and gives the same bytes. The manifests are written last.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bd3lm_scale.data.documents import count_documents
from bd3lm_scale.data.packing import SPLITS, Head, Packer, Splitter
from bd3lm_scale.data.shards import (
    MANIFEST,
    Manifest,
    Shard,
    manifest_from_json,
    manifest_to_json,
    shard_from_json,
    token_dtype,
    write_file,
)
from bd3lm_scale.data.tokenising import Preparation, Unit, tokenised_units
from bd3lm_scale.data.tokenizer import Tokenizer, identity_of, load_tokenizer

PROGRESS = "progress.jsonl"


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
        workers: processes that tokenise; 0 does it in this one.
        report: called with each finished unit and the number of tokens so far.

    Returns:
        The manifest of each split that has tokens.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    description = {**task.describe(), "tokenizer": tokenizer.hash}
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    finished = _finished(output, fingerprint)
    if finished is not None:
        return finished
    splitter = Splitter(
        task, sum(count_documents(p, task.options) for p in task.inputs) if task.validation_documents else 0
    )
    output.mkdir(parents=True, exist_ok=True)
    log = _ProgressLog(output / PROGRESS, fingerprint)
    tokenizer.save(output / "tokenizer")
    dtype = token_dtype(tokenizer.vocab_size)
    packers = {s: Packer(s, output / s, dtype, task, log.shards[s], log.resume[s]) for s in SPLITS}
    head = min((log.resume[s][0] for s in SPLITS), key=lambda h: h.place)
    for unit, tokens in tokenised_units(task, tokenizer_path, head.place, workers):
        runs, following = splitter.split(unit, tokens, head)
        for split, run in zip(SPLITS, runs, strict=True):
            packers[split].add(head, *run)
        head = following
        for packer in packers.values():
            while packer.is_full:
                _finish_shard(packer, packers, head, log)
        report(unit, sum(packer.num_tokens for packer in packers.values()))
    for packer in packers.values():
        while packer.pending_tokens:
            _finish_shard(packer, packers, head, log)
    manifests = _manifests(task, tokenizer, packers, head, {**description, "fingerprint": fingerprint})
    for split, manifest in manifests.items():
        write_file(output / split / MANIFEST, manifest_to_json(manifest))
    log.remove()
    return manifests


def _finish_shard(packer: Packer, packers: dict[str, Packer], head: Head, log: "_ProgressLog") -> None:
    shard = packer.cut()
    split = next(s for s in SPLITS if packers[s] is packer)
    log.append(split, shard, {s: packers[s].resume_point(head) for s in SPLITS})


def _manifests(
    task: Preparation, tokenizer: Tokenizer, packers: dict[str, Packer], head: Head, description: dict
) -> dict[str, Manifest]:
    if not any(packer.shards for packer in packers.values()):
        raise ValueError(f"no text: the {len(task.files)} input files hold only empty documents, or none")
    return {
        split: Manifest(
            split=split,
            dtype=token_dtype(tokenizer.vocab_size),
            chunk_tokens=task.chunk_tokens,
            num_tokens=sum(shard.num_tokens for shard in packers[split].shards),
            num_documents=sum(shard.num_documents for shard in packers[split].shards),
            num_text_bytes=head.text_bytes[number],
            tokenizer=identity_of(tokenizer),
            shards=tuple(packers[split].shards),
            preparation=description,
        )
        for number, split in enumerate(SPLITS)
        if packers[split].shards
    }


def _finished(output: Path, fingerprint: str) -> dict[str, Manifest] | None:
    """The manifests of an equal preparation that is complete."""
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
        self.resume: dict[str, tuple[Head, int]] = {split: (Head(), 0) for split in SPLITS}
        # what follows the last newline was being written when the process died
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if not lines:
            lines = [json.dumps(fingerprint)]
        elif json.loads(lines[0]) != fingerprint:
            raise ValueError(
                f"output {path.parent}: holds an unfinished preparation of other inputs, options or another "
                "tokenizer; choose another --output, or remove that folder first"
            )
        for line in lines[1:]:
            entry = json.loads(line)
            self.shards[entry["split"]].append(shard_from_json(entry["shard"]))
            self.resume = {s: (_head(entry["resume"][s][0]), entry["resume"][s][1]) for s in SPLITS}
        write_file(path, "\n".join(lines) + "\n")

    def append(self, split: str, shard: Shard, resume: dict[str, tuple[Head, int]]) -> None:
        """Record a finished shard."""
        places = {s: [asdict(head), used] for s, (head, used) in resume.items()}
        entry = {"split": split, "shard": asdict(shard), "resume": places}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """The preparation is complete."""
        self._path.unlink()


def _head(raw: dict) -> Head:
    return Head(**{**raw, "text_bytes": tuple(raw["text_bytes"])})
