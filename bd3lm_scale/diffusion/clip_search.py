"""The data-driven clipped schedule (paper, Section 5.2), from the times and losses that evaluation has anyway.

Evaluation draws t ~ U[epsilon, 1]. With l the loss of a block (per token, weight p'/p included), training on
t ~ U[low, high] uses the same l at other times and no other weight, so

    Var_{U[low, high]}[l] = mean over t in [low, high] of E[l^2 | t]  -  (mean over t in [low, high] of E[l | t])^2

and the moments E[l | t], E[l^2 | t], kept in bins of t, give the variance under *every* interval at once. Evaluation is
loglinear, so its t is a mask rate p; another schedule's loss at the same p is p'(t) times as large, so the same
moments give the variance under every interval of every schedule.

Shapes: B rows, N blocks in a row.
"""

import math

import torch
from torch import Tensor

from bd3lm_scale.diffusion.schedule import Schedule
from bd3lm_scale.values import Interval

NUM_BINS = 1000
"""Bins of t; the edges 0.001, 0.002, ... include those of the paper's grid."""

HYSTERESIS = 0.01
"""Another interval must have this much less variance, so that rounding never flips the choice."""


class TimeMoments:
    """Count, sum and sum of squares of block losses in bins of their diffusion time.

    Times must be uniform on [epsilon, 1]; or all 1, as in the exact evaluation of blocks of one token.

    Attributes:
        epsilon: smallest time drawn.
        sums: float64 (3, NUM_BINS).
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self.sums = torch.zeros(3, NUM_BINS, dtype=torch.float64)

    def accumulate(self, time_BN: Tensor, block_loss_BN: Tensor, is_real_B: Tensor | None = None) -> None:
        """Add the blocks of a micro-batch; rows that are not real are left out."""
        time_BN, loss_BN = time_BN.detach().double().cpu(), block_loss_BN.detach().double().cpu()
        if is_real_B is not None:
            keep = is_real_B.cpu()
            time_BN, loss_BN = time_BN[keep], loss_BN[keep]
        bin_index = (time_BN.flatten() * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        loss = loss_BN.flatten()
        for row, values in enumerate((torch.ones_like(loss), loss, loss * loss)):
            self.sums[row].index_add_(0, bin_index, values)

    def as_tensor(self) -> Tensor:
        """The sums, to all-reduce or save; a copy."""
        return self.sums.clone()

    @staticmethod
    def from_tensor(sums: Tensor, epsilon: float) -> "TimeMoments":
        """Moments whose sums are given (summed over ranks, or loaded)."""
        moments = TimeMoments(epsilon)
        moments.sums = sums.detach().double().cpu().clone()
        return moments

    def variance(self, interval: Interval, schedule: Schedule | None = None) -> float:
        """Variance of a block's loss when its time is uniform on `interval` (unbiased; nan with fewer than 2 blocks).

        An edge inside a bin counts the bin in proportion. Equal ends stand for the bin that holds them.

        Args:
            interval: (low, high) in the schedule's own time.
            schedule: of the training that is asked about; default: the one that the moments were measured under.
        """
        if schedule is None or schedule.name == "loglinear":
            share, covered = self._share(interval).expand(3, -1), 1.0
        else:
            share, covered = self._share_under(interval, schedule)
        count = float((self.sums[0] * share[1]).sum())
        if count < 1.5:
            return math.nan
        norm, total, squares = (self.sums * share).sum(1).tolist()
        mean, square = covered * total / norm, covered * squares / norm
        return max(0.0, square - mean**2) * count / (count - 1)

    def _share(self, interval: Interval) -> Tensor:
        """How much of each bin's times lies in the interval, float64 (NUM_BINS,)."""
        low, high = interval
        if high <= low:
            return (torch.arange(NUM_BINS) == min(int(low * NUM_BINS), NUM_BINS - 1)).double()
        left, right = self._edges()
        inside = (right.clamp(max=high) - left.clamp(min=low)).clamp(min=0.0)
        return inside / (right - left).clamp(min=1e-12)

    def _share_under(self, interval: Interval, schedule: Schedule) -> tuple[Tensor, float]:
        """For powers q = 0, 1, 2 the integral over each bin of p'^q dt per width of the bin, and the share of the
        interval's time in which p rises (elsewhere the loss is 0).

        A measured loss l at mask rate p stands for p' l under the schedule, and dp = p' dt.
        """
        ends = torch.tensor(interval, dtype=torch.float64)
        low, high = schedule.mask_rate(ends).tolist()
        left, right = self._edges()
        inside_left, inside_right = left.clamp(low, high), right.clamp(low, high)
        width = (right - left).clamp(min=1e-12)
        middle = schedule.time_of((inside_left + inside_right) / 2)
        time = schedule.time_of(inside_right) - schedule.time_of(inside_left)
        rate = inside_right - inside_left
        share = torch.stack([time, rate, rate * schedule.mask_rate_slope(middle)]) / width
        return share, float(time.sum()) / (interval[1] - interval[0])

    def _edges(self) -> tuple[Tensor, Tensor]:
        """Left and right edge of each bin; no time lies below epsilon."""
        edges = torch.arange(NUM_BINS + 1, dtype=torch.float64) / NUM_BINS
        return edges[:-1].clamp(min=self.epsilon), edges[1:].clamp(min=self.epsilon)


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


