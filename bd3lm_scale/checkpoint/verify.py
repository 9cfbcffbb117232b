"""Is a checkpoint whole and sane? Checksums, shapes against its own configuration, and numbers that are not finite."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bd3lm_scale.checkpoint.folders import list_steps
from bd3lm_scale.checkpoint.manifest import MANIFEST, read_manifest
from bd3lm_scale.checkpoint.reader import CheckpointReader, find_checkpoint
from bd3lm_scale.config.checks import padded_vocab_size
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.config.sizes import parameters
from bd3lm_scale.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointReport:
    """What verify found; str() is a table, as_dict() is JSON.

    Attributes:
        path: the checkpoint folder.
        step: optimizer steps done.
        contents: "full" or "weights".
        kinds: of master, exp_avg, exp_avg_sq, ema.
        num_tensors, num_parameters: parameter tensors, and their elements.
        size_bytes: of the data files.
        num_files: data files.
        layout: the layout it was saved in.
        problems: what is wrong; empty for a good checkpoint.
        notes: what could not be looked at.
    """

    path: str
    step: int | None
    contents: str
    kinds: tuple[str, ...]
    num_tensors: int
    num_parameters: int
    size_bytes: int
    num_files: int
    layout: dict[str, Any]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        """No problems."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """JSON types, with `is_valid`."""
        return {**asdict(self), "is_valid": self.is_valid}

    def __str__(self) -> str:
        layout = ", ".join(f"{key} {value}" for key, value in self.layout.items()) or "not recorded"
        rows = {
            "checkpoint": self.path,
            "step": self.step,
            "contents": f"{self.contents}: {', '.join(self.kinds)}",
            "parameters": f"{self.num_parameters:,} in {self.num_tensors} tensors",
            "size": f"{self.size_bytes / 1e6:,.1f} MB in {self.num_files} files",
            "saved as": layout,
            "result": "valid" if self.is_valid else "DAMAGED",
        }
        lines = [f"{key:<12}{value}" for key, value in rows.items()]
        return "\n".join([*lines, *(f"  - {text}" for text in (*self.problems, *self.notes))])


def verify(
    path: str | Path, step: int | None = None, progress: Callable[[int, int], object] | None = None
) -> list[CheckpointReport]:
    """Verify one checkpoint, or every checkpoint of a run.

    Args:
        path: a run folder, a checkpoints folder or a checkpoint folder.
        step: of a run, only this step's.
        progress: called with (bytes done, bytes in all) as reading goes on; each byte is read twice.

    Raises:
        CheckpointError: there is no checkpoint at all.
    """
    path = Path(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folders = [item for number, item in reversed(list_steps(folder)) if step in (None, number)]
    if (path / MANIFEST).is_file() or not folders:
        folders = [find_checkpoint(path, step)]
    found: list[tuple[Path, CheckpointReader | str]] = []
    for item in folders:
        try:
            found.append((item, CheckpointReader(item, read_manifest(item))))
        except CheckpointError as error:
            found.append((item, str(error)))
    total = 2 * sum(reader.manifest.size_bytes for _, reader in found if not isinstance(reader, str))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return [_unreadable(item, r) if isinstance(r, str) else _verify_one(r, advance) for item, r in found]


def _unreadable(path: Path, problem: str) -> CheckpointReport:
    return CheckpointReport(str(path), None, "unknown", (), 0, 0, 0, 0, {}, (problem,))


def _verify_one(reader: CheckpointReader, advance: Callable[[int], None]) -> CheckpointReport:
    problems = reader.verify(advance)
    # a scan of bytes that are known to be wrong would only say so again
    problems += [] if problems else [*_not_finite(reader, advance)]
    expected = _expected_shapes(reader)
    notes = [expected] if isinstance(expected, str) else []
    problems += [] if isinstance(expected, str) else [*_wrong_shapes(reader, expected)]
    problems += _missing_kinds(reader)
    layout = reader.meta.get("layout")
    return CheckpointReport(
        path=str(reader.path),
        step=reader.meta.get("step"),
        contents=str(reader.meta.get("contents", "unknown")),
        kinds=tuple(reader.kinds()),
        num_tensors=len(reader.manifest.shapes),
        num_parameters=sum(prod(shape) for shape in reader.manifest.shapes.values()),
        size_bytes=reader.manifest.size_bytes,
        num_files=len(reader.manifest.files),
        layout=layout if isinstance(layout, dict) else {},
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _not_finite(reader: CheckpointReader, advance: Callable[[int], None]) -> Iterator[str]:
    """One line per tensor that holds NaN or infinity."""
    counts: dict[tuple[str, str], int] = {}
    for stored, values in reader.scan():
        counts[stored.kind, stored.name] = counts.get((stored.kind, stored.name), 0) + int((~np.isfinite(values)).sum())
        advance(values.nbytes)
    for (kind, name), count in sorted(counts.items()):
        if count:
            yield f"{kind} of {name}: {count:,} of {prod(reader.shape(name)):,} numbers are not finite"


def _expected_shapes(reader: CheckpointReader) -> dict[str, tuple[int, ...]] | str:
    """Shapes by the saved configuration, or why they are not known."""
    try:
        vocab_size = padded_vocab_size(int(reader.meta["vocab_size"]))
        found = parameters(from_dict(reader.meta["config"]), vocab_size)
    except KeyError as error:
        return f"shapes were not compared: the checkpoint's record has no {error}"
    except (ValueError, TypeError, AttributeError) as error:
        return f"shapes were not compared: the saved configuration does not fit this version: {error}"
    return {name: tuple(parameter.shape) for name, parameter in found.items()}


def _wrong_shapes(reader: CheckpointReader, expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Differences from the parameters that the saved configuration describes."""
    shapes = reader.manifest.shapes
    for name in sorted(expected.keys() - shapes.keys()):
        yield f"{name} is missing"
    for name in sorted(shapes.keys() - expected.keys()):
        yield f"{name} does not belong to the saved configuration"
    for name in sorted(shapes.keys() & expected.keys()):
        if expected[name] != shapes[name]:
            yield f"{name} has shape {shapes[name]}, the saved configuration says {expected[name]}"


def _missing_kinds(reader: CheckpointReader) -> Iterator[str]:
    for kind in reader.kinds():
        if missing := sorted(set(reader.manifest.shapes) - set(reader.names(kind))):
            yield f"{kind} is missing for {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
