"""score(): exact where it can be, an error bar that is one elsewhere, and refusals that name what is wrong."""

import math
import re
from itertools import combinations

import pytest
import torch

from tests.checkpoint.hf.test_modeling import OBJECTIVES, make


def bound_of(model, text, given=0):
    """The NELBO of one row by plain enumeration, a pass per set of masks: no code shared with `score`."""
    mask = model.config.mask_token_id
    size = model.config.block_size if model.config.objective == "bd3lm" else text.shape[1]
    first = max(given, int(model.config.ignore_bos))
    total = 0.0
    for start in range(0, text.shape[1], size):
        stop = min(start + size, text.shape[1])
        scored = [i for i in range(start, stop) if i >= first]
        for k in range(1, len(scored) + 1):
            weight = math.factorial(k - 1) * math.factorial(len(scored) - k) / math.factorial(len(scored))
            for hidden in combinations(scored, k):
                noisy = text[:, :stop].clone()
                noisy[:, list(hidden)] = mask
                logits = model(noisy, sample_mode=True).logits
                logits[..., mask] = float("-inf")
                nats = -logits.log_softmax(-1)[0].gather(-1, text[0, :stop, None])[:, 0]
                total += weight * float(nats[list(hidden)].sum())
    return total


@torch.no_grad()
@pytest.mark.parametrize("ignore_bos", [False, True])
def test_blocks_of_four_are_scored_exactly_by_default(ignore_bos):
    model = make("bd3lm", length=12, block_size=4, ignore_bos=ignore_bos)
    text = torch.randint(0, 29, (2, 11), generator=torch.Generator().manual_seed(3))
    passes, encode = [], model.encode
    model.encode = lambda *args, **options: passes.append(1) or encode(*args, **options)
    scores = model.score(text)
    assert len(passes) == 15, "2^4 - 1 patterns of masks"
    assert scores.nats_stderr.tolist() == [0.0, 0.0]
    for row in range(2):
        assert float(scores.nats[row]) == pytest.approx(bound_of(model, text[row : row + 1]), rel=1e-5)
    assert torch.equal(scores.nats, model.score(text, seed=7).nats)


@torch.no_grad()
@pytest.mark.parametrize("objective", ["bd3lm", "mdlm"])
def test_a_short_continuation_is_exact_in_any_block(objective):
    """Only scored tokens are masked, so three of them have seven patterns however long the block is."""
    model = make(objective, length=16, block_size=16)
    text = torch.randint(0, 29, (1, 9), generator=torch.Generator().manual_seed(4))
    labels = torch.cat([torch.full((1, 6), -100), text[:, 6:]], dim=1)
    scores = model.score(text, labels=labels)
    assert (float(scores.nats_stderr), int(scores.num_tokens)) == (0.0, 3)
    assert float(scores.nats) == pytest.approx(bound_of(model, text, given=6), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("objective", ["bd3lm", "mdlm"])
def test_the_standard_error_is_the_spread_of_repeated_scores(objective):
    model = make(objective, length=8, block_size=8, ignore_bos=False)
    text = torch.randint(0, 29, (1, 7), generator=torch.Generator().manual_seed(5))
    exact = bound_of(model, text)
    found = [model.score(text.expand(64, -1), draws=6, seed=seed) for seed in range(6)]
    nats = torch.cat([score.nats for score in found])
    stderr = torch.cat([score.nats_stderr for score in found])
    spread = float(nats.std())
    assert abs(float(nats.mean()) - exact) < 4 * spread / len(nats) ** 0.5, "unbiased"
    claimed = float((stderr**2).mean() ** 0.5)
    assert spread < 1.15 * claimed, "never smaller than the truth"
    assert claimed < 2.5 * spread, "nor much larger: the strata only help"
    assert model.score(text).nats_stderr.isfinite(), "a default has an error"
    assert model.score(text, draws=1).nats_stderr.isnan()


@torch.no_grad()
def test_time_conditioned_scores_average_over_the_times_of_the_process():
    """SEDD's network is told the time: the bound is an integral over it, here by a fine grid of times."""
    model = make("sedd", length=2, ignore_bos=False)
    text, mask = torch.tensor([[3, 11]]), model.config.mask_token_id
    total, grid = 0.0, (torch.arange(2000) + 0.5) / 2000
    for hidden in ((0,), (1,), (0, 1)):
        noisy = text.clone()
        noisy[:, list(hidden)] = mask
        sigma = -torch.log1p(-grid)
        logits = model(noisy.expand(len(grid), -1), sigma.clamp(max=6.9078)).logits
        entropy = model.score_entropy(logits, text.expand(len(grid), -1))[:, list(hidden)].sum(1)
        k = len(hidden)
        total += float((grid ** (k - 1) * (1 - grid) ** (2 - k) * entropy).mean())
    nats = model.score(text.expand(2048, -1), draws=4).nats
    assert abs(float(nats.mean()) - total) < 4 * float(nats.std()) / 2048**0.5 + 1e-3


@torch.no_grad()
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_left_or_right_and_int32_change_nothing(objective):
    model = make(objective, length=16)
    text = torch.randint(0, 29, (1, 6), generator=torch.Generator().manual_seed(6))
    other = torch.randint(0, 29, (1, 9), generator=torch.Generator().manual_seed(7))
    padding = torch.full((1, 3), 29)  # even the mask may be padding: nobody reads it
    zeros, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)
    alone = model.score(text.int())
    for parts, masks in (((text, padding), (ones, zeros)), ((padding, text), (zeros, ones))):
        batch = torch.cat([torch.cat(parts, dim=1), other]).int()
        is_real = torch.cat([torch.cat(masks, dim=1), torch.ones(1, 9, dtype=torch.long)])
        scores = model.score(batch, attention_mask=is_real)
        assert scores.num_tokens.tolist() == [5, 8]
        where = is_real[0].bool()
        assert (scores.token_nats[0][~where] == 0).all()
        if objective in ("bd3lm", "ar"):
            torch.testing.assert_close(scores.token_nats[0][where], alone.token_nats[0], atol=1e-5, rtol=1e-4)
        loss = model(batch, attention_mask=is_real, labels=batch.masked_fill(~is_real.bool(), -100)).loss
        assert loss.isfinite()


