"""How many tokens of a block are masked in training, and with which weight.

Given the number k of masked tokens in a block, every noise here draws their places uniformly among all sets of k. So
two noises differ in nothing but the joint law of k and the loss weight w, which this module has in closed form:

* binomial: each token by itself at the mask rate p(t), weight w(t) = p'/p;
* resample: the same, given that k lies between p(low) S and p(high) S; the weight is not corrected;
* stratified: k = ceil(p(t) S), weight p'(t) S/k. On U[0, 1] k is uniform on 1 ... S and the mean loss is the bound
  itself (Hoogeboom et al. 2022, Autoregressive Diffusion Models, Eq. 9, block by block): k w is constant, where
  binomial counts spread it. Times are stratified over the global batch, so the counts are too.

Shapes: B rows, N blocks in a row, S tokens in a block, T times.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.diffusion.process import Process
from bd3lm_scale.diffusion.schedule import Schedule
from bd3lm_scale.values import Interval

POWERS = 3
"""Of the weight: 0, 1 and 2."""

_MET = 3.0
"""Blocks expected at some times before those times count as seen by a probe."""

_NODES, _CELLS = 1024, 1 << 22
"""Gauss-Legendre nodes in ln t; largest table of binomial chances held at once."""


def allowed_counts(process: Process, interval: Interval) -> tuple[int, int]:
    """First and last number of masked tokens that training keeps under a clip interval.

    Training is possible where last >= max(first, 1).

    With `resample` the masked share lies between the mask rates at the interval's ends; a bound at the end of the full
    range (low = time_epsilon, high = 1) is not enforced.
    """
    size, (low, high) = process.block_size, process.training_interval(*interval)
    if not process.resample:
        return 0, size
    least, most = process.schedule.mask_rate(torch.tensor([low, high], dtype=torch.float64)).tolist()
    first = 0 if low <= process.time_epsilon else math.ceil(least * size - 1e-9)
    last = size if high >= 1.0 else math.floor(most * size + 1e-9)
    return first, last


def binomial_rates(time: Tensor, schedule: Schedule) -> Tensor:
    """Mask rates; t = 1 means "everything", also where a schedule's rate stops short of 1."""
    return torch.where(time >= 1.0, 1.0, schedule.mask_rate(time))


def binomial_weights(time: Tensor, schedule: Schedule) -> Tensor:
    """Loss weights p'/p; at t = 1 each block is predicted from clean context, a plain likelihood: weight 1."""
    return torch.where(time >= 1.0, 1.0, schedule.loss_weight(time))


def stratified_counts(time_BN: Tensor, process: Process) -> Tensor:
    """The number of masked tokens of each block, int64 (B, N), 1 ... S: the share p(t) rounded up."""
    size = process.block_size
    return (process.schedule.mask_rate(time_BN) * size).ceil().long().clamp(1, size)


def stratified_weights(time_BN: Tensor, process: Process) -> Tensor:
    """Loss weight p'(t) S/k of each block's masked tokens, float64 (B, N); 1 at t = 1."""
    slope_BN = process.schedule.mask_rate_slope(time_BN)
    return torch.where(time_BN >= 1.0, 1.0, slope_BN * process.block_size / stratified_counts(time_BN, process))


def count_weights(process: Process, interval: Interval) -> Tensor:
    """Mean over the training noise of w^q where k tokens are masked, float64 (POWERS, S + 1), q = 0, 1, 2.

    Row 0 is the law of k. All nan where `resample` admits no count. Integrated over the time by Gauss-Legendre in
    ln t, so the singular end of 1/t costs nothing.
    """
    if process.mask_counts == "stratified":
        return _stratified_law(process, process.training_times(*interval))
    return _binomial_law(process, process.training_interval(*interval), allowed_counts(process, interval))


def unseen_share(process: Process, interval: Interval, blocks: int) -> float:
    """Share of the second moment of w that lies at times so small that `blocks` blocks are likely to miss them.

    The loss's tail at the singular end of 1/t: below a time under which three blocks with a masked token are expected,
    the draws know neither the variance nor how uncertain it is.
    """
    low, high = process.training_interval(*interval)
    counts = allowed_counts(process, interval)
    if process.mask_counts == "stratified" or high <= low or counts[1] < max(counts[0], 1):
        return 0.0

    def below(time: float) -> tuple[float, float]:
        law = _binomial_law(process, Interval(low, time), counts) * (time - low) / (high - low)
        return float(law[0, 1:].sum()), float(law[2] @ torch.arange(process.block_size + 1, dtype=torch.float64))

    left, right = low, high
    for _ in range(40):
        middle = math.sqrt(left * right)
        left, right = (middle, right) if below(middle)[0] * blocks < _MET else (left, middle)
    return below(right)[1] / below(high)[1]


