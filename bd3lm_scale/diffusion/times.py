"""Diffusion times: one per block, stratified over all blocks of the global batch.

The n = rows * N blocks of a global batch get the n points (k + u)/n, k = 0..n-1, with one shared uniform u. A keyed
permutation decides which block gets which point, so every block's time is uniform by itself (no position is tied
to a range of times) while the batch as a whole covers [0, 1] evenly. Everything is a pure function of
(seed, step, position, block): how rows are split over ranks and micro-batches does not matter.

Shapes: B rows, N blocks in a row.
"""

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.rng import derive_key, permute, uniforms
from bd3lm_scale.values import Interval


def draw_times(
    seed: int, step: int, position_B: Tensor, num_blocks: int, global_batch_size: int, interval: Interval
) -> Tensor:
    """Training times, float64 (B, N), uniform on `interval`.

    Args:
        seed: seed of the run.
        step: optimizer step.
        position_B: index of each row in the global batch; padding rows (>= global_batch_size) get some time.
        num_blocks: N.
        global_batch_size: rows in the global batch.
        interval: (low, high); equal ends give that time everywhere.
    """
    return _stratified(seed, "train", step, position_B, num_blocks, global_batch_size, interval)


def evaluation_times(seed: int, draw: int, row_B: Tensor, num_blocks: int, num_rows: int, interval: Interval) -> Tensor:
    """Times for noise draw number `draw` of validation rows `row_B` out of num_rows, float64 (B, N)."""
    return _stratified(seed, "evaluation", draw, row_B, num_blocks, num_rows, interval)


def _stratified(
    seed: int, use: str, round_: int, row_B: Tensor, num_blocks: int, num_rows: int, interval: Interval
) -> Tensor:
    size = num_rows * num_blocks
    row_index_B = row_B.cpu().numpy().astype(np.int64) % num_rows
    point_BN = permute(
        row_index_B[:, None] * num_blocks + np.arange(num_blocks), size, derive_key(seed, f"{use} times", round_)
    )
    rotation = uniforms(derive_key(seed, f"{use} rotation", round_), 1)[0]
    low, high = interval
    return torch.from_numpy(low + (high - low) * ((point_BN + rotation) / size))
