"""Preparation that is killed again and again, each time a little further on."""

from collections.abc import Callable
from pathlib import Path

from bd3lm_scale.data.prepare import prepare
from bd3lm_scale.data.tokenizing import Preparation


class Killed(BaseException):
    """What ends a preparation in the middle; nothing in it expects this."""


def prepare_through_kills(
    task: Preparation,
    tokenizer: str,
    output: Path,
    units: int,
    after: Callable[[], object] = lambda: None,
    most: int = 100,
) -> int:
    """Prepare, killed at every `units`-th unit of a life; `after` is called after each kill. How many kills it took."""
    kills = 0
    while True:
        seen = 0

        def report(unit, tokens):
            nonlocal seen
            seen += 1
            if seen == units:
                raise Killed

        try:
            prepare(task, tokenizer, output, 0, report)
            return kills
        except Killed:
            kills += 1
            after()
            assert kills < most, "no progress is made between kills"