def _binomial_law(process: Process, times: Interval, counts: tuple[int, int]) -> Tensor:
    """`count_weights` of binomial counts, given that they are first ... last, over U[times]."""
    size, (first, last) = process.block_size, counts
    if last < max(first, 1):
        return torch.full((POWERS, size + 1), math.nan, dtype=torch.float64)
    time_T, share_T = _quadrature(*times)
    rate_T = binomial_rates(time_T, process.schedule)
    powers = binomial_weights(time_T, process.schedule) ** torch.arange(POWERS)[:, None] * share_T
    law = torch.zeros(POWERS, size + 1, dtype=torch.float64)
    for part in torch.arange(len(time_T)).split(max(1, _CELLS // (size + 1))):
        law[:, first : last + 1] += powers[:, part] @ _binomial(size, rate_T[part], first, last)
    return law


def total_weight(process: Process, interval: Interval) -> float:
    """Mean of w p, the weight that a token has in the loss, over the times of an interval; 1 for loglinear."""
    low, high = process.training_times(*interval)
    if high <= low:
        time = torch.tensor([high], dtype=torch.float64)
        return float(binomial_weights(time, process.schedule) * binomial_rates(time, process.schedule))
    # w p = p'
    rates = process.schedule.mask_rate(torch.tensor([low, high], dtype=torch.float64))
    return float(rates[1] - rates[0]) / (high - low)


def _binomial(size: int, rate_T: Tensor, first: int, last: int) -> Tensor:
    """Chances of first ... last successes in `size` trials, given that it is one of these; float64 (T, counts)."""
    count = torch.arange(first, last + 1, dtype=torch.float64)
    ways = math.lgamma(size + 1) - torch.lgamma(count + 1) - torch.lgamma(size - count + 1)
    rate_T1 = rate_T[:, None]
    return (ways + torch.xlogy(count, rate_T1) + torch.special.xlog1py(size - count, -rate_T1)).softmax(dim=1)


def _quadrature(low: float, high: float, nodes: int = _NODES) -> tuple[Tensor, Tensor]:
    """Times and their shares, both (T,), for means over U[low, high], low > 0; equal ends are one time."""
    if high <= low:
        return torch.tensor([high], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    node_T, weight_T = _legendre(nodes)
    half = math.log(high / low) / 2
    time_T = low * ((node_T + 1.0) * half).exp()
    return time_T, weight_T * half * time_T / (high - low)


@cache
def _legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss-Legendre on [-1, 1], float64: an eigenvalue problem, once per process."""
    node_T, weight_T = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(node_T), torch.from_numpy(weight_T)


def _stratified_law(process: Process, interval: Interval) -> Tensor:
    """`count_weights` of stratified counts, count by count: k is masked while p(t) is in ((k-1)/S, k/S]."""
    schedule, size, (low, high) = process.schedule, process.block_size, interval
    law = torch.zeros(POWERS, size + 1, dtype=torch.float64)
    if high <= low:
        time = torch.tensor([high], dtype=torch.float64)
        count = int(stratified_counts(time, process))
        law[:, count] = stratified_weights(time, process) ** torch.arange(POWERS)
        return law
    inner = schedule.time_of(torch.arange(1, size, dtype=torch.float64) / size)
    edges = torch.cat([torch.tensor([low]), inner, torch.tensor([high])]).double().clamp(low, high)
    risen = schedule.mask_rate(edges).diff()
    law[0, 1:], law[1, 1:] = edges.diff(), risen
    for count in torch.nonzero(risen > 0).flatten().tolist():
        left, right = max(float(edges[count]), 1e-9), float(edges[count + 1])
        time_T, share_T = _quadrature(left, right, nodes=64)
        law[2, count + 1] = (schedule.mask_rate_slope(time_T).square() * share_T).sum() * (right - left)
    per_count = size / torch.arange(1, size + 1)
    law[:, 1:] *= per_count ** torch.arange(POWERS)[:, None] / (high - low)
    return law
