"""generate(): the laws of its samplers, its cache, prompts and stops."""

import itertools
import json

import pytest
import torch

from bd3lm_scale.checkpoint.hf.generation_bd3lm import Draws, Settings
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from tests.checkpoint.hf.test_modeling import OBJECTIVES, make

STEPS = {"mdlm": {"num_steps": 8, "sampler": "ancestral"}, "sedd": {"num_steps": 8}}


def prompts(batch=2, length=5):
    return torch.randint(2, 29, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_text_longer_than_the_context_has_no_masks_and_keeps_the_prompt(objective):
    model, given = make(objective), prompts()
    ids = model.generate(given, max_new_tokens=45, seed=1, stop_at_eos=False, **STEPS.get(objective, {}))
    assert ids.shape == (2, 50)
    assert torch.equal(ids[:, :5], given)
    assert int(ids.max()) < model.config.mask_token_id
    again = model.generate(given, max_new_tokens=45, seed=1, stop_at_eos=False, **STEPS.get(objective, {}))
    assert torch.equal(ids, again), "a seed gives the same text"
    assert not torch.equal(
        ids, model.generate(given, max_new_tokens=45, seed=2, stop_at_eos=False, **STEPS.get(objective, {}))
    )


@pytest.mark.parametrize("objective", ["bd3lm", "ar"])
@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral"])
def test_the_cache_changes_nothing_within_the_context(objective, sampler):
    options = {"max_new_tokens": 11, "seed": 3, "stop_at_eos": False, "sampler": sampler, "num_steps": 3}
    model = make(objective)
    assert torch.equal(model.generate(prompts(), **options), model.generate(prompts(), use_cache=False, **options))


@torch.no_grad()
def test_the_cache_slides_over_blocks():
    """Beyond the context a block attends to window - S cached tokens: decoding block by block or in one call."""
    model, text = make("bd3lm"), torch.randint(0, 29, (2, 40))
    one_by_one, at_once = model.new_cache(), model.new_cache()
    for start in range(0, 40, 4):
        model(text[:, start : start + 4], past_key_values=one_by_one, store_kv=True)
        assert one_by_one.length <= 12
    model(text, past_key_values=at_once, store_kv=True)
    block = torch.full((2, 4), 29)
    expected = model(block, past_key_values=one_by_one).logits
    torch.testing.assert_close(model(block, past_key_values=at_once).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral"])
@torch.no_grad()
def test_samples_follow_the_models_own_law(sampler):
    """A block of two tokens: either is drawn first with chance 1/2, the other given it; 3^2 outcomes, chi-square."""
    model = make("bd3lm", length=4, block_size=2, vocab_size=4, ignore_bos=False, bos_token_id=None, eos_token_id=None)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    mask = 3

    def chances(tokens, position):
        logits = model(torch.tensor([tokens])).logits[0, position]
        logits[mask] = float("-inf")
        return logits.softmax(-1)

    alone = [chances([mask, mask], i) for i in range(2)]
    law = torch.tensor([
        0.5 * float(alone[0][a] * chances([a, mask], 1)[b]) + 0.5 * float(alone[1][b] * chances([mask, b], 0)[a])
        for a, b in itertools.product(range(3), repeat=2)
    ])  # fmt: skip
    count = 3000
    # the more steps, the rarer two tokens in one step, which would be drawn independently
    ids = model.generate(max_new_tokens=2, num_return_sequences=count, seed=5, sampler=sampler, num_steps=64)
    found = torch.bincount(ids[:, 0] * 3 + ids[:, 1], minlength=9)
    chi_square = float(((found - count * law) ** 2 / (count * law)).sum())
    assert chi_square < 26.1, "8 degrees of freedom, p = 0.001"


@torch.no_grad()
def test_sedd_analytic_sampler_unmasks_at_the_processs_rate():
    """With exact scores a token is still masked at time t with chance t."""
    model = make("sedd", length=64, bos_token_id=None)
    model.generation_config.bos_token_id = None
    seen = []
    exact = torch.full((30,), 1 / 29).log() + torch.log(torch.tensor(29.0))

    def scores(tokens_BL, region, cache, time_B, position_B):
        seen.append((float(time_B[0]), float((tokens_BL == 29).float().mean())))
        return model._without_mask(exact.expand(*tokens_BL.shape, 30).clone())

    model._denoise = scores
    ids = model.generate(max_new_tokens=64, num_return_sequences=64, num_steps=20, seed=1)
    assert int(ids.max()) < 29
    for time, masked in seen[1:]:
        assert abs(masked - time) < 5 * (0.25 / 4096) ** 0.5


def test_rows_of_a_batch_do_not_see_each_other():
    for objective in ("ar", "bd3lm"):
        # blocks of one token leave no random order, and no draws are left when the best token is taken
        model = make(objective, block_size=1)
        given = prompts(3, 6)
        mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
        ids = model.generate(given, attention_mask=mask, max_new_tokens=5, do_sample=False, stop_at_eos=False)
        for row, (low, high) in enumerate(((0, 6), (0, 3), (2, 6))):
            alone = model.generate(given[row : row + 1, low:high], max_new_tokens=5, do_sample=False, stop_at_eos=False)
            assert torch.equal(ids[row, :6], given[row]), "the columns given"
            assert torch.equal(ids[row, 6:], alone[0, high - low :]), (objective, row)


@pytest.mark.parametrize("objective", ["bd3lm", "ar", "mdlm"])
def test_rows_end_after_their_first_new_eos(objective):
    model = make(objective)
    with torch.no_grad():
        model.backbone.output_layer.linear.bias[1] += 1.0
    given = prompts()
    given[0, 2] = 1  # an EOS in the prompt ends nothing
    ids = model.generate(given, max_new_tokens=60, seed=1)
    for row in ids[:, 5:].tolist():
        end = row.index(1)
        assert set(row[end:]) == {1}, "filled up with padding, which is EOS here"
    assert ids.shape[1] < 65
    assert model.generate(given, max_new_tokens=60, seed=1, stop_at_eos=False).shape[1] == 65


def test_without_a_prompt_text_starts_with_bos():
    model = make("bd3lm")
    assert model.generate(max_new_tokens=3, seed=1)[0, 0] == model.generation_config.bos_token_id
    assert model.generate(max_new_tokens=3, num_return_sequences=4, seed=1, stop_at_eos=False).shape == (4, 4)
    assert model.generate(prompts(), max_length=8, seed=1, stop_at_eos=False).shape == (2, 8)


def test_defaults_come_from_the_folder(tmp_path):
    make("bd3lm").save_pretrained(tmp_path / "first")
    fields = {"max_new_tokens": 7, "do_sample": True, "top_p": 0.5, "sampler": "ancestral", "num_steps": 3}
    (tmp_path / "first" / "generation_config.json").write_text(json.dumps(fields))
    BD3LM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    for folder in ("first", "again"):
        model = BD3LM.from_pretrained(tmp_path / folder)
        settings = model._settings(model.generation_config, {"top_k": 2})
        assert {name: getattr(settings, name) for name in fields} == fields
        assert settings.top_k == 2


def test_filters_keep_what_they_say():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = lambda **options: (Draws(Settings(**options), "cpu").filtered(logits) > -50).tolist()  # noqa: E731
    assert kept(top_p=0.8001) == [True, True, False, False]
    assert kept(top_p=0.6) == [True, False, False, False], "the token that crosses top_p is dropped"
    assert kept(top_p=0.1) == [True, False, False, False], "the best token always stays"
    assert kept(top_k=3) == [True, True, True, False]
    assert Draws(Settings(temperature=0), "cpu").tokens(logits) == 0


def test_bad_calls_say_what_to_do():
    model = make("bd3lm")
    with pytest.raises(ValueError, match="unknown options \\['beams'\\]"):
        model.generate(beams=3)
    with pytest.raises(ValueError, match="may not contain the mask"):
        model.generate(torch.tensor([[29]]))
    with pytest.raises(ValueError, match="use first_hitting or ancestral"):
        model.generate(sampler="best")
