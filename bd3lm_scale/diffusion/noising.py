"""From clean rows to what the model reads and is scored against: times, masks, weights.

Masks are Philox words compared with integer thresholds; the key names (seed, step, row), the counter the token. So a
row's noise does not depend on which rank or micro-batch holds it, and a GPU run equals a CPU run.

Times are one per block, stratified over all blocks of the global batch: its n = rows * N blocks get the n points
(k + u)/n, k = 0..n-1, with one shared uniform u. A keyed permutation decides which block gets which point, so every
block's time is uniform by itself (no position is tied to a range of times) while the batch covers [0, 1] evenly.

Shapes: B rows, L tokens in a row, N blocks in a row, S tokens in a block (L = N*S), P positions the model reads.
"""

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.diffusion.mask_counts import (
    allowed_counts,
    binomial_rates,
    binomial_weights,
    stratified_counts,
    stratified_weights,
)
from bd3lm_scale.diffusion.process import Process
from bd3lm_scale.diffusion.schedule import Schedule, get_schedule
from bd3lm_scale.rng import derive_key, mix64, permute, random_words, uniforms
from bd3lm_scale.values import Interval, NoisyRows, Rows

_MAX_REDRAWS = 10_000


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
    times = process.training_times(*interval)
    time_BN = draw_times(seed, "train", step, rows.position_B, process.num_blocks, global_batch_size, times)
    keys = [derive_key(seed, "train masks", step, p) for p in rows.position_B.tolist()]
    if process.mask_counts == "stratified":
        is_masked_BL = _draw_counted_masks(keys, stratified_counts(time_BN, process), process)
        weight_BN = stratified_weights(time_BN, process)
        return _assemble(rows, is_masked_BL, time_BN, weight_BN, process.schedule, process, training=True)
    is_masked_BL = _draw_masks(keys, time_BN, process.schedule, process)
    if process.resample:
        is_masked_BL = _resample(is_masked_BL, keys, time_BN, interval, process)
    weight_BN = binomial_weights(time_BN, process.schedule)
    return _assemble(rows, is_masked_BL, time_BN, weight_BN, process.schedule, process, training=True)


def draw_times(
    seed: int, use: str, number: int, row_B: Tensor, num_blocks: int, num_rows: int, interval: Interval
) -> Tensor:
    """Times of the blocks of some rows, float64 (B, N), uniform on `interval`.

    Args:
        seed: seed of the run.
        use: "train" or "evaluation": the two never share a draw.
        number: optimizer step, or number of the noise draw.
        row_B: index of each row in the global batch, or in the validation rows; padding rows (>= num_rows) get some
            time.
        num_blocks: N.
        num_rows: rows in the global batch, or of validation.
        interval: (low, high); equal ends give that time everywhere.
    """
    size = num_rows * num_blocks
    row_index_B = row_B.cpu().numpy().astype(np.int64) % num_rows
    point_BN = permute(
        row_index_B[:, None] * num_blocks + np.arange(num_blocks), size, derive_key(seed, f"{use} times", number)
    )
    rotation = uniforms(derive_key(seed, f"{use} rotation", number), 1)[0]
    low, high = interval
    return torch.from_numpy(low + (high - low) * ((point_BN + rotation) / size))


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
    time_BN = draw_times(seed, "evaluation", draw, rows.position_B, process.num_blocks, num_rows, interval)
    keys = [derive_key(seed, "evaluation masks", draw, row) for row in rows.position_B.tolist()]
    is_masked_BL = _draw_masks(keys, time_BN, schedule, process)
    weight_BN = binomial_weights(time_BN, schedule)
    return _assemble(rows, is_masked_BL, time_BN, weight_BN, schedule, process, training=False)


