"""First-hitting sampling (Zheng et al. 2024): one token per call of the network, in a uniformly random order.

The position comes first, so the head runs on one row per sequence. It is the exact reverse process: ancestral sampling
with infinitely many steps.
"""

from bd3lm_scale.diffusion.samplers.protocols import BlockDenoiser
from bd3lm_scale.diffusion.samplers.request import BlockTask, FilledBlock
from bd3lm_scale.diffusion.samplers.reveal import fill_in_order
from bd3lm_scale.diffusion.samplers.sampler import by_blocks


def first_hitting(denoiser: BlockDenoiser, task: BlockTask) -> FilledBlock:
    """Fill a block one position at a time."""
    return fill_in_order(denoiser, task, task.when_BS)


SAMPLER = by_blocks(lambda settings: first_hitting)
