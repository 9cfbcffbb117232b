"""The command line of `train`, which the launcher reads before it starts anything."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from bd3lm_scale.runtime.exit_codes import ExitCode

FIRST_START_ONLY = {"--fresh": 0, "--checkpoint": 1}
"""Options of `train`, with their number of values, that say where a run begins: a restart goes on instead."""


class Parser(argparse.ArgumentParser):
    """Ends with ExitCode.CONFIG on a wrong command line: no restart would help. Options are not abbreviated."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit."""
        self.print_usage(sys.stderr)
        self.exit(ExitCode.CONFIG, f"{self.prog}: error: {message}\n")


def parse_train_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """`CONFIG [a.b=c ...] [--dry-run] [--fresh] [--checkpoint STEP]`; exits with ExitCode.CONFIG on anything else."""
    parser = Parser("python -m bd3lm_scale.train", "Train: build the parts, restore, loop, save, stop.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields to set, e.g. train.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--fresh", action="store_true", help="refuse if run_dir holds a checkpoint")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="resume from this step, not the newest")
    return parser.parse_intermixed_args(words)


def for_a_restart(words: Sequence[str]) -> list[str]:
    """The words without the options that only a first start may have."""
    kept: list[str] = []
    skip = 0
    for word in words:
        name, is_joined, _ = word.partition("=")
        if skip:
            skip -= 1
        elif name in FIRST_START_ONLY:
            skip = 0 if is_joined else FIRST_START_ONLY[name]
        else:
            kept.append(word)
    return kept
