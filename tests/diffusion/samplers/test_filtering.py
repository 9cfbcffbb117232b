"""Nucleus, top-k, temperature and greedy against a float64 oracle that follows the documented definition."""

import numpy as np
import pytest
import torch

from bd3lm_scale.diffusion.samplers.filtering import (
    TokenFilter,
    draw_tokens,
    draw_tokens_batched,
    filtered_probabilities,
)
from tests.diffusion.samplers.toys import oracle_filter

FILTERS = [
    TokenFilter(nucleus_p=0.9),
    TokenFilter(nucleus_p=0.1),
    TokenFilter(nucleus_p=0.99, temperature=0.7),
    TokenFilter(top_k=5),
    TokenFilter(nucleus_p=0.8, top_k=20, temperature=1.3),
    TokenFilter(),
    TokenFilter(temperature=2.0),
]


def logits_of(kind: str, rows: int = 12, vocab: int = 300) -> torch.Tensor:
    rng = np.random.default_rng(7)
    logits = {
        "peaked": rng.normal(size=(rows, vocab)) * 4,
        "flat": rng.normal(size=(rows, vocab)) * 0.01,
        "ties": rng.integers(-2, 3, size=(rows, vocab)).astype(float),
        "equal": np.zeros((rows, vocab)),
        "certain": np.where(np.arange(vocab) == 17, 60.0, 0.0) + np.zeros((rows, 1)),
    }[kind]
    logits[:, -3:] = -np.inf  # mask and padding ids
    return torch.tensor(logits)


@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "equal", "certain"])
@pytest.mark.parametrize("token_filter", FILTERS, ids=str)
def test_the_filtered_distribution_is_the_oracles(kind, token_filter):
    logits_RV = logits_of(kind)
    expected = np.stack(
        [oracle_filter(r, token_filter.nucleus_p, token_filter.top_k, token_filter.temperature) for r in logits_RV]
    )
    actual = filtered_probabilities(logits_RV, token_filter).numpy()
    assert ((actual > 0) == (expected > 0)).all()
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "equal", "certain"])
@pytest.mark.parametrize("token_filter", FILTERS, ids=str)
def test_evenly_spaced_uniforms_give_each_token_its_share(kind, token_filter):
    """Inverse transform: over an even grid of n numbers every count is within one of n * p, in both implementations."""
    row = logits_of(kind, rows=1)
    grid = (np.arange(4000) + 0.5) / 4000
    expected = oracle_filter(row[0], token_filter.nucleus_p, token_filter.top_k, token_filter.temperature)
    for tokens in (
        draw_tokens(row.expand(4000, -1), grid, token_filter),
        draw_tokens_batched(row.expand(4000, -1), torch.tensor(grid), token_filter),
    ):
        counts = np.bincount(tokens.numpy(), minlength=row.shape[1])
        assert abs(counts - 4000 * expected).max() <= 1.0 + 1e-6
        assert not counts[expected == 0].any()


def test_float32_logits_give_the_oracles_nucleus_but_for_rounding_at_its_edge():
    logits_RV = logits_of("peaked", rows=200)
    for row32, row64 in zip(logits_RV.float(), logits_RV, strict=True):
        kept = filtered_probabilities(row32[None], TokenFilter(0.9))[0].numpy() > 0
        expected = oracle_filter(row64, 0.9) > 0
        wider, narrower = oracle_filter(row64, 0.9 + 1e-6) > 0, oracle_filter(row64, 0.9 - 1e-6) > 0
        assert (kept <= wider).all()
        assert (kept >= narrower).all()
        if (wider == narrower).all():
            assert (kept == expected).all()


def test_the_token_that_crosses_p_is_dropped_and_the_top_one_always_kept():
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    kept = lambda p: (filtered_probabilities(logits, TokenFilter(p))[0] > 0).tolist()  # noqa: E731
    assert kept(0.79) == [True, False, False]
    assert kept(0.81) == [True, True, False]
    assert kept(0.3) == [True, False, False]


@pytest.mark.parametrize("extreme", [0.0, 1.0 - 2.0**-53])
def test_extreme_uniforms_stay_inside_the_distribution(extreme):
    logits = logits_of("peaked").float()
    for token_filter in FILTERS:
        tokens = draw_tokens(logits, np.full(12, extreme), token_filter)
        batched = draw_tokens_batched(logits, torch.full((12,), extreme, dtype=torch.float64), token_filter)
        p = filtered_probabilities(logits, token_filter)
        assert (p[torch.arange(12), tokens] > 0).all()
        assert (p[torch.arange(12), batched] > 0).all()


@pytest.mark.parametrize("token_filter", [TokenFilter(temperature=0.0), TokenFilter(top_k=1)])
def test_greedy_takes_the_most_likely_token(token_filter):
    logits = logits_of("peaked")
    assert (draw_tokens(logits, np.linspace(0, 0.99, 12), token_filter) == logits.argmax(-1)).all()


@pytest.mark.parametrize(
    ("bad", "field"),
    [({"nucleus_p": 0.0}, "nucleus_p"), ({"top_k": 0}, "top_k"), ({"temperature": -1.0}, "temperature")],
)
def test_bad_settings_name_their_field(bad, field):
    with pytest.raises(ValueError, match=rf"sampling\.{field}"):
        TokenFilter(**bad)


def test_a_diverged_model_is_reported():
    with pytest.raises(ValueError, match="not finite"):
        draw_tokens(torch.full((1, 4), float("nan")), np.array([0.5]), TokenFilter(0.9))
    with pytest.raises(ValueError, match="not finite"):
        draw_tokens(torch.full((1, 4), -float("inf")), np.array([0.5]), TokenFilter())


@pytest.mark.parametrize("temperature", [1e-8, 1e-40, 1e-300, 5e-324])
@pytest.mark.parametrize("nucleus_p", [0.9, 1.0])
def test_the_smallest_temperatures_are_greedy(temperature, nucleus_p):
    logits_RV, uniform_R = torch.randn(50, 30), np.random.default_rng(0).random(50)
    token_filter = TokenFilter(nucleus_p, None, temperature)
    assert torch.equal(draw_tokens(logits_RV, uniform_R, token_filter), logits_RV.argmax(-1))
    assert torch.equal(draw_tokens_batched(logits_RV, torch.from_numpy(uniform_R), token_filter), logits_RV.argmax(-1))
