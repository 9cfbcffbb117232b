"""Small decoders of transformers with random weights, and their logits; needs torch and transformers only.

python make_decoders.py FOLDER    writes FOLDER/NAME for every architecture that this transformers has, expected.pt
"""

import sys
from pathlib import Path

import tokenizers
import torch
import transformers

VOCAB, LENGTH = 320, 48
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 0, "bos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
DECODERS = {
    "llama": ("Llama", {"head_dim": 16, "mlp_bias": True}),
    "llama3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 5e4, "tie_word_embeddings": True}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rms_norm_eps": 0.1}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}
"""Name -> family and what its configuration has beyond COMMON."""
SHARDED = ("llama3", "qwen2")


def build(name: str):
    """One of DECODERS with random weights, norms and biases included."""
    family, fields = DECODERS[name]
    torch.manual_seed(sum(map(ord, name)))
    fields = dict(fields)
    if int(transformers.__version__.split(".")[0]) > 4 and ("rope_theta" in fields or "rope_scaling" in fields):
        theta, scaling = fields.pop("rope_theta", 1e4), fields.pop("rope_scaling", {"rope_type": "default"})
        fields["rope_parameters"] = {**scaling, "rope_theta": theta}
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**COMMON, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0).add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def byte_level(folder: Path, *added: str, **named: str) -> Path:
    """Write a byte-level tokenizer with 300 pieces, <|end|> (EOS, id 300), and these added tokens; the folder."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    assert trained.get_vocab_size() == 300
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|end|>")
    made.add_tokens([tokenizers.AddedToken(name, special=True) for name in added], special_tokens=True)
    if named:
        made.add_special_tokens(named)
    made.save_pretrained(folder)
    return folder


def main(folder: Path) -> None:
    """Write them all."""
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = {"tokens": tokens}
    for name, (family, _) in DECODERS.items():
        if hasattr(transformers, f"{family}ForCausalLM"):
            model = build(name)
            model.save_pretrained(folder / name, max_shard_size="60KB" if name in SHARDED else "5GB")
            with torch.no_grad():
                expected[name] = model(tokens).logits
    torch.save(expected, folder / "expected.pt")
    print(f"transformers {transformers.__version__}:", *expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
