"""The errors that several modules raise and the entries turn into exit codes (`runtime/exit_codes.py`)."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """Everything wrong with a configuration at once: one line `field (value): reason; use remedy` per problem.

    Attributes:
        problems: the lines.
        source: what they are about.
    """

    def __init__(self, problems: Sequence[str], source: str = "configuration"):
        self.problems = list(problems)
        self.source = source
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"{count} in {source}:", *self.problems]))


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names the file, the reason and the remedy."""


class BadShardError(RuntimeError):
    """A shard that stays unreadable after all retries; `shard` is the name to exclude."""

    def __init__(self, shard: str, reason: str):
        super().__init__(
            f"shard {shard}: {reason}; restore it from its source, or set data.on_bad_shard=skip to go on without it"
        )
        self.shard = shard
        self.reason = reason


class RunInUseError(RuntimeError):
    """Another live job works in this run folder; the message says which."""


class FencedError(RuntimeError):
    """Another job or a newer attempt owns the run folder by now: leave it alone."""


class PreflightError(RuntimeError):
    """A node is unfit. The process should end with ExitCode.PREFLIGHT."""
