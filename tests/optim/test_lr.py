"""The learning rate: a straight warm-up, then constant or half a cosine down to min_lr."""

import math

import pytest

from bd3lm_scale.config.schema import OptimConfig
from bd3lm_scale.optim.lr import learning_rate

LR, FLOOR, WARMUP, TOTAL = 3e-4, 3e-5, 10, 110
COSINE = OptimConfig(lr=LR, min_lr=FLOOR, warmup_steps=WARMUP, schedule="cosine")


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_is_a_straight_line_from_nothing(schedule):
    config = OptimConfig(lr=LR, min_lr=FLOOR, warmup_steps=WARMUP, schedule=schedule)
    assert [learning_rate(step, config, TOTAL) for step in range(WARMUP + 1)] == pytest.approx(
        [LR * step / WARMUP for step in range(WARMUP + 1)]
    )
    assert learning_rate(0, config, TOTAL) == 0


def test_constant_stays():
    config = OptimConfig(lr=LR, warmup_steps=WARMUP)
    assert {learning_rate(step, config, TOTAL) for step in (WARMUP, WARMUP + 1, TOTAL - 1, 10 * TOTAL)} == {LR}


def test_without_a_warm_up_the_first_step_has_the_whole_rate():
    for schedule in ("constant", "cosine"):
        assert learning_rate(0, OptimConfig(lr=LR, warmup_steps=0, schedule=schedule), TOTAL) == LR


def test_the_cosine_is_half_a_period_between_its_ends():
    """Whole at the end of the warm-up, half-way in the middle, min_lr at the last step and for ever after."""
    rates = [learning_rate(step, COSINE, TOTAL) for step in range(WARMUP, TOTAL + 1)]
    assert rates[0] == LR
    assert rates[50] == pytest.approx((LR + FLOOR) / 2)
    assert rates[25] == pytest.approx(FLOOR + (LR - FLOOR) * (1 + math.sqrt(0.5)) / 2)
    assert rates[100] == pytest.approx(FLOOR)
    assert learning_rate(10 * TOTAL, COSINE, TOTAL) == pytest.approx(FLOOR)
    assert rates == sorted(rates, reverse=True)
    assert [a + b for a, b in zip(rates, reversed(rates), strict=True)] == pytest.approx([LR + FLOOR] * len(rates))


def test_a_run_that_ends_in_its_warm_up_never_leaves_it():
    assert learning_rate(5, COSINE, 6) == pytest.approx(LR / 2)
    assert learning_rate(WARMUP, COSINE, 6) == LR
