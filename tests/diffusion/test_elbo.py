"""The objective, enumerated exactly on a 3-token vocabulary: it is the bound it claims to be, under every schedule."""

import math
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch

from bd3lm_scale.config.schema import DiffusionConfig
from bd3lm_scale.diffusion.loss import row_losses, score_rows
from bd3lm_scale.diffusion.mask_counts import count_weights
from bd3lm_scale.diffusion.noising import given_noise, noise_rows, noise_rows_for_evaluation
from bd3lm_scale.diffusion.process import make_process
from bd3lm_scale.diffusion.registry import SCHEDULES
from bd3lm_scale.diffusion.schedule import get_schedule
from bd3lm_scale.values import Rows
from tests.diffusion.heads import head_of
from tests.plain_dit import PlainDiT, random_parameters

REAL_IDS, MASK, LENGTH = 3, 3, 4
TEXT = torch.tensor([[2, 0, 1, 1], [0, 0, 2, 1]])
MODEL = PlainDiT(random_parameters(REAL_IDS + 1, hidden_size=16, cond_dim=8, scale=2.0), num_heads=2)


def process_for(block_size, schedule="loglinear", objective="bd3lm", ignore_bos=False):
    config = DiffusionConfig(objective=objective, block_size=block_size, schedule=schedule, ignore_bos=ignore_bos)
    return make_process(config, LENGTH, REAL_IDS + 1, MASK)


def log_probs(clean, noisy, block_size):
    """Log-probabilities over real ids at every position, and those of the clean tokens."""
    logits = MODEL.training_logits(noisy, clean, block_size)[..., :MASK]
    return logits.log_softmax(-1).gather(2, clean[..., None])[..., 0]


def any_order_nll(clean, block_size):
    """The bound in closed form, per row: the chain-rule NLL, averaged over all orders of revealing a block's tokens."""
    total = torch.zeros(len(clean), dtype=torch.float64)
    orders = list(permutations(range(block_size)))
    for block in range(0, LENGTH, block_size):
        for order in orders:
            noisy = clean.clone()
            noisy[:, block : block + block_size] = MASK
            for place in order:
                total -= log_probs(clean, noisy, block_size)[:, block + place] / len(orders)
                noisy[:, block + place] = clean[:, block + place]
    return total


