"""Heartbeats and hangs: every rank says how far it is, and ends itself when nothing moves any more.

Each rank writes run_dir/runtime/heartbeat/rank_00003.json from a thread: `progress` (changes when the training loop
gets on), `alive` (changes as long as the process runs at all), step and phase. Who reads it compares contents by its
own clock, so neither clock skew nor the time stamps of a network file system matter.

Three lines of defence: the thread (stacks, diagnosis, exit 87), faulthandler's C timer where a native call holds the
interpreter lock and the thread cannot run, and the launcher, which watches rank 0's file from outside.
"""

import errno
import faulthandler
import json
import os
import stat
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bd3lm_scale.config.schema import RuntimeConfig
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import current_attempt, node_name, read_json, runtime_folder, try_write_json

log = get_logger(__name__)

STARTING = "start"
STEP = "step"
ENDED = "ended"
MIN_STEPS_FOR_MEDIAN = 3
BEAT_BYTES = 512
BEAT_FIELDS = {"node": str, "progress": int, "alive": int, "step": int, "phase": str, "limit": int | float}
_LOOKS_APART = 3  # intervals between the two looks of a diagnosis
_INTERVALS_TO_READ = 4  # that the one who looks may need for reading everybody's heartbeats
RANKS_PER_SECOND = 200  # heartbeats the shared file system gets per second, whatever the size of the run


@dataclass(frozen=True)
class Beat:
    """One rank's heartbeat file; `limit` is how many seconds it may stay without progress."""

    rank: int
    node: str
    progress: int
    alive: int
    step: int
    phase: str
    limit: float


