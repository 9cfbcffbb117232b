"""The closed-form clip search equals the brute-force one on a trained model, and its choice is stable."""

import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3lm_scale.config.schema import ClipSearchConfig, DiffusionConfig
from bd3lm_scale.diffusion.clip_search import (
    NUM_BINS,
    Interval,
    TimeMoments,
    candidate_intervals,
    choose_interval,
    variance_table,
)
from bd3lm_scale.diffusion.loss import num_loss_tokens, score_rows
from bd3lm_scale.diffusion.noising import given_noise, make_process, noise_rows, noise_rows_for_evaluation
from bd3lm_scale.diffusion.schedule import get_schedule
from bd3lm_scale.diffusion.variance import GradientMoments, spread
from bd3lm_scale.values import LossSum, NoisyRows, Rows
from tests.diffusion.heads import head_of
from tests.plain_dit import PlainDiT, random_parameters

FOLDER = Path(__file__).parents[1] / "goldens"
VOCAB, MASK, LENGTH, EPSILON = 13, 12, 16, 1e-3
GRID = ClipSearchConfig()


def process_for(block_size):
    config = DiffusionConfig(block_size=block_size, ignore_bos=False)
    return make_process(config, LENGTH, VOCAB, MASK)


def text(count, seed):
    """A language with structure: each symbol has three successors of unequal probability."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, MASK, (count,), generator=generator)]
    jump = torch.tensor([1, 5, 8])
    for _ in range(LENGTH - 1):
        choice = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), count, replacement=True, generator=generator)
        tokens.append((tokens[-1] * 3 + jump[choice]) % MASK)
    return Rows(torch.stack(tokens, 1), torch.arange(count), torch.ones(count, dtype=torch.bool))


def score(model: PlainDiT, noisy: NoisyRows, process) -> LossSum:
    shown = noisy.input_BP[:, :LENGTH]
    return score_rows(
        head_of(model.training_logits(shown, noisy.target_BL, process.block_size), noisy, MASK), noisy, process
    )


@pytest.fixture(scope="module")
def trained() -> PlainDiT:
    """A small model after 150 steps: losses spread over t as in a real run, far from the initial ln V everywhere."""
    process, batch = process_for(4), 32
    start = random_parameters(VOCAB, cond_dim=8, seed=1, dtype=torch.float32, scale=0.5)
    parameters = {n: p.requires_grad_() for n, p in start.items()}
    model = PlainDiT(parameters, num_heads=2)
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(150):
        noisy = noise_rows(
            text(batch, 100 + step), process, seed=0, step=step, global_batch_size=batch, interval=(0.3, 0.8)
        )
        loss = score(model, noisy, process).weighted_nll / num_loss_tokens(process, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    return PlainDiT({n: p.detach() for n, p in parameters.items()}, num_heads=2)


ROWS, MOMENT_DRAWS, BRUTE_DRAWS = 384, 8, 2


@dataclass(frozen=True)
class Truth:
    """Mean, variance and fourth central moment of a block's loss, exact over noise, for the given rows."""

    mean: float
    variance: float
    fourth: float

    def error(self, count: float) -> float:
        """Standard error of the sample variance of `count` blocks."""
        return math.sqrt((self.fourth - self.variance**2) / count)


def losses_by_pattern(model: PlainDiT, process) -> dict[int, list[torch.Tensor]]:
    """Block losses at t = 1 of every mask pattern, by number of masked tokens; at time t they are 1/t of that."""
    rows = text(ROWS, 7)
    found: dict[int, list[torch.Tensor]] = {count: [] for count in range(process.block_size + 1)}
    for pattern in product([False, True], repeat=process.block_size):
        shown = torch.where(torch.tensor(pattern * process.num_blocks), MASK, rows.tokens_BL)
        noisy = given_noise(rows.tokens_BL, shown, torch.ones(ROWS, process.num_blocks), process, training=True)
        loss = score(model, noisy, process).block_loss_BN if any(pattern) else torch.zeros(ROWS, process.num_blocks)
        found[sum(pattern)].append(loss)
    return found