def enumerated_loss(clean, process, low, high, nodes=400):
    """Integral over time in [low, high] of the expected loss: Gauss-Legendre in t, every mask with its probability.

    The loss of each (mask, time) comes from the package's own given_noise and score_rows.
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    times = torch.from_numpy((high - low) / 2 * points + (high + low) / 2)
    weights = torch.from_numpy((high - low) / 2 * weights)
    size, blocks = process.block_size, process.num_blocks
    total = torch.zeros(len(clean), dtype=torch.float64)
    for pattern in product([False, True], repeat=size):
        if not any(pattern):
            continue
        is_masked = torch.tensor(pattern * blocks)
        shown = torch.where(is_masked, MASK, clean)
        logits = MODEL.training_logits(shown, clean, size)
        rate = process.schedule.mask_rate(times)
        probability = rate ** sum(pattern) * (1 - rate) ** (size - sum(pattern))
        for time, share in zip(times, weights * probability, strict=True):
            noisy = given_noise(clean, shown, time.expand(len(clean), blocks), process, training=True)
            total += share * row_losses(score_rows(head_of(logits, noisy, MASK), noisy, process), process)
    return total


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_expected_loss_is_the_any_order_bound_under_every_schedule(schedule):
    """Up to the mask rates below p(low) that no time covers; those are added in closed form for block size 2."""
    process = process_for(2, schedule)
    low = {"square": math.sqrt(1e-3), "cosine": 0.0}.get(schedule, 1e-4)  # above the square's flat part
    measured = enumerated_loss(TEXT, process, low, 1.0)
    # the part missed: integral over p in [0, p(low)] of (1/p) * E[nll of masked tokens at rate p]
    rate = float(process.schedule.mask_rate(torch.tensor(low, dtype=torch.float64)))
    missed = torch.zeros(2, dtype=torch.float64)
    for pattern, integral in (
        ((True, False), rate - rate**2 / 2),
        ((False, True), rate - rate**2 / 2),
        ((True, True), rate**2 / 2),
    ):
        is_masked = torch.tensor(pattern * 2)
        nll = -log_probs(TEXT, torch.where(is_masked, MASK, TEXT), 2)
        missed += integral * (nll * is_masked).sum(1)
    torch.testing.assert_close(measured + missed, any_order_nll(TEXT, 2), rtol=2e-5, atol=0)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_bound_never_promises_more_than_a_distribution_has(block_size):
    """exp(-NELBO) summed over all 3^4 texts is at most 1, and exactly 1 for blocks of one token."""
    texts = torch.tensor(list(product(range(REAL_IDS), repeat=LENGTH)))
    mass = float(torch.exp(-any_order_nll(texts, block_size)).sum())
    assert mass <= 1 + 1e-9
    if block_size == 1:
        assert mass == pytest.approx(1, abs=1e-9)
    else:
        assert 0.3 < mass < 0.9999


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("block_size", [2, 4])
def test_drawn_noise_averages_to_the_enumerated_loss(schedule, block_size):
    """Times, masks and weights as drawn in training: unbiased for every row, within 4 standard errors."""
    process = process_for(block_size, schedule)
    low, high, steps = 0.2, 0.9, 400
    patterns = list(product([False, True], repeat=LENGTH))
    shown = torch.stack([torch.where(torch.tensor(p), MASK, TEXT) for p in patterns])
    table = torch.stack([log_probs(TEXT, s, block_size) for s in shown])  # (pattern, row, position)
    copies = 32
    rows = Rows(TEXT.repeat(copies, 1), torch.arange(2 * copies), torch.ones(2 * copies, dtype=torch.bool))
    powers = 2 ** torch.arange(LENGTH - 1, -1, -1)
    means = []
    for step in range(steps):
        noisy = noise_rows(rows, process, seed=9, step=step, global_batch_size=2 * copies, interval=(low, high))
        pattern_B = (noisy.is_scored_BL * powers).sum(1)
        nll_BL = -table[pattern_B, torch.arange(2).repeat(copies)]
        means.append((nll_BL * noisy.weight_BL).sum(1).reshape(copies, 2).mean(0))
    means = torch.stack(means)
    expected = enumerated_loss(TEXT, process, low, high, nodes=40) / (high - low)
    z = (means.mean(0) - expected) / (means.std(0) / steps**0.5)
    assert z.abs().max() < 4, z
    assert (means.std(0) / steps**0.5 / expected).max() < 0.015  # the test has power


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stratified_counts_have_the_bound_itself_for_their_mean(schedule):
    """Every count and every set of places, with the law of the drawn noise: no time is left out, and no clipping."""
    process = replace(process_for(4, schedule), mask_counts="stratified")
    law = count_weights(process, (1e-3, 1.0))
    total = torch.zeros(len(TEXT), dtype=torch.float64)
    for pattern in product([False, True], repeat=4):
        count = sum(pattern)
        if count:
            is_masked = torch.tensor(pattern)
            nll = -(log_probs(TEXT, torch.where(is_masked, MASK, TEXT), 4) * is_masked).sum(1)
            total += law[1, count] / math.comb(4, count) * nll
    floor = 0 if schedule in ("loglinear", "log") else 4e-3  # mask rates under 1e-3, which the schedule leaves out
    torch.testing.assert_close(total, any_order_nll(TEXT, 4), rtol=1e-7 + floor, atol=0)


def test_evaluation_averages_to_the_bound_whatever_the_training_schedule():
    """Over U[1e-3, 1]; the rest of [0, 1] and the missing factor 1 - 1e-3 nearly cancel (docs/method.md)."""
    expected = enumerated_loss(TEXT, process_for(4), 1e-3, 1.0, nodes=60) / (1 - 1e-3)
    assert expected.sum() == pytest.approx(float(any_order_nll(TEXT, 4).sum()), rel=2e-3)
    process, copies = process_for(4, "cosine"), 256
    rows = Rows(TEXT.repeat(copies, 1), torch.arange(2 * copies), torch.ones(2 * copies, dtype=torch.bool))
    results = []
    for draw in range(30):
        noisy = noise_rows_for_evaluation(rows, process, seed=1, draw=draw, num_rows=2 * copies)
        logits = MODEL.training_logits(noisy.input_BP[:, :LENGTH], rows.tokens_BL, 4)
        results.append(score_rows(head_of(logits, noisy, MASK), noisy, process).weighted_nll / (2 * copies))
    results = torch.stack(results)
    assert abs(results.mean() - expected.mean()) < 4 * results.std() / 30**0.5


@pytest.mark.parametrize("ignore_bos", [False, True])
def test_blocks_of_one_token_at_full_masking_are_the_chain_rule(ignore_bos):
    """Evaluated position by position: the clean prefix and one mask, causal attention."""
    process = process_for(1, ignore_bos=ignore_bos)
    rows = Rows(TEXT, torch.arange(2), torch.ones(2, dtype=torch.bool))
    noisy = noise_rows_for_evaluation(rows, process, seed=1, draw=0, num_rows=2)
    logits = MODEL.training_logits(noisy.input_BP[:, :LENGTH], TEXT, 1)
    measured = row_losses(score_rows(head_of(logits, noisy, MASK), noisy, process), process)
    chain = torch.zeros(2, dtype=torch.float64)
    for place in range(int(ignore_bos), LENGTH):
        prefix = torch.cat([TEXT[:, :place], torch.full((2, 1), MASK)], 1)
        logits = MODEL.causal_logits(prefix)[:, -1, :MASK]
        chain -= logits.log_softmax(-1).gather(1, TEXT[:, place : place + 1])[:, 0]
    torch.testing.assert_close(measured, chain, rtol=1e-6, atol=0)
    assert int(noisy.counts_BL.sum()) == 2 * (LENGTH - ignore_bos)


def test_mdlm_is_one_block_without_the_clean_half():
    rows = Rows(TEXT, torch.arange(2), torch.ones(2, dtype=torch.bool))
    losses = []
    for objective in ("bd3lm", "mdlm"):
        process = process_for(LENGTH, objective=objective)
        noisy = noise_rows(rows, process, seed=3, step=1, global_batch_size=2, interval=(0.0, 1.0))
        shown = noisy.input_BP[:, :LENGTH]
        logits = MODEL.full_logits(shown) if objective == "mdlm" else MODEL.training_logits(shown, TEXT, LENGTH)
        losses.append(score_rows(head_of(logits, noisy, MASK), noisy, process).weighted_nll)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    assert losses[0] > 0


def test_evaluation_schedule_covers_the_same_mask_rates_as_loglinear():
    """Why evaluation may use loglinear for all: substituting p for t turns every bound into the same integral."""
    for name in SCHEDULES:
        schedule = get_schedule(name)
        time = torch.linspace(0.05, 1, 20001, dtype=torch.float64)
        rate = schedule.mask_rate(time)
        integral = torch.trapezoid(schedule.loss_weight(time) * rate**2, time)  # E.g. nll proportional to p
        assert float(integral) == pytest.approx((1 - float(rate[0]) ** 2) / 2, rel=1e-6), name
