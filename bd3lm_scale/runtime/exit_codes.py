"""What a process of a run says with its exit code; docs/fault_tolerance.md explains each to users."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `train` and `launch`. Codes from 85 on are ours; 128 + n is death by signal n."""

    FINISHED = 0
    """All steps are done."""
    FAILED = 1
    """An error with a traceback; restarted from the last checkpoint."""
    STOPPED = 85
    """Saved and stopped on request (signal, STOP file, time limit); the same command resumes."""
    CONFIG = 86
    """The configuration or the data is wrong; a restart would not help."""
    HANG = 87
    """The watchdog saw no progress and ended the process; restarted."""
    DIVERGED = 88
    """Loss or gradients are beyond what runtime.on_nan allows; a restart would not help."""
    IN_USE = 89
    """Another live job owns the run folder."""
    FENCED = 90
    """A newer start or attempt owns the run folder; this process has written nothing since."""
    PREFLIGHT = 91
    """A node failed the checks before the first step; it is named in the log and in runtime/preflight.json."""
    CRASH_LOOP = 92
    """The launcher gave up: too many failures in a row without a new checkpoint."""


NEVER_RETRIED = frozenset({ExitCode.CONFIG, ExitCode.DIVERGED})
