"""What a power cut leaves of a folder, from a recording of one training process.

    python -m tests.power_cut RECORD WATCHED ARGUMENT-OF-TRAIN ...

Before each call that changes the watched folder (open for writing, fsync, rename, link, unlink, mkdir, rmdir) two
folders are noted that a cut at this moment may leave:

    strict    only what was fsynced: entries of a folder as of its last fsync, bytes of a file as of its last fsync
    ordered   every entry, for file systems that keep names well but not bytes: a file never fsynced is empty

`states` reads them back, `materialize` makes such a folder.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

Tree = dict[str, str | None]
"""Path below the watched folder -> digest of a file's bytes; None for a folder."""

CALLS = ("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir")


class Recorder:
    """Watches this process's calls; lives as long as the process."""

    def __init__(self, record: Path, watched: Path) -> None:
        self.record = record
        self.watched = watched.resolve()
        self.blobs = record / "blobs"
        self.blobs.mkdir(parents=True)
        self.empty = self._keep(b"")
        self.bytes_of: dict[int, str] = {}
        self.entries_of: dict[int, dict[str, int]] = {}
        self.is_folder: dict[int, bool] = {}
        self.held_open: list[int] = []  # so that no inode's number is used again
        self.lock = threading.RLock()
        self.is_busy = False
        self.seen: set[str] = set()
        self.states = (record / "states.jsonl").open("w")
        self._take_all_as_durable()

    def install(self) -> None:
        """Note a state before every call from now on."""
        for name in CALLS:
            setattr(os, name, self._before(name, getattr(os, name)))
        real = os.fsync

        def fsync(descriptor: int) -> None:
            with self.lock:
                self.note("fsync")
                real(descriptor)
                self._is_durable(descriptor)

        os.fsync = fsync
        sys.addaudithook(self._audit)

    def note(self, call: str) -> None:
        """Write down both trees, each once."""
        with self.lock:
            if self.is_busy:
                return
            self.is_busy = True
            try:
                for kind, tree in (("strict", dict(self._strict())), ("ordered", dict(self._ordered()))):
                    text = json.dumps(tree, sort_keys=True)
                    if text not in self.seen:
                        self.seen.add(text)
                        self.states.write(json.dumps({"call": call, "kind": kind, "tree": tree}) + "\n")
                        self.states.flush()
            finally:
                self.is_busy = False

    def _before(self, name: str, real: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            self.note(name)
            return real(*arguments, **options)

        return call

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            is_write = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if is_write and arguments[0].startswith(str(self.watched)):
                self.note("open")

    def _keep(self, content: bytes) -> str:
        digest = sha256(content).hexdigest()[:24]
        (self.blobs / digest).write_bytes(content)
        return digest

    def _is_durable(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(str(self.watched)):
            self._take(path)

    def _take(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        number = os.fstat(descriptor).st_ino
        if number in self.is_folder:
            os.close(descriptor)
        else:
            self.held_open.append(descriptor)
        self.is_folder[number] = os.path.isdir(path)
        if self.is_folder[number]:
            self.entries_of[number] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.bytes_of[number] = self._keep(Path(path).read_bytes())

    def _take_all_as_durable(self) -> None:
        for folder, _, names in os.walk(self.watched):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                self._take(path)

    def _strict(self, number: int | None = None, place: str = "") -> Iterator[tuple[str, str | None]]:
        number = os.stat(self.watched).st_ino if number is None else number
        for name, inner in self.entries_of.get(number, {}).items():
            path = f"{place}{name}"
            # what was never fsynced itself is there by name, as whatever it is now
            is_folder = self.is_folder.get(inner, inner in self.entries_of or self._is_folder_now(path))
            yield path, None if is_folder else self.bytes_of.get(inner, self.empty)
            if is_folder:
                yield from self._strict(inner, f"{path}/")

    def _is_folder_now(self, path: str) -> bool:
        return (self.watched / path).is_dir()

    def _ordered(self) -> Iterator[tuple[str, str | None]]:
        for folder, folders, names in os.walk(self.watched):
            place = os.path.relpath(folder, self.watched)
            for name in folders:
                yield os.path.normpath(f"{place}/{name}"), None
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    number = os.stat(os.path.join(folder, name)).st_ino
                    yield os.path.normpath(f"{place}/{name}"), self.bytes_of.get(number, self.empty)


@dataclass(frozen=True)
class State:
    """What one power cut leaves."""

    call: str
    kind: str
    tree: Tree

    def files(self) -> dict[str, str]:
        """The files alone."""
        return {path: digest for path, digest in self.tree.items() if digest is not None}


def states(record: Path) -> list[State]:
    """All different ones, in the order of the calls."""
    return [State(**json.loads(line)) for line in (record / "states.jsonl").open()]


def materialize(state: State, record: Path, folder: Path) -> Path:
    """Make the folder that this cut leaves."""
    for path, digest in sorted(state.tree.items()):
        target = folder / path
        if digest is None:
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((record / "blobs" / digest).read_bytes())
    return folder


if __name__ == "__main__":
    from bd3lm_scale import train

    Recorder(Path(sys.argv[1]), Path(sys.argv[2])).install()
    sys.exit(train.main(sys.argv[3:]))
