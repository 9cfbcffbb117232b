"""Uses exported folders the way their readers do; needs torch and transformers only. Run by test_fresh_venv.py.

python use_export.py FOLDER    with FOLDER/{bd3lm,mdlm,sedd,ar} exports and FOLDER/expected.pt
"""

import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline


def main(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt", weights_only=True)
    assert "bd3lm_scale" not in sys.modules
    for objective in ("bd3lm", "mdlm", "sedd", "ar"):
        source = folder / objective
        model, info = AutoModelForMaskedLM.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        with torch.no_grad():
            for name, tokens in (("plain", expected["tokens"]), ("pair", expected["pair"])):
                if name == "pair" and objective != "bd3lm":
                    continue
                difference = (model(tokens, expected["sigma"]).logits - expected[f"{objective}.{name}"]).abs().max()
                assert difference < 1e-5, (objective, name, difference)
        check_text(model, source, expected)
        check_training(model, expected["tokens"])
        check_saving(model, source, folder / f"{objective}_again", expected["tokens"], expected["sigma"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat")
    found = tokenizer.apply_chat_template(expected["messages"], return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(found["input_ids"]) == expected["chat"]
    answers = [i for i, mark in zip(found["input_ids"], found["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(answers) == "return x<|im_end|>x<|im_end|>"
    generate = pipeline(
        "text-generation",
        model=str(folder / "bd3lm"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "bd3lm", trust_remote_code=True),
        trust_remote_code=True,
    )
    assert generate("def f(x):", max_new_tokens=8)[0]["generated_text"].startswith("def f(x):")
    prompts = ["def f(x):", "import os\n\n\nclass A:\n    pass\n"]
    generate.tokenizer.pad_token_id = generate.tokenizer.eos_token_id  # as many models have it
    for prompt, found in zip(
        prompts, generate(prompts, batch_size=2, max_new_tokens=8, stop_at_eos=False), strict=True
    ):
        text = found[0]["generated_text"]
        assert text.startswith(prompt), text
        assert len(text) > len(prompt), "nobody loses text to padding"
    print(f"transformers {transformers.__version__}: all good")


def check_text(model, source, expected):
    """The tokenizer round trip, a batch of prompts beyond the context, and likelihoods."""
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        assert tokenizer(text)["input_ids"] == ids, text[:50]
        assert tokenizer.decode(ids) == text
    assert tokenizer.mask_token_id == model.config.mask_token_id != tokenizer.pad_token_id
    prompts = tokenizer(["def f(x):", "import os\n\n\n"], return_tensors="pt", padding=True)
    length = prompts["input_ids"].shape[1] + 100
    ids = model.generate(**prompts, max_new_tokens=100, seed=1, stop_at_eos=False, num_steps=8)
    assert ids.shape == (2, length), "longer than the context of 64"
    text = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert text[0].startswith("def f(x):")
    assert text[1].startswith("import os\n\n\n")
    assert torch.equal(ids[:, : prompts["input_ids"].shape[1]], prompts["input_ids"])
    start = model.generate(max_new_tokens=3, num_steps=2)[0, 0]
    assert start == tokenizer.eos_token_id != tokenizer.bos_token_id, "what precedes documents in training"
    score = model.score(**prompts, draws=4)
    assert (score.perplexity > 1).all()
    assert score.num_tokens.tolist() == (prompts["attention_mask"].sum(1) - 1).tolist()


def check_training(model, tokens):
    """`labels` give a loss that has a gradient."""
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert loss > 0
    assert model.backbone.blocks[0].attn_qkv.weight.grad.abs().max() > 0


def check_saving(model, source, again, tokens, sigma):
    """save_pretrained writes a folder that loads again, in bfloat16 too."""
    model.save_pretrained(again)
    copy = AutoModelForMaskedLM.from_pretrained(again, trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), copy.state_dict().values(), strict=True))
    rounded = AutoModelForMaskedLM.from_pretrained(source, trust_remote_code=True, torch_dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    with torch.no_grad():
        exact = model(tokens, sigma).logits
        assert (rounded(tokens, sigma).logits - exact).abs().max() < 0.3 * exact.std()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