def variance_table(
    moments: TimeMoments,
    widths: tuple[float, ...],
    step: float,
    block_size: int,
    current: Interval | None = None,
    schedule: Schedule | None = None,
) -> dict[Interval, float]:
    """Variance of the block loss under every candidate interval, and under the one in force.

    Args:
        moments: from an evaluation.
        widths, step: of the grid.
        block_size: S.
        current: the interval in force.
        schedule: of the training; default loglinear.
    """
    intervals = candidate_intervals(widths, step, moments.epsilon, block_size)
    if block_size == 1:
        return _single_token_table(moments, intervals, schedule)
    if current is not None and current not in intervals:
        intervals.append(current)
    return {interval: moments.variance(interval, schedule) for interval in intervals}


def _single_token_table(
    moments: TimeMoments, intervals: list[Interval], schedule: Schedule | None
) -> dict[Interval, float]:
    """Blocks of one token, from their exact losses at t = 1.

    At time t the loss is nll * p'/p with probability p, so E[l^2 | t] = E[nll^2] p'^2/p; for loglinear the mean of
    1/t over [epsilon, 1] is ln(1/epsilon) / (1 - epsilon). E[l] = E[nll] times the share of [0, 1] that p covers.
    """
    count, total, squares = moments.sums[:, -1].tolist()
    if count < 1.5:
        return dict.fromkeys(intervals, math.nan)
    mean, square = total / count, squares / count
    correction = count / (count - 1)
    first, second = _weight_moments(moments.epsilon, schedule)
    full, exact = intervals
    return {
        full: (square * second - (mean * first) ** 2) * correction,
        exact: (square - mean**2) * correction,
    }


def _weight_moments(epsilon: float, schedule: Schedule | None) -> tuple[float, float]:
    """Means over t ~ U[epsilon, 1] of w p and w^2 p, w = p'/p."""
    if schedule is None or schedule.name == "loglinear":
        return 1.0, math.log(1.0 / epsilon) / (1.0 - epsilon)
    points = 200_000
    time = epsilon + (1.0 - epsilon) * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    slope = schedule.mask_rate_slope(time)
    return float(slope.mean()), float((slope.square() / schedule.mask_rate(time)).mean())


def choose_interval(table: dict[Interval, float], current: Interval) -> Interval:
    """The interval of least variance; `current` stays unless another is better by more than 1%.

    Intervals of unknown variance (nan) are never chosen; with no known one, `current` stays.
    """
    known = {interval: variance for interval, variance in table.items() if math.isfinite(variance)}
    if not known:
        return current
    best = min(known, key=lambda interval: known[interval])
    if current in known and known[best] >= known[current] * (1.0 - HYSTERESIS):
        return current
    return best
