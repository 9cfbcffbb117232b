"""The clip search against exact enumeration on a trained model: every interval, schedule and noise; its choice."""

import json
import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch

from bd3lm_scale.config.schema import ClipSearchConfig, DiffusionConfig
from bd3lm_scale.diffusion.clip_search import (
    CountMoments,
    Interval,
    LossMoments,
    candidate_intervals,
    choose_interval,
    loss_table,
)
from bd3lm_scale.diffusion.loss import num_loss_tokens, score_rows
from bd3lm_scale.diffusion.noising import given_noise, noise_rows, noise_rows_for_evaluation
from bd3lm_scale.diffusion.process import make_process
from bd3lm_scale.diffusion.registry import SCHEDULES
from bd3lm_scale.diffusion.variance import GradientMoments, spread
from bd3lm_scale.values import LossSum, NoisyRows, Rows
from tests.diffusion.heads import head_of
from tests.plain_dit import PlainDiT, random_parameters

FOLDER = Path(__file__).parents[1] / "goldens"
VOCAB, MASK, LENGTH, EPSILON = 13, 12, 16, 1e-3
GRID = ClipSearchConfig()


def process_for(block_size, schedule="loglinear", **changes):
    config = DiffusionConfig(block_size=block_size, schedule=schedule, **{"ignore_bos": False, **changes})
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
NOISES = {"binomial": {}, "resample": {"resample": True}, "stratified": {"mask_counts": "stratified"}}


@dataclass(frozen=True)
class Truth:
    """Mean, variance and fourth central moment of a block's loss, exact over noise, for the given rows."""

    mean: float
    variance: float
    fourth: float
    weight: float

    @property
    def relative(self) -> float:
        return self.variance / self.weight**2

    def error(self, count: float) -> float:
        """Standard error of the sample variance of `count` blocks."""
        return math.sqrt((self.fourth - self.variance**2) / count)


def losses_by_pattern(model: PlainDiT, process) -> dict[int, list[float]]:
    """Powers 0 to 4 of the block losses at weight 1, summed over the mask patterns with k masked tokens, by k."""
    rows = text(ROWS, 7)
    found = {count: [0.0] * 5 for count in range(process.block_size + 1)}
    for pattern in product([False, True], repeat=process.block_size):
        shown = torch.where(torch.tensor(pattern * process.num_blocks), MASK, rows.tokens_BL)
        noisy = given_noise(rows.tokens_BL, shown, torch.ones(ROWS, process.num_blocks), process, training=True)
        loss = score(model, noisy, process).block_loss_BN if any(pattern) else torch.zeros(ROWS, process.num_blocks)
        for power in range(5):
            found[sum(pattern)][power] += float((loss**power).mean())
    return found


def exact_moments(patterns: dict[int, list[float]], interval: Interval, process) -> Truth:
    """Every mask of a block with its probability, integrated over t ~ U[interval] by the midpoint rule in ln t.

    Written without the package's laws of the counts: a pattern's chance at time t, and what the noise makes of it.
    """
    low, high = interval
    edges = torch.linspace(math.log(low), math.log(high), 10_001, dtype=torch.float64).exp()
    time, density = (edges[1:] * edges[:-1]).sqrt(), edges.diff() / (high - low)
    schedule, size = process.schedule, process.block_size
    rate, weight = schedule.mask_rate(time), schedule.loss_weight(time)
    chance = {k: rate**k * (1 - rate) ** (size - k) for k in range(size + 1)}  # of one pattern with k masked
    if process.resample and interval != (EPSILON, 1.0):
        ends = schedule.mask_rate(torch.tensor([low, high], dtype=torch.float64)).tolist()
        least, most = 0.0 if low == EPSILON else ends[0], ends[1]
        kept = [k for k in chance if least - 1e-9 <= k / size <= most + 1e-9]
        total = sum(math.comb(size, k) * chance[k] for k in kept)
        chance = {k: chance[k] / total if k in kept else torch.zeros_like(rate) for k in chance}
    if process.mask_counts == "stratified":
        k_of = (rate * size).ceil()
        chance = {k: (k_of == k) / math.comb(size, k) for k in chance}
        weight = schedule.mask_rate_slope(time) * size / k_of
    raw = [
        sum(float((density * weight**power * chance[k]).sum()) * patterns[k][power] for k in chance if k or not power)
        for power in range(5)
    ]
    assert raw[0] == pytest.approx(1, abs=1e-3)
    _, m1, m2, m3, m4 = raw
    scale = float((density * schedule.loss_weight(time) * rate).sum())
    return Truth(m1, m2 - m1**2, m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4, scale)


