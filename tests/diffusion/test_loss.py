"""Losses against published numbers and float64 references, and their sums over blocks, rows and batches."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3lm_scale.config.schema import DiffusionConfig
from bd3lm_scale.diffusion.loss import num_loss_tokens, row_losses, score_rows, token_losses
from bd3lm_scale.diffusion.noising import given_noise, noise_rows, noise_rows_for_evaluation
from bd3lm_scale.diffusion.process import make_process
from bd3lm_scale.values import Rows
from tests.diffusion.heads import head_of

FOLDER = Path(__file__).parents[1] / "goldens"
VOCAB, MASK, LENGTH = 100, 99, 32


def process_for(objective, **changes):
    return make_process(DiffusionConfig(objective=objective, block_size=4, **changes), LENGTH, VOCAB, MASK)


def text(count=6):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB - 1, (count, LENGTH), generator=generator)
    return Rows(tokens, torch.arange(count), torch.ones(count, dtype=torch.bool))


def random_logits(count=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, LENGTH, VOCAB, generator=generator, dtype=torch.float64).mul(2).to(dtype)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_block_diffusion_loss_matches_the_published_numbers(mode):
    golden = np.load(FOLDER / "loss_goldens.npz")
    clean, shown = torch.from_numpy(golden["x0"]), torch.from_numpy(golden["xt"])
    time_BN = torch.from_numpy(golden["t_bs4"])[:, ::4].double()
    logits = torch.from_numpy(np.load(FOLDER / "hf_tiny_goldens.npz")["train_logits_bs4_tc0"])
    process = process_for("bd3lm")
    noisy = given_noise(clean, shown, time_BN, process, training=mode == "train")
    assert torch.equal(noisy.input_BP, torch.cat([shown, clean], 1))
    head = head_of(logits, noisy, MASK)
    per_token = torch.zeros(2 * LENGTH).index_add_(0, head.index_R, token_losses(head, noisy, process))
    published = torch.from_numpy(golden[f"bd3lm_bs4_{mode}_nlls"])
    torch.testing.assert_close(per_token.reshape(2, LENGTH), published, rtol=1e-5, atol=1e-5)
    assert torch.equal(noisy.counts_BL.float(), torch.from_numpy(golden[f"bd3lm_bs4_{mode}_tokmask"]))
    sums = score_rows(head, noisy, process)
    denominator = num_loss_tokens(process, 2) if mode == "train" else int(noisy.counts_BL.sum())
    loss = float(sums.weighted_nll) / denominator
    assert loss == pytest.approx(float(golden[f"bd3lm_bs4_{mode}_loss"]), rel=1e-6)


@pytest.mark.parametrize("mdlm_loss_scale", [False, True])
def test_score_entropy_equals_the_definition_in_float64(mdlm_loss_scale):
    """SEDD: log score, entropy and rate written out as published, in float64, mask column and all."""
    process = process_for("sedd", mdlm_loss_scale=mdlm_loss_scale)
    noisy = noise_rows(text(), process, seed=1, step=0, global_batch_size=6, interval=(0.0, 1.0))
    logits = random_logits(dtype=torch.float64)
    time_B11 = noisy.time_BN[:, :, None]
    rate = process.schedule.mask_rate(time_B11)
    sigma = (-torch.log1p(-rate)).clamp(max=-math.log(1e-3))
    expm1 = torch.expm1(sigma)
    log_score = logits - expm1.log() - math.log(VOCAB - 1)
    positive = log_score[..., :MASK].exp().sum(-1)
    target = log_score.gather(2, noisy.target_BL[:, :, None])[..., 0]
    r = (1 / expm1)[..., 0]
    entropy = positive - r * target + r * (r.log() - 1)
    if mdlm_loss_scale:
        noise_rate = (1 - 1e-3) / (1 - (1 - 1e-3) * time_B11[..., 0])
    else:
        noise_rate = process.schedule.loss_weight(time_B11[..., 0]) * expm1[..., 0]
    expected = (noise_rate * entropy * noisy.is_scored_BL).sum(1)
    head = head_of(logits.float(), noisy, MASK)
    sums = score_rows(head, noisy, process)
    torch.testing.assert_close(row_losses(sums, process), expected, rtol=2e-6, atol=0)
    subs = score_rows(head, noisy, process_for("mdlm", mdlm_loss_scale=mdlm_loss_scale))
    assert sums.weighted_nll > subs.weighted_nll  # score entropy bounds the SUBS loss from above


def test_ar_loss_is_cross_entropy_of_the_next_token():
    process, rows, logits = process_for("ar"), text(), random_logits()
    noisy = noise_rows(rows, process, seed=1, step=0, global_batch_size=6, interval=(0.0, 1.0))
    sums = score_rows(head_of(logits, noisy, MASK), noisy, process)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1, :MASK].flatten(0, 1), rows.tokens_BL[:, 1:].flatten())
    assert float(sums.weighted_nll) / num_loss_tokens(process, 6) == pytest.approx(float(expected), rel=1e-6)
    assert num_loss_tokens(process, 6) == int(noisy.counts_BL.sum()) == 6 * 31


@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "sedd", "ar"])
def test_sums_add_up_over_blocks_and_micro_batches(objective):
    process, rows, logits = process_for(objective), text(), random_logits()

    def sums_of(low, high):
        part = Rows(rows.tokens_BL[low:high], rows.position_B[low:high], rows.is_real_B[low:high])
        noisy = noise_rows(part, process, seed=1, step=0, global_batch_size=6, interval=(0.0, 1.0))
        return score_rows(head_of(logits[low:high], noisy, MASK), noisy, process)

    whole = sums_of(0, 6)
    parts = [sums_of(b, b + 1) for b in range(6)]
    torch.testing.assert_close(sum(p.weighted_nll for p in parts), whole.weighted_nll, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([p.block_loss_BN for p in parts]), whole.block_loss_BN)
    torch.testing.assert_close(row_losses(whole, process).sum(), whole.weighted_nll)


@pytest.mark.parametrize("objective", ["bd3lm", "sedd", "ar"])
def test_gradient_is_finite_with_garbage_in_padding_rows(objective):
    process, logits = process_for(objective), random_logits().requires_grad_()
    noisy = noise_rows(text(), process, seed=1, step=0, global_batch_size=6, interval=(0.0, 1.0))
    score_rows(head_of(logits, noisy, MASK), noisy, process).weighted_nll.backward()
    gradient = logits.grad
    assert gradient.isfinite().all()
    assert torch.equal(gradient.abs().sum(-1) > 0, noisy.is_scored_BL)


def test_evaluation_counts_what_it_scores():
    process = process_for("bd3lm")
    noisy = noise_rows_for_evaluation(text(), process, seed=1, draw=0, num_rows=6)
    assert int(noisy.counts_BL.sum()) == 6 * 31
    assert not (noisy.is_scored_BL & ~noisy.counts_BL).any()
