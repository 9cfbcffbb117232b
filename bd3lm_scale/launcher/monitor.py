"""The ranks' heartbeats as the launcher reads them, judged by its own clock.

The ranks watch themselves first (runtime/watchdog.py) and know more; this catches what they cannot: a frozen
process, a machine without power or network, an interpreter that no longer runs.
"""

import time
from pathlib import Path

from bd3lm_scale.config.schema import RuntimeConfig
from bd3lm_scale.runtime.watchdog import ENDED, STARTING, Beat, describe, read_beats

MARGIN_SECONDS = 10.0


class Monitor:
    """Watches one attempt.

    Attributes:
        beats: the last heartbeat of each rank.
        has_trained: whether any rank was seen beyond its start.
    """

    def __init__(self, run_dir: Path, attempt: str, config: RuntimeConfig) -> None:
        self.runtime = run_dir / "runtime"
        self.attempt = attempt
        self.config = config
        self.beats: dict[int, Beat] = {}
        now = time.monotonic()
        self._progress_at = now
        self._alive_at: dict[int, float] = {}
        self._next_look = now
        self.has_trained = False

    @property
    def step(self) -> int:
        """The last step in any rank's heartbeat."""
        return max((beat.step for beat in self.beats.values()), default=0)

    def look(self, at_once: bool = False) -> str | None:
        """None while all is well; otherwise what is wrong. Reads the files once per heartbeat."""
        now = time.monotonic()
        if now < self._next_look and not at_once:
            return None
        self._next_look = now + max(0.2, min(self.config.heartbeat_seconds, self.config.silent_seconds / 4))
        self._read(now)
        return self._silent(now) or self._hang(now)

    def _read(self, now: float) -> None:
        for rank, beat in read_beats(self.runtime, self.attempt).items():
            known = self.beats.get(rank)
            if known is None or known.progress != beat.progress or known.phase != beat.phase:
                self._progress_at = now
            if known is None or known.alive != beat.alive:
                self._alive_at[rank] = now
            self.has_trained |= beat.phase not in (STARTING, ENDED)
            self.beats[rank] = beat

    def _silent(self, now: float) -> str | None:
        """Ranks that stopped beating while others go on."""
        running = [rank for rank, beat in self.beats.items() if beat.phase != ENDED]
        silent = [rank for rank in running if now - self._alive_at[rank] > self.config.silent_seconds]
        beating = [rank for rank in running if now - self._alive_at[rank] < self.config.silent_seconds / 2]
        if not silent or not beating:
            return None
        return f"no sign of life for {self.config.silent_seconds:.0f} s from {describe(self.beats, silent)}"

    def _hang(self, now: float) -> str | None:
        still = now - self._progress_at
        if not self.beats:
            limit = self.config.collective_timeout_seconds + self.config.hang_min_seconds
            return f"no rank got going within {still:.0f} s" if still > limit else None
        limit = max(beat.limit for beat in self.beats.values()) + 6 * self.config.heartbeat_seconds + MARGIN_SECONDS
        if still <= limit:
            return None
        behind = min(beat.progress for beat in self.beats.values())
        slowest = [rank for rank, beat in self.beats.items() if beat.progress == behind]
        return f"nothing moved for {still:.0f} s; furthest behind: {describe(self.beats, slowest)}"