@pytest.fixture(scope="module", params=[False, True], ids=["all tokens", "first token clean"])
def measured(request, trained) -> tuple[CountMoments, dict[int, list[float]], bool]:
    """Moments from evaluation draws, and the losses of every mask."""
    process, rows = process_for(4, ignore_bos=request.param), text(ROWS, 7)
    moments = CountMoments(4)
    for draw in range(MOMENT_DRAWS):
        noisy = noise_rows_for_evaluation(rows, process, seed=3, draw=draw, num_rows=ROWS)
        moments.accumulate(noisy, score(trained, noisy, process))
    return moments, losses_by_pattern(trained, process), request.param


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_interval_has_the_enumerated_variance_within_its_error_bar(measured, name, noise):
    """The paper's whole grid, the heavy intervals at the singular end included, and the choice that follows."""
    moments, patterns, ignore_bos = measured
    process = process_for(4, name, ignore_bos=ignore_bos, **NOISES[noise])
    table = loss_table(moments, process, GRID.widths, GRID.step)
    assert len(table) == 36
    truth = {interval: exact_moments(patterns, interval, process) for interval in table}
    # stratified counts start the full range at 0, where the enumeration needs a positive time
    exact = {i: t for i, t in truth.items() if not (noise == "stratified" and i[0] == EPSILON)}
    for interval, want in exact.items():
        got = table[interval]
        assert abs(got.mean - want.mean) < 4 * math.sqrt(want.variance / (ROWS * MOMENT_DRAWS)), interval
        assert got.weight == pytest.approx(want.weight, rel=2e-3), interval
        assert abs(got.variance - want.variance) < 3 * got.stderr, interval
        assert got.stderr < 0.07 * want.variance, interval  # the bar is narrow enough to say something
    chosen = choose_interval({i: table[i] for i in exact}, (0.0, 0.1))
    assert exact[chosen].relative < 1.04 * min(t.relative for t in exact.values())


def test_the_interval_depends_on_resample(measured):
    """What the search must see: the best intervals of the two noises differ, and each is poor for the other."""
    moments, patterns, ignore_bos = measured
    chosen, truth = {}, {}
    for noise in ("binomial", "resample"):
        process = process_for(4, ignore_bos=ignore_bos, **NOISES[noise])
        table = loss_table(moments, process, GRID.widths, GRID.step)
        chosen[noise] = choose_interval(table, (EPSILON, 1.0))
        truth[noise] = {i: exact_moments(patterns, i, process).relative for i in table}
    assert chosen["binomial"] == (0.5, 1.0)
    assert chosen["resample"] != chosen["binomial"]
    for noise in chosen:
        assert truth[noise][chosen[noise]] < 1.02 * min(truth[noise].values())


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("interval", [(EPSILON, 1.0), (0.3, 0.8), (0.45, 0.95)])
def test_draws_of_training_have_the_variance_of_the_table(trained, measured, noise, interval):
    """The real noise, not an enumeration of it."""
    moments, patterns, ignore_bos = measured
    process, rows = process_for(4, ignore_bos=ignore_bos, **NOISES[noise]), text(ROWS, 7)
    losses = []
    for step in range(BRUTE_DRAWS):
        noisy = noise_rows(rows, process, seed=2, step=step, global_batch_size=ROWS, interval=interval)
        losses.append(score(trained, noisy, process).block_loss_BN)
    drawn, got = torch.cat(losses).flatten(), moments.loss(interval, process)
    error = exact_moments(patterns, interval, process).error(len(drawn))
    assert abs(float(drawn.var()) - got.variance) < 4 * math.hypot(error, got.stderr)
    assert abs(float(drawn.mean()) - got.mean) < 4 * math.sqrt(got.variance / len(drawn))


