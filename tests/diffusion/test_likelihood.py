"""Likelihood figures and their errors."""

import math

import pytest
import torch

from bd3lm_scale.diffusion.likelihood import LikelihoodSums


def simulated(rows, draws, seed=0, row_spread=3.0, noise_spread=5.0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, 40, (rows,), generator=generator)
    level = 2.0 * tokens + row_spread * torch.randn(rows, generator=generator, dtype=torch.float64)
    noise = noise_spread * torch.randn(rows, draws, generator=generator, dtype=torch.float64)
    return level[:, None] + noise, tokens, level


def test_figures_are_what_they_say():
    sums = LikelihoodSums.of_rows(torch.tensor([[10.0, 14.0], [8.0, 8.0]]), torch.tensor([4, 4]))
    result = sums.estimate(num_bytes=30)
    assert result.nelbo == pytest.approx(20 / 8)
    assert result.ppl == pytest.approx(math.exp(2.5))
    assert result.bits_per_token == pytest.approx(2.5 / math.log(2))
    assert result.bits_per_byte == pytest.approx(20 / math.log(2) / 30)
    assert result.noise_stderr == pytest.approx(math.sqrt(8 / 2) / 8)
    assert (result.num_rows, result.num_tokens) == (2, 8)
    assert result.ppl_stderr == pytest.approx(result.ppl * result.stderr)


def test_the_rows_error_is_that_of_a_ratio_of_sums():
    """sqrt(R/(R-1) sum (x - nelbo n)^2) / sum n, with three rows, where R/(R-1) is plain to see."""
    loss, tokens = torch.tensor([9.0, 16.0, 20.0]), torch.tensor([4, 6, 10])
    residuals = [x - 45 / 20 * n for x, n in ((9, 4), (16, 6), (20, 10))]
    expected = math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 20
    assert LikelihoodSums.of_rows(loss, tokens).estimate().stderr == pytest.approx(expected)


def test_sums_do_not_depend_on_how_rows_are_split():
    loss, tokens, _ = simulated(40, 3)
    whole = LikelihoodSums.of_rows(loss, tokens)
    parts = LikelihoodSums.empty()
    for low, high in ((0, 1), (1, 17), (17, 40)):
        parts = parts + LikelihoodSums.of_rows(loss[low:high], tokens[low:high])
    torch.testing.assert_close(parts.as_tensor(), whole.as_tensor())
    assert parts.estimate().stderr == pytest.approx(whole.estimate().stderr)


def test_errors_are_the_spread_of_repeated_experiments():
    estimates = [LikelihoodSums.of_rows(*simulated(60, 2, seed)[:2]).estimate() for seed in range(300)]
    spread = torch.tensor([e.nelbo for e in estimates]).std()
    claimed = torch.tensor([e.stderr for e in estimates]).mean()
    assert float(claimed / spread) == pytest.approx(1, abs=0.15)
    # noise alone, documents fixed
    _, tokens, level = simulated(60, 2)
    fixed = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(1000 + seed)
        noise = 5.0 * torch.randn(60, 2, generator=generator, dtype=torch.float64)
        fixed.append(LikelihoodSums.of_rows(level[:, None] + noise, tokens).estimate())
    spread = torch.tensor([e.nelbo for e in fixed]).std()
    claimed = torch.tensor([e.noise_stderr for e in fixed]).mean()
    assert float(claimed / spread) == pytest.approx(1, abs=0.15)


def test_one_draw_has_no_noise_error_and_one_row_no_row_error():
    result = LikelihoodSums.of_rows(torch.tensor([5.0]), torch.tensor([4])).estimate()
    assert result.noise_stderr is None
    assert math.isnan(result.stderr)
    with pytest.raises(ValueError, match="no tokens were scored"):
        LikelihoodSums.empty().estimate()