def exact_moments(patterns: dict[int, list[torch.Tensor]], interval: Interval, schedule="loglinear") -> Truth:
    """Every mask of a block with its probability, integrated over t ~ U[interval] on a logarithmic grid."""
    low, high = interval
    points, weights = np.polynomial.legendre.leggauss(60 if schedule == "loglinear" else 600)
    time = (torch.from_numpy(points) * math.log(high / low) / 2 + math.log(high * low) / 2).exp()
    density = torch.from_numpy(weights) * math.log(high / low) / 2 * time / (high - low)
    rate, weight = get_schedule(schedule).mask_rate(time), get_schedule(schedule).loss_weight(time)
    size = max(patterns)
    raw = []
    for power in range(5):
        terms = [
            float((density * weight**power * rate**count * (1 - rate) ** (size - count)).sum() * (loss**power).mean())
            for count, losses in patterns.items()
            for loss in losses
            if count or not power
        ]
        raw.append(sum(terms))
    assert raw[0] == pytest.approx(1, abs=1e-9)
    _, m1, m2, m3, m4 = raw
    return Truth(m1, m2 - m1**2, m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4)


@pytest.fixture(scope="module")
def measured(trained) -> tuple[TimeMoments, dict[Interval, float], dict[Interval, Truth]]:
    """Moments from evaluation draws; for every interval the variance from draws of its own, and the exact one."""
    process, rows = process_for(4), text(ROWS, 7)
    moments = TimeMoments(EPSILON)
    for draw in range(MOMENT_DRAWS):
        noisy = noise_rows_for_evaluation(rows, process, seed=1, draw=draw, num_rows=ROWS)
        moments.accumulate(noisy.time_BN, score(trained, noisy, process).block_loss_BN, noisy.is_real_B)
    brute, truth = {}, {}
    patterns = losses_by_pattern(trained, process)
    for number, interval in enumerate(candidate_intervals(GRID.widths, GRID.step, EPSILON, 4)):
        losses = []
        for draw in range(BRUTE_DRAWS):
            step = 10 * number + draw
            noisy = noise_rows(rows, process, seed=2, step=step, global_batch_size=ROWS, interval=interval)
            losses.append(score(trained, noisy, process).block_loss_BN)
        brute[interval] = float(torch.cat(losses).var())
        truth[interval] = exact_moments(patterns, interval)
    return moments, brute, truth


def test_closed_form_and_brute_force_agree_with_the_exact_variance(measured):
    """For every interval of the paper's grid, within 4 exact standard errors each; closely where tails are light."""
    moments, brute, truth = measured
    table = variance_table(moments, GRID.widths, GRID.step, 4)
    assert list(table) == list(brute)
    assert len(table) == 36
    blocks = ROWS * 4
    for interval, variance in table.items():
        exact = truth[interval]
        inside = MOMENT_DRAWS * blocks * (interval[1] - interval[0])
        assert abs(variance - exact.variance) < 4 * exact.error(inside), interval
        assert abs(brute[interval] - exact.variance) < 4 * exact.error(BRUTE_DRAWS * blocks), interval
        if interval[0] >= 0.1:
            assert variance == pytest.approx(exact.variance, rel=0.1), interval


def test_closed_form_chooses_the_exact_minimum(measured):
    moments, brute, truth = measured
    chosen = choose_interval(variance_table(moments, GRID.widths, GRID.step, 4), (EPSILON, 1.0))
    best = min(t.variance for t in truth.values())
    assert truth[chosen].variance < 1.03 * best
    assert best < 0.5 * truth[(EPSILON, 1.0)].variance  # there is something to find
    brute_choice = min(brute, key=lambda i: brute[i])
    error = truth[brute_choice].error(BRUTE_DRAWS * ROWS * 4)
    assert abs(brute[brute_choice] - moments.variance(chosen)) < 4 * error


@pytest.mark.parametrize("name", ["cosine", "square", "square_root", "log"])
def test_one_evaluation_gives_the_variance_under_every_schedule(trained, measured, name):
    """Loglinear moments, carried over to another schedule's interval, against exact enumeration under that schedule."""
    moments, schedule = measured[0], get_schedule(name)
    patterns = losses_by_pattern(trained, process_for(4))
    widest = (EPSILON, 1.0)
    for interval in (widest, (0.2, 0.7), (0.3, 0.8), (0.45, 0.95), (0.5, 1.0)):
        exact, ours = exact_moments(patterns, interval, name), moments.variance(interval, schedule)
        heavy = schedule.mask_rate(torch.tensor(interval[0], dtype=torch.float64)) < 0.1
        assert ours == pytest.approx(exact.variance, rel=0.5 if heavy else 0.1), interval
    table = variance_table(moments, GRID.widths, GRID.step, 4, schedule=schedule)
    assert table[widest] == moments.variance(widest, schedule)


