"""What recipes for fine-tuning ask: PEFT, new tokens, checkpointed activations, embeddings, hidden states."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM, BD3LMForCausalLM
from tests.checkpoint.hf.test_modeling import OBJECTIVES, make


def text_of(rows=2, length=12):
    return torch.randint(2, 29, (rows, length), generator=torch.Generator().manual_seed(1))


def noise():
    return torch.Generator().manual_seed(2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_hidden_states_come_with_labels(objective):
    model, text = make(objective), text_of()
    found = model(text, labels=text, generator=noise(), output_hidden_states=True)
    assert [tuple(h.shape) for h in found.hidden_states] == [(2, 12, 32)] * 3
    plain = model(text, labels=text, generator=noise())
    assert torch.equal(found.loss, plain.loss)
    assert plain.hidden_states is None
    if objective != "sedd":  # whose head reads the noise level too
        cond = model.conditioning(None, 2, text.device)
        torch.testing.assert_close(model.backbone.output_layer(found.hidden_states[-1], cond), found.logits)
    loss, logits, hidden = model(text, labels=text, generator=noise(), output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, found.loss)
    assert torch.equal(logits, found.logits)
    assert len(hidden) == 3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_embeddings_stand_for_ids(objective):
    model, text, sigma = make(objective), text_of(), torch.tensor([0.4, 0.9])
    embeds = model.get_input_embeddings()(text)
    torch.testing.assert_close(model(inputs_embeds=embeds, timesteps=sigma).logits, model(text, sigma).logits)
    expected = model(text, labels=text, generator=noise()).loss
    embeds = embeds.detach().requires_grad_()
    found = model(inputs_embeds=embeds, labels=text, generator=noise()).loss
    torch.testing.assert_close(found, expected)
    found.backward()
    assert embeds.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="must be given as input_ids"):
        make("bd3lm")(inputs_embeds=embeds, labels=text, mask_rate=torch.ones(2))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations_change_no_gradient(objective, use_reentrant):
    model, text, calls = make(objective, dropout=0.1).train(), text_of(), []
    model.backbone.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        model.zero_grad()
        calls.clear()
        torch.manual_seed(3)
        loss = model(text, labels=text, generator=noise()).loss
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    assert len(calls) == 1
    assert model.supports_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed = gradients()
    assert len(calls) == 2, "the layer ran again in the backward pass"
    assert len(plain) == len(checkpointed)
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)
    model.eval()(text, labels=text, generator=noise())
    assert len(calls) == 3
    model.gradient_checkpointing_disable()
    model.train()
    gradients()
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_new_tokens_go_behind_the_mask_and_old_ones_keep_their_logits(objective, tmp_path):
    model, text, sigma = make(objective), text_of(), torch.tensor([0.4, 0.9])
    before = model(text, sigma).logits
    rows = model.backbone.vocab_embed.embedding[:29].mean(0)
    returned = model.resize_token_embeddings(33)
    assert returned is model.get_input_embeddings()
    assert (model.config.vocab_size, model.config.mask_token_id) == (33, 29)
    after = model(text, sigma).logits
    torch.testing.assert_close(after[..., :30], before)
    torch.testing.assert_close(after[..., 30:], before[..., :29].mean(-1, keepdim=True).expand(-1, -1, 3))
    torch.testing.assert_close(model.backbone.vocab_embed.embedding[31], rows)
    new = torch.cat([text, torch.tensor([[30, 32], [31, 30]])], dim=1)
    assert model.score(new).nats.isfinite().all()
    ids = model.generate(new, max_new_tokens=40, seed=1, stop_at_eos=False, num_steps=4)
    assert 29 not in ids[:, 14:].tolist()[0] + ids[:, 14:].tolist()[1], "the mask is still no text"
    model.save_pretrained(tmp_path)
    again = BD3LM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(new, sigma).logits, model(new, sigma).logits)
    assert model.resize_token_embeddings(pad_to_multiple_of=16).embedding.shape[0] == 48
    assert model.resize_token_embeddings(30).embedding.shape[0] == model.config.vocab_size == 30
    torch.testing.assert_close(model(text, sigma).logits, before)
    assert model.resize_token_embeddings() is returned
    with pytest.raises(ValueError, match="mask 29\\); use at least 30"):
        model.resize_token_embeddings(29)


def test_new_tokens_are_learned():
    model = make("bd3lm", dropout=0.0).train()
    model.resize_token_embeddings(31)
    text = torch.full((4, 12), 30)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(text, labels=text).loss.backward()
        optimizer.step()
    assert (model.eval().generate(text[:1, :4], max_new_tokens=8, do_sample=False) == 30).all()


@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "ar"])
def test_lora_for_causal_lm_trains_adapters_alone_and_comes_back(objective, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    text, options = text_of(4), {"seed": 1, "max_new_tokens": 6, "stop_at_eos": False}
    base = make(objective, dropout=0.0)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["attn_qkv", "attn_out"])
    model = get_peft_model(base, config).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=text, attention_mask=torch.ones_like(text), labels=text, generator=noise()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    for name, tensor in base.state_dict().items():
        if "lora" not in name:
            assert torch.equal(tensor, frozen[name.replace(".base_layer", "")]), name
    model.save_pretrained(tmp_path)
    ids = model.generate(input_ids=text, attention_mask=torch.ones_like(text), **options)
    assert ids.shape == (4, 18)
    nats = model.score(text, seed=1).nats
    again = PeftModel.from_pretrained(make(objective, dropout=0.0), tmp_path).eval()
    assert torch.equal(again.generate(input_ids=text, **options), ids)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged.score(text, seed=1).nats, nats, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_causal_lm_refuses_what_next_token_scorers_ask(objective, tmp_path):
    """Such a program reads logits of plain text as next-token predictions, which only ar's are."""
    model = make(objective)
    name = "BD3LM" if objective == "ar" else "BD3LMForCausalLM"
    model.config.auto_map = {
        "AutoConfig": "configuration_bd3lm.BD3LMConfig", "AutoModelForCausalLM": f"modeling_bd3lm.{name}",
    }  # fmt: skip
    model.save_pretrained(tmp_path)
    causal = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    text, sigma = text_of(), torch.tensor([0.4, 0.9])
    if objective == "ar":
        assert torch.equal(causal(text).logits, model(text).logits)
        return
    for options in ({}, {"timesteps": sigma}, {"attention_mask": torch.ones_like(text)}):
        with pytest.raises(ValueError, match=r"use model\.score\(ids\)"):
            causal(text, **options)
    noisy = text.clone()
    noisy[:, 5] = 29
    assert torch.equal(causal(noisy, sigma).logits, model(noisy, sigma).logits), "text with masks is a denoiser's"
    assert torch.equal(causal(text, sigma, sample_mode=True).logits, model(text, sigma, sample_mode=True).logits)
    assert causal(text, labels=text).loss.isfinite()
    assert torch.equal(causal.score(text).nats, model.score(text).nats)
    options = {"seed": 1, "max_new_tokens": 5, "num_steps": 4}
    assert torch.equal(causal.generate(text, **options), model.generate(text, **options))
    causal.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(again).__name__ == BD3LMForCausalLM.__name__
