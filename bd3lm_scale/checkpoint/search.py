"""Which checkpoint a run resumes from: the newest whose every byte is as it was written, agreed by all ranks."""

from pathlib import Path
from typing import Any

from bd3lm_scale.checkpoint.folders import DAMAGED, free_name, list_steps, settle_replacements
from bd3lm_scale.checkpoint.manifest import UnknownVersionError, read_manifest
from bd3lm_scale.checkpoint.reader import CheckpointReader, open_checkpoint
from bd3lm_scale.errors import CheckpointError
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.runtime.log import get_logger

log = get_logger(__name__)


def newest_valid(folder: Path, agreement: Agreement, step: int | None = None) -> CheckpointReader | None:
    """The newest valid checkpoint of a checkpoints folder; None when there never was one. Collective.

    The ranks share the work of verifying. Damaged checkpoints are renamed to *.damaged, with a message naming the file.

    Args:
        folder: run_dir/checkpoints.
        agreement: how the ranks talk.
        step: insist on this step's checkpoint.

    Raises:
        CheckpointError: `step` is missing or damaged; every checkpoint is damaged; one is of an unknown format
            version; or a rank cannot read what rank 0 can (then nothing is renamed: the folder is not shared).
    """
    listed = agreement.decide(lambda: _list(folder))
    for number, name in listed:
        if step is not None and number != step:
            continue
        reader, reports = _examine(folder / name, agreement)
        reason = agreement.decide(lambda name=name, reports=reports: _judge(folder / name, reports))
        if reason is None and reader is not None:
            reader.trust()
            return reader
        if step is not None:
            raise CheckpointError(f"the checkpoint of step {step} is damaged: {reason}")
    if step is not None:
        there = ", ".join(str(number) for number, _ in reversed(listed)) or "none"
        raise CheckpointError(f"there is no checkpoint of step {step} in {folder} (steps there: {there})")
    damaged = agreement.decide(lambda: sorted(path.name for path in folder.glob(f"*{DAMAGED}*")))
    if damaged:
        # starting over without a word would look like a resume
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(damaged)}); "
            "to start over use another run_dir, or remove them"
        )
    return None


def _list(folder: Path) -> list[tuple[int, str]]:
    settle_replacements(folder)
    return [(number, path.name) for number, path in list_steps(folder)]


def _examine(path: Path, agreement: Agreement) -> tuple[CheckpointReader | None, list[dict[str, Any]]]:
    """This rank's reader, and on rank 0 what every rank found wrong in its share of the files."""
    reader = None
    try:
        reader = CheckpointReader(path, read_manifest(path))
        report = {"problems": reader.verify(rank=agreement.rank, world_size=agreement.world_size), "foreign": False}
    except CheckpointError as error:
        report = {"problems": [str(error)], "foreign": isinstance(error, UnknownVersionError)}
    return reader, agreement.collect(report)


def _judge(path: Path, reports: list[dict[str, Any]]) -> str | None:
    """Rank 0: None for a good checkpoint; otherwise the reason, after setting it aside."""
    problems = [problem for report in reports for problem in report["problems"]]
    if not problems:
        return None
    if any(report["foreign"] for report in reports):
        raise CheckpointError(problems[0])
    try:
        seen_here = open_checkpoint(path).verify()
    except CheckpointError as error:
        seen_here = [str(error)]
    if not seen_here:
        rank = next(rank for rank, report in enumerate(reports) if report["problems"])
        raise CheckpointError(
            f"{path} is whole on rank 0, but rank {rank} reads: {problems[0]}; "
            "run_dir must be on a file system that all nodes share"
        )
    reason = "; ".join(sorted(set(problems)))
    aside = free_name(path.with_name(path.name + DAMAGED))
    path.rename(aside)
    log.warning("checkpoint %s is damaged: %s; set aside as %s", path.name, reason, aside.name)
    return reason
