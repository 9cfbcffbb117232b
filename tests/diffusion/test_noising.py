"""Noise is a pure function of seed, step, position, block and token; times are unbiased; masks have their rates."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3lm_scale.config.schema import DiffusionConfig
from bd3lm_scale.diffusion.mask_counts import count_weights
from bd3lm_scale.diffusion.noising import draw_times, noise_rows, noise_rows_for_evaluation, stream_hash
from bd3lm_scale.diffusion.process import make_process
from bd3lm_scale.diffusion.registry import SCHEDULES
from bd3lm_scale.values import NoisyRows, Rows

MASK, VOCAB = 49, 50
FULL = (1e-3, 1.0)


def process_for(objective="bd3lm", length=32, block_size=4, **changes):
    return make_process(DiffusionConfig(objective=objective, block_size=block_size, **changes), length, VOCAB, MASK)


def text(count, length=32, start=0):
    """Rows start .. start + count - 1 of an endless fixed text."""
    position = torch.arange(start, start + count)
    tokens = (position[:, None] * 7 + torch.arange(length) * 3) % (VOCAB - 1)
    return Rows(tokens, position, torch.ones(count, dtype=torch.bool))


def cut(rows: Rows, low, high):
    return Rows(rows.tokens_BL[low:high], rows.position_B[low:high], rows.is_real_B[low:high])


def noise(rows, process, step=5, gbs=12, interval=(0.0, 1.0)) -> NoisyRows:
    return noise_rows(rows, process, seed=3, step=step, global_batch_size=gbs, interval=interval)


@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "sedd", "ar"])
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (1,) * 12, (5, 3, 4)])
def test_noise_does_not_depend_on_how_the_batch_is_split(objective, sizes):
    process, rows = process_for(objective), text(12)
    whole = noise(rows, process)
    starts = np.cumsum([0, *sizes])
    parts = [noise(cut(rows, a, b), process) for a, b in pairwise(starts)]
    for name in ("input_BP", "target_BL", "is_scored_BL", "weight_BL", "counts_BL", "time_BN", "sigma_B"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name
    assert sum(stream_hash(p) for p in parts) % 2**64 == stream_hash(whole)
    if objective != "ar":
        assert not torch.equal(noise(rows, process, step=6).input_BP, whole.input_BP)


def test_padding_rows_change_nothing():
    process = process_for()
    rows = text(14)
    padded = replace(rows, is_real_B=torch.arange(14) < 12)
    with_padding, without = noise(padded, process), noise(cut(rows, 0, 12), process)
    assert stream_hash(with_padding) == stream_hash(without)
    assert not with_padding.weight_BL[12:].any()
    assert not with_padding.is_scored_BL[12:].any()
    assert not with_padding.counts_BL[12:].any()
    assert torch.equal(with_padding.weight_BL[:12], without.weight_BL)


def test_hash_notices_every_kind_of_change():
    noisy = noise(text(4), process_for(), gbs=4)
    flip = torch.zeros_like(noisy.input_BP)
    flip[2, 7] = 1
    swapped = replace(noisy, position_B=noisy.position_B[[1, 0, 2, 3]])
    changed = [
        replace(noisy, input_BP=noisy.input_BP + flip),
        replace(noisy, target_BL=noisy.target_BL + flip[:, :32]),
        replace(noisy, time_BN=noisy.time_BN.nextafter(torch.tensor(2.0, dtype=torch.float64))),
        swapped,
    ]
    hashes = {stream_hash(noisy), *map(stream_hash, changed)}
    assert len(hashes) == 5


def test_every_position_sees_all_times_at_micro_batch_1():
    """Mean time of every (row, block) within 3 standard errors of the middle, and its spread uniform."""
    steps, gbs, blocks = 2000, 4, 8
    low, high = 0.2, 0.8
    draws = torch.stack(
        [
            torch.cat([draw_times(11, "train", s, torch.tensor([p]), blocks, gbs, (low, high)) for p in range(gbs)])
            for s in range(steps)
        ]
    )
    deviation = (draws.mean(0) - (low + high) / 2) / ((high - low) / 12**0.5 / steps**0.5)
    # 3 standard errors for each; of 32 positions one beyond 3 has probability 8%, the seed is fixed
    assert deviation.abs().max() < 3.0
    spread = draws.var(0) / ((high - low) ** 2 / 12)
    assert (spread - 1).abs().max() < 0.12
    # whole batch: exactly one time per stratum at every step
    strata = ((draws - low) / (high - low) * gbs * blocks).floor().reshape(steps, -1)
    assert torch.equal(strata.sort(1).values, torch.arange(gbs * blocks).expand(steps, -1).double())
    # neighbours are not tied to each other beyond the -1/(n-1) that stratification implies
    centred = (draws - draws.mean(0)).reshape(steps, -1)
    correlation = torch.corrcoef(centred.T) - torch.eye(gbs * blocks, dtype=torch.float64)
    assert correlation.abs().max() < 5 / steps**0.5


@pytest.mark.parametrize("use", ["train", "evaluation"])
def test_the_rotation_of_the_strata_is_uniform_and_new_at_every_step(use):
    """With one block there is one stratum and the time is the rotation; with many, all of a step share it."""
    steps = 2000
    rotation = np.array([float(draw_times(11, use, step, torch.zeros(1), 1, 1, (0.0, 1.0))) for step in range(steps)])
    assert len(np.unique(rotation)) == steps
    assert abs(rotation.mean() - 0.5) < 4 * (1 / 12 / steps) ** 0.5
    assert abs(rotation.var() * 12 - 1) < 0.1
    assert abs(np.corrcoef(rotation[1:], rotation[:-1])[0, 1]) < 4 / steps**0.5
    many = [draw_times(11, use, step, torch.arange(4), 8, 4, (0.0, 1.0)).numpy() * 32 % 1 for step in range(3)]
    for inside in many:
        assert np.ptp(inside) < 1e-12
    assert np.ptp([inside[0, 0] for inside in many]) > 1e-3
    assert float(draw_times(12, use, 0, torch.zeros(1), 1, 1, (0.0, 1.0))) != rotation[0]


def test_evaluation_times_do_not_follow_training_times_and_differ_by_draw():
    rows = torch.arange(6)
    first, second = (draw_times(11, "evaluation", d, rows, 8, 6, FULL) for d in (0, 1))
    train = draw_times(11, "train", 0, rows, 8, 6, FULL)
    assert not torch.equal(first, second)
    assert not torch.equal(first, train)
    assert torch.equal(first[2:4], draw_times(11, "evaluation", 0, torch.tensor([2, 3]), 8, 6, FULL))
    noisy = noise_rows_for_evaluation(text(6), process_for(), seed=11, draw=0, num_rows=6, interval=FULL)
    trained = noise_rows(text(6), process_for(), seed=11, step=0, global_batch_size=6, interval=FULL)
    assert not torch.isclose(noisy.time_BN, trained.time_BN, rtol=1e-3).any(), "not training's, down to the floor"


def test_masks_are_drawn_anew_for_every_step_draw_row_and_seed():
    """At one fixed time, so that nothing else moves them: any two masks agree in half of the places."""
    process, rows = process_for(length=512, block_size=64, ignore_bos=False), text(2, 512)
    half = (0.5, 0.5)
    train = [
        noise_rows(rows, process, seed=seed, step=step, global_batch_size=2, interval=half)
        for seed, step in ((3, 5), (3, 6), (4, 5))
    ]
    held_out = [
        noise_rows_for_evaluation(rows, process, seed=seed, draw=draw, num_rows=2, interval=half)
        for seed, draw in ((3, 5), (3, 6), (4, 5))
    ]
    masks = torch.cat([noisy.is_scored_BL for noisy in train + held_out])
    agreement = (masks[:, None] == masks[None]).double().mean(2)
    assert (agreement - 0.5)[~torch.eye(len(masks), dtype=torch.bool)].abs().max() < 5 * 0.5 / 512**0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masks_have_the_mask_rate_of_their_block(schedule):
    process = process_for(length=512, block_size=64, schedule=schedule, ignore_bos=False)
    noisy = noise(text(256, 512), process, gbs=256)
    rate_BN = process.schedule.mask_rate(noisy.time_BN)
    share_BN = noisy.is_scored_BL.reshape(256, 8, 64).double().mean(2)
    z_BN = (share_BN - rate_BN) / (rate_BN * (1 - rate_BN) / 64).sqrt()
    centre = (rate_BN > 0.1) & (rate_BN < 0.9)
    assert abs(z_BN[centre].mean()) < 4 / centre.sum() ** 0.5
    assert abs(z_BN[centre].var() - 1) < 0.15
    # each column is as likely to be masked as the others
    column_L = noisy.is_scored_BL.double().mean(0)
    assert (column_L - rate_BN.mean()).abs().max() < 5 * 0.5 / 256**0.5


def test_masked_tokens_read_the_mask_and_weigh_p_prime_over_p():
    process = process_for()
    rows = text(12)
    noisy = noise(rows, process)
    shown, clean = noisy.input_BP[:, :32], noisy.input_BP[:, 32:]
    assert torch.equal(clean, rows.tokens_BL)
    assert torch.equal(shown == MASK, noisy.is_scored_BL)
    assert torch.equal(shown[~noisy.is_scored_BL], clean[~noisy.is_scored_BL])
    weight = (1 / noisy.time_BN).repeat_interleave(4, 1).float() * noisy.is_scored_BL
    torch.testing.assert_close(noisy.weight_BL, weight)
    assert not noisy.is_scored_BL[:, 0].any()
    assert noisy.counts_BL.all()


def test_evaluation_leaves_the_first_token_out_only_when_it_is_given():
    for ignore in (True, False):
        process = process_for(ignore_bos=ignore, schedule="cosine")
        noisy = noise_rows_for_evaluation(text(6), process, seed=1, draw=0, num_rows=6)
        assert noisy.counts_BL[:, 0].any() != ignore
        assert noisy.counts_BL[:, 1:].all()
        weights = (1 / noisy.time_BN).repeat_interleave(4, 1).float() * noisy.is_scored_BL
        torch.testing.assert_close(noisy.weight_BL, weights)  # loglinear, whatever the training schedule


@pytest.mark.parametrize("schedule", [*SCHEDULES, "scaled"])
def test_full_masking_weighs_one(schedule):
    changes = {"mdlm_loss_scale": True} if schedule == "scaled" else {"schedule": schedule}
    process = process_for(block_size=1, ignore_bos=False, **changes)
    noisy = noise(text(400), process, gbs=400, interval=(1.0, 1.0))
    assert noisy.is_scored_BL.all()
    assert (noisy.weight_BL == 1).all()


def test_next_token_rows_shift_by_one():
    noisy = noise(text(3), process_for("ar"), gbs=3)
    assert torch.equal(noisy.target_BL[:, :-1], noisy.input_BP[:, 1:])
    assert noisy.is_scored_BL[:, :-1].all()
    assert not noisy.is_scored_BL[:, -1].any()
    assert noisy.counts_BL.sum() == 3 * 31
    assert noisy.input_BP.shape == (3, 32)


def test_sigma_reaches_only_conditioned_networks():
    noisy = noise(text(12), process_for("sedd"))
    expected = (-torch.log1p(-noisy.time_BN[:, 0])).clamp(max=6.9078).float()
    torch.testing.assert_close(noisy.sigma_B, expected)
    assert noisy.time_BN.shape == (12, 1)
    assert not noise(text(12), process_for("mdlm")).sigma_B.any()


def test_resample_keeps_the_masked_share_inside_the_interval():
    """And so never shows the fully masked block at block size 4 under the paper's interval."""
    rows = text(512)
    for length_process, low_high, allowed in (
        (process_for(resample=True, ignore_bos=False), (0.45, 0.95), {2, 3}),
        (process_for(resample=True, ignore_bos=False), (0.0, 0.5), {0, 1, 2}),
        (process_for(resample=True, ignore_bos=False), (0.5, 1.0), {2, 3, 4}),
        (process_for(resample=False, ignore_bos=False), (0.45, 0.95), {0, 1, 2, 3, 4}),
        (process_for(resample=True, ignore_bos=False), (0.0, 1.0), {0, 1, 2, 3, 4}),
    ):
        noisy = noise(rows, length_process, gbs=512, interval=low_high)
        counts = noisy.is_scored_BL.reshape(512, 8, 4).sum(2)
        assert set(counts.unique().tolist()) == allowed
        again = noise(cut(rows, 100, 103), length_process, gbs=512, interval=low_high)
        assert torch.equal(again.input_BP, noisy.input_BP[100:103])