def known_blocks(count: int, size: int, seed: int, bias=lambda k: 1.0):
    """Evaluated blocks whose masked tokens have nll of mean bias(k), with their noise: NoisyRows and LossSum."""
    process = replace(process_for(4), block_size=size, context_length=size)
    rows = Rows(torch.zeros(count, size, dtype=torch.long), torch.arange(count), torch.ones(count, dtype=torch.bool))
    noisy = noise_rows_for_evaluation(rows, process, seed=seed, draw=0, num_rows=count)
    generator = torch.Generator().manual_seed(seed)
    nll = -torch.rand(count, size, generator=generator, dtype=torch.float64).log()
    k = noisy.masked_count_BN
    loss = (nll * noisy.is_scored_BL).sum(1, keepdim=True) * bias(k) / noisy.time_BN / size
    return process, noisy, LossSum(torch.zeros(()), loss)


@pytest.mark.parametrize("size", [4, 64, 128, 1000])
def test_large_blocks_too(size):
    """Blocks larger than the number of bins, some counts never seen: against the closed form of exponential nll."""
    process, moments = None, CountMoments(size)
    for seed in range(4):
        process, noisy, loss = known_blocks(500, size, seed)
        moments.accumulate(noisy, loss)
    for interval in ((0.3, 0.8), (0.5, 1.0), (0.05, 0.55)):
        got = moments.loss(interval, process)
        # per masked token mean 1, variance 1: Var l = E[w^2 k]/S^2 + Var(w k)/S^2, with k ~ Bin(S, t), w = 1/t
        low, high = interval
        inverse = math.log(high / low) / (high - low)
        exact = inverse / size + (inverse - 1) / size
        assert got.mean == pytest.approx(1, rel=0.05)
        assert abs(got.variance - exact) < 4 * got.stderr, interval
        assert got.stderr < 0.2 * exact, interval


@pytest.mark.parametrize(("size", "count"), [(4, 400), (64, 400)])
def test_the_error_bar_is_the_spread_of_repeated_searches(size, count):
    results = []
    for seed in range(120):
        process, noisy, loss = known_blocks(count, size, 1000 + seed, bias=lambda k: 1 + 2 * k / size)
        moments = CountMoments(size)
        moments.accumulate(noisy, loss)
        results.append(moments.loss((0.3, 0.8), process))
    variances = torch.tensor([r.variance for r in results])
    claimed = float(torch.tensor([r.stderr for r in results]).mean())
    assert claimed == pytest.approx(float(variances.std()), rel=0.25 if size > 4 else 0.2)


def test_a_block_of_one_token_is_best_at_full_masking():
    """From exact losses at t = 1 the variance at all other times is known, under every schedule; against draws."""
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(200_000, generator=generator, dtype=torch.float64) + 1
    rows = Rows(torch.zeros(1, len(nll)).long(), torch.arange(1), torch.ones(1, dtype=torch.bool))
    for name in SCHEDULES:
        process = replace(process_for(1, name), context_length=len(nll))
        noisy = noise_rows_for_evaluation(rows, process, seed=1, draw=0, num_rows=1)
        exact = CountMoments(1)
        exact.accumulate(noisy, LossSum(torch.zeros(()), nll[None]))
        table = loss_table(exact, process, GRID.widths, GRID.step)
        assert list(table) == [(EPSILON, 1.0), (1.0, 1.0)]
        assert table[(1.0, 1.0)].variance == pytest.approx(float(nll.var()))
        time = EPSILON + (1 - EPSILON) * torch.rand(len(nll), generator=generator, dtype=torch.float64)
        masked = torch.rand(len(nll), generator=generator, dtype=torch.float64) < process.schedule.mask_rate(time)
        drawn = spread(nll * process.schedule.loss_weight(time) * masked)
        assert abs(table[(EPSILON, 1.0)].variance - drawn.variance) < 4 * drawn.variance_stderr, name
        assert choose_interval(table, (EPSILON, 1.0)) == (1.0, 1.0)


