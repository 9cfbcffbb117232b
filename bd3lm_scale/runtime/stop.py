"""Stopping cleanly: signals, the user's STOP file, the launcher's request and the time limit become one `reason`."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from bd3lm_scale.errors import ConfigError
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import current_attempt, current_rank, has_launcher, read_json

log = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BY_USER = "STOP file"
BY_TIME_LIMIT = "time limit"
BY_NEW_OWNER = "a newer start or attempt owns the run folder"


class StopRequest:
    """Collects requests to save and stop; the training loop asks `reason` at each step boundary.

    Handlers only set a flag, so a signal never interrupts a step or a save, and a second one changes nothing. Files
    and clock are looked at by rank 0 alone, at most once per `poll_seconds`; the loop tells the other ranks (it adds
    the flag to a reduction it does anyway), so that all stop after the same step.
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        time_limit_minutes: float | None = None,
        poll_seconds: float = 1.0,
        rank: int | None = None,
        is_owner: Callable[[], bool] = lambda: True,
    ) -> None:
        """Args: is_owner says whether this attempt may still write in run_dir (RunLock.is_held).

        Raises:
            ConfigError: the STOP file of an earlier stop cannot be removed.
        """
        self.is_rank_zero = (current_rank() if rank is None else rank) == 0
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.is_owner = is_owner
        self.poll_seconds = poll_seconds
        self.deadline = None if time_limit_minutes is None else time.monotonic() + 60 * time_limit_minutes
        self._reason: str | None = None
        self._next_poll = 0.0
        self._previous: dict[int, Any] = {}
        if self.is_rank_zero and not has_launcher():
            forget_stop_file(self.run_dir)

    def install(self) -> "StopRequest":
        """Take over SIGTERM, SIGUSR1 and SIGINT (main thread only)."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def reason(self) -> str | None:
        """Why the run should save and stop, e.g. "signal SIGTERM", "STOP file", "time limit"; None to go on."""
        if self._reason is None and self.is_rank_zero and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + self.poll_seconds
            self._reason = self._look()
        return self._reason

    def request(self, reason: str) -> None:
        """Ask from inside the program; the first reason stays."""
        self._reason = self._reason or reason

    def _look(self) -> str | None:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return BY_TIME_LIMIT
        if self.run_dir is None:
            return None
        if not self.is_owner():
            return BY_NEW_OWNER
        if has_stop_file(self.run_dir):
            return BY_USER
        asked = read_json(self.run_dir / "runtime" / "stop_request.json")
        if has_launcher() and asked.get("attempt") == current_attempt():
            return f"launcher: {asked.get('reason', 'stop')}"
        return None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        first = self._reason is None
        self.request(f"signal {signal.Signals(number).name}")
        # os.write, not the logger: the signal may have interrupted it while it holds its lock
        if first and self.is_rank_zero:
            text = f"{signal.Signals(number).name}: finishing the step, saving, stopping (SIGKILL to end at once)\n"
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


def has_stop_file(run_dir: Path) -> bool:
    """Whether run_dir/STOP is there, be it a file, a folder or a link to nothing."""
    return os.path.lexists(run_dir / "STOP")


def forget_stop_file(run_dir: Path | None) -> None:
    """Remove the STOP file of an earlier stop, so that starting the run again means what it says.

    Raises:
        ConfigError: it cannot be removed.
    """
    if run_dir is None or not has_stop_file(run_dir):
        return
    path = run_dir / "STOP"
    try:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError([f"{path}: asks the run to stop and cannot be removed ({error}); remove it"]) from error
    log.info("removed %s, left over from an earlier stop", path)