@pytest.mark.parametrize(
    ("resample", "percent"), [(False, (2.0, 10.2, 23.7, 33.8, 30.2)), (True, (0.0, 0.0, 38.1, 61.9, 0.0))]
)
def test_resample_changes_how_many_tokens_are_masked(resample, percent):
    """The shares of docs/method.md for blocks of 4 under U[0.45, 0.95]."""
    noisy = noise(text(2048), process_for(resample=resample, ignore_bos=False), gbs=2048, interval=(0.45, 0.95))
    counts = noisy.is_scored_BL.reshape(-1, 4).sum(1)
    share = torch.bincount(counts, minlength=5) / len(counts) * 100
    torch.testing.assert_close(share, torch.tensor(percent), rtol=0, atol=1.2)
    documented = Path(__file__).parents[2].joinpath("docs", "method.md").read_text()
    assert " | ".join(f"{p:.1f}" for p in percent) in documented


def test_resample_null_is_on_where_blocks_have_a_choice_of_counts():
    for changes, is_on in (
        ({}, True),
        ({"block_size": 1}, False),
        ({"objective": "mdlm"}, False),
        ({"objective": "ar"}, False),
        ({"mask_counts": "stratified"}, False),
    ):
        assert process_for(resample=None, **changes).resample is is_on, changes


