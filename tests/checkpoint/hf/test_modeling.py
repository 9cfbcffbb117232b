"""The exported class: the reference's logits, losses that are what they say, and life inside transformers."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3lm_scale.checkpoint.hf.configuration_bd3lm import BD3LMConfig
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM

GOLDENS = Path(__file__).parents[2] / "goldens"
TINY = GOLDENS / "hf_tiny"
OBJECTIVES = ("bd3lm", "mdlm", "sedd", "ar")
FIELDS = {
    "bd3lm": {"block_size": 4},
    "mdlm": {"cross_attn": False},
    "sedd": {"cross_attn": False, "time_conditioning": True, "adaln": True},
    "ar": {"cross_attn": False, "causal": True, "adaln": False, "var_min": False},
}

DECODER = {
    "norm": "rmsnorm", "norm_eps": 1e-6, "mlp": "swiglu", "ffn_hidden_size": 48, "n_kv_heads": 2, "head_dim": 12,
    "qk_norm": True, "mlp_bias": False, "adaln": False,
    "rope": {"theta": 500.0, "scaling": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_context_length": 8},
}  # fmt: skip
NETWORK = DECODER if os.environ.get("BD3LM_SCALE_TEST_NETWORK") == "decoder" else {}
"""The laws of the class are run a second time with it: of a decoder instead of the paper's DiT."""


def golden(name):
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDENS / name).items()}


def make(objective, length=16, **fields):
    """A tiny model without a zero weight."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_dim": 32, "n_blocks": 2, "n_heads": 4, "cond_dim": 8, "model_length": length}
    config = BD3LMConfig(
        **{**sizes, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **NETWORK, **FIELDS[objective], **fields}
    )
    model = BD3LM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def goldens():
    return golden("hf_tiny_goldens.npz")


@pytest.fixture(params=[0, 1], ids=["unconditioned", "time_conditioned"])
def reference(request):
    """The reference's weights in our class, and the suffix of its goldens."""
    model = BD3LM.from_pretrained(TINY).eval()
    model.config.time_conditioning = bool(request.param)
    return model, f"_bs4_tc{request.param}"


def largest(difference):
    return float(difference.detach().abs().max())


@torch.no_grad()
def test_training_mode_equals_the_reference(reference, goldens):
    model, suffix = reference
    pair = torch.cat([goldens["xt"], goldens["x0"]], dim=1)
    assert largest(model(pair, goldens["timesteps"]) - goldens[f"train_logits{suffix}"]) < 1e-5
    assert largest(model(pair, goldens["timesteps"], sample_mode=False) - goldens[f"train_logits{suffix}"]) < 1e-5


@torch.no_grad()
def test_sample_mode_equals_the_reference(reference, goldens):
    model, suffix = reference
    times = goldens["timesteps"]
    full = goldens[f"sample_full{suffix}"]
    assert largest(model(goldens["xt"], times, sample_mode=True) - full) < 1e-5
    assert largest(model(goldens["xt"], times) - full) < 1e-5, "a plain sequence needs no flag"
    prefix = goldens[f"sample_prefix{suffix}"]
    assert largest(model(goldens["xt"][:, : prefix.shape[1]], times, sample_mode=True) - prefix) < 1e-5


@torch.no_grad()
def test_cached_decoding_equals_the_reference(goldens):
    model = BD3LM.from_pretrained(TINY).eval()
    model.reset_kv_cache(eval_batch_size=2)
    cache = model.new_cache()
    for start in range(0, 32, 4):
        here = slice(start, start + 4)
        noisy, clean = goldens["xt"][:, here], goldens["x0"][:, here]
        assert largest(model(noisy, sample_mode=True) - goldens["kv_masked_bs4"][:, here]) < 1e-5
        assert largest(model(noisy, past_key_values=cache) - goldens["kv_masked_bs4"][:, here]) < 1e-5
        assert largest(model(clean, sample_mode=True, store_kv=True) - goldens["kv_clean_bs4"][:, here]) < 1e-5
        model(clean, past_key_values=cache, store_kv=True)
    model.drop_kv_cache()