def given_noise(clean_BL: Tensor, noisy_BL: Tensor, time_BN: Tensor, process: Process, training: bool) -> NoisyRows:
    """NoisyRows for x_0, x_t and t decided elsewhere (comparison with another implementation)."""
    rows = Rows(clean_BL, torch.arange(len(clean_BL)), torch.ones(len(clean_BL), dtype=torch.bool))
    if process.objective == "ar":
        return _next_token_rows(rows, process)
    is_masked_BL = noisy_BL == process.mask_token_id
    time_BN = time_BN.double()
    weight_BN = binomial_weights(time_BN, process.schedule)
    return _assemble(rows, is_masked_BL, time_BN, weight_BN, process.schedule, process, training)


def _draw_masks(keys: list[int], time_BN: Tensor, schedule: Schedule, process: Process) -> np.ndarray:
    """Independent masks at each block's mask rate, bool (B, L). Rates are thresholds on 53-bit integers."""
    threshold_BN = (binomial_rates(time_BN, schedule).numpy() * 2.0**53).astype(np.uint64)
    words_BL = np.stack([random_words(key, process.context_length) for key in keys]) >> np.uint64(11)
    return words_BL < np.repeat(threshold_BN, process.block_size, axis=1)


def _draw_counted_masks(keys: list[int], count_BN: Tensor, process: Process) -> np.ndarray:
    """As many masks as told in each block, every set of places equally likely, bool (B, L)."""
    words_BL = np.stack([random_words(key, process.context_length) for key in keys])
    rank_BNS = words_BL.reshape(*count_BN.shape, process.block_size).argsort(axis=2).argsort(axis=2)
    return (rank_BNS < count_BN.numpy()[:, :, None]).reshape(words_BL.shape)


def _resample(
    is_masked_BL: np.ndarray, keys: list[int], time_BN: Tensor, interval: Interval, process: Process
) -> np.ndarray:
    """Redraw whole blocks, at the same time, until their number of masked tokens is an allowed one."""
    size, (first, last) = process.block_size, allowed_counts(process, interval)
    if last < max(first, 1):
        raise ValueError(
            f"diffusion.resample (true): no number of masked tokens above 0 in a block of {size} gives a share in "
            f"[{interval[0]}, {interval[1]}]; use resample=false or another clip interval"
        )
    blocks_BNS = is_masked_BL.reshape(len(keys), process.num_blocks, size)
    for attempt in range(1, _MAX_REDRAWS):
        count_BN = blocks_BNS.sum(axis=2)
        outside_BN = (count_BN < first) | (count_BN > last)
        if not outside_BN.any():
            return blocks_BNS.reshape(is_masked_BL.shape)
        again = np.flatnonzero(outside_BN.any(axis=1))
        fresh_keys = [derive_key(keys[b], "redraw", attempt) for b in again]
        fresh = _draw_masks(fresh_keys, time_BN[again], process.schedule, process)
        fresh_BNS = fresh.reshape(len(again), process.num_blocks, size)
        blocks_BNS[again] = np.where(outside_BN[again][:, :, None], fresh_BNS, blocks_BNS[again])
    raise RuntimeError(f"diffusion.resample: still not {first} to {last} masked tokens after {_MAX_REDRAWS} redraws")


