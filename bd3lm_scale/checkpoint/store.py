"""The checkpoints of one run: saved atomically, verified, the newest valid one found.

    checkpoints/
      step_00001000/            manifest.json + one safetensors file per rank that owns state
      step_00000900.damaged     set aside by newest(), with a message that names the file
      .writing_step_00001100_*  a save in progress, or one that died: removed by the next save

A save: every rank copies the runs it owns (the only stall), then in the background writes its file under a temporary
folder, fsyncs it and reports its SHA-256 to rank 0; rank 0 writes the manifest last, fsyncs and renames. A rank that
fails says so in the same exchange, so the others never wait for it, and the run goes on with the checkpoint before.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bd3lm_scale.checkpoint.boxes import KINDS, Box, boxes_of
from bd3lm_scale.checkpoint.files import DataFile, StoredBox, write_data_file, write_durably
from bd3lm_scale.checkpoint.folders import (
    WRITING,
    prune,
    put_in_place,
    remove_leftovers,
    set_aside_later,
    step_folder,
)
from bd3lm_scale.checkpoint.manifest import MANIFEST, write_text
from bd3lm_scale.checkpoint.reader import CheckpointReader, find_checkpoint, open_checkpoint
from bd3lm_scale.checkpoint.search import newest_valid
from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.runtime import faults
from bd3lm_scale.runtime.durable import make_folder, sync_folder
from bd3lm_scale.runtime.lock import RunLock
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.values import StateSlice

__all__ = ["CheckpointReader", "CheckpointStore", "SaveReport", "find_checkpoint", "open_checkpoint", "write_weights"]

log = get_logger(__name__)


@dataclass(frozen=True)
class SaveReport:
    """How a save went.

    Attributes:
        step: the optimizer step saved.
        size_bytes: bytes of all files (rank 0; 0 elsewhere).
        stall_seconds: how long training stood still on this rank.
        total_seconds: from the call to the renamed folder.
        problem: None when the checkpoint exists.
    """

    step: int
    size_bytes: int
    stall_seconds: float
    total_seconds: float
    problem: str | None


@dataclass
class _Job:
    """One save of this rank: what to write, already safe from the next optimizer step unless synchronous."""

    step: int
    meta: str = "{}"
    boxes: list[StoredBox] = field(default_factory=list)
    runs: list[Tensor] = field(default_factory=list)
    problem: str | None = None
    started: float = 0.0
    stall_seconds: float = 0.0


class CheckpointStore:
    """Saves and finds the checkpoints of one run. Every method is collective: all ranks call it, in the same order."""

    def __init__(
        self,
        folder: str | Path,
        config: CheckpointConfig,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        lock: RunLock | None = None,
    ) -> None:
        """Args: folder is run_dir/checkpoints; group a gloo group over all ranks that nothing else uses.

        With a lock nothing is committed after another job took over the run folder.
        """
        self.folder = Path(folder)
        self.config = config
        self.last_save: SaveReport | None = None
        self._agreement = Agreement(rank, world_size, group)
        self._lock = lock
        self._thread: threading.Thread | None = None
        self._buffer = torch.empty(0)

    @property
    def is_cut_off(self) -> bool:
        """Whether this rank lost touch with another during a save: none will succeed any more."""
        return self._agreement.world_size > 1 and self._agreement.group is None

    @property
    def _is_first(self) -> bool:
        return self._agreement.rank == 0

    def save(self, step: int, slices: Iterable[StateSlice], meta: dict[str, Any]) -> None:
        """Save the owned slices as the checkpoint of `step`; returns once training may go on.

        With asynchronous saving that is after a copy to host memory. A save still in flight is waited for first.
        Failures are logged and end up in `last_save.problem`; they are never raised.
        """
        started = time.perf_counter()
        self.wait()
        job = _Job(step, started=started)
        try:
            job.meta = json.dumps({"contents": "full", **meta, "step": step})
            job.boxes, job.runs = self._take(slices)
            faults.point("save:copied", step)
        # whatever went wrong here must reach the other ranks, which are about to wait for this one's report
        except Exception as error:
            job.problem = f"{type(error).__name__}: {error}"
        job.stall_seconds = time.perf_counter() - started
        if self.config.asynchronous:
            self._thread = threading.Thread(target=self._write, args=(job,), name=f"save step {step}")
            self._thread.start()
        else:
            self._write(job)

    def prepare(self, slices: Iterable[StateSlice]) -> None:
        """Make the host buffer for these slices now, in the background: new memory is slow, the first save is not.

        Optional, and not collective.
        """
        owned = [part for part in slices if part.is_owner]
        total = sum((part.stop - part.start) * len(part.tensors) for part in owned)
        on_gpu = any(tensor.is_cuda for part in owned for tensor in part.tensors.values())
        self.wait()
        if self.config.asynchronous:
            self._thread = threading.Thread(target=self._grow_buffer, args=(total, on_gpu), name="checkpoint buffer")
            self._thread.start()

    def wait(self) -> None:
        """Return when no save is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def newest(self, step: int | None = None) -> CheckpointReader | None:
        """The newest checkpoint whose every byte is as it was written; see search.newest_valid.

        What dead saves left is removed first.
        """
        self.wait()
        self._agreement.decide(lambda: remove_leftovers(self.folder) if self.foreign_owner() is None else None)
        return newest_valid(self.folder, self._agreement, step)

    def go_back_to(self, step: int) -> None:
        """Set every later checkpoint aside, so that whoever starts next goes on from `step`, too.

        Raises:
            CheckpointError: on every rank, when they cannot be renamed.
        """
        self.wait()
        self._agreement.decide(lambda: set_aside_later(self.folder, step))

    def _take(self, slices: Iterable[StateSlice]) -> tuple[list[StoredBox], list[Tensor]]:
        """Boxes and runs of the owned slices; the runs are copies in the host buffer when asynchronous."""
        boxes, runs = [], []
        for part in slices:
            if not part.is_owner or part.start == part.stop:
                continue
            cut = boxes_of(part)
            for kind, tensor in part.tensors.items():
                if kind not in KINDS or tensor.dtype != torch.float32 or tensor.shape != (part.stop - part.start,):
                    raise ValueError(
                        f"{part.name}: {kind} is {tensor.dtype} of {tuple(tensor.shape)}; "
                        f"expected one of {KINDS}, float32 of ({part.stop - part.start},)"
                    )
                boxes += [StoredBox(kind, part.name, tuple(part.global_shape), box) for box in cut]
                runs.append(tensor.detach())
        return boxes, self._copy(runs) if self.config.asynchronous else runs

    def _copy(self, runs: list[Tensor]) -> list[Tensor]:
        total = sum(run.numel() for run in runs)
        on_gpu = any(run.is_cuda for run in runs)
        self._grow_buffer(total, on_gpu)
        copies = list(self._buffer[:total].split([run.numel() for run in runs])) if runs else []
        for copy, run in zip(copies, runs, strict=True):
            copy.copy_(run, non_blocking=run.is_cuda)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _grow_buffer(self, total: int, pinned: bool) -> None:
        """Host memory for a copy of `total` float32 elements, kept for the next save."""
        if self._buffer.numel() >= total:
            return
        self._buffer = torch.empty(0)
        if pinned:
            self._buffer = torch.empty(total, dtype=torch.float32, pin_memory=True)
        else:
            # numpy asks the system for huge pages; touching the memory now keeps page faults out of the copy
            self._buffer = torch.from_numpy(np.empty(total, dtype=np.float32)).zero_()

    def _write(self, job: _Job) -> None:
        """The rest of a save; every path through it takes part in the same three exchanges."""
        try:
            folder, problem = self._agreement.share(self._new_folder(job.step) if self._is_first else None)
            if problem is None:
                own = self._write_own(Path(folder), job)
                reports = self._agreement.collect(own)
                result = self._commit(Path(folder), job, reports) if self._is_first else None
                problem, size = self._agreement.share(result)
            else:
                size = 0
        # a lost peer or a bug: the run must not stop because it could not save
        except Exception as error:
            log.exception("the save of step %d failed", job.step)
            self._agreement.leave()
            problem, size = f"{type(error).__name__}: {error}", 0
        seconds = time.perf_counter() - job.started
        self.last_save = SaveReport(job.step, size, job.stall_seconds, seconds, problem)
        if problem is not None and self._is_first:
            log.error("checkpoint of step %d was NOT saved, training goes on: %s", job.step, problem)
        elif self._is_first:
            text = "checkpoint of step %d saved: %.1f MB in %.2f s, training stood still %.2f s"
            log.info(text, job.step, size / 1e6, seconds, job.stall_seconds)

    def _new_folder(self, step: int) -> tuple[str, str | None]:
        """Rank 0: remove what dead saves left, make the temporary folder; (path, problem)."""
        folder = self.folder / f"{WRITING}{step_folder(step)}_{os.getpid()}_{time.time_ns()}"
        try:
            if foreign := self.foreign_owner():
                return str(folder), foreign
            make_folder(self.folder)
            remove_leftovers(self.folder)
            folder.mkdir()
            faults.point("save:folder_made")
        except (OSError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            return str(folder), f"rank 0: {type(error).__name__}: {error}"
        return str(folder), None

    def foreign_owner(self) -> str | None:
        """Why this job may not touch the run folder any more; None while it may. Not collective."""
        if self._lock is not None and not self._lock.is_held():
            return "another job has taken over the run folder"
        return None

    def _write_own(self, folder: Path, job: _Job) -> dict[str, Any]:
        """Write this rank's file; what the others need to know about it, or why there is none."""
        rank = self._agreement.rank
        if job.problem is not None:
            return {"problem": f"rank {rank}: {job.problem}"}
        if not job.boxes:
            return {}
        try:
            path = folder / f"rank_{rank:05d}.safetensors"
            file = write_data_file(path, job.boxes, (run.cpu().numpy() for run in job.runs))
            faults.point("save:file_written")
        # reported, not raised: the other ranks wait for this report
        except Exception as error:
            return {"problem": f"rank {rank}: {type(error).__name__}: {error}"}
        boxes = [[*stored.to_json(), list(stored.global_shape)] for stored in file.boxes]
        return {"name": file.name, "bytes": file.size_bytes, "sha256": file.sha256, "boxes": boxes}

    def _commit(self, folder: Path, job: _Job, reports: list[dict[str, Any]]) -> tuple[str | None, int]:
        """Rank 0: manifest, fsync, rename, prune; (problem, bytes)."""
        problem = "; ".join(report["problem"] for report in reports if "problem" in report) or None
        size = sum(report.get("bytes", 0) for report in reports)
        try:
            problem = problem or self.foreign_owner()
            if problem is None:
                files = [_file_from_report(report) for report in reports if report]
                faults.point("save:before_manifest")
                write_durably(folder / MANIFEST, write_text(json.loads(job.meta), files))
                sync_folder(folder)
                faults.point("save:before_rename")
                put_in_place(folder, self.folder / step_folder(job.step))
                faults.point("save:after_rename")
                try:
                    prune(self.folder, job.step, self.config.keep_last, self.config.keep_every)
                except OSError as error:
                    log.warning("old checkpoints could not be removed: %s", error)
        # reported, not raised: the other ranks wait for the verdict
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            shutil.rmtree(folder, ignore_errors=True)
        return problem, size


def _file_from_report(report: dict[str, Any]) -> DataFile:
    boxes = tuple(
        StoredBox(kind, name, tuple(whole), Box(tuple(offset), tuple(shape)), position)
        for kind, name, offset, shape, position, whole in report["boxes"]
    )
    return DataFile(report["name"], report["bytes"], report["sha256"], boxes)
