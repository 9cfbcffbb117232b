"""The files of a corpus: what folders, braces and URLs name, what is passed over, and whether a file is still the same.

data/        hidden files and folders, files of other kinds and metadata are counted and left out
data/more -> linked folders are followed, but not in a circle, and no file is taken twice
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bd3lm_scale.data.compressed import DamagedFileError, open_local
from bd3lm_scale.data.records import BY_NAME, READABLE, Options
from bd3lm_scale.data.storage import is_remote

_HEAD_BYTES = 1 << 16
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def find_inputs(paths: list[str], options: Options = BY_NAME, ignored: Counter[str] | None = None) -> list[str]:
    """The files that `paths` name: folders in sorted order, braces ({0000..0099}), and * in object stores.

    Args:
        paths: files, folders, URLs, pipe: commands.
        options: whether a file's name or --format says what it is.
        ignored: is told which files in folders are left out, by kind.

    Raises:
        ValueError: a path does not exist, holds nothing readable, or a file is there twice.
    """
    ignored = Counter() if ignored is None else ignored
    found: list[str] = []
    for name in [expanded for path in paths for expanded in _expanded(path)]:
        path = Path(name)
        if is_remote(name):
            pass
        elif not path.exists():
            raise ValueError(f"input {name}: does not exist")
        elif path.is_dir():
            found += _folder_files(path, options, ignored)
            continue
        elif not path.is_file():
            raise ValueError(f"input {name}: not a file; 'pipe:cat {name}' reads a stream")
        if not options.kind(name):
            raise ValueError(f"input {name}: unknown kind; it must end in {READABLE}, or --format must say")
        found.append(name)
    refuse_twice(found)
    return found


def refuse_twice(files: list[str]) -> None:
    """ValueError where a file is listed twice, under another name or through a link perhaps."""
    first: dict[object, str] = {}
    for file in files:
        status = None if is_remote(file) else os.stat(file)
        key = file if status is None else (status.st_dev, status.st_ino)
        if key in first:
            names = f"input {file}: the same file as {first[key]}" if first[key] != file else f"input {file}"
            raise ValueError(f"{names} is given twice; every document counts once: leave one out")
        first[key] = file


def _expanded(name: str) -> list[str]:
    if "*" in name and is_remote(name) and not name.startswith(("pipe:", "http://", "https://")):
        import fsspec

        files, pattern = fsspec.core.url_to_fs(name)
        found = sorted(files.unstrip_protocol(path) for path in files.glob(pattern))
        if not found:
            raise ValueError(f"input {name}: no file matches")
        return found
    if Path(name).exists() or "{" not in name:
        return [name]
    import braceexpand

    return list(braceexpand.braceexpand(name))


def _folder_files(folder: Path, options: Options, ignored: Counter[str]) -> list[str]:
    left_out: Counter[str] = Counter()
    found = list(_walk(folder, options, left_out, (folder.resolve(),)))
    objects = [p for p in found if ".json" in _suffixes(p)]
    if not options.format and len(objects) < len(found):
        # a .json file beside data of another kind describes it, unless it holds documents
        described = {p for p in objects if not _begins_with_document(p, options)}
        left_out[".json files that describe data"] += len(described)
        found = [p for p in found if p not in described]
    ignored += left_out
    if not found:
        seen = f"; it holds {counts(left_out)}" if left_out.total() else ""
        raise ValueError(f"input {folder}: no file inside ends in {READABLE}{seen}")
    return [str(p) for p in found]


def counts(found: Counter[str]) -> str:
    """ "3 .csv files, 1 hidden folders" """
    return ", ".join(f"{number:,} {kind}" for kind, number in sorted(found.items()) if number)


def _walk(folder: Path, options: Options, ignored: Counter[str], above: tuple[Path, ...]) -> Iterator[Path]:
    """The readable files below a folder, in sorted order."""
    saved = _saved_dataset(folder)
    if saved is not None:
        yield from saved
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            ignored["hidden folders" if path.is_dir() else "hidden files"] += 1
        elif path.is_dir():
            real = path.resolve()
            if real in above:
                ignored["links to a folder that holds them"] += 1
            else:
                yield from _walk(path, options, ignored, (*above, real))
        elif not path.is_file():
            ignored["links that lead nowhere" if path.is_symlink() else "special files"] += 1
        elif not options.format and path.name in _METADATA:
            ignored[".json files that describe data"] += 1
        elif options.kind(path.name):
            yield path
        else:
            ignored[f"{path.suffix.lower()} files" if path.suffix else "files without suffix"] += 1


def _saved_dataset(folder: Path) -> list[Path] | None:
    """The files of a folder of datasets.save_to_disk in its own order; None for another folder."""
    splits = _described(folder / "dataset_dict.json").get("splits")
    if splits:
        raise ValueError(
            f"input {folder}: holds several splits; give one of {', '.join(f'{folder}/{s}' for s in splits)}"
        )
    state = _described(folder / "state.json")
    if "_data_files" not in state:
        return None
    if state.get("_indices_data_files"):
        raise ValueError(f"input {folder}: rows are selected by an index; call flatten_indices() before save_to_disk()")
    files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"input {folder}: its state.json names {missing[0]}, which is not there; copy the whole folder"
        )
    return files


def _described(file: Path) -> dict:
    """A metadata file's content; empty where it is none of ours."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _suffixes(path: Path) -> set[str]:
    """The last two, compression among them perhaps."""
    return {suffix.lower() for suffix in path.suffixes[-2:]}


def _begins_with_document(path: Path, options: Options) -> bool:
    """Whether the first line of a .json file is an object with the text's field, or cannot be read at all."""
    try:
        with open_local(str(path)) as file:
            line = next((line for line in file if line.strip()), b"")
    except DamagedFileError:
        return True  # whoever reads it says what is wrong
    try:
        return options.field in json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return False


def fingerprint(path: str) -> list:
    """What tells whether an input is still what it was.

    Returns:
        Of a local file: name, bytes, time of change in nanoseconds, and a hash of its beginning and end. Of a remote
        one: its address.
    """
    if is_remote(path):
        return [path, None, None, None]
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        digest.update(os.pread(file.fileno(), _HEAD_BYTES, 0))
        if status.st_size > _HEAD_BYTES:
            digest.update(os.pread(file.fileno(), _HEAD_BYTES, max(_HEAD_BYTES, status.st_size - _HEAD_BYTES)))
    return [os.path.basename(path), status.st_size, status.st_mtime_ns, digest.hexdigest()[:32]]


def changed_inputs(before: list[list], now: list[list]) -> list[str]:
    """Which of two lists of fingerprints differ, as "a.txt (other content)"; in order, and bounded."""
    found = []
    for was, is_now in zip(before, now, strict=False):
        reasons = ("another name", "another size", "changed later", "other content")
        different = [reason for reason, a, b in zip(reasons, was, is_now, strict=False) if a != b]
        found += [f"{is_now[0]} ({different[-1]})"] if different else []
    if len(before) != len(now):
        found.append(f"{len(now)} files instead of {len(before)}")
    return found
