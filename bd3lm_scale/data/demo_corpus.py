"""A corpus every machine has: the sources of Python's standard library, one document per file."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
_MAX_BYTES = 150_000


def demo_documents(library: str | None = None) -> Iterator[tuple[str, str]]:
    """(name, text) of each document, in an order that depends on the library's content alone.

    Tests, tables of character encodings and very large files are left out.
    """
    root = Path(library or sysconfig.get_paths()["stdlib"])
    count = 0
    for path in sorted(_sources(root), key=lambda p: p.relative_to(root).as_posix()):
        data = path.read_bytes()
        if not 0 < len(data) <= _MAX_BYTES:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        count += 1
        yield path.relative_to(root).as_posix(), text
    if not count:
        raise ValueError(f"demo corpus: no Python sources under {root}; install the full standard library")


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))
