"""Variance estimators: unbiased, honest about their own error, additive over shards."""

import math
from dataclasses import replace

import pytest
import torch

from bd3lm_scale.config.schema import DiffusionConfig
from bd3lm_scale.diffusion.mask_counts import unseen_share
from bd3lm_scale.diffusion.process import make_process
from bd3lm_scale.diffusion.variance import GradientMoments, spread


def test_spread_is_unbiased_and_knows_its_error():
    generator = torch.Generator().manual_seed(0)
    results = [spread(torch.randn(30, generator=generator, dtype=torch.float64) * 2 + 7) for _ in range(800)]
    variances = torch.tensor([r.variance for r in results])
    assert abs(variances.mean() - 4) < 4 * variances.std() / 800**0.5
    claimed = torch.tensor([r.variance_stderr for r in results]).mean()
    assert float(claimed / variances.std()) == pytest.approx(1, abs=0.15)
    assert results[0].variance_stderr >= results[0].variance * math.sqrt(2 / 29)
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


def test_the_error_of_the_gradient_variance_is_the_spread_of_repeated_probes():
    """Noise whose size itself varies from draw to draw, as that of masks and weights does."""
    generator = torch.Generator().manual_seed(0)
    variances, claimed = [], []
    for _ in range(300):
        moments = GradientMoments()
        for _ in range(16):
            size = 0.5 * torch.randn((), generator=generator).exp()
            moments.add([1 + size * torch.randn(200, generator=generator)])
        variances.append(moments.result().variance)
        claimed.append(moments.result().variance_stderr)
    assert float(torch.tensor(claimed).square().mean().sqrt()) == pytest.approx(
        float(torch.tensor(variances).std()), rel=0.25
    )
    moments = GradientMoments()
    for gradient in draws(2):
        moments.add(gradient)
    assert math.isnan(moments.result().variance_stderr)


def test_a_tail_that_was_not_met_widens_the_error_and_nothing_else():
    measured = spread(torch.tensor([1.0, 2.0, 4.0]))
    wider = measured.with_unseen(0.5)
    assert (wider.variance, wider.mean) == (measured.variance, measured.mean)
    assert wider.variance_stderr == pytest.approx(math.hypot(measured.variance_stderr, measured.variance))
    assert measured.with_unseen(0.0) == measured


def test_shards_add_up_to_the_whole():
    whole, shards = GradientMoments(), [GradientMoments(), GradientMoments()]
    for draw in draws(10):
        whole.add(draw)
        for shard, gradient in zip(shards, draw, strict=True):
            shard.add([gradient])
    together = shards[0].result(shards[0].as_tensor() + shards[1].as_tensor())
    assert together.variance == pytest.approx(whole.result().variance)
    assert together.variance_stderr == pytest.approx(whole.result().variance_stderr)
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


def test_the_error_of_a_probe_covers_the_tail_that_few_draws_miss():
    """12 draws of a batch of 256 blocks under U[1e-3, 1], 600 times over: the exact variance lies within two errors."""
    process = make_process(DiffusionConfig(block_size=4, ignore_bos=False), 1024, 50, 49)
    generator = torch.Generator().manual_seed(0)
    exact = (math.log(1e3) / 0.999 - 1) / 4 / 256  # Var(k / (4 t)) / 256, k ~ Bin(4, t)
    share = unseen_share(process, (1e-3, 1.0), 12 * 256)
    assert 0.35 < share < 0.5
    covered, uncovered = 0, 0
    for _ in range(600):
        time = 1e-3 + 0.999 * torch.rand(12, 256, 1, generator=generator, dtype=torch.float64)
        masked = torch.rand(12, 256, 4, generator=generator, dtype=torch.float64) < time
        measured = spread((masked / time).mean((1, 2)))
        wider = measured.with_unseen(share)
        covered += abs(measured.variance - exact) < 2 * wider.variance_stderr
        uncovered += abs(measured.variance - exact) > 2 * measured.variance_stderr
    assert covered > 0.85 * 600
    assert uncovered > 0.2 * 600, "the draws alone do not know"
    for interval in ((0.3, 0.8), (0.5, 1.0)):
        assert unseen_share(process, interval, 12 * 256) < 0.02
    assert unseen_share(replace(process, mask_counts="stratified"), (1e-3, 1.0), 12 * 256) == 0
