"""Rewrite a checkpoint: into another number of files, or only its weights, or only its averaged weights."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bd3lm_scale.checkpoint.boxes import boxes_of
from bd3lm_scale.checkpoint.files import ITEM_BYTES, DataFile, StoredBox, write_data_file
from bd3lm_scale.checkpoint.reader import CheckpointReader, find_checkpoint, open_checkpoint
from bd3lm_scale.checkpoint.write import write_folder
from bd3lm_scale.errors import CheckpointError
from bd3lm_scale.values import StateSlice

CONTENTS = ("all", "weights", "ema")
PIECE_ELEMENTS = 4 * 1024 * 1024


@dataclass(frozen=True)
class ReshardReport:
    """What reshard wrote; str() is a line, as_dict() is JSON."""

    path: str
    contents: str
    num_tensors: int
    num_files: int
    size_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        size = f"{self.size_bytes / 1e6:,.1f} MB in {self.num_files} files"
        return f"{self.path}: {self.contents}, {self.num_tensors} tensors, {size}, {self.seconds:.1f} s"


def reshard(
    source: str | Path,
    destination: str | Path,
    num_files: int = 1,
    contents: str = "all",
    progress: Callable[[int, int], object] | None = None,
) -> ReshardReport:
    """Rewrite a checkpoint folder, in memory of a few pieces; the source is verified first.

    Args:
        source: the checkpoint folder to read, or a run folder (its newest one).
        destination: the checkpoint folder to create.
        num_files: data files of nearly equal size.
        contents: "all"; "weights" (raw and averaged, no optimizer state); "ema" (the averaged weights alone, stored
            as the weights, `meta["weights"] = "ema"`).
        progress: called with (bytes done, bytes in all); the source is read twice.

    Raises:
        ValueError: a wrong argument.
        CheckpointError: the source is damaged or lacks what is asked for, or the destination exists.
    """
    started = time.perf_counter()
    if contents not in CONTENTS:
        raise ValueError(f"contents ({contents}): not known; use one of {', '.join(CONTENTS)}")
    if num_files < 1:
        raise ValueError(f"num_files ({num_files}): must be at least 1")
    reader = open_checkpoint(find_checkpoint(source))
    tensors = _chosen(reader, contents)
    total = reader.manifest.size_bytes + ITEM_BYTES * sum(prod(reader.shape(name)) for name, _, _ in tensors)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    if problems := reader.verify(advance):
        raise CheckpointError(f"{source} is damaged: {'; '.join(problems)}")
    meta = dict(reader.meta)
    if contents != "all":
        meta["contents"] = "weights"
    if contents == "ema":
        meta["weights"] = "ema"
    written: list[DataFile] = []

    def write(folder: Path) -> Iterator[DataFile]:
        for i, parts in enumerate(_share(reader, tensors, num_files)):
            boxes = [
                StoredBox(target, part.name, part.global_shape, box)
                for target, _, part in parts
                for box in boxes_of(part)
            ]
            runs = _read_pieces(reader, parts, advance)
            written.append(write_data_file(folder / f"part_{i:05d}.safetensors", boxes, runs))
            yield written[-1]

    path = write_folder(Path(destination), meta, write)
    size = sum(file.size_bytes for file in written)
    return ReshardReport(str(path), contents, len(tensors), len(written), size, time.perf_counter() - started)


def _chosen(reader: CheckpointReader, contents: str) -> list[tuple[str, str, str]]:
    """(name, kind to write, kind to read) of every tensor."""
    kinds = {
        "all": {k: k for k in reader.kinds()},
        "weights": {"master": "master", "ema": "ema"},
        "ema": {"master": "ema"},
    }
    if contents == "ema" and "ema" not in reader.kinds():
        raise CheckpointError(f"{reader.path} holds no averaged weights (it holds {', '.join(reader.kinds())})")
    return [(name, to, of) for to, of in kinds[contents].items() for name in reader.names(of)]


def _share(
    reader: CheckpointReader, tensors: list[tuple[str, str, str]], num_files: int
) -> Iterator[list[tuple[str, str, StateSlice]]]:
    """For each file its (kind to write, kind to read, run): all tensors laid end to end, cut in equal lengths."""
    sizes = [prod(reader.shape(name)) for name, _, _ in tensors]
    total = sum(sizes)
    for i in range(num_files):
        low, high, begin, parts = i * total // num_files, (i + 1) * total // num_files, 0, []
        for (name, target, source), size in zip(tensors, sizes, strict=True):
            start, stop = max(low, begin) - begin, min(high, begin + size) - begin
            if start < stop:
                parts.append((target, source, StateSlice(name, reader.shape(name), None, 0, 1, start, stop)))
            begin += size
        if parts:
            yield parts


def _read_pieces(
    reader: CheckpointReader, parts: list[tuple[str, str, StateSlice]], advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    for _, source, part in parts:
        for start in range(part.start, part.stop, PIECE_ELEMENTS):
            stop = min(start + PIECE_ELEMENTS, part.stop)
            run = torch.empty(stop - start)
            piece = StateSlice(part.name, part.global_shape, None, 0, 1, start, stop, True, {source: run})
            reader.fill([piece])
            yield run.numpy()
            advance(run.nbytes)
