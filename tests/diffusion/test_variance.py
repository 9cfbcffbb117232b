"""Variance estimators: unbiased, honest about their own error, additive over shards."""

import math

import pytest
import torch

from bd3lm_scale.diffusion.variance import GradientMoments, spread


def test_spread_is_unbiased_and_knows_its_error():
    generator = torch.Generator().manual_seed(0)
    results = [spread(torch.randn(30, generator=generator, dtype=torch.float64) * 2 + 7) for _ in range(800)]
    variances = torch.tensor([r.variance for r in results])
    assert abs(variances.mean() - 4) < 4 * variances.std() / 800**0.5
    claimed = torch.tensor([r.variance_stderr for r in results]).mean()
    assert float(claimed / variances.std()) == pytest.approx(1, abs=0.15)
    means = torch.tensor([r.mean for r in results])
    assert float(torch.tensor([r.mean_stderr for r in results]).mean() / means.std()) == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="at least 2 draws"):
        spread(torch.ones(1))


def draws(count, seed=0):
    """Gradients with mean (1, ..., 1) and known covariance trace, over two tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [1 + 0.5 * torch.randn(7, generator=generator), 1 + 0.25 * torch.randn(3, 4, generator=generator)]
        for _ in range(count)
    ]


def test_gradient_variance_is_the_trace_of_the_covariance():
    gradients = draws(50)
    moments = GradientMoments()
    for draw in gradients:
        moments.add(draw)
    flat = torch.stack([torch.cat([g.flatten() for g in draw]) for draw in gradients]).double()
    result = moments.result(flops_per_draw=3e9)
    assert result.variance == pytest.approx(float(flat.var(0).sum()), rel=1e-5)
    assert result.mean_norm**2 == pytest.approx(float(flat.mean(0).square().sum() - flat.var(0).sum() / 50), rel=1e-5)
    assert result.variance_per_flop == pytest.approx(result.variance * 3e9)
    assert result.noise_to_signal == pytest.approx(result.variance / result.mean_norm**2)


def test_gradient_variance_is_unbiased_and_so_is_the_signal():
    variances, signals = [], []
    for seed in range(400):
        moments = GradientMoments()
        for draw in draws(3, seed):
            moments.add(draw)
        result = moments.result()
        variances.append(result.variance)
        signals.append(result.mean_norm**2)
    for values, truth in ((variances, 7 * 0.25 + 12 / 16), (signals, 19.0)):
        values = torch.tensor(values)
        assert abs(values.mean() - truth) < 4 * values.std() / 400**0.5


def test_shards_add_up_to_the_whole():
    whole, shards = GradientMoments(), [GradientMoments(), GradientMoments()]
    for draw in draws(10):
        whole.add(draw)
        for shard, gradient in zip(shards, draw, strict=True):
            shard.add([gradient])
    together = shards[0].result(shards[0].as_tensor() + shards[1].as_tensor())
    assert together.variance == pytest.approx(whole.result().variance)
    assert together.mean_norm == pytest.approx(whole.result().mean_norm)


def test_noise_small_beside_the_mean_is_not_lost():
    moments = GradientMoments()
    base = torch.full((1000,), 100.0)
    noise = torch.Generator().manual_seed(1)
    truth = []
    for _ in range(20):
        delta = 1e-3 * torch.randn(1000, generator=noise)
        truth.append(base + delta)
        moments.add([truth[-1]])
    exact = float(torch.stack(truth).double().var(0).sum())
    assert moments.result().variance == pytest.approx(exact, rel=1e-3)


def test_one_draw_is_refused():
    moments = GradientMoments()
    moments.add([torch.ones(3)])
    with pytest.raises(ValueError, match="at least 2"):
        moments.result()
    moments.add([torch.ones(3)])
    result = moments.result()
    assert result.variance == 0.0
    assert math.isnan(result.variance_per_flop)