@torch.no_grad()
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_and_losses_do_not_depend_on_where_a_row_is_padded(objective):
    model, sigma = make(objective, length=16), torch.tensor([0.7, 0.7])
    text = torch.randint(0, 29, (2, 6), generator=torch.Generator().manual_seed(8))
    rate, noisy = torch.tensor([[0.5] * 4 + [0.8] * 2, [0.9] * 4 + [0.3] * 2]), text.clone()
    rate = rate if objective == "bd3lm" else rate[:, :1]
    noisy[:, ::2] = model.config.mask_token_id
    expected = model(noisy, sigma, output_hidden_states=True)
    labelled = model(noisy, labels=text, mask_rate=rate)
    for left in (0, 3, 5):
        pad = lambda x, value, left=left: torch.nn.functional.pad(x, (left, 5 - left), value=value)  # noqa: E731
        is_real = pad(torch.ones_like(text), 0)
        here = slice(left, left + 6)
        found = model(pad(noisy, 4), sigma, attention_mask=is_real, output_hidden_states=True)
        torch.testing.assert_close(found.logits[:, here], expected.logits, atol=1e-5, rtol=1e-4)
        for layer, same in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(layer[:, here], same, atol=1e-5, rtol=1e-4)
        rates = pad(rate, 1.0) if objective == "bd3lm" else rate
        loss = model(pad(noisy, 4), labels=pad(text, -100), mask_rate=rates, attention_mask=is_real)
        torch.testing.assert_close(loss.loss, labelled.loss, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(loss.logits[:, here], labelled.logits, atol=1e-5, rtol=1e-4)
    if objective == "bd3lm":
        plain = model(torch.cat([noisy, text], 1), sample_mode=False).logits
        pair = torch.cat([torch.nn.functional.pad(x, (2, 0), value=4) for x in (noisy, text)], dim=1)
        is_real = torch.nn.functional.pad(torch.ones_like(text), (2, 0))
        for given in (is_real, is_real.repeat(1, 2)):
            found = model(pair, attention_mask=given, sample_mode=False).logits
            torch.testing.assert_close(found[:, 2:], plain, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_read_is_refused_by_name():
    model, text = make("bd3lm"), torch.randint(0, 29, (2, 8))
    hole = torch.tensor([[1] * 8, [1, 1, 0, 1, 1, 1, 0, 0]])
    masked = text.clone()
    masked[1, 3] = 29
    other = text.clone()
    other[0, 5] = (text[0, 5] + 1) % 29
    calls = {
        "rows \\[1\\] have padding between": lambda: model.score(text, attention_mask=hole),
        "padding between their tokens": lambda: model(text, attention_mask=hole),
        "padding between": lambda: model(text, labels=text, attention_mask=hole),
        "shape \\(2, 8\\)": lambda: model.score(text, attention_mask=hole[:, :5]),
        "rows \\[0, 1\\] have no token to score": lambda: model.score(text[:, :1]),
        "rows \\[1\\] have no token": lambda: model.score(text, attention_mask=torch.tensor([[1] * 8, [1] + [0] * 7])),
        "have no token to score": lambda: model.score(text[:, :0]),
        "id 29 at row 1, column 3 is the mask": lambda: model.score(masked),
        "labels: id 29 at row 1": lambda: model(text, labels=masked),
        "id 30 at row 0, column 0 is outside the vocabulary of 30": lambda: model.score(text * 0 + 30),
        "id -1 at row": lambda: model(text * 0 - 1),
        "float32\\): token ids are integers": lambda: model.score(text.float()),
        "inputs_embeds, one of them": lambda: model(),
        "bool\\): token ids": lambda: model.score(text > 5),
        "\\(rows, tokens\\)": lambda: model.score(text[0]),
        "draws \\(0\\)": lambda: model.score(text, draws=0),
        "labels: use -100": lambda: model.score(text, labels=other),
        "output_attentions \\(True\\)": lambda: model(text, output_attentions=True),
    }
    for message, call in calls.items():
        model.train()
        model.backbone.blocks[1].eval()
        with pytest.raises(ValueError, match=message):
            call()
        assert model.training, message
        assert not model.backbone.blocks[1].training, "each module keeps its own mode"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_broken_weights_have_no_likelihood(objective):
    model = make(objective)
    torch.nn.init.constant_(model.backbone.blocks[0].attn_out.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.score(torch.randint(2, 29, (2, 8)), draws=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": float("nan")}, "draws (nan)"), ({"draws": "3"}, "draws (3)"), ({"draws": True}, "draws (True)"),
        ({"seed": None}, "seed (None)"), ({"seed": "a"}, "seed (a)"), ({"seed": [1, 0.5]}, "seed ([1, 0.5])"),
        ({"attention_mask": torch.full((2, 8), 2)}, "other values than 1"),
        ({"attention_mask": torch.zeros(2, 8).masked_fill(torch.arange(8) > 5, -1e9)}, "other values than 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("objective", ["bd3lm", "ar"])
def test_arguments_of_other_types_are_named(objective, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(objective).score(torch.randint(2, 29, (2, 8)), **options)
