"""Reading checkpoints: any part of any tensor, under any layout, only the bytes that are asked for.

No number leaves a file whose SHA-256 was not compared: by verify(), by the search for the newest checkpoint, or else by
the first read from that file.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.checkpoint.boxes import Box, BoxIndex, boxes_of
from bd3lm_scale.checkpoint.files import ITEM_BYTES, StoredBox, file_problem
from bd3lm_scale.checkpoint.folders import list_steps
from bd3lm_scale.checkpoint.manifest import MANIFEST, CheckpointManifest, read_manifest
from bd3lm_scale.errors import CheckpointError
from bd3lm_scale.values import StateSlice

MAX_OPEN_FILES = 64
# Reading whole rows and cutting them is faster than one read per row while a row's part is smaller than this.
SEPARATE_READ_BYTES = 64 * 1024
ROWS_READ_BYTES = 16 * 1024 * 1024
SCAN_ELEMENTS = 4 * 1024 * 1024


def find_checkpoint(path: str | Path, step: int | None = None) -> Path:
    """The checkpoint folder that a run folder, a checkpoints folder or a checkpoint folder means.

    Args:
        path: any of the three.
        step: choose this step's checkpoint in place of the newest one.

    Raises:
        CheckpointError: there is none; the message says where it looked and what is there.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = list_steps(folder)
    problems = []
    for number, candidate in found:
        if step is not None and number != step:
            continue
        try:
            problem = next(iter(CheckpointReader(candidate, read_manifest(candidate)).size_problems()), None)
        except CheckpointError as error:
            problem = str(error)
        if problem is None:
            return candidate
        problems.append(problem)
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    there = f"steps there: {', '.join(str(number) for number, _ in reversed(found))}" if found else "none is there"
    damage = f"; damaged: {'; '.join(problems)}" if problems else ""
    raise CheckpointError(f"no {wanted} in {folder} ({there}{damage})")


def open_checkpoint(path: str | Path) -> "CheckpointReader":
    """Open a checkpoint folder (for a run folder use find_checkpoint first).

    Raises:
        CheckpointError: no valid manifest, or a file that is missing or has another size; names the file.
    """
    path = Path(path)
    reader = CheckpointReader(path, read_manifest(path))
    if problems := reader.size_problems():
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")
    return reader


