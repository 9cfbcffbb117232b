"""Files and folders that a power cut cannot empty: written under a temporary name, fsynced, renamed, folder fsynced.

POSIX promises nothing else: without fsync of the file its new name may hold no bytes, without fsync of the folder the
name may be gone. Everything that a later start reads is written through here, or by checkpoint/files.py.
"""

import errno
import os
import shutil
from pathlib import Path

TEMPORARY = ".tmp"
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` in one step: a reader, and a start after a power cut, sees the old file or the new one, whole.

    Raises:
        OSError: what the disk says; the old file is untouched and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:  # "x": never through a link that lies there
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable: creating, renaming and removing change the folder, not the file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # file systems without fsync of folders order such changes themselves
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> Path:
    """The folder, made with its parents if needed, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    return folder


def rename(source: Path, target: Path) -> Path:
    """Give a file or folder another name in the same folder, durably."""
    os.rename(source, target)
    sync_folder(target.parent)
    return target


def copy_folder(source: Path, target: Path) -> None:
    """Put a copy of a folder of plain files in place of `target`, durably; an older one is removed first.

    Cut off between the two, `target` is missing: what reads it must be able to make it again.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=shutil.copyfile)
    for folder, _, names in os.walk(temporary):
        os.chmod(folder, 0o755)  # the source may be read-only
        for name in names:
            with open(Path(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
    if target.exists():
        old = rename(target, target.with_name(f".{target.name}.{os.getpid()}.old{TEMPORARY}"))
        shutil.rmtree(old)
    rename(temporary, target)


def remove_leftovers(folder: Path, names: tuple[str, ...] = ("*",)) -> None:
    """Remove temporary files and folders of writers that died, for targets that match `names`; the owner calls it."""
    for pattern in names:
        for left in folder.glob(f".{pattern}.*{TEMPORARY}"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
