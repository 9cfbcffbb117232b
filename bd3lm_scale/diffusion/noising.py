"""From clean rows to what the model reads and is scored against: times, masks, weights.

Masks are Philox words compared with integer thresholds; the key names (seed, step, row), the counter the token. So a
row's noise does not depend on which rank or micro-batch holds it, and a GPU run equals a CPU run.

Shapes: B rows, L tokens in a row, N blocks in a row, S tokens in a block (L = N*S), P positions the model reads.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.config.schema import DiffusionConfig
from bd3lm_scale.diffusion.schedule import Schedule, get_schedule
from bd3lm_scale.diffusion.times import draw_times, evaluation_times
from bd3lm_scale.rng import derive_key, mix64, random_words
from bd3lm_scale.values import Interval, NoisyRows, Rows

_MAX_REDRAWS = 10_000


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

    @property
    def num_blocks(self) -> int:
        """N, blocks (and so diffusion times) in a row."""
        return self.context_length // self.block_size

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
        resample=config.resample,
    )


def noise_rows(
    rows: Rows, process: Process, *, seed: int, step: int, global_batch_size: int, interval: Interval
) -> NoisyRows:
    """Noise a training micro-batch; a pure function of (seed, step, position in the global batch).

    Args:
        rows: clean rows, on the CPU.
        process: the forward process.
        seed: seed of the run.
        step: optimizer step.
        global_batch_size: rows in the global batch (times are stratified over all of them).
        interval: clip interval (low, high) in force; low is raised to time_epsilon.
    """
    if process.objective == "ar":
        return _next_token_rows(rows, process)
    interval = Interval(*interval).floored(process.time_epsilon)
    time_BN = draw_times(seed, step, rows.position_B, process.num_blocks, global_batch_size, interval)
    keys = [derive_key(seed, "train masks", step, p) for p in rows.position_B.tolist()]
    is_masked_BL = _draw_masks(keys, time_BN, process.schedule, process)
    if process.resample and interval != (process.time_epsilon, 1.0):
        is_masked_BL = _resample(is_masked_BL, keys, time_BN, interval, process)
    return _assemble(rows, is_masked_BL, time_BN, process.schedule, process, training=True)


def noise_rows_for_evaluation(
    rows: Rows, process: Process, *, seed: int, draw: int, num_rows: int, interval: Interval | None = None
) -> NoisyRows:
    """Noise validation rows: the same for a given (seed, draw, row) whatever the batch size or device count.

    Evaluation uses the loglinear schedule whatever the training schedule: the bound is the same for all of them,
    and loglinear covers the mask rates (time_epsilon, 1) evenly.

    Args:
        rows: clean rows on the CPU; position_B is the row's index in the validation set.
        process: the forward process.
        seed: seed of the evaluation.
        draw: number of the noise draw.
        num_rows: rows evaluated in all (times are stratified over them).
        interval: (low, high); default `process.evaluation_interval()`.
    """
    if process.objective == "ar":
        return _next_token_rows(rows, process)
    schedule = process.schedule if process.schedule.name == "loglinear" else get_schedule("loglinear")
    interval = process.evaluation_interval() if interval is None else Interval(*interval).floored(process.time_epsilon)
    time_BN = evaluation_times(seed, draw, rows.position_B, process.num_blocks, num_rows, interval)
    keys = [derive_key(seed, "evaluation masks", draw, row) for row in rows.position_B.tolist()]
    return _assemble(rows, _draw_masks(keys, time_BN, schedule, process), time_BN, schedule, process, training=False)


def given_noise(clean_BL: Tensor, noisy_BL: Tensor, time_BN: Tensor, process: Process, training: bool) -> NoisyRows:
    """NoisyRows for x_0, x_t and t decided elsewhere (comparison with another implementation)."""
    rows = Rows(clean_BL, torch.arange(len(clean_BL)), torch.ones(len(clean_BL), dtype=torch.bool))
    if process.objective == "ar":
        return _next_token_rows(rows, process)
    is_masked_BL = noisy_BL == process.mask_token_id
    return _assemble(rows, is_masked_BL, time_BN.double(), process.schedule, process, training)


def _draw_masks(keys: list[int], time_BN: Tensor, schedule: Schedule, process: Process) -> np.ndarray:
    """Independent masks at each block's mask rate, bool (B, L). Rates are thresholds on 53-bit integers."""
    # t = 1 means "everything", also where a schedule's rate stops short of 1
    rate_BN = torch.where(time_BN >= 1.0, 1.0, schedule.mask_rate(time_BN))
    threshold_BN = (rate_BN.numpy() * 2.0**53).astype(np.uint64)
    words_BL = np.stack([random_words(key, process.context_length) for key in keys]) >> np.uint64(11)
    return words_BL < np.repeat(threshold_BN, process.block_size, axis=1)