@pytest.mark.parametrize("name", ["loglinear", "cosine", "square", "square_root", "log"])
def test_carrying_over_is_exact_up_to_the_width_of_a_bin(name):
    """Losses that depend on the mask rate alone, so that the variance is a plain integral."""
    moments, schedule = TimeMoments(EPSILON), get_schedule(name)
    rate = EPSILON + (1 - EPSILON) * (torch.arange(400_000, dtype=torch.float64)[None] + 0.5) / 400_000
    moments.accumulate(rate, 1 + rate)
    for low, high in ((EPSILON, 1.0), (EPSILON, 0.5), (0.123, 0.777), (0.5, 1.0)):
        time = low + (high - low) * (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
        at = schedule.mask_rate(time)
        loss = schedule.mask_rate_slope(time) * (1 + at) * (at >= EPSILON)
        exact = float(loss.var())
        assert moments.variance((low, high), schedule) == pytest.approx(exact, rel=0.02, abs=1e-5), (low, high)


def test_blocks_of_one_token_under_another_schedule():
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(200_000, generator=generator, dtype=torch.float64) + 1
    exact = TimeMoments(EPSILON)
    exact.accumulate(torch.ones(len(nll), 1, dtype=torch.float64), nll[:, None])
    for name in ("loglinear", "cosine", "square", "square_root", "log"):
        schedule = get_schedule(name)
        time = EPSILON + (1 - EPSILON) * torch.rand(len(nll), generator=generator, dtype=torch.float64)
        masked = torch.rand(len(nll), generator=generator, dtype=torch.float64) < schedule.mask_rate(time)
        drawn = spread(nll * schedule.loss_weight(time) * masked)
        table = variance_table(exact, GRID.widths, GRID.step, 1, schedule=schedule)
        assert abs(table[(EPSILON, 1.0)] - drawn.variance) < 4 * drawn.variance_stderr, name


def test_clipping_lowers_the_variance_of_the_gradient_too(trained, measured):
    """What the search is for: at the chosen interval the gradient of a fixed batch spreads less over noise draws."""
    moments = measured[0]
    chosen = choose_interval(variance_table(moments, GRID.widths, GRID.step, 4), (EPSILON, 1.0))
    process, rows = process_for(4), text(32, 5)
    parameters = {n: p.clone().requires_grad_() for n, p in trained.parameters.items()}
    model = PlainDiT(parameters, num_heads=2)
    results = []
    for interval in ((EPSILON, 1.0), chosen):
        gradients = GradientMoments()
        for draw in range(60):
            noisy = noise_rows(rows, process, seed=4, step=draw, global_batch_size=32, interval=interval)
            loss = score(model, noisy, process).weighted_nll / num_loss_tokens(process, 32)
            gradients.add(torch.autograd.grad(loss, list(parameters.values())))
        results.append(gradients.result().variance)
    assert results[1] < 0.8 * results[0]


def test_candidates_are_the_published_grid():
    published = json.loads((FOLDER / "clip_grid.json").read_text())
    for block_size in (1, 4, 16, 32):
        ours = candidate_intervals(GRID.widths, GRID.step, EPSILON, block_size)
        theirs = published[f"grid_bs{block_size}"]
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(tuple(b), abs=1e-6)


def test_finer_grids_are_free(measured):
    moments, _, _ = measured
    fine = variance_table(moments, (0.3, 0.45, 0.5, 0.55), 0.01, 4, current=(0.123, 0.456))
    assert len(fine) > 180
    assert (0.123, 0.456) in fine
    assert all(math.isfinite(v) and v > 0 for v in fine.values())
    coarse = variance_table(moments, (0.5,), 0.05, 4)
    assert all(fine[i] == coarse[i] for i in coarse if i in fine)


def test_moments_add_up_over_ranks_and_survive_a_checkpoint():
    generator = torch.Generator().manual_seed(0)
    time = EPSILON + (1 - EPSILON) * torch.rand(64, 8, generator=generator, dtype=torch.float64)
    loss = torch.rand(64, 8, generator=generator, dtype=torch.float64) / time
    real = torch.rand(64, generator=generator) < 0.9
    whole = TimeMoments(EPSILON)
    whole.accumulate(time, loss, real)
    parts = [TimeMoments(EPSILON) for _ in range(4)]
    for rank, part in enumerate(parts):
        part.accumulate(time[rank::4], loss[rank::4], real[rank::4])
    together = TimeMoments.from_tensor(sum(p.as_tensor() for p in parts), EPSILON)
    torch.testing.assert_close(together.as_tensor(), whole.as_tensor(), rtol=1e-14, atol=1e-14)
    assert int(whole.as_tensor()[0].sum()) == int(real.sum()) * 8
    # aligned interval: exactly the sample variance of the blocks inside
    inside = (time[real] >= 0.25) & (time[real] < 0.75)
    assert whole.variance((0.25, 0.75)) == pytest.approx(float(loss[real][inside].var()), rel=1e-10)


def test_partial_bins_count_in_proportion():
    moments = TimeMoments(EPSILON)
    time = (torch.arange(NUM_BINS * 10, dtype=torch.float64)[None] + 0.5) / (NUM_BINS * 10)
    moments.accumulate(time, time)
    # l = t: variance width^2/12 up to the spread inside a bin
    for low, high in ((0.1, 0.6), (0.10037, 0.60011), (0.2003, 0.2997)):
        assert moments.variance((low, high)) == pytest.approx((high - low) ** 2 / 12, rel=2e-2)
    # few bins, so that the cut ones matter: exactly the variance with each block of a cut bin counted in part
    for low, high in ((0.2003, 0.2037), (0.2008, 0.2012)):
        left = (time * NUM_BINS).floor() / NUM_BINS
        part = ((left + 1 / NUM_BINS).clamp(max=high) - left.clamp(min=low)).clamp(min=0) * NUM_BINS
        count, mean = part.sum(), (part * time).sum() / part.sum()
        variance = ((part * time**2).sum() / count - mean**2) * count / (count - 1)
        assert moments.variance((low, high)) == pytest.approx(float(variance), rel=1e-6)


def test_blocks_of_one_token_are_best_at_full_masking():
    """From exact losses at t = 1 the variance at all other times is known; checked against draws."""
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(200_000, generator=generator, dtype=torch.float64) + 1
    exact = TimeMoments(EPSILON)
    exact.accumulate(torch.ones(len(nll), 1, dtype=torch.float64), nll[:, None])
    table = variance_table(exact, GRID.widths, GRID.step, 1)
    assert table[(1.0, 1.0)] == pytest.approx(float(nll.var()))
    time = EPSILON + (1 - EPSILON) * torch.rand(len(nll), generator=generator, dtype=torch.float64)
    masked = torch.rand(len(nll), generator=generator, dtype=torch.float64) < time
    drawn = spread(nll / time * masked)
    assert abs(table[(EPSILON, 1.0)] - drawn.variance) < 4 * drawn.variance_stderr
    assert choose_interval(table, (EPSILON, 1.0)) == (1.0, 1.0)


def test_choice_changes_only_for_more_than_one_percent():
    a, b, c = (EPSILON, 1.0), (0.3, 0.8), (0.45, 0.95)
    assert choose_interval({a: 10.0, b: 5.0, c: 4.96}, b) == b
    assert choose_interval({a: 10.0, b: 5.0, c: 4.94}, b) == c
    assert choose_interval({a: 10.0, b: 5.0, c: 5.0}, a) == b
    assert choose_interval({a: math.nan, b: 5.0}, a) == b
    assert choose_interval({a: math.nan, b: math.nan}, a) == a
    assert choose_interval({b: 5.0}, c) == b


def test_unmeasured_intervals_are_unknown():
    moments = TimeMoments(EPSILON)
    moments.accumulate(torch.full((1, 4), 0.3, dtype=torch.float64), torch.ones(1, 4))
    assert math.isnan(moments.variance((0.5, 1.0)))
    assert moments.variance((0.2, 0.7)) == 0.0