class CheckpointReader:
    """One checkpoint, open for reading.

    Attributes:
        path: its folder.
        manifest: what it holds.
        meta: the run's record: step, tokens, optimizer_step, cursor, clip, config, layout, contents, versions, ...
    """

    def __init__(self, path: Path, manifest: CheckpointManifest) -> None:
        self.path = path
        self.manifest = manifest
        self.meta = manifest.meta
        self._open_files: dict[str, int] = {}
        self._verified: set[str] = set()
        self._stored: dict[tuple[str, str], list[tuple[str, StoredBox]]] = {}
        for file in manifest.files:
            for stored in file.boxes:
                self._stored.setdefault((stored.kind, stored.name), []).append((file.name, stored))
        self._index: dict[tuple[str, str], BoxIndex] = {}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def kinds(self) -> list[str]:
        """What is stored: some of master, exp_avg, exp_avg_sq, ema."""
        return sorted({kind for kind, _ in self._stored})

    def names(self, kind: str = "master") -> list[str]:
        """Global names of the parameters that have this kind of state, in sorted order."""
        return sorted(name for found, name in self._stored if found == kind)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a parameter; CheckpointError if there is no such parameter."""
        if name not in self.manifest.shapes:
            raise CheckpointError(f"{self.path} has no parameter {name!r}")
        return self.manifest.shapes[name]

    def read(self, name: str, kind: str = "master") -> Tensor:
        """The whole tensor (float32, on the CPU)."""
        shape = self.shape(name)
        out = np.empty(shape, dtype=np.float32)
        self._read_box(kind, name, Box(tuple(0 for _ in shape), shape), out)
        return torch.from_numpy(out)

    def fill(self, slices: Iterable[StateSlice], kinds: Iterable[str] | Mapping[str, str] | None = None) -> None:
        """Fill the slices' tensors in place, reading only what overlaps them.

        Args:
            slices: what this rank holds under its layout, owner or not.
            kinds: which of the slices' tensors to fill (all by default); a mapping fills one kind from another,
                e.g. {"master": "ema"} starts from the averaged weights.

        Raises:
            CheckpointError: a parameter or kind is missing, a shape differs, or a region is not completely stored.
        """
        chosen = (
            None if kinds is None else dict(kinds) if isinstance(kinds, Mapping) else {kind: kind for kind in kinds}
        )
        for part in slices:
            if self.shape(part.name) != tuple(part.global_shape):
                raise CheckpointError(
                    f"{part.name} has shape {tuple(part.global_shape)} here and {self.shape(part.name)} in "
                    f"{self.path}: the model differs from the one that was saved"
                )
            boxes = boxes_of(part)
            for target, source in (chosen or {kind: kind for kind in part.tensors}).items():
                if target not in part.tensors:
                    raise CheckpointError(f"{part.name}: there is no {target!r} to fill, only {sorted(part.tensors)}")
                self._fill_run(source, part, part.tensors[target], boxes)

    def _fill_run(self, kind: str, part: StateSlice, run: Tensor, boxes: list[Box]) -> None:
        if run.dim() != 1 or run.numel() != part.stop - part.start:
            raise ValueError(f"{part.name}: a tensor of {tuple(run.shape)} for the run [{part.start}, {part.stop})")
        # straight into the memory of a CPU tensor; anything else goes through one host copy of the box
        direct = run.device.type == "cpu" and run.dtype == torch.float32 and run.is_contiguous()
        for box in boxes:
            place = run[box.start : box.start + box.volume]
            out = place.detach().numpy().reshape(box.shape) if direct else np.empty(box.shape, dtype=np.float32)
            self._read_box(kind, part.name, box, out)
            if not direct:
                with torch.no_grad():
                    place.copy_(torch.from_numpy(out.reshape(-1)))

    def _read_box(self, kind: str, name: str, box: Box, out: np.ndarray) -> None:
        if (kind, name) not in self._stored:
            raise CheckpointError(f"{self.path} holds no {kind!r} of {name} (it holds {', '.join(self.kinds())})")
        entries = self._stored[kind, name]
        if (kind, name) not in self._index:
            self._index[kind, name] = BoxIndex(self.shape(name), [stored.box for _, stored in entries])
        covered = 0
        for i, inside, wanted in self._index[kind, name].overlapping(box):
            file, stored = entries[i]
            # the ellipsis keeps a view where a tensor has no dimensions
            self._read_region(file, stored, inside, out[(*wanted, ...)])
            covered += prod(part.stop - part.start for part in inside)
        if covered != box.volume:
            raise CheckpointError(
                f"{self.path} holds {covered:,} of the {box.volume:,} elements of {kind} {name} "
                f"from {box.offset} of extent {box.shape}"
            )

    def _read_region(self, file: str, stored: StoredBox, inside: tuple[slice, ...], out: np.ndarray) -> None:
        """out[...] = stored[inside]; out may be a strided view."""
        shape = stored.box.shape
        if not shape:
            self._read_into(file, stored.position, out.reshape(1))
            return
        inner = prod(shape[1:])
        whole_rows = all(part.stop - part.start == size for part, size in zip(inside[1:], shape[1:], strict=True))
        begin, end = inside[0].start, inside[0].stop
        if whole_rows and out.flags.c_contiguous:
            self._read_into(file, stored.position + ITEM_BYTES * begin * inner, out.reshape(-1))
        elif ITEM_BYTES * prod(out.shape[1:]) >= SEPARATE_READ_BYTES or ITEM_BYTES * inner > ROWS_READ_BYTES:
            for row in range(begin, end):
                position = stored.position + ITEM_BYTES * row * inner
                part = StoredBox(stored.kind, stored.name, stored.global_shape, Box((), shape[1:]), position)
                self._read_region(file, part, inside[1:], out[row - begin, ...])
        else:
            step = max(1, ROWS_READ_BYTES // (ITEM_BYTES * inner))
            for row in range(begin, end, step):
                rows = np.empty((min(step, end - row), *shape[1:]), dtype=np.float32)
                self._read_into(file, stored.position + ITEM_BYTES * row * inner, rows.reshape(-1))
                out[row - begin : row - begin + len(rows)] = rows[(slice(None), *inside[1:])]

    def _read_into(self, file: str, position: int, out: np.ndarray) -> None:
        """Read `out` (1-D, contiguous) from a byte position; plain reads, because a mapped file that shrinks kills."""
        if not out.size:
            return
        descriptor = self._open_files.get(file)
        if descriptor is None:
            descriptor = self._open(file)
        view = out.data.cast("B")
        try:
            while view:
                count = os.preadv(descriptor, [view], position)
                if count == 0:
                    raise CheckpointError(f"{self.path / file} ends before its data does: it was truncated")
                view, position = view[count:], position + count
        except OSError as error:
            raise CheckpointError(f"{self.path / file} cannot be read: {error}") from error

    def _open(self, name: str) -> int:
        if name not in self._verified:
            (file,) = (file for file in self.manifest.files if file.name == name)
            if problem := file_problem(self.path / name, file.size_bytes, file.sha256):
                raise CheckpointError(f"{self.path} is damaged: {problem}")
            self._verified.add(name)
        if len(self._open_files) >= MAX_OPEN_FILES:
            self.close()
        try:
            self._open_files[name] = os.open(self.path / name, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{self.path / name} cannot be opened: {error}") from error
        return self._open_files[name]

    def scan(self) -> Iterator[tuple[StoredBox, np.ndarray]]:
        """All data in the order it is stored, in pieces of bounded size (flat arrays)."""
        for file in self.manifest.files:
            for stored in file.boxes:
                for start in range(0, stored.box.volume, SCAN_ELEMENTS):
                    values = np.empty(min(SCAN_ELEMENTS, stored.box.volume - start), dtype=np.float32)
                    self._read_into(file.name, stored.position + ITEM_BYTES * start, values)
                    yield stored, values

    def size_problems(self) -> list[str]:
        """Files that are missing or have another size; quick, reads no data."""
        found = (file_problem(self.path / file.name, file.size_bytes, None) for file in self.manifest.files)
        return [problem for problem in found if problem]

    def verify(self, progress: Callable[[int], object] | None = None, rank: int = 0, world_size: int = 1) -> list[str]:
        """Compare files with their SHA-256 and return what is wrong.

        Args:
            progress: called with the number of bytes read since the last call (tqdm's update).
            rank, world_size: check only this rank's share of the files (a resume shares the work).
        """
        # largest first, dealt in turn, so that the shares are even
        files = sorted(self.manifest.files, key=lambda file: (-file.size_bytes, file.name))
        problems = []
        for file in files[rank::world_size]:
            if problem := file_problem(self.path / file.name, file.size_bytes, file.sha256, progress):
                problems.append(problem)
            else:
                self._verified.add(file.name)
        return problems

    def trust(self) -> None:
        """Take the other ranks' word that every file is good (each of them verified its share)."""
        self._verified = {file.name for file in self.manifest.files}
