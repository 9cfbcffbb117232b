"""How noisy training is: variance of the loss estimator (paper, Eq. 10) and of its gradient.

Both measure the same thing at two depths: the spread, over draws of the noise, of what one optimizer step would use.
Nothing here knows about ranks; sums are additive over parameter shards, so callers all-reduce `as_tensor()`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Mean and unbiased variance of repeated measurements, with the standard error of each.

    The error of the variance is sqrt((m4 - var^2 (k-3)/(k-1)) / k), m4 the fourth moment, and no less than for a normal
    distribution, var sqrt(2/(k-1)): few draws underrate m4. What they cannot have met at all is `with_unseen`.
    """

    mean: float
    variance: float
    mean_stderr: float
    variance_stderr: float
    count: int

    def with_unseen(self, share: float) -> "Spread":
        """The same where a share of the variance lies in a tail that the draws are likely to have missed."""
        return replace(self, variance_stderr=_with_unseen(self.variance, self.variance_stderr, share))


def _with_unseen(variance: float, stderr: float, share: float) -> float:
    return math.hypot(stderr, variance * share / (1.0 - share)) if share < 1.0 else math.inf


def spread(values: Tensor) -> Spread:
    """Spread of a 1-D tensor of measurements, e.g. the loss of one batch under many noise draws (nats per token)."""
    values = values.detach().double().flatten().cpu()
    count = len(values)
    if count < 2:
        raise ValueError(f"variance of {count} measurements is undefined; give at least 2 draws")
    mean, variance = float(values.mean()), float(values.var())
    fourth = float((values - mean).pow(4).mean())
    error = math.sqrt(max(0.0, fourth - variance**2 * (count - 3) / (count - 1)) / count)
    error = max(error, variance * math.sqrt(2.0 / (count - 1)))
    return Spread(mean, variance, math.sqrt(variance / count), error, count)


@dataclass(frozen=True)
class GradientSpread:
    """Spread of the gradient over noise draws on a fixed batch.

    Attributes:
        variance: trace of the gradient's covariance, E|g - E g|^2 (unbiased).
        variance_stderr: its standard error, from the spread of the squared distances to the first draw; nan with
            fewer than 3 draws.
        mean_norm: |E g|, with the variance of the mean taken off its square (0 where noise hides it).
        count: noise draws.
        flops_per_draw: cost of one draw (forward and backward of the batch).
    """

    variance: float
    variance_stderr: float
    mean_norm: float
    count: int
    flops_per_draw: float

    def with_unseen(self, share: float) -> "GradientSpread":
        """The same where a share of the variance lies in a tail that the draws are likely to have missed."""
        return replace(self, variance_stderr=_with_unseen(self.variance, self.variance_stderr, share))

    @property
    def noise_to_signal(self) -> float:
        """variance / |E g|^2: how many such batches average to a unit signal-to-noise ratio."""
        return self.variance / self.mean_norm**2 if self.mean_norm > 0 else math.inf

    @property
    def variance_per_flop(self) -> float:
        """Variance that a budget of one FLOP would leave: variance * flops_per_draw; lower is better.

        Averaging k draws divides the variance by k and costs k times as much, so objectives of different cost
        compare by this product, and a budget of F FLOPs leaves variance_per_flop / F.
        """
        return self.variance * self.flops_per_draw


class GradientMoments:
    """Running moments of gradients g_1, g_2, ... of a fixed batch under different noise.

    Keeps the first gradient and the sum of differences from it (float32, two copies of the parameters) and float64
    norms: differences do not cancel where the noise is small beside the mean. With parameters cut over ranks each
    rank adds its own shards; parameters that ranks replicate must be added by one of them only.
    """

    def __init__(self) -> None:
        self._first: list[Tensor] = []
        self._difference: list[Tensor] = []
        self._squares: list[float] = []
        self.count = 0

    def add(self, gradients: Iterable[Tensor]) -> None:
        """Add one draw's gradients, in the same order every time."""
        if not self.count:
            self._first = [g.detach().float().clone() for g in gradients]
            self._difference = [torch.zeros_like(g) for g in self._first]
        else:
            square = 0.0
            for first, difference, gradient in zip(self._first, self._difference, gradients, strict=True):
                delta = gradient.detach().float() - first
                difference += delta
                square += float(delta.double().square().sum())
            self._squares.append(square)
        self.count += 1

    def as_tensor(self) -> Tensor:
        """float64 (2 + draws - 1,): |sum of d|^2, |mean g|^2, each |d|^2, with d = g - g_1; add them over shards."""
        mean = [
            f.double() + d.double() / max(self.count, 1) for f, d in zip(self._first, self._difference, strict=True)
        ]
        difference_norm = sum(float(d.double().square().sum()) for d in self._difference)
        mean_norm = sum(float(m.square().sum()) for m in mean)
        return torch.tensor([difference_norm, mean_norm, *self._squares], dtype=torch.float64)

    def result(self, sums: Tensor | None = None, flops_per_draw: float = math.nan) -> GradientSpread:
        """The spread; `sums` is `as_tensor()` summed over shards, by default this object's own."""
        if self.count < 2:
            raise ValueError(f"gradient variance from {self.count} draws is undefined; use at least 2")
        difference_norm, mean_norm, *squares = (self.as_tensor() if sums is None else sums).tolist()
        variance = max(0.0, sum(squares) - difference_norm / self.count) / (self.count - 1)
        signal = max(0.0, mean_norm - variance / self.count)
        error = math.sqrt(float(torch.tensor(squares).var()) / self.count) if self.count > 2 else math.nan
        return GradientSpread(variance, error, math.sqrt(signal), self.count, flops_per_draw)
