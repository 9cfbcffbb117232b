"""metrics.jsonl: one JSON object per line, the truth about a run; Weights & Biases gets a copy when it can."""

import contextlib
import json
import math
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bd3lm_scale.config.schema import LoggingConfig
from bd3lm_scale.runtime.durable import make_folder, sync_folder, write_file
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import current_attempt, label_of

log = get_logger(__name__)

FILE_NAME = "metrics.jsonl"
SYNC_SECONDS = 10.0
MAX_UNWRITTEN_BYTES = 1 << 24
WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends metrics to run_dir/metrics.jsonl (rank 0; elsewhere `enabled=False` makes every call a no-op).

    Lines reach the operating system at once, so a killed process loses nothing; a half-written last line, left by a
    machine that lost power, is cut off when the file is opened again. Steps repeated after a resume are written again
    with their new `attempt`: the last line per (kind, step) wins. While the disk is full, lines wait in memory.
    """

    def __init__(
        self,
        run_dir: str | Path,
        attempt: str | None = None,
        logging: LoggingConfig | None = None,
        enabled: bool = True,
        run_config: dict | None = None,
    ) -> None:
        self.attempt = label_of(current_attempt() if attempt is None else attempt)
        self._file = None
        self._mirror = None
        if not enabled:
            return
        path = Path(run_dir) / FILE_NAME
        make_folder(path.parent)
        cut_torn_line(path)
        self._file = path.open("ab", buffering=0)
        sync_folder(path.parent)  # else a power cut could take the whole file with it
        self._unwritten = b""
        self._next_sync = time.monotonic() + SYNC_SECONDS
        if logging is not None and logging.wandb != "disabled":
            self._mirror = WandbMirror(Path(run_dir), logging, run_config or {})

    def write(self, kind: str, step: int, **metrics: Any) -> None:
        """Append one line: kind, step, attempt, wall-clock time and the metrics, at full precision."""
        if self._file is None:
            return
        row = {"kind": kind, "step": step, **metrics, "attempt": self.attempt, "time": round(time.time(), 3)}
        row = {name: to_json(value) for name, value in row.items()}
        self._append(json.dumps(row, allow_nan=False).encode() + b"\n")
        if time.monotonic() >= self._next_sync:
            self.sync()
        if self._mirror is not None:
            self._mirror.send(row)

    def sync(self) -> None:
        """Force what was written to the disk (done every few seconds; call it before a checkpoint is committed)."""
        if self._file is not None:
            self._append(b"")
            with contextlib.suppress(OSError):  # said by _append, if it lasts
                os.fsync(self._file.fileno())
            self._next_sync = time.monotonic() + SYNC_SECONDS

    def _append(self, line: bytes) -> None:
        """Write what waits and this line; a disk that takes neither is no reason to end a run."""
        assert self._file is not None
        had_waiting = bool(self._unwritten)
        self._unwritten = (self._unwritten + line)[-MAX_UNWRITTEN_BYTES:]
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not had_waiting:
                log.error("%s cannot be written, its lines wait in memory: %s", self._file.name, error)

    def close(self) -> None:
        """Finish the file and the mirror."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None
        if self._mirror is not None:
            self._mirror.close()


def read_metrics(path: str | Path) -> list[dict]:
    """The metrics of a run (its folder or its metrics.jsonl): the last line per (kind, step) wins.

    Rows come in the order in which their (kind, step) first appeared; see `stream_metrics`.
    """
    rows: dict[tuple, dict] = {}
    for row in stream_metrics(path):
        rows[row["kind"], row["step"]] = row
    return list(rows.values())


def stream_metrics(path: str | Path) -> Iterator[dict]:
    """Every line of a run's metrics (its folder or its metrics.jsonl), as it was written, one at a time.

    Non-finite numbers come back as floats, and lines that are not valid JSON (a torn last line) are left out.
    """
    path = Path(path)
    with open(path / FILE_NAME if path.is_dir() else path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            yield {
                name: NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()
            }


def to_json(value: Any) -> Any:
    """A JSON value: tensors and NumPy scalars become numbers or lists, NaN and infinities become strings."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def cut_torn_line(path: Path) -> None:
    """Drop an unfinished last line."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - 4096)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)
            log.warning("%s: cut an unfinished last line (%d bytes)", path, end - keep)


class WandbMirror:
    """Copies rows to Weights & Biases from a thread of its own: slow or failing, it never holds up the run."""

    def __init__(self, run_dir: Path, logging: LoggingConfig, run_config: dict) -> None:
        self._rows: queue.Queue[dict | None] = queue.Queue(maxsize=10_000)
        self._is_down = False
        arguments = {
            "project": logging.wandb_project,
            "name": logging.wandb_name or run_dir.name,
            "mode": logging.wandb,
            "dir": str(run_dir),
            "resume": "allow",
            "id": run_id(run_dir),
            "config": run_config,
        }
        self._thread = threading.Thread(target=self._run, args=(arguments,), name="wandb mirror", daemon=True)
        self._thread.start()

    def send(self, row: dict) -> None:
        """Queue a row; dropped while the service is down or too slow."""
        if self._is_down:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._go_down("it cannot keep up")

    def close(self) -> None:
        """Give it a moment to finish; what it did not take stays in metrics.jsonl."""
        if not self._is_down:
            self._rows.put(None)
            self._thread.join(timeout=30)

    def _run(self, arguments: dict) -> None:
        try:
            import wandb

            run = wandb.init(**arguments)
            while (row := self._rows.get()) is not None:
                prefix = row["kind"]
                metrics = {f"{prefix}/{name}": value for name, value in row.items() if isinstance(value, int | float)}
                run.log({**metrics, "step": row["step"]})
            run.finish()
        except Exception as error:  # whatever the service does wrong, the run goes on
            self._go_down(repr(error))

    def _go_down(self, why: str) -> None:
        self._is_down = True
        log.warning("wandb is off for the rest of this run (%s); %s has every figure", why, FILE_NAME)


def run_id(run_dir: Path) -> str:
    """A name that a resumed run finds again, kept in run_dir/wandb_id; a new one where that file was spoilt."""
    path = run_dir / "wandb_id"
    try:
        found = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        found = ""
    if WANDB_ID.fullmatch(found):
        return found
    made = os.urandom(4).hex()
    try:
        write_file(path, made + "\n")
    except OSError as error:
        log.warning("%s cannot be written (%s); a restart will be another run at wandb", path, error)
    return made
