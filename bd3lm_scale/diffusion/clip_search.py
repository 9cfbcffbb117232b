"""The data-driven clipped schedule (paper, Section 5.2), from the masks and losses that evaluation has anyway.

Given the number k of masked tokens in a block, their places are uniform whatever the noise, so the mean nll u of the
masked tokens has one law for each k. Evaluation measures its moments E[u | k], E[u^2 | k]; the training noise says how
often k is masked with which weight (`mask_counts.count_weights`). With l = w u k/S the loss of a block per token,

    E[l^q] = sum over k of  E[w^q; k] (k/S)^q E[u^q | k]

for every interval of every schedule, with `resample` or without, integrated over the time exactly.

Off loglinear the total weight E[w p] of a masked token differs by interval, and with it the scale of the loss, to which
the optimizer is indifferent. So intervals compare by their relative variance Var l / E[w p]^2; under loglinear, whose
total weight is 1 on every interval, that is the variance itself, the paper's criterion.

Where the network is told the time, E[u | k] is the mean over the times that evaluation had with k: an approximation.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.diffusion.mask_counts import count_weights, total_weight
from bd3lm_scale.diffusion.process import Process
from bd3lm_scale.diffusion.registry import SCHEDULES
from bd3lm_scale.diffusion.schedule import get_schedule
from bd3lm_scale.values import Interval, LossSum, NoisyRows

HYSTERESIS = 0.01
"""Another interval must have this much less relative variance, so that rounding never flips the choice."""

_OCTAVE = 64
"""Counts below have a bin each; above, bins of 1/64 to 1/32 of their count."""


@dataclass(frozen=True)
class LossMoments:
    """A block's loss in training, in nats per token of the block, under one clip interval.

    Attributes:
        mean, variance: over the training noise and the text; nan where they are unknown.
        stderr: standard error of the variance over the blocks that were measured.
        weight: the schedule's total weight E[w p] on the interval.
    """

    mean: float
    variance: float
    stderr: float
    weight: float

    @property
    def relative(self) -> float:
        """Variance in units of the total weight, the criterion of the search; nan where unknown."""
        return self.variance / self.weight**2


class CountMoments:
    """Moments of the mean nll of a block's masked tokens, by how many are masked.

    Attributes:
        block_size: S.
        sums: float64 (5, bins), sums of u^0 ... u^4.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.sums = torch.zeros(5, int(_bin_of(torch.tensor(block_size))) + 1, dtype=torch.float64)

    def accumulate(self, noisy: NoisyRows, loss: LossSum) -> None:
        """Add the blocks of an evaluated micro-batch (loglinear, weight 1/t).

        Rows that are not real and blocks without targets are left out.
        """
        keep = noisy.is_real_B[:, None].cpu().expand_as(noisy.time_BN)
        if noisy.is_target_BL is not None:
            keep = keep & noisy.is_target_BL.reshape(*keep.shape, -1).any(dim=2)
        count, time = noisy.masked_count_BN.cpu()[keep], noisy.time_BN.double().cpu()[keep]
        block_loss = loss.block_loss_BN.detach().double().cpu()[keep]
        mean_nll = block_loss * time * self.block_size / count.clamp(min=1)
        self.sums.index_add_(1, _bin_of(count), mean_nll ** torch.arange(5)[:, None])

    def as_tensor(self) -> Tensor:
        """The sums, to all-reduce or save; a copy."""
        return self.sums.clone()

    @staticmethod
    def from_tensor(sums: Tensor, block_size: int) -> "CountMoments":
        """Moments whose sums are given (summed over ranks, or loaded)."""
        moments = CountMoments(block_size)
        moments.sums = sums.detach().double().cpu().reshape(moments.sums.shape).clone()
        return moments

    def loss(self, interval: Interval, process: Process) -> LossMoments:
        """Mean and unbiased variance of a block's loss when training clips to `interval`.

        Counts that were never seen take the moments of their neighbors, by linear interpolation.

        Args:
            interval: (low, high) in the process's time.
            process: of the training that is asked about; block size, schedule and noise.
        """
        return self._combine(count_weights(process, interval), total_weight(process, interval))

    def _combine(self, law: Tensor, total: float) -> LossMoments:
        seen = self.sums[0] > 0
        seen[0] = False  # nothing is masked there: the loss is 0
        if self.sums[0].sum() < 2 or not seen.any() or not bool(law.isfinite().all()):
            return LossMoments(math.nan, math.nan, math.nan, total)
        share = torch.arange(self.block_size + 1, dtype=torch.float64) / self.block_size
        weight = torch.zeros(3, len(seen), dtype=torch.float64)
        weight.index_add_(1, _bin_of(torch.arange(self.block_size + 1)), law * share ** torch.arange(3)[:, None])
        u1, u2, u3, u4 = _interpolate(self.sums[1:] / self.sums[0], seen)
        number = self.sums[0].clamp(min=1.0)
        several = seen & (number > 1)
        mean, square = float((weight[1] * u1).sum()), float((weight[2] * u2).sum())
        if not several.any():
            return LossMoments(mean, math.nan, math.nan, total)
        covariance = torch.stack([u2 - u1 * u1, u3 - u1 * u2, u4 - u2 * u2]) * (number / (number - 1))
        s11, s12, s22 = _interpolate(covariance, several).clamp(min=0.0) / number
        # the square of an estimated mean is too large by the estimate's own variance
        variance = square - mean**2 + float((weight[1].square() * s11).sum())
        # to first order the estimate moves with  w2 u^2 - 2 E[l] w1 u  of each block
        spread = weight[2].square() * s22 - 4 * mean * weight[1] * weight[2] * s12
        spread += 4 * mean**2 * weight[1].square() * s11
        return LossMoments(mean, max(0.0, variance), math.sqrt(max(0.0, float(spread.sum()))), total)


