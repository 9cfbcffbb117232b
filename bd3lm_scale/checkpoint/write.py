"""Checkpoints written by one process, outside a run: converted weights and resharded copies."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3lm_scale.checkpoint.boxes import Box
from bd3lm_scale.checkpoint.files import DataFile, StoredBox, write_data_file, write_durably
from bd3lm_scale.checkpoint.folders import WRITING
from bd3lm_scale.checkpoint.manifest import MANIFEST, write_text
from bd3lm_scale.errors import CheckpointError
from bd3lm_scale.runtime.durable import make_folder, rename, sync_folder

WEIGHT_FILE_BYTES = 2 * 1024**3


def write_weights(folder: str | Path, tensors: Iterable[tuple[str, str, Tensor]], meta: dict[str, Any]) -> Path:
    """Write a checkpoint that holds only weights, in memory bounded by one file.

    Args:
        folder: the checkpoint folder to create.
        tensors: (global name, kind, whole tensor) with kind "master" or "ema"; any floating dtype.
        meta: the record; contents is set to "weights".

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists; OSError: what the disk says.
    """

    def write(temporary: Path) -> Iterator[DataFile]:
        for i, batch in enumerate(_batches(tensors)):
            boxes = [StoredBox(kind, name, tuple(t.shape), _whole(t)) for name, kind, t in batch]
            runs = (t.detach().to(device="cpu", dtype=torch.float32).reshape(-1).numpy() for _, _, t in batch)
            yield write_data_file(temporary / f"weights_{i:05d}.safetensors", boxes, runs)

    return write_folder(Path(folder), {**meta, "contents": "weights"}, write)


def write_folder(folder: Path, meta: dict[str, Any], write: Callable[[Path], Iterable[DataFile]]) -> Path:
    """Create a checkpoint folder as a save does: under a temporary name, manifest last, renamed when durable.

    Args:
        folder: the folder to create.
        meta: the record.
        write: writes the data files into the temporary folder it is given.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists; choose another destination or remove it")
    make_folder(folder.parent)
    temporary = folder.with_name(f"{WRITING}{folder.name}_{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        files = list(write(temporary))
        write_durably(temporary / MANIFEST, write_text(meta, files))
        sync_folder(temporary)
        rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _whole(tensor: Tensor) -> Box:
    return Box(tuple(0 for _ in tensor.shape), tuple(tensor.shape))


def _batches(tensors: Iterable[tuple[str, str, Tensor]]) -> Iterator[list[tuple[str, str, Tensor]]]:
    """As many tensors as fill a file."""
    batch, size = [], 0
    for item in tensors:
        batch.append(item)
        size += 4 * item[2].numel()
        if size >= WEIGHT_FILE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