def test_an_interval_without_an_allowed_count_is_never_chosen(measured):
    """Blocks of 4 have no share in [0.8, 0.95], and nothing but the empty mask in [0, 0.2]."""
    process = process_for(4, resample=True)
    for interval in ((0.8, 0.95), (EPSILON, 0.2)):
        assert math.isnan(measured[0].loss(interval, process).relative)
        assert measured[0].loss(interval, process_for(4)).relative > 0


def test_clipping_lowers_the_variance_of_the_gradient_too(trained, measured):
    """What the search is for: at the chosen interval the gradient of a fixed batch spreads less over noise draws."""
    moments = measured[0]
    process, rows = process_for(4), text(32, 5)
    chosen = choose_interval(loss_table(moments, process, GRID.widths, GRID.step), (EPSILON, 1.0))
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


def test_finer_grids_and_intervals_off_the_grid_are_free(measured):
    moments, process = measured[0], process_for(4)
    fine = loss_table(moments, process, (0.3, 0.45, 0.5, 0.55), 0.01, current=(0.123, 0.456))
    assert len(fine) > 180
    assert (0.123, 0.456) in fine
    assert all(math.isfinite(loss.variance) and loss.variance > 0 for loss in fine.values())
    coarse = loss_table(moments, process, (0.5,), 0.05)
    assert all(fine[i] == coarse[i] for i in coarse if i in fine)
    assert loss_table(moments, process, (0.5,), 0.05, schedule="square") == loss_table(
        moments, process_for(4, "square"), (0.5,), 0.05
    )


def test_moments_add_up_over_ranks_and_survive_a_checkpoint(trained):
    process, rows = process_for(4), text(64, 3)
    rows = replace(rows, is_real_B=torch.arange(64) % 7 > 0)
    noisy = noise_rows_for_evaluation(rows, process, seed=1, draw=0, num_rows=64)
    whole = CountMoments(4)
    whole.accumulate(noisy, score(trained, noisy, process))
    sums = torch.zeros_like(whole.as_tensor())
    for rank in range(4):
        mine = torch.arange(64) % 4 == rank
        part = CountMoments(4)
        own = Rows(rows.tokens_BL[mine], rows.position_B[mine], rows.is_real_B[mine])
        shard = noise_rows_for_evaluation(own, process, seed=1, draw=0, num_rows=64)
        part.accumulate(shard, score(trained, shard, process))
        sums += part.as_tensor()
    together = CountMoments.from_tensor(sums.flatten(), 4)
    torch.testing.assert_close(together.as_tensor(), whole.as_tensor(), rtol=1e-4, atol=1e-4)
    assert int(whole.as_tensor()[0].sum()) == int(rows.is_real_B.sum()) * 4


def at(relative: float) -> LossMoments:
    return LossMoments(2.0, 9.0 * relative, 0.1, 3.0)


def test_choice_changes_only_for_more_than_one_percent():
    a, b, c = (EPSILON, 1.0), (0.3, 0.8), (0.45, 0.95)
    assert choose_interval({a: at(10.0), b: at(5.0), c: at(4.96)}, b) == b
    assert choose_interval({a: at(10.0), b: at(5.0), c: at(4.94)}, b) == c
    assert choose_interval({a: at(10.0), b: at(5.0), c: at(5.0)}, a) == b
    assert choose_interval({a: at(math.nan), b: at(5.0)}, a) == b
    assert choose_interval({a: at(math.nan), b: at(math.nan)}, a) == a
    assert choose_interval({b: at(5.0)}, c) == b


def test_a_smaller_scale_of_the_loss_is_no_advantage():
    """Half the weights have a quarter of the variance, and nothing is gained."""
    low, high = (0.0, 0.5), (0.5, 1.0)
    assert choose_interval({low: LossMoments(1, 1.1, 0.1, 0.5), high: LossMoments(2, 4.0, 0.1, 1.0)}, low) == high


def test_nothing_measured_is_unknown():
    assert math.isnan(CountMoments(4).loss((0.5, 1.0), process_for(4)).variance)