@torch.no_grad()
def test_hidden_states_equal_the_reference(goldens):
    model = BD3LM.from_pretrained(TINY).eval()
    pair = torch.cat([goldens["xt"], goldens["x0"]], dim=1)
    _, hidden = model(pair, goldens["timesteps"], output_hidden_states=True)
    assert largest(torch.stack(hidden) - goldens["hidden_bs4"]) < 1e-5


@torch.no_grad()
def test_labels_with_given_noise_give_the_references_loss():
    model, losses = BD3LM.from_pretrained(TINY).eval(), golden("loss_goldens.npz")
    clean, noisy, rate = losses["x0"], losses["xt"], losses["t_bs4"]
    for tokens in (noisy, torch.cat([noisy, clean], dim=1)):
        loss, logits = model(tokens, labels=clean, mask_rate=rate)
        assert abs(float(loss - losses["bd3lm_bs4_eval_loss"])) < 1e-5
        assert logits.shape == (2, 32, 100)
    per_token, _ = model.token_losses(noisy, clean, model._counted(clean, None), rate)
    assert largest(per_token - losses["bd3lm_bs4_eval_nlls"] * losses["bd3lm_bs4_eval_tokmask"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_changes_nothing(objective):
    model = make(objective)
    text = torch.randint(0, 29, (1, 12))
    padded = torch.cat([text, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 12 + [0] * 4])
    sigma = torch.tensor([0.7])
    alone = model(text, sigma).logits
    assert largest(model(padded, sigma, attention_mask=mask).logits[:, :12] - alone) < 1e-5
    scores = model.score(padded, attention_mask=mask)
    assert int(scores.num_tokens) == 11
    assert largest(scores.token_nats[:, 12:]) == 0


@torch.no_grad()
def test_autoregressive_score_is_the_exact_likelihood():
    model, text = make("ar"), torch.randint(0, 29, (3, 10))
    logits = model(text).logits
    logits[..., model.config.mask_token_id] = float("-inf")
    expected = -logits.log_softmax(-1)[:, :-1].gather(-1, text[:, 1:, None])[..., 0]
    torch.testing.assert_close(model.score(text).token_nats[:, 1:], expected)
    torch.testing.assert_close(model(text, labels=text).loss, expected.mean())


@torch.no_grad()
def test_block_size_1_scores_exactly():
    """Every token is masked once and sees all tokens before it: no Monte-Carlo error is left."""
    model, text = make("bd3lm", block_size=1), torch.randint(0, 29, (2, 10))
    first, second = model.score(text, seed=1), model.score(text, seed=2)
    torch.testing.assert_close(first.nats, second.nats)
    for i in (1, 5, 9):
        noisy = torch.cat([text[:, :i], torch.full((2, 1), model.config.mask_token_id)], dim=1)
        logits = model(noisy, sample_mode=True).logits[:, -1]
        logits[:, model.config.mask_token_id] = float("-inf")
        expected = -logits.log_softmax(-1).gather(-1, text[:, i, None])[:, 0]
        torch.testing.assert_close(first.token_nats[:, i], expected)


@torch.no_grad()
@pytest.mark.parametrize("objective", ["bd3lm", "mdlm"])
def test_monte_carlo_bound_agrees_with_the_exhaustive_one(objective):
    """Over blocks of 2, the expectation over times has a closed form: every subset of masks, weighted."""
    model = make(objective, length=4, **({"block_size": 2} if objective == "bd3lm" else {}), ignore_bos=False)
    text = torch.tensor([[3, 7, 11, 5]])[:, : 4 if objective == "bd3lm" else 2]
    mask, total = model.config.mask_token_id, 0.0
    for start in range(0, text.shape[1], 2):
        for hidden in ((0,), (1,), (0, 1)):
            noisy = text[:, : start + 2].clone()
            noisy[:, [start + i for i in hidden]] = mask
            logits = model(noisy, sample_mode=True).logits
            logits[..., mask] = float("-inf")
            nll = -logits.log_softmax(-1).gather(-1, text[:, : start + 2, None])[..., 0]
            # integral of t^(k-1) (1-t)^(2-k) dt
            total += 0.5 * float(sum(nll[0, start + i] for i in hidden))
    estimates = model.score(text.expand(4096, -1), draws=1).nats
    assert abs(float(estimates.mean()) - total) < 5 * float(estimates.std()) / 4096**0.5
    assert float(model.score(text).nats) == pytest.approx(total, rel=1e-6), "few patterns are enumerated"


def test_labels_train_every_objective():
    for objective in OBJECTIVES:
        model = make(objective, dropout=0.0).train()
        text = torch.randint(0, 29, (8, 16))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        before = float(model.eval().score(text, draws=4).nats_per_token.mean())
        model.train()
        for _ in range(15):
            optimizer.zero_grad()
            model(text, labels=text).loss.backward()
            optimizer.step()
        assert float(model.score(text, draws=4).nats_per_token.mean()) < before
        assert model.training, "score leaves the mode as it was"


def test_prompts_are_conditioned_on_and_not_scored():
    model, text = make("bd3lm"), torch.randint(0, 29, (2, 12))
    labels = text.clone()
    labels[:, :5] = -100
    scores = model.score(text, labels=labels, draws=4)
    assert scores.num_tokens.tolist() == [7, 7]
    assert largest(scores.token_nats[:, :5]) == 0


def test_times_are_stratified_over_all_blocks_and_clipped_in_training():
    model = make("bd3lm", sampling_eps_min=0.45, sampling_eps_max=0.95)
    for low, high in ((1e-3, 1.0), (0.45, 0.95)):
        rate = model.draw_mask_rates(8, 16, torch.Generator().manual_seed(3), "cpu")
        assert rate.shape == (8, 4)
        strata = ((rate.flatten().sort().values - low) / (high - low) * 32).floor()
        assert strata.tolist() == list(range(32)), "one time in each of 32 equal parts"
        model.train()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_network_and_its_loss_compile_without_breaks(objective):
    model = make(objective)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    text, sigma = torch.randint(0, 29, (2, 32 if objective == "bd3lm" else 16)), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        assert largest(compiled(text, sigma).logits - model(text, sigma).logits) < 1e-5
    model.train()
    loss = compiled(text[:, :16], labels=text[:, :16]).loss
    loss.backward()
    assert loss.isfinite()


def test_bfloat16_stays_close_and_keeps_float32_logits(goldens):
    model = BD3LM.from_pretrained(TINY).eval()
    exact = model(goldens["x0"]).detach()
    rounded = model.to(torch.bfloat16)(goldens["x0"])
    assert rounded.dtype == torch.float32
    assert 0 < largest(rounded - exact) < 0.15 * float(exact.std())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_save_pretrained_again_keeps_bits_and_code(tmp_path, objective):
    model = make(objective)
    model.save_pretrained(tmp_path)
    assert {"configuration_bd3lm.py", "modeling_bd3lm.py", "generation_bd3lm.py", "likelihood_bd3lm.py"} <= {
        path.name for path in tmp_path.iterdir()
    }
    again = BD3LM.from_pretrained(tmp_path)
    assert again.config.objective == objective
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }


def test_fresh_models_start_as_the_paper_says():
    model = BD3LM(make("bd3lm").config)
    text = torch.randint(0, 29, (2, 16))
    assert largest(model.backbone.output_layer.linear.weight) == 0
    if model.config.adaln:
        assert largest(model.backbone.blocks[0].adaLN_modulation.bias) == 0
    with torch.no_grad():
        loss = model.cross_entropy(model(text).logits, text)
    assert float(loss[0, 0]) == pytest.approx(np.log(29)), "ln(V - 1)"
    assert 0 < float(model.backbone.blocks[1].attn_qkv.weight.detach().abs().max()) <= 32**-0.5


def test_bad_calls_say_what_to_do():
    model = make("bd3lm")
    with pytest.raises(ValueError, match="two equal halves"):
        model(torch.zeros(1, 5, dtype=torch.long), sample_mode=False)
    with pytest.raises(ValueError, match="split the text into rows"):
        model.score(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="one per block of 4"):
        model(
            torch.zeros(1, 16, dtype=torch.long),
            labels=torch.zeros(1, 16, dtype=torch.long),
            mask_rate=torch.ones(1, 3),
        )
    with pytest.raises(ValueError, match="pass timesteps"):
        make("sedd")(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="no key/value cache"):
        make("mdlm").new_cache()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        BD3LMConfig(vocab_size=10, mask_token_id=10)


def test_published_fields_tell_the_objective():
    for objective in OBJECTIVES:
        assert BD3LMConfig(**FIELDS[objective]).objective == objective
