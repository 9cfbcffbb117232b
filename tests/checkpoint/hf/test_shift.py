"""Exports of models whose predictions are read one position early (diffusion.shift_targets)."""

from dataclasses import replace

import pytest
import torch

from bd3lm_scale.checkpoint.hf.export import export_hf
from bd3lm_scale.checkpoint.hf.importing import import_hf
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from tests.checkpoint.test_conversion import VOCAB, configuration, native

LENGTH, MASK = 16, VOCAB - 1


def exported(folder, objective="bd3lm", block_size=4, shift_targets=True):
    """The same weights without adaptive norms, whatever the objective."""
    config = configuration(objective)
    diffusion = replace(config.diffusion, block_size=block_size, shift_targets=shift_targets)
    config = replace(config, diffusion=diffusion, model=replace(config.model, adaln=False))
    export_hf(native(folder / "native", config), folder / "hf")
    return BD3LM.from_pretrained(folder / "hf").eval()


@pytest.fixture
def tokens():
    return torch.randint(0, MASK, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def assert_same(one, other):
    torch.testing.assert_close(one[..., :MASK], other[..., :MASK], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_predictions_are_those_of_the_positions_before(tokens, tmp_path):
    """Against the same weights unshifted, in pairs, in plain sequences, and from the cache."""
    model, plain = exported(tmp_path / "a"), exported(tmp_path / "b", shift_targets=False)
    noisy = tokens.clone()
    noisy[:, 1::2] = MASK
    pair = torch.cat([noisy, tokens], dim=1)
    logits, unshifted = model(pair).logits, plain(pair).logits
    clean = plain(tokens, sample_mode=True).logits
    for token in range(1, LENGTH):
        source = clean if token % 4 == 0 else unshifted
        assert_same(logits[:, token], source[:, token - 1])
    cache = model.new_cache()
    for start in range(0, LENGTH, 4):
        block = noisy[:, start : start + 4]
        row = torch.cat([tokens[:, :start], block], dim=1)
        first = 1 if start == 0 else 0
        assert_same(model(row, sample_mode=True).logits[:, start + first :], logits[:, start + first : start + 4])
        assert_same(model(block, past_key_values=cache).logits[:, first:], logits[:, start + first : start + 4])
        model(tokens[:, start : start + 4], past_key_values=cache, store_kv=True)


@torch.no_grad()
def test_shifted_blocks_of_one_token_are_the_autoregressive_model(tokens, tmp_path):
    model, ar = exported(tmp_path / "a", block_size=1), exported(tmp_path / "b", "ar", shift_targets=False)
    torch.testing.assert_close(model.score(tokens).token_nats, ar.score(tokens).token_nats, rtol=1e-5, atol=1e-5)
    assert float((model(tokens, labels=tokens).loss - ar(tokens, labels=tokens).loss).abs()) < 1e-5
    options = {"max_new_tokens": 12, "do_sample": False, "stop_at_eos": False}
    assert torch.equal(model.generate(tokens[:, :3], **options), ar.generate(tokens[:, :3], **options))


@pytest.mark.parametrize("objective", ["bd3lm", "mdlm"])
def test_generation_with_and_without_a_cache_is_the_same(objective, tokens, tmp_path):
    model = exported(tmp_path, objective)
    options = {"max_new_tokens": LENGTH - 5, "seed": 3, "stop_at_eos": False, "top_p": 0.9}
    cached, recomputed = (model.generate(tokens[:, :5], use_cache=flag, **options) for flag in (True, False))
    assert torch.equal(cached, recomputed)
    assert not (cached == MASK).any()
    _, meta = import_hf(tmp_path / "hf")
    assert meta["config"]["diffusion"]["shift_targets"] is True
