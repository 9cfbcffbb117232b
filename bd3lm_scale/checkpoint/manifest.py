"""manifest.json: what a checkpoint folder holds. A folder without a valid one does not exist.

Everything in it is checked before it is believed: its own checksum, the version, names, shapes, and that the boxes of
each tensor are the whole tensor, each element once. It is JSON and is only ever parsed as JSON.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3lm_scale.checkpoint.boxes import KINDS, Box, BoxIndex
from bd3lm_scale.checkpoint.files import DATA_FILE, ITEM_BYTES, DataFile, StoredBox
from bd3lm_scale.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "bd3lm_scale checkpoint"
VERSION = 1

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From version n to n + 1, on the parsed manifest; a version raised above gets its entry here."""


class UnknownVersionError(CheckpointError):
    """Written by another version of the format: not damaged, so never set aside."""


@dataclass(frozen=True)
class CheckpointManifest:
    """A checkpoint's contents, checked.

    Attributes:
        meta: the run's own record (step, cursor, config, ...).
        shapes: global shape of each parameter.
        files: the data files with their boxes.
    """

    meta: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: tuple[DataFile, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all data files."""
        return sum(file.size_bytes for file in self.files)


def write_text(meta: dict[str, Any], files: Iterable[DataFile]) -> str:
    """The manifest as JSON text; CheckpointError when the files together are not whole tensors."""
    files = sorted(files, key=lambda f: f.name)
    shapes: dict[str, tuple[int, ...]] = {}
    for stored in (stored for file in files for stored in file.boxes):
        if shapes.setdefault(stored.name, stored.global_shape) != stored.global_shape:
            raise CheckpointError(f"{stored.name}: saved with shapes {shapes[stored.name]} and {stored.global_shape}")
    check_coverage(shapes, files)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "meta": meta,
        "shapes": {name: list(shape) for name, shape in sorted(shapes.items())},
        "files": {
            f.name: {"bytes": f.size_bytes, "sha256": f.sha256, "boxes": [b.to_json() for b in f.boxes]} for f in files
        },
    }
    content["sha256"] = _digest(content)
    # no newline at the end: every byte of the file counts
    return json.dumps(content, separators=(",", ":"))


def read_manifest(folder: Path) -> CheckpointManifest:
    """Parse and check a folder's manifest.

    Raises:
        CheckpointError: missing, damaged or inconsistent; the message names the file.
        UnknownVersionError: from a version this code does not read.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: not a finished checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a {FORMAT}")
    expected = content.pop("sha256", None)
    if expected != _digest(content):
        raise CheckpointError(f"{path} was changed after it was written (its own checksum differs)")
    content = _migrate(content, path)
    try:
        return _parse(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path} is malformed: {type(error).__name__} {error}") from error


def _migrate(content: dict[str, Any], path: Path) -> dict[str, Any]:
    version = content.get("version")
    while isinstance(version, int) and version < VERSION and version in MIGRATIONS:
        content = {**MIGRATIONS[version](content), "version": version + 1}
        version += 1
    if version != VERSION:
        raise UnknownVersionError(
            f"{path}: format version {version}, this code reads version {VERSION}; "
            "use the version of bd3lm_scale that wrote it, or one that is newer"
        )
    return content


def _parse(content: dict[str, Any]) -> CheckpointManifest:
    shapes = {str(name): tuple(int(n) for n in shape) for name, shape in content["shapes"].items()}
    files = []
    for name, record in content["files"].items():
        if not DATA_FILE.fullmatch(name):
            raise CheckpointError(f"{name!r} is not a name of a data file")
        boxes = []
        for kind, tensor, offset, shape, position in record["boxes"]:
            box = Box(tuple(int(n) for n in offset), tuple(int(n) for n in shape))
            stored = StoredBox(kind, tensor, shapes[tensor], box, int(position))
            if kind not in KINDS or min((position, *box.shape)) < 0 or len(shape) != len(shapes[tensor]):
                raise CheckpointError(f"{name}: {kind} {tensor} {offset} {shape} is not a box of {shapes[tensor]}")
            if position + ITEM_BYTES * box.volume > record["bytes"]:
                raise CheckpointError(f"{name}: {kind} {tensor} lies outside its file")
            boxes.append(stored)
        files.append(DataFile(name, int(record["bytes"]), str(record["sha256"]), tuple(boxes)))
    check_coverage(shapes, files)
    if not isinstance(content["meta"], dict):
        raise CheckpointError("meta is not an object")
    return CheckpointManifest(content["meta"], shapes, tuple(files))


def check_coverage(shapes: dict[str, tuple[int, ...]], files: Iterable[DataFile]) -> None:
    """CheckpointError unless each kind of each parameter is stored completely, each element once."""
    found: dict[tuple[str, str], list[Box]] = {}
    for stored in (stored for file in files for stored in file.boxes):
        found.setdefault((stored.kind, stored.name), []).append(stored.box)
    for (kind, name), boxes in found.items():
        if problem := BoxIndex(shapes[name], boxes).problem():
            raise CheckpointError(f"{kind} of {name}: {problem}")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
