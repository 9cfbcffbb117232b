"""Noise schedules: the published curves, and weights that are exactly p'/p."""

import json
from pathlib import Path

import pytest
import torch

from bd3lm_scale.diffusion.schedule import (
    MIN_MASK_RATE,
    SCHEDULES,
    get_schedule,
    sigma_from_mask_rate,
)

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "noise_schedules.json").read_text())
TIMES = torch.tensor(GOLDENS["t"], dtype=torch.float64)


def golden(*path: str) -> torch.Tensor:
    node = GOLDENS
    for name in path:
        node = node[name]
    return torch.tensor(node, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_mask_rates_are_the_published_ones(name):
    torch.testing.assert_close(get_schedule(name).mask_rate(TIMES), golden(name, "move_chance"), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_weight_is_the_log_derivative_of_the_mask_rate(name):
    schedule = get_schedule(name)
    time = torch.linspace(0.002, 1.0, 777, dtype=torch.float64, requires_grad=True)
    rate = schedule.mask_rate(time)
    (slope,) = torch.autograd.grad(rate.log().sum(), time)
    torch.testing.assert_close(schedule.loss_weight(time.detach()), slope)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_is_recovered_from_the_mask_rate(name):
    schedule = get_schedule(name)
    time = torch.linspace(0.04, 1.0, 99, dtype=torch.float64)
    torch.testing.assert_close(schedule.time_of(schedule.mask_rate(time)), time)


def test_weights_are_the_published_ones_where_those_are_exact():
    for name in SCHEDULES:
        schedule, published = get_schedule(name), -golden(name, "loss_scaling")
        rate = schedule.mask_rate(TIMES)
        if name == "cosine":  # published with p + 1e-3 in the denominator
            published = published * (rate + MIN_MASK_RATE) / rate
        exact = schedule.loss_weight(TIMES)
        rises = rate > MIN_MASK_RATE  # the published power schedules keep a weight where the rate is at its floor
        assert rises.sum() >= 15
        torch.testing.assert_close(exact[rises], published[rises], rtol=1e-5, atol=0)


def test_mdlm_scale_matches_the_published_numbers():
    scaled = get_schedule("loglinear", mdlm_loss_scale=True)
    torch.testing.assert_close(scaled.mask_rate(TIMES), golden("mdlm_p"))
    torch.testing.assert_close(scaled.loss_weight(TIMES), -golden("mdlm_loss_scale"))
    torch.testing.assert_close(scaled.sigma(TIMES), golden("loglinear", "total_noise"))
    # the rate of the noise, sigma' = p'/(1 - p) = weight * expm1(sigma)
    rate = scaled.loss_weight(TIMES) * torch.expm1(scaled.sigma(TIMES))
    torch.testing.assert_close(rate, golden("loglinear", "rate_noise"))


def test_sigma_matches_the_published_numbers_and_inverts():
    torch.testing.assert_close(sigma_from_mask_rate(TIMES), golden("sigma_from_p"), rtol=1e-4, atol=0)
    below_cap = TIMES[TIMES < 0.999]
    torch.testing.assert_close(-torch.expm1(-sigma_from_mask_rate(below_cap)), below_cap)


def test_wrong_names_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"diffusion.schedule \(linear\).*loglinear, cosine"):
        get_schedule("linear")
    with pytest.raises(ValueError, match=r"mdlm_loss_scale.*loglinear only"):
        get_schedule("cosine", mdlm_loss_scale=True)
