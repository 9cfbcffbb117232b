"""Block sizes that a run goes through: diffusion.block_size_schedule as stages with a configuration each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bd3lm_scale.config.schema import RunConfig


@dataclass(frozen=True)
class Stage:
    """A stretch of steps with one block size.

    Attributes:
        index: 0, 1, ...
        first_step: its first optimizer step, 0-based.
        config: the run's with the block size and clip interval in force, and no schedule.
    """

    index: int
    first_step: int
    config: RunConfig


def stages(config: RunConfig) -> Iterator[Stage]:
    """All stages in order; the last one has diffusion.block_size and no end."""
    diffusion, first_step, index = config.diffusion, 0, 0
    if not diffusion.block_size_schedule:
        yield Stage(0, 0, config)
        return
    final = replace(diffusion, block_size_schedule=())
    for index, stage in enumerate(diffusion.block_size_schedule, 1):
        here = replace(
            final,
            block_size=stage.block_size,
            clip_low=diffusion.clip_low if stage.clip_low is None else stage.clip_low,
            clip_high=diffusion.clip_high if stage.clip_high is None else stage.clip_high,
        )
        yield Stage(index - 1, first_step, replace(config, diffusion=here))
        first_step += stage.steps
    yield Stage(index, first_step, replace(config, diffusion=final))
