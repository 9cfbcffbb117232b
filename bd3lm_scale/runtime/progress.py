"""One line that says where the run is: step, loss, tokens per second, time left."""

import sys
import time

from tqdm import tqdm

from bd3lm_scale.runtime.log import get_logger

log = get_logger(__name__)


class Progress:
    """A tqdm bar on a terminal, a plain log line every `every_seconds` elsewhere; silent when not enabled."""

    def __init__(
        self, start: int, total: int, tokens_per_step: int, enabled: bool, every_seconds: float = 30.0
    ) -> None:
        self.total = total
        self.tokens_per_step = tokens_per_step
        self.enabled = enabled
        self.every_seconds = every_seconds
        self._first_step = self._step = start
        self._first_time: float | None = None
        self._next_line = 0.0
        on_terminal = enabled and sys.stderr.isatty()
        self._bar = tqdm(initial=start, total=total, unit="step", dynamic_ncols=True) if on_terminal else None

    def update(self, step: int, loss: float) -> None:
        """Show that `step` steps are done and the last one had this loss (nats per token)."""
        if not self.enabled:
            return
        now = time.monotonic()
        if self._first_time is None:
            # measured from the end of the first step: start-up and compilation are no guide to the time left
            self._first_time, self._first_step = now, step
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {self.tokens_per_second(now):,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._step)
        elif now >= self._next_line or step >= self.total:
            self._next_line = now + self.every_seconds
            log.info("%s", self.line(step, loss, now))
        self._step = step

    def line(self, step: int, loss: float, now: float) -> str:
        """The plain line."""
        rate = self.tokens_per_second(now)
        left = format_duration((self.total - step) * self.tokens_per_step / rate) if rate else "?"
        return f"step {step:,}/{self.total:,}  loss {loss:.4f}  {rate:,.0f} tokens/s  {left} left"

    def tokens_per_second(self, now: float) -> float:
        """Mean since the first step of this process; 0 before the second one."""
        if self._first_time is None or now <= self._first_time:
            return 0.0
        return (self._step - self._first_step) * self.tokens_per_step / (now - self._first_time)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def format_duration(seconds: float) -> str:
    """`3d 04h`, `2h 05m`, `7m 30s` or `12s`."""
    whole = int(seconds)
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
