"""The forward process that a configuration describes: what is masked, when, and in which blocks."""

from dataclasses import dataclass

from bd3lm_scale.config.schema import DiffusionConfig
from bd3lm_scale.diffusion.schedule import Schedule, get_schedule
from bd3lm_scale.values import Interval


@dataclass(frozen=True)
class Process:
    """The forward process of one objective.

    Attributes:
        objective: bd3lm | mdlm | ar | sedd.
        context_length, block_size: L and S; S is L for mdlm, sedd and (one "block" of text) ar.
        vocab_size: V, ids including the mask, without padding ids.
        mask_token_id: the mask.
        schedule: mask rate and loss weight.
        ignore_bos: keep each row's first token clean and leave it out of evaluation.
        time_epsilon: smallest time.
        time_conditioning: whether sigma reaches the network.
        resample: redraw blocks whose masked share leaves the clip interval.
        mask_counts: binomial | stratified: how the number of masked tokens in a block comes about.
    """

    objective: str
    context_length: int
    block_size: int
    vocab_size: int
    mask_token_id: int
    schedule: Schedule
    ignore_bos: bool
    time_epsilon: float
    time_conditioning: bool
    resample: bool
    mask_counts: str = "binomial"

    @property
    def num_blocks(self) -> int:
        """N, blocks (and so diffusion times) in a row."""
        return self.context_length // self.block_size

    def training_interval(self, low: float, high: float) -> Interval:
        """The clip interval (low, high) as it is named everywhere: [max(low, time_epsilon), high]."""
        return Interval(low, high).floored(self.time_epsilon)

    def training_times(self, low: float, high: float) -> Interval:
        """The interval that training times come from.

        It is the clip interval, except that stratified counts have no singular weight to keep away from: their full
        interval starts at 0, where their mean is the bound itself.
        """
        starts_at_zero = self.mask_counts == "stratified" and low <= self.time_epsilon
        return Interval(0.0, high) if starts_at_zero else self.training_interval(low, high)

    def evaluation_interval(self) -> Interval:
        """Where evaluation times come from: (time_epsilon, 1); blocks of one token are exact at (1, 1)."""
        is_exact = self.objective == "bd3lm" and self.block_size == 1
        return Interval(1.0, 1.0) if is_exact else Interval(self.time_epsilon, 1.0)


def make_process(config: DiffusionConfig, context_length: int, vocab_size: int, mask_token_id: int) -> Process:
    """The process that a configuration describes.

    Raises:
        ValueError: unknown objective or schedule, or a block size that does not divide the context length.
    """
    objective = config.objective
    if objective not in ("bd3lm", "mdlm", "ar", "sedd"):
        raise ValueError(f"diffusion.objective ({objective}): use bd3lm, mdlm, ar or sedd")
    block_size = config.block_size if objective == "bd3lm" else context_length
    if block_size < 1 or context_length % block_size:
        raise ValueError(
            f"diffusion.block_size ({block_size}): must divide data.context_length ({context_length}); "
            "use a divisor of it"
        )
    redraws = objective == "bd3lm" and block_size > 1 and config.mask_counts == "binomial"
    conditioned = objective == "sedd" if config.time_conditioning is None else config.time_conditioning
    return Process(
        objective=objective,
        context_length=context_length,
        block_size=block_size,
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
        schedule=get_schedule(config.schedule, config.mdlm_loss_scale),
        ignore_bos=config.ignore_bos and objective != "ar",
        time_epsilon=config.time_epsilon,
        time_conditioning=conditioned and objective != "ar",
        resample=redraws if config.resample is None else config.resample,
        mask_counts=config.mask_counts,
    )