def _bin_of(count: Tensor) -> Tensor:
    """Bin of each count: itself below 64, then 32 bins to the octave."""
    octave = (count.double() / _OCTAVE).clamp(min=0.5).log2().floor().long() + 1
    half = _OCTAVE // 2
    return torch.where(octave > 0, half * (octave + 1) + (count >> octave) - half, count)


def _interpolate(values: Tensor, known: Tensor) -> Tensor:
    """Rows of values by bin, unknown ones from the known ones beside them."""
    bins, places = np.arange(values.shape[1]), torch.nonzero(known).flatten().numpy()
    return torch.from_numpy(np.stack([np.interp(bins, places, row[known].numpy()) for row in values]))


def candidate_intervals(widths: tuple[float, ...], step: float, epsilon: float, block_size: int) -> list[Interval]:
    """The intervals that are compared: the full one first, then every width at every multiple of step.

    For blocks of one token only the full interval and (1, 1), the exact likelihood, are of interest.
    """
    full = Interval(epsilon, 1.0)
    if block_size == 1:
        return [full, Interval(1.0, 1.0)]
    intervals = [full]
    for width in widths:
        places = int((1.0 - width) / step + 1e-9) + 1
        for place in range(places):
            low = round(place * step, 12)
            intervals.append(Interval(max(low, epsilon), min(1.0, round(low + width, 12))))
    return list(dict.fromkeys(intervals))


def loss_table(
    moments: CountMoments,
    process: Process,
    widths: tuple[float, ...],
    step: float,
    current: Interval | None = None,
    schedule: str | None = None,
) -> dict[Interval, LossMoments]:
    """A block's loss under every candidate interval, and under the one in force.

    Args:
        moments: from an evaluation.
        process: of the training.
        widths, step: of the grid.
        current: the interval in force.
        schedule: name of another schedule than the process's.
    """
    if schedule is not None and schedule != process.schedule.name:
        assert schedule in SCHEDULES
        process = replace(process, schedule=get_schedule(schedule))
    intervals = candidate_intervals(widths, step, process.time_epsilon, process.block_size)
    if current is not None and process.block_size > 1 and current not in intervals:
        intervals.append(current)
    return {interval: moments.loss(interval, process) for interval in intervals}


def choose_interval(table: dict[Interval, LossMoments], current: Interval) -> Interval:
    """The interval of least relative variance; `current` stays unless another is better by more than 1%.

    Intervals of unknown variance (nan) are never chosen; with no known one, `current` stays.
    """
    best = least_noisy(table)
    if best is None:
        return current
    in_force = table[current].relative if current in table else math.nan
    return current if table[best].relative >= in_force * (1.0 - HYSTERESIS) else best


def least_noisy(table: dict[Interval, LossMoments]) -> Interval | None:
    """The interval of least relative variance; None where no variance is known."""
    known = [interval for interval, loss in table.items() if math.isfinite(loss.relative)]
    return min(known, key=lambda interval: table[interval].relative, default=None)
