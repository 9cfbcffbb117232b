"""Rows of several documents: what is no target is never masked, weighted or counted, and padding is nothing."""

from dataclasses import replace
from itertools import combinations
from math import comb

import pytest
import torch

from bd3lm_scale.config.schema import DiffusionConfig
from bd3lm_scale.diffusion.clip_search import CountMoments
from bd3lm_scale.diffusion.likelihood import DocumentSums
from bd3lm_scale.diffusion.loss import num_loss_tokens
from bd3lm_scale.diffusion.mask_counts import stratified_counts, stratified_weights
from bd3lm_scale.diffusion.noising import noise_rows, noise_rows_for_evaluation, stream_hash
from bd3lm_scale.diffusion.process import make_process
from bd3lm_scale.values import PADDING, LossSum, Rows, Targets

MASK, VOCAB, LENGTH = 49, 50, 32
OBJECTIVES = ("bd3lm", "mdlm", "sedd", "ar")


def process_for(objective="bd3lm", block_size=4, **changes):
    return make_process(DiffusionConfig(objective=objective, block_size=block_size, **changes), LENGTH, VOCAB, MASK)


def documents(*lengths):
    """(1, L): documents of these lengths, each from a block of 4 on, then padding."""
    document = torch.full((1, LENGTH), PADDING)
    start = 0
    for number, length in enumerate(lengths):
        document[0, start : start + length] = number
        start += -(-length // 4) * 4
    return document


def packed(count=6):
    """Rows of three documents with padding inside their last blocks, the last row nearly all padding."""
    document = torch.cat([documents(9, 4, 11)] * (count - 1) + [documents(3)])
    tokens = torch.arange(count * LENGTH).reshape(count, LENGTH) % (VOCAB - 1)
    return Rows(tokens, torch.arange(count), torch.ones(count, dtype=torch.bool), document, document >= 0)


def noises(rows, objective, **changes):
    process = process_for(objective, **changes)
    yield noise_rows(rows, process, seed=3, step=5, global_batch_size=6, interval=(0.45, 0.95))
    yield noise_rows_for_evaluation(rows, process, seed=3, draw=1, num_rows=6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("changes", [{}, {"mask_counts": "stratified"}, {"resample": True}, {"ignore_bos": False}])
def test_what_is_no_target_is_never_masked_weighted_or_counted(objective, changes):
    if objective != "bd3lm" and changes.keys() & {"mask_counts", "resample"}:
        changes = {}
    rows = packed()
    rows = replace(rows, is_target_BL=rows.is_target_BL & (torch.arange(LENGTH) % 3 != 1))
    for noisy in noises(rows, objective, **changes):
        target = rows.is_target_BL.roll(-1, 1) if objective == "ar" else rows.is_target_BL
        for outside in (noisy.is_scored_BL, noisy.weight_BL != 0, noisy.counts_BL):
            assert not (outside & ~target).any()
        assert noisy.is_scored_BL.sum() > 10
        shown = noisy.input_BP[:, :LENGTH]
        assert ((shown == MASK) == (noisy.is_scored_BL & (objective != "ar"))).all()
        assert (shown[~rows.is_target_BL] == rows.tokens_BL[~rows.is_target_BL]).all()


@pytest.mark.parametrize("objective", OBJECTIVES[:3])
def test_other_tokens_have_the_noise_they_would_have_anyway(objective):
    rows = packed()
    plain = replace(rows, document_BL=None, is_target_BL=None)
    for with_documents, without in zip(noises(rows, objective), noises(plain, objective), strict=True):
        assert torch.equal(with_documents.masked_count_BN, without.masked_count_BN)
        starts = torch.zeros(6, LENGTH, dtype=torch.bool)
        starts[:5, [12, 16]] = True  # the second and third document's first tokens are shown, as a row's first is
        same = rows.is_target_BL & ~starts
        assert torch.equal(with_documents.weight_BL[same], without.weight_BL[same])
        assert with_documents.weight_BL[starts].eq(0).all()
        assert without.weight_BL[starts].ne(0).any()


def test_every_document_has_a_first_token_that_evaluation_leaves_out():
    training, evaluation = noises(packed(), "bd3lm")
    assert training.counts_BL.sum(1).tolist() == [24] * 5 + [3]
    assert evaluation.counts_BL.sum(1).tolist() == [21] * 5 + [2]


def test_ar_predicts_inside_documents_only():
    training, evaluation = noises(packed(), "ar")
    scored = [*range(8), *range(12, 15), *range(16, 26)]
    for noisy in (training, evaluation):
        assert noisy.is_scored_BL[0].nonzero().flatten().tolist() == scored
        assert torch.equal(noisy.counts_BL, noisy.is_scored_BL)
        assert noisy.is_scored_BL[5].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_denominator_is_what_training_counts(objective):
    rows = packed()
    training, _ = noises(rows, objective)
    targets = Targets(int(rows.is_target_BL.sum()), 5 * 3 + 1)
    assert num_loss_tokens(process_for(objective), 6, targets) == int(training.counts_BL.sum())
    assert num_loss_tokens(process_for(objective), 6) == 6 * (LENGTH - (objective == "ar"))
    assert num_loss_tokens(process_for(objective), 6, Targets(0, 0)) == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_stream_hash_covers_documents_and_targets(objective):
    rows = packed()
    moved = rows.document_BL.clone()
    moved[0, 8] = 1  # only the border between two documents
    other_target = rows.is_target_BL.clone()
    other_target[5, 1] = False
    variants = [
        rows, replace(rows, document_BL=None, is_target_BL=None), replace(rows, is_target_BL=None),
        replace(rows, document_BL=moved), replace(rows, is_target_BL=other_target),
    ]  # fmt: skip
    noisy = next(noises(rows, objective))  # one noise: what differs is what the hash has to see
    hashes = {stream_hash(replace(noisy, document_BL=v.document_BL, is_target_BL=v.is_target_BL)) for v in variants}
    assert len(hashes) == len(variants)
    names = ("tokens_BL", "position_B", "is_real_B", "document_BL", "is_target_BL")
    parts = [Rows(*(getattr(rows, name)[a:b] for name in names)) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert sum(stream_hash(next(noises(part, objective))) for part in parts) % 2**64 == stream_hash(noisy)


@pytest.mark.parametrize("real", [1, 2, 3, 4])
def test_stratified_counts_give_the_bound_of_a_block_that_is_partly_padding(real):
    """Each set of the block's real tokens is masked with the weight it has where the block is that short."""
    size = 4
    process = process_for("bd3lm", mask_counts="stratified", resample=False)
    times = (torch.arange(size, dtype=torch.float64)[None] + 0.5) / size
    counts, weights = stratified_counts(times, process)[0].tolist(), stratified_weights(times, process)[0].tolist()
    total = dict.fromkeys((s for j in range(1, real + 1) for s in combinations(range(real), j)), 0.0)
    for count, weight in zip(counts, weights, strict=True):
        for masked in combinations(range(size), count):
            seen = tuple(m for m in masked if m < real)
            if seen:
                total[seen] += weight / size / comb(size, count)
    for masked, share in total.items():
        assert share == pytest.approx(1 / (len(masked) * comb(real, len(masked))))


def test_blocks_without_a_target_tell_the_clip_search_nothing():
    rows = packed()
    _, noisy = noises(rows, "bd3lm")
    moments, loss = CountMoments(4), LossSum(torch.zeros(()), torch.rand(6, 8, dtype=torch.float64))
    moments.accumulate(noisy, loss)
    assert moments.sums[0].sum() == 5 * (3 + 1 + 3) + 1


def test_pieces_of_a_document_count_once_and_the_bootstrap_is_its_spread():
    """Documents 3 and 1 share a row; 3 goes on in another row, beside padding; 0 and 2 are nowhere."""
    rows = packed(2)
    _, noisy = noises(rows, "bd3lm")
    numbers = torch.tensor([[3, 1, 4], [3, -1, -1]])
    losses = [LossSum(torch.zeros(()), torch.zeros(2, 8), torch.rand(2, LENGTH).double()) for _ in range(2)]
    sums = DocumentSums(5, 2)
    sums.add(noisy, losses, numbers)
    assert sums.tokens_D.tolist() == [0, 3, 0, 8 + 2, 10]
    for draw, loss in enumerate(losses):
        loss_BL = loss.token_loss_BL
        wanted = [0, loss_BL[0, 12:16].sum(), 0, loss_BL[0, :9].sum() + loss_BL[1, :3].sum(), loss_BL[0, 16:27].sum()]
        assert sums.nats_DJ[:, draw].tolist() == pytest.approx([float(w) for w in wanted])
    twice = sums.filled(sums.as_tensor() * 2)
    assert torch.equal(twice.nats_DJ, 2 * sums.nats_DJ)
    estimate = sums.estimate()
    assert (estimate.num_rows, estimate.num_tokens) == (3, 23)
    assert estimate.nelbo == pytest.approx(float(sums.nats_DJ.mean(1).sum()) / 23)

    generator = torch.Generator().manual_seed(0)
    many = DocumentSums(400, 1)
    many.tokens_D = torch.randint(0, 50, (400,), generator=generator).double()
    many.nats_DJ = (many.tokens_D * (3 + torch.rand(400, generator=generator).double()))[:, None]
    error, low, high = many.bootstrap(seed=1)
    expected = many.estimate()
    assert error == pytest.approx(expected.stderr, rel=0.1)
    assert (low, high) == pytest.approx((expected.nelbo - 1.96 * error, expected.nelbo + 1.96 * error), abs=0.3 * error)
    assert many.bootstrap(seed=1) == (error, low, high)
    assert many.bootstrap(seed=2) != (error, low, high)


def test_padding_rows_are_in_no_document():
    rows = packed(2)
    rows = replace(rows, is_real_B=torch.tensor([True, False]))
    _, noisy = noises(rows, "bd3lm")
    sums = DocumentSums(4, 1)
    sums.add(
        noisy,
        [LossSum(torch.zeros(()), torch.zeros(2, 8), torch.ones(2, LENGTH).double())],
        torch.arange(6).reshape(2, 3) % 4,
    )
    assert sums.tokens_D.tolist() == [8, 3, 10, 0]
    assert sums.nats_DJ[3] == 0