class Watchdog:
    """Watches this rank's training loop. `beat` often; `start` and `stop` around the loop."""

    def __init__(
        self,
        run_dir: str | Path,
        config: RuntimeConfig,
        rank: int = 0,
        world_size: int = 1,
        attempt: str | None = None,
    ) -> None:
        """Args: attempt is this attempt's name; by default what the launcher says."""
        self.attempt = attempt or current_attempt()
        self.config = config
        self.rank = rank
        self.world_size = world_size
        folder = runtime_folder(run_dir)
        self.heartbeats = folder / "heartbeat"
        self.stacks = folder / "stacks"
        self.interval = max(config.heartbeat_seconds, world_size / RANKS_PER_SECOND)
        self._lock = threading.Lock()
        self._progress = 0
        self._step = 0
        self._phase = STARTING
        self._durations: deque[float] = deque(maxlen=50)
        self._moved_at = time.monotonic()
        self._step_ended_at: float | None = None
        self._alive = 0
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> "Watchdog":
        """Begin to write heartbeats and to watch."""
        self.heartbeats.mkdir(exist_ok=True)
        self.stacks.mkdir(exist_ok=True)
        self._moved_at = time.monotonic()
        self._write()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop watching; the last heartbeat says that this rank is done."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        self.beat(self._step, ENDED)
        self._write()

    def beat(self, step: int, phase: str = STEP) -> None:
        """The loop got on: `step` steps are done (phase "step"), or it is inside a save, a validation, ...

        Long phases beat again for each of their parts; the number of steps per second is learnt from "step" alone.
        """
        now = time.monotonic()
        with self._lock:
            if phase == STEP and self._phase == STEP and self._step_ended_at is not None and step == self._step + 1:
                self._durations.append(now - self._step_ended_at)
            self._step_ended_at = now if phase == STEP else None
            self._progress += 1
            self._step, self._phase, self._moved_at = step, phase, now

    def waiting(self) -> None:
        """This rank's own work is done and it begins to wait for the others: who hangs before this is the suspect."""
        with self._lock:
            self._progress += 1
            self._moved_at = time.monotonic()

    @property
    def limit_seconds(self) -> float:
        """How long the current phase may go without a beat.

        Steps: hang_factor times their median, at least hang_min_seconds. Before some steps are known, and in other
        phases: a collective's time-out as well, since nothing tells how long they should take.
        """
        with self._lock:
            known = len(self._durations) >= MIN_STEPS_FOR_MEDIAN
            usual = median(self._durations) if known else 0.0
            limit = max(self.config.hang_min_seconds, self.config.hang_factor * usual)
            in_steps = self._phase == STEP and known
        return limit if in_steps else max(limit, self.config.collective_timeout_seconds)

    def _run(self) -> None:
        while not self._ending.wait(self.interval):
            self._write()
            limit = self.limit_seconds
            with self._lock:
                still_for = time.monotonic() - self._moved_at
            if still_for > limit:
                self._give_up(still_for, limit)
            # the C timer fires only if this thread cannot come back to set it again
            faulthandler.dump_traceback_later(limit + 4 * self.interval, exit=True)

    def _write(self) -> None:
        self._alive += 1
        with self._lock:
            beat = {"progress": self._progress, "step": self._step, "phase": self._phase}
        text = json.dumps(
            {
                **beat,
                "alive": self._alive,
                "limit": self.limit_seconds,
                "attempt": self.attempt,
                "node": node_name(),
            }
        )
        path = self.heartbeats / f"rank_{self.rank:05d}.json"
        try:
            # one write of constant size over the old text: a reader never meets an empty or half-written file, and
            # thousands of ranks cause no traffic of names on the file system
            file = _open_own(path)
            try:
                os.pwrite(file, text.ljust(BEAT_BYTES).encode(), 0)
            finally:
                os.close(file)
        except OSError as error:  # a full or absent disk is no reason to end a run
            log.warning("cannot write %s: %s", path, error)

    def _give_up(self, still_for: float, limit: float) -> None:
        """Stacks first: they are what a diagnosis needs, and nothing after them is certain to work.

        All ranks get here within moments of each other. The first one reads everybody's heartbeats and tells; the
        others go on beating until it has, or each hung run would cost the file system a read per pair of ranks.
        """
        try:
            self._write_stacks(still_for)
            if self._is_first_to_tell():
                self._tell(still_for, limit)
            else:
                self._beat_while_another_tells()
        finally:
            os._exit(ExitCode.HANG)

    def _tell(self, still_for: float, limit: float) -> None:
        before = read_beats(self.heartbeats.parent, self.attempt)
        for _ in range(_LOOKS_APART):  # this rank's own heart must go on beating meanwhile
            time.sleep(self.interval)
            self._write()
        suspects, text = diagnose(before, read_beats(self.heartbeats.parent, self.attempt))
        told = "hang: no progress for %.0f s (limit %.0f s); %s; stacks in %s"
        log.error(told, still_for, limit, text, self.stacks)
        report = {"attempt": self.attempt, "ranks": suspects, "text": text}
        try_write_json(self.stacks.parent / "hang.json", report)

    def _beat_while_another_tells(self) -> None:
        for _ in range(_LOOKS_APART + _INTERVALS_TO_READ):
            time.sleep(self.interval)
            self._write()
            if read_json(self.stacks.parent / "hang.json").get("attempt") == self.attempt:
                return

    def _write_stacks(self, still_for: float) -> None:
        try:
            with (self.stacks / f"rank_{self.rank:05d}.txt").open("a") as file:
                file.write(f"attempt {self.attempt}: nothing moved for {still_for:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.warning("the stacks cannot be written: %s", error)

    def _is_first_to_tell(self) -> bool:
        """Whether no other rank of this attempt has begun to."""
        try:
            (self.stacks / f"told_{self.attempt}").touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # a full disk: rather twice than never
            return True
        return True


def _open_own(path: Path) -> int:
    """Open a heartbeat file for writing; a link, a pipe or a folder in its place is not written to but replaced.

    Raises:
        OSError: it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    else:
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            return file
        os.close(file)
    path.unlink()
    return os.open(path, flags | os.O_EXCL, 0o644)


def read_beats(runtime: Path, attempt: str | None = None) -> dict[int, Beat]:
    """All heartbeats of an attempt (default: this process's), by rank."""
    attempt = current_attempt() if attempt is None else attempt
    beats = {}
    for path in sorted((runtime / "heartbeat").glob("rank_*.json")):
        found, rank = read_json(path), path.stem.removeprefix("rank_")
        if found.get("attempt") == attempt and rank.isdigit() and BEAT_FIELDS.keys() <= found.keys():
            values = {name: found[name] for name in BEAT_FIELDS}
            if all(isinstance(values[name], kind) for name, kind in BEAT_FIELDS.items()):
                beats[int(rank)] = Beat(int(rank), **values)
    return beats


def diagnose(before: dict[int, Beat], after: dict[int, Beat]) -> tuple[list[int], str]:
    """Name the suspects from two looks at the heartbeats, a few intervals apart: (ranks, one line of text).

    A rank that does not even answer (frozen, dead, its node gone) comes first; among ranks that are all alive, those
    furthest behind, since the others wait for them.
    """
    silent = [rank for rank, beat in after.items() if rank in before and before[rank].alive == beat.alive]
    if silent and len(silent) < len(after):
        return silent, f"suspect: {describe(after, silent)}, which no longer answers"
    behind = min((beat.step, beat.progress) for beat in after.values()) if after else (0, 0)
    slowest = [rank for rank, beat in after.items() if (beat.step, beat.progress) == behind]
    if len(slowest) == len(after):
        return [], f"all ranks stand at the same place ({describe(after, slowest[:1])}); their stacks tell more"
    return slowest, f"suspect: {describe(after, slowest)}, the furthest behind"


def describe(beats: dict[int, Beat], ranks: list[int]) -> str:
    """`rank 3 on node-07 (step 120, phase step)`, at most four of them."""
    shown = [f"rank {r} on {beats[r].node} (step {beats[r].step}, phase {beats[r].phase})" for r in ranks[:4]]
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return ", ".join(shown) + more if shown else "no rank at all"
