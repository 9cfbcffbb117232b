"""What a sampler is: a function of a network and a request, listed by name in diffusion/registry.py.

Most fill one block after another and differ in how a block is filled: `by_blocks` makes a sampler of such a rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bd3lm_scale.diffusion.registry import SAMPLERS, resolve
from bd3lm_scale.diffusion.samplers.blocks import BlockPlan, FillBlock, sample_blocks
from bd3lm_scale.diffusion.samplers.mdlm import WindowDenoiser, window_plan
from bd3lm_scale.diffusion.samplers.request import SampleRequest, SampleResult
from bd3lm_scale.diffusion.schedule import Schedule

OnProgress = Callable[[int], object] | None
"""Told the number of new tokens."""


@dataclass(frozen=True)
class SamplerSettings:
    """What a sampler may know besides the network and the request.

    Attributes:
        objective: of the model.
        block_size: S.
        context_length: L, tokens of the model's rows.
        schedule: the model's noise schedule.
        steps: T, sampling.steps.
        threshold: sampling.threshold.
        commit_runs_network: whether committing a block costs a forward call (it does with a KV cache).
    """

    objective: str
    block_size: int
    context_length: int
    schedule: Schedule
    steps: int
    threshold: float
    commit_runs_network: bool = True


Sampler = Callable[[Any, SampleRequest, SamplerSettings, OnProgress], SampleResult]
"""Samples a batch with a network that has an empty context: a BlockDenoiser (bd3lm), FullSequenceDenoiser (mdlm,
sedd) or NextToken (ar)."""


def get_sampler(name: str) -> Sampler:
    """The sampler of that name.

    Raises:
        ValueError: no such sampler.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampling.sampler ({name}): no such sampler; use one of {', '.join(SAMPLERS)}")
    return resolve(SAMPLERS[name].address)


def by_blocks(make_fill: Callable[[SamplerSettings], FillBlock]) -> Sampler:
    """A sampler that fills block after block of bd3lm, and window after window of mdlm."""

    def sample(
        network: Any, request: SampleRequest, settings: SamplerSettings, on_progress: OnProgress = None
    ) -> SampleResult:
        fill = make_fill(settings)
        if settings.objective == "mdlm":
            plan = window_plan(request.length, settings.context_length)
            denoiser = WindowDenoiser(network, settings.context_length)
            return sample_blocks(denoiser, fill, request, plan, on_progress)
        plan = BlockPlan(settings.block_size, settings.block_size, settings.commit_runs_network)
        return sample_blocks(network, fill, request, plan, on_progress)

    return sample