def _assemble(
    rows: Rows,
    is_masked_BL: np.ndarray | Tensor,
    time_BN: Tensor,
    weight_BN: Tensor,
    schedule: Schedule,
    process: Process,
    training: bool,
) -> NoisyRows:
    clean_BL, is_real_B1 = rows.tokens_BL, rows.is_real_B[:, None]
    is_masked_BL = torch.as_tensor(is_masked_BL).clone()
    count_BN = is_masked_BL.reshape(*time_BN.shape, process.block_size).sum(dim=2)
    counts_BL = is_real_B1.expand_as(clean_BL).clone()
    first = (slice(None), 0) if rows.document_BL is None else document_starts(rows.document_BL)
    if isinstance(first, Tensor) and process.objective == "bd3lm":
        _refuse_documents_inside_blocks(first, process)
    if rows.is_target_BL is not None:
        is_masked_BL &= rows.is_target_BL
        counts_BL &= rows.is_target_BL
    if process.ignore_bos:
        is_masked_BL[first] = False
        # training keeps the first token in its denominator (the published convention); evaluation does not
        counts_BL[first] &= training
    noisy_BL = torch.where(is_masked_BL, process.mask_token_id, clean_BL)
    is_scored_BL = is_masked_BL & is_real_B1
    weight_BL = weight_BN.repeat_interleave(process.block_size, dim=1) * is_scored_BL
    sigma_B = schedule.sigma(time_BN[:, 0]) if process.time_conditioning else torch.zeros(len(clean_BL))
    return NoisyRows(
        input_BP=torch.cat([noisy_BL, clean_BL], dim=1) if process.objective == "bd3lm" else noisy_BL,
        target_BL=clean_BL,
        is_scored_BL=is_scored_BL,
        weight_BL=weight_BL.float(),
        counts_BL=counts_BL,
        time_BN=time_BN,
        masked_count_BN=count_BN,
        sigma_B=sigma_B.float(),
        position_B=rows.position_B,
        is_real_B=rows.is_real_B,
        document_BL=rows.document_BL,
        is_target_BL=rows.is_target_BL,
    )


def _refuse_documents_inside_blocks(is_first_BL: Tensor, process: Process) -> None:
    size = process.block_size
    if is_first_BL.reshape(len(is_first_BL), -1, size)[:, :, 1:].any():
        raise ValueError(f"documents begin inside blocks of {size}; open the data with block_size={size}")


def document_starts(document_BL: Tensor) -> Tensor:
    """Where documents begin in their rows, bool (B, L)."""
    is_first_BL = document_BL >= 0
    is_first_BL[:, 1:] &= document_BL[:, 1:] != document_BL[:, :-1]
    return is_first_BL


def _next_token_rows(rows: Rows, process: Process) -> NoisyRows:
    """AR: the text itself; position l is scored against token l + 1, the last of a document not at all."""
    is_scored_BL = rows.is_real_B[:, None].expand_as(rows.tokens_BL).clone()
    is_scored_BL[:, -1] = False
    if rows.document_BL is not None:
        is_scored_BL[:, :-1] &= rows.document_BL[:, 1:] == rows.document_BL[:, :-1]
        is_scored_BL &= rows.document_BL >= 0
    if rows.is_target_BL is not None:
        is_scored_BL[:, :-1] &= rows.is_target_BL[:, 1:]
    num_rows = len(rows.tokens_BL)
    return NoisyRows(
        input_BP=rows.tokens_BL,
        target_BL=rows.tokens_BL.roll(-1, dims=1),
        is_scored_BL=is_scored_BL,
        weight_BL=is_scored_BL.float(),
        counts_BL=is_scored_BL,
        time_BN=torch.zeros(num_rows, process.num_blocks, dtype=torch.float64),
        masked_count_BN=torch.zeros(num_rows, process.num_blocks, dtype=torch.int64),
        sigma_B=torch.zeros(num_rows),
        position_B=rows.position_B,
        is_real_B=rows.is_real_B,
        document_BL=rows.document_BL,
        is_target_BL=rows.is_target_BL,
    )


def stream_hash(noisy: NoisyRows) -> int:
    """Order-free fingerprint of the rows, masks and times that a step consumes.

    Every (position in the global batch, place in the row) is hashed with its clean id, noisy id or time, its document
    and whether it is a target where rows say so, and the hashes are summed modulo 2^64 over real rows: micro-batches'
    and ranks' hashes add up to the step's.
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
        total = tokens.sum(dtype=np.uint64) + times.sum(dtype=np.uint64)
        for salt, marks_BL in enumerate((noisy.document_BL, noisy.is_target_BL), start=1):
            if marks_BL is not None:
                marks = marks_BL.numpy()[real].astype(np.int64).view(np.uint64)
                salted = mix64(place[:length] + np.uint64(salt))
                total += mix64(marks + (row_keys ^ salted)).sum(dtype=np.uint64)
        return int(total)
