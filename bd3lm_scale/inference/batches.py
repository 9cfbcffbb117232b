"""From a configuration and prompts to finished samples, batch by batch, for any objective and any network.

Shapes: B samples in a batch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.diffusion.registry import samplers_for
from bd3lm_scale.diffusion.samplers.filtering import TokenFilter
from bd3lm_scale.diffusion.samplers.request import SampleRequest, SampleResult
from bd3lm_scale.diffusion.samplers.sampler import SamplerSettings, get_sampler
from bd3lm_scale.diffusion.samplers.stopping import StopRule
from bd3lm_scale.diffusion.schedule import get_schedule
from bd3lm_scale.errors import ConfigError

_REDRAW_STRIDE = 1 << 40  # sample numbers of the n-th redraw of sample i: i + n * stride, clear of all first draws


@dataclass(frozen=True)
class Sample:
    """One finished sample.

    Attributes:
        index: its number in the run.
        tokens: ids, prompt included.
        prompt_length: tokens of the prompt.
        finish: length | eos | low_entropy.
        nfe, forward_calls: see SampleResult; redraws included in neither.
        redraws: attempts thrown away before this one.
        seconds: wall-clock time of its batch divided by the batch's samples.
        slots: of infilled text: places that were open, each with the log-probability of what was written there.
    """

    index: int
    tokens: tuple[int, ...]
    prompt_length: int
    finish: str
    nfe: int
    forward_calls: int
    redraws: int
    seconds: float
    slots: tuple[tuple[int, float], ...] = ()


def choose_sampler(config: RunConfig) -> str:
    """The sampler in force."""
    name = config.sampling.sampler
    return samplers_for(config.diffusion.objective)[0] if name == "auto" else name


def check_sampling(config: RunConfig, infill: bool = False) -> None:
    """Refuse what is legal for training but cannot be sampled (ConfigError naming the field).

    Infilled text has its own length, not sampling.length.
    """
    sampling, objective, found = config.sampling, config.diffusion.objective, []
    if objective == "sedd" and not infill and sampling.length > config.data.context_length:
        found.append(
            f"sampling.length ({sampling.length}): sedd has no way beyond its context of {config.data.context_length} "
            "tokens; use a shorter length, or mdlm or bd3lm"
        )
    if objective in ("bd3lm", "mdlm") and config.time_conditioning:
        found.append(
            f"diffusion.time_conditioning (true): sampling {objective} from a network that reads the time is not "
            "supported, because its predictions must depend on the tokens alone; train with false (the default)"
        )
    if found:
        raise ConfigError(found, source="the sampling settings")


def run_sampler(
    network: Any,
    request: SampleRequest,
    config: RunConfig,
    on_progress: Callable[[int], object] | None = None,
) -> SampleResult:
    """Sample one batch with the sampler that the configuration names.

    Args:
        network: with an empty context: a BlockDenoiser (bd3lm), FullSequenceDenoiser (mdlm, sedd) or NextToken (ar).
        request: what to sample.
        config: objective, block size, context and sampling section.
        on_progress: told the number of new tokens.
    """
    diffusion, sampling = config.diffusion, config.sampling
    settings = SamplerSettings(
        objective=diffusion.objective,
        block_size=config.block_size,
        context_length=config.data.context_length,
        schedule=get_schedule(diffusion.schedule, diffusion.mdlm_loss_scale),
        steps=sampling.steps,
        threshold=sampling.threshold,
        commit_runs_network=sampling.kv_cache,
    )
    return get_sampler(choose_sampler(config))(network, request, settings, on_progress)


def draw_samples(
    open_network: Callable[[int], Any],
    config: RunConfig,
    prompts: Sequence[tuple[int, ...]],
    indices: Sequence[int],
    *,
    mask_token_id: int,
    eos_token_id: int,
    device: Any = "cpu",
    on_progress: Callable[[int], object] | None = None,
    infill: bool = False,
    end_of_turn: int | None = None,
    on_text: Callable[[tuple[int, ...]], object] | None = None,
) -> Iterator[Sample]:
    """Samples in batches of sampling.batch_size, yielded batch by batch.

    Where a sample of fixed length is cut for low entropy it is drawn again, at most sampling.max_redraws times.

    Args:
        open_network: the network with an empty context for so many rows.
        config: of the run, with its sampling section.
        prompts: tokens each sample starts with.
        indices: number of each sample in the run: draws are a function of (sampling.seed, number).
        mask_token_id, eos_token_id: special ids.
        device: of the network.
        on_progress: told the number of new tokens (redrawn ones count again).
        infill: prompts are whole texts with masks to write; texts of one length go together, and nothing stops them.
        end_of_turn: a token that ends a sample as EOS does.
        on_text: told the new tokens of each batch's first sample so far, as they come.
    """
    sampling = config.sampling
    todo = [(number, prompt, 0) for number, prompt in zip(indices, prompts, strict=True)]
    while todo:
        size = sampling.batch_size
        if infill:
            size = next((i for i, (_, text, _) in enumerate(todo[:size]) if len(text) != len(todo[0][1])), size)
        group, todo = todo[:size], todo[size:]
        stop = StopRule(eos_token_id if sampling.stop_at_eos else None, sampling.min_entropy, end_of_turn)
        request = SampleRequest(
            prompts=tuple(prompt for _, prompt, _ in group),
            length=len(group[0][1]) if infill else sampling.length,
            mask_token_id=mask_token_id,
            seed=sampling.seed,
            sample_index=tuple(number + tries * _REDRAW_STRIDE for number, _, tries in group),
            token_filter=TokenFilter(sampling.nucleus_p, sampling.top_k, sampling.temperature),
            stop=StopRule() if infill else stop,
            device=device,
            infill=infill,
            on_text=on_text,
        )
        started = time.perf_counter()
        result = run_sampler(open_network(len(group)), request, config, on_progress)
        seconds = (time.perf_counter() - started) / len(group)
        for place, (number, prompt, tries) in enumerate(group):
            if result.finish[place] == "low_entropy" and tries < sampling.max_redraws:
                todo.append((number, prompt, tries + 1))
                continue
            yield _sample(result, place, number, prompt, tries, seconds, mask_token_id)


def _sample(
    result: SampleResult,
    place: int,
    number: int,
    prompt: tuple[int, ...],
    tries: int,
    seconds: float,
    mask_token_id: int,
) -> Sample:
    return Sample(
        index=number,
        tokens=result.tokens[place],
        prompt_length=len(prompt) - prompt.count(mask_token_id),
        finish=result.finish[place],
        nfe=result.nfe[place],
        forward_calls=result.forward_calls[place],
        redraws=tries,
        seconds=seconds,
        slots=_slots(prompt, mask_token_id, result.log_probs[place]) if result.log_probs is not None else (),
    )


def _slots(text: tuple[int, ...], mask_token_id: int, log_probs: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    return tuple((place, log_probs[place]) for place, token in enumerate(text) if token == mask_token_id)