def _resample(
    is_masked_BL: np.ndarray, keys: list[int], time_BN: Tensor, interval: Interval, process: Process
) -> np.ndarray:
    """Redraw whole blocks, at the same time, until their masked share lies in the clip interval.

    A bound at the end of the full range (low = time_epsilon, high = 1) is not enforced.
    """
    size = process.block_size
    low = 0.0 if interval[0] <= process.time_epsilon else interval[0]
    high = interval[1]
    if not any(low <= count / size <= high for count in range(size + 1)):
        raise ValueError(
            f"diffusion.resample (true): no number of masked tokens in a block of {size} gives a share in "
            f"[{low}, {high}]; use resample=false or another clip interval"
        )
    blocks_BNS = is_masked_BL.reshape(len(keys), process.num_blocks, size)
    for attempt in range(1, _MAX_REDRAWS):
        share_BN = blocks_BNS.mean(axis=2)
        outside_BN = (share_BN < low) | (share_BN > high)
        if not outside_BN.any():
            return blocks_BNS.reshape(is_masked_BL.shape)
        again = np.flatnonzero(outside_BN.any(axis=1))
        fresh_keys = [derive_key(keys[b], "redraw", attempt) for b in again]
        fresh = _draw_masks(fresh_keys, time_BN[again], process.schedule, process)
        fresh_BNS = fresh.reshape(len(again), process.num_blocks, size)
        blocks_BNS[again] = np.where(outside_BN[again][:, :, None], fresh_BNS, blocks_BNS[again])
    raise RuntimeError(f"diffusion.resample: masked shares still outside [{low}, {high}] after {_MAX_REDRAWS} redraws")


def _assemble(
    rows: Rows, is_masked_BL: np.ndarray | Tensor, time_BN: Tensor, schedule: Schedule, process: Process, training: bool
) -> NoisyRows:
    clean_BL, is_real_B1 = rows.tokens_BL, rows.is_real_B[:, None]
    is_masked_BL = torch.as_tensor(is_masked_BL).clone()
    counts_BL = is_real_B1.expand_as(clean_BL).clone()
    if process.ignore_bos:
        is_masked_BL[:, 0] = False
        # training keeps the first token in its denominator (the published convention); evaluation does not
        counts_BL[:, 0] &= training
    noisy_BL = torch.where(is_masked_BL, process.mask_token_id, clean_BL)
    is_scored_BL = is_masked_BL & is_real_B1
    # at t = 1 in all blocks everything is masked and each block is predicted from clean context: a plain likelihood
    weight_BN = torch.where(time_BN >= 1.0, 1.0, schedule.loss_weight(time_BN))
    weight_BL = weight_BN.repeat_interleave(process.block_size, dim=1) * is_scored_BL
    sigma_B = schedule.sigma(time_BN[:, 0]) if process.time_conditioning else torch.zeros(len(clean_BL))
    return NoisyRows(
        input_BP=torch.cat([noisy_BL, clean_BL], dim=1) if process.objective == "bd3lm" else noisy_BL,
        target_BL=clean_BL,
        is_scored_BL=is_scored_BL,
        weight_BL=weight_BL.float(),
        counts_BL=counts_BL,
        time_BN=time_BN,
        sigma_B=sigma_B.float(),
        position_B=rows.position_B,
        is_real_B=rows.is_real_B,
    )


def _next_token_rows(rows: Rows, process: Process) -> NoisyRows:
    """AR: the text itself; position l is scored against token l + 1, the last position not at all."""
    is_scored_BL = rows.is_real_B[:, None].expand_as(rows.tokens_BL).clone()
    is_scored_BL[:, -1] = False
    num_rows = len(rows.tokens_BL)
    return NoisyRows(
        input_BP=rows.tokens_BL,
        target_BL=rows.tokens_BL.roll(-1, dims=1),
        is_scored_BL=is_scored_BL,
        weight_BL=is_scored_BL.float(),
        counts_BL=is_scored_BL,
        time_BN=torch.zeros(num_rows, process.num_blocks, dtype=torch.float64),
        sigma_B=torch.zeros(num_rows),
        position_B=rows.position_B,
        is_real_B=rows.is_real_B,
    )


def stream_hash(noisy: NoisyRows) -> int:
    """Order-free fingerprint of the rows, masks and times that a step consumes.

    Every (position in the global batch, place in the row) is hashed with its clean id, noisy id or time, and the
    hashes are summed modulo 2^64 over real rows: micro-batches' and ranks' hashes add up to the step's.
    """
    real = noisy.is_real_B.numpy()
    row_keys = mix64(noisy.position_B.numpy()[real].astype(np.uint64))[:, None]
    length = noisy.target_BL.shape[1]
    shown = noisy.input_BP[:, :length].numpy()[real].astype(np.uint64)
    target = noisy.target_BL.numpy()[real].astype(np.uint64)
    time_bits = noisy.time_BN.numpy()[real].view(np.uint64)
    place = mix64(np.arange(1, length + time_bits.shape[1] + 1, dtype=np.uint64))
    with np.errstate(over="ignore"):
        tokens = mix64((shown << np.uint64(32) | target) + (row_keys ^ place[:length]))
        times = mix64(time_bits + (row_keys ^ place[length:]))
        return int(tokens.sum(dtype=np.uint64) + times.sum(dtype=np.uint64))