def test_resample_that_can_never_succeed_is_refused():
    with pytest.raises(ValueError, match=r"diffusion.resample \(true\).*block of 1"):
        noise(text(4), process_for(block_size=1, resample=True), interval=(0.45, 0.95))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resample_keeps_the_share_between_the_mask_rates_of_the_interval(schedule):
    """Whatever the schedule, and so never in vain: a share that the times of the interval do not give cannot be met."""
    process = process_for("mdlm", length=512, resample=True, ignore_bos=False, schedule=schedule)
    noisy = noise(text(64, 512), process, gbs=64, interval=(0.3, 0.6))
    low, high = process.schedule.mask_rate(torch.tensor([0.3, 0.6], dtype=torch.float64)).tolist()
    share = noisy.masked_count_BN / 512
    assert share.min() >= low
    assert share.max() <= high
    assert share.max() - share.min() > 0.8 * (high - low)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("changes", [{}, {"resample": True}, {"mask_counts": "stratified"}], ids=str)
def test_counts_and_weights_are_drawn_from_their_law(changes, schedule):
    """Mean of w^q where k tokens are masked: the closed form that the clip search rests on, against drawn noise."""
    process = process_for(schedule=schedule, ignore_bos=False, **changes)
    for interval in ((0.3, 0.8), (0.45, 0.95), (0.2, 1.0)):
        noisy = noise(text(4096), process, gbs=4096, interval=interval)
        count, weight_BN = noisy.masked_count_BN, noisy.weight_BL.reshape(4096, 8, 4).amax(2).double()
        law = count_weights(process, interval)
        for k in range(5):
            is_k = (count == k).double()
            for power in range(3 if k else 1):
                values = is_k * weight_BN**power if power else is_k
                error = float(values.std()) / values.numel() ** 0.5
                assert abs(float(values.mean() - law[power, k])) < 4 * error + 1e-4, (interval, k, power)


def test_stratified_counts_are_equally_frequent_and_their_places_uniform():
    process = process_for(mask_counts="stratified", ignore_bos=False)
    noisy = noise(text(1024), process, gbs=1024)
    shown = noisy.is_scored_BL.reshape(-1, 4)
    counts = torch.bincount(shown.sum(1), minlength=5)
    assert counts[0] == 0
    assert (counts[1:] - 2048).abs().max() <= 1, "as even as 8192 strata allow"
    for k in (1, 2, 3):
        patterns = (shown[shown.sum(1) == k] * 2 ** torch.arange(4)).sum(1).bincount(minlength=16)
        possible = patterns[patterns > 0]
        assert len(possible) == math.comb(4, k)
        expected = 2048 / len(possible)
        assert (possible - expected).abs().max() < 4 * expected**0.5
    mass = noisy.weight_BL.reshape(-1, 4).sum(1)
    assert torch.equal(mass, torch.full_like(mass, 4.0)), "every block has the same total weight"


def test_bad_block_size_is_refused():
    with pytest.raises(ValueError, match=r"diffusion.block_size \(5\): must divide data.context_length \(32\)"):
        process_for(block_size=5)
