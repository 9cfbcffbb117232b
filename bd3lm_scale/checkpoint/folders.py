"""The checkpoints folder of a run: names, order, replacement and retention.

step_00001000             a checkpoint
step_00000900.damaged     found damaged and set aside
step_00002000.abandoned   the future of a line the run left by going back to an earlier step
.writing_* .deleting_*    a save in progress, a removal in progress; leftovers of dead ones
.replaced_step_00001000   the old checkpoint of a step while the new one takes its place
"""

import re
import shutil
from pathlib import Path

from bd3lm_scale.runtime import faults
from bd3lm_scale.runtime.durable import rename, sync_folder
from bd3lm_scale.runtime.log import get_logger

log = get_logger(__name__)

STEP_FOLDER = re.compile(r"step_(\d+)")
WRITING, REPLACED, DELETING = ".writing_", ".replaced_", ".deleting_"
DAMAGED, ABANDONED = ".damaged", ".abandoned"


def step_folder(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step_{step:08d}"


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every finished checkpoint in a checkpoints folder, newest first; damaged ones may be among."""
    if not folder.is_dir():
        return []
    found = [(STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def free_name(path: Path) -> Path:
    """The path, or with .1, .2, ... appended when it is taken."""
    if not path.exists():
        return path
    return next(p for i in range(1, 10_000) if not (p := path.with_name(f"{path.name}.{i}")).exists())


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a finished folder its name, durably; a checkpoint of the same step is replaced."""
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        faults.point("save:replacing")
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def settle_replacements(folder: Path) -> None:
    """Finish the replacements of saves that died: the old checkpoint comes back where the new one never arrived."""
    for path in folder.glob(f"{REPLACED}*"):
        original = folder / path.name.removeprefix(REPLACED)
        if original.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            rename(path, original)


def remove_leftovers(folder: Path) -> None:
    """Finish or remove what saves and removals that died have left; nobody else may be writing."""
    settle_replacements(folder)
    for prefix in (WRITING, DELETING):
        for left in folder.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)


def set_aside_later(folder: Path, step: int) -> None:
    """Set checkpoints of later steps aside: the run went back to `step`, and they are not its future any more."""
    for _, path in (item for item in list_steps(folder) if item[0] > step):
        aside = rename(path, free_name(path.with_name(path.name + ABANDONED)))
        log.warning("checkpoint %s is from before the run went back; set aside as %s", path.name, aside.name)


def prune(folder: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """After the save of `step`: remove what is not kept, set aside the future of an abandoned line.

    Args:
        folder: the checkpoints folder.
        step: the step just saved.
        keep_last: so many newest ones are kept, at least one.
        keep_every: as are those whose step is a multiple of this.
    """
    set_aside_later(folder, step)
    for number, path in list_steps(folder)[max(1, keep_last) :]:
        if not (keep_every and number % keep_every == 0):
            # renamed first, durably: a half-removed folder must not look like a damaged checkpoint
            doomed = rename(path, free_name(path.with_name(DELETING + path.name)))
            faults.point("save:deleting")
            shutil.rmtree(doomed, ignore_errors=True)
