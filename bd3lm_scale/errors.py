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


class NoShardLeftError(BadShardError):
    """Every shard of one split of a dataset is left out as damaged."""

    def __init__(self, path: str, names: Sequence[str]):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        RuntimeError.__init__(
            self, f"data.path ({path}): every shard is damaged or missing ({shown}); restore them from their source"
        )
        self.shard, self.reason = names[0], "every shard is damaged or missing"


class RunInUseError(RuntimeError):
    """Another live job works in this run folder; the message says which."""


class FencedError(RuntimeError):
    """Another job or a newer attempt owns the run folder by now: leave it alone."""


class PreflightError(RuntimeError):
    """A node is unfit. The process should end with ExitCode.PREFLIGHT."""
