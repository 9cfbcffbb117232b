"""Llama, Qwen2 and Qwen3 folders become models of objective ar: same logits, same bits, or a refusal that says why."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bd3lm_scale.checkpoint.hf.decoders import decoder_config, import_decoder, kind_of, their_names
from bd3lm_scale.checkpoint.hf.export import export_hf
from bd3lm_scale.checkpoint.hf.mask_token import NEW_ROW, OWN, RESERVED_ID, SPARE_ROW, choose_mask, write_tokenizer
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.names import PREFIX, Architecture, table
from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.config.sizes import count
from bd3lm_scale.data.tokenizer import load_tokenizer
from tests.checkpoint.hf import make_decoders
from tests.checkpoint.hf.make_decoders import DECODERS, SHARDED, VOCAB, byte_level


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every small decoder as a folder, and its logits."""
    folder = tmp_path_factory.mktemp("decoders")
    make_decoders.main(folder)
    return folder


def stored(folder):
    """All tensors of a folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def check_round_trip(source, name, logits, tokens, destination):
    """Imported and exported again: the same function, and every number of the source in its place."""
    decoder = import_decoder(source / name)
    write_weights(destination / "native", decoder.weights, decoder.meta)
    reader = open_checkpoint(destination / "native")
    export_hf(reader, destination / "hf")
    model = BD3LM.from_pretrained(destination / "hf").eval()
    with torch.no_grad():
        ours = model(tokens).logits[..., :VOCAB]
    assert float((ours - logits).abs().max()) < 1e-5
    theirs, exported = stored(source / name), stored(destination / "hf")
    arch = Architecture.of(decoder_config(source / name, fields_of(source / name), kind(source / name), VOCAB), VOCAB)
    seen = set()
    for entry in table(arch):
        names = their_names(entry)
        if entry.published == "output_layer.linear.weight" and arch.tied_head:
            names = ["model.embed_tokens.weight"]
        rows = torch.cat([theirs[n] for n in names])
        found = exported[PREFIX + entry.published]
        assert torch.equal(found[: len(rows)], rows), entry.published
        if len(found) > len(rows):
            assert torch.equal(found[-1], rows.double().mean(0).float()), "a new row starts at the mean of the others"
            assert len(found) == len(rows) + 1
        seen |= set(names)
    assert seen == set(theirs), "every tensor of the source is somewhere"
    return decoder


def fields_of(folder):
    return json.loads((folder / "config.json").read_text())


def kind(folder):
    return kind_of(folder, fields_of(folder))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_keeps_its_function_and_its_bits(folders, name, tmp_path):
    expected = torch.load(folders / "expected.pt", weights_only=True)
    decoder = check_round_trip(folders, name, expected[name], expected["tokens"], tmp_path)
    assert (decoder.mask.origin, decoder.mask.token_id, decoder.meta["vocab_size"]) == (NEW_ROW, VOCAB, VOCAB + 1)
    config = decoder.meta["config"]
    assert (config["diffusion"]["objective"], config["data"]["context_length"]) == ("ar", 64)
    assert (len(list((folders / name).glob("*.safetensors"))) > 1) == (name in SHARDED)


def test_older_configurations_and_pickles_of_tensors_are_read(folders, tmp_path):
    """rope_theta and rope_scaling beside the other fields, torch_dtype, and pytorch_model.bin files with an index."""
    source = tmp_path / "llama3"
    shutil.copytree(folders / "llama3", source)
    fields = fields_of(source)
    rope = fields.pop("rope_parameters")
    fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    fields["torch_dtype"] = fields.pop("dtype")
    (source / "config.json").write_text(json.dumps(fields))
    tensors = stored(source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    weight_map = {}
    for number, names in enumerate(halves):
        torch.save({name: tensors[name] for name in names}, source / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(names, f"pytorch_model-{number}.bin")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ours, theirs = import_decoder(source), import_decoder(folders / "llama3")
    assert ours.meta["config"] == theirs.meta["config"]
    for (name, _, one), (same, _, other) in zip(ours.weights, theirs.weights, strict=True):
        assert name == same
        assert torch.equal(one, other)


class Trap:
    def __reduce__(self):
        return (open, ("/tmp/never", "w"))


def test_nothing_but_tensors_is_read_from_pickles(folders, tmp_path):
    source = tmp_path / "qwen3"
    source.mkdir()
    shutil.copyfile(folders / "qwen3" / "config.json", source / "config.json")
    for content in ({"model.norm.weight": Trap()}, {"step": 3}, [1]):
        torch.save(content, source / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model.bin: .*save the model as safetensors"):
            import_decoder(source)


REFUSED = [
    ("llama", {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
    ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ("llama", {"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"}, "another architecture"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act ('gelu')"),
    ("llama", {"attention_bias": True}, "attention_bias (True)"),
    ("qwen3", {"attention_bias": True}, "attention_bias (True)"),
    ("qwen3", {"num_experts": 8}, "num_experts (8)"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor (0.5)"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling ('yarn')"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling ('dynamic')"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping (30.0)"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types (sliding_attention)"),
    ("qwen2", {"layer_types": None, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "(16)"),
    ("llama", {"hidden_size": None, "num_hidden_layers": "two"}, "num_hidden_layers ('two'): not a count"),
    ("llama", {"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ("qwen3", {"tie_word_embeddings": False}, "missing: lm_head.weight (320, 48)"),
    ("qwen3", {"num_hidden_layers": 1}, "not expected: model.layers.1."),
    ("qwen2", {"num_key_value_heads": 3}, "wrong shape: model.layers.0.self_attn.k_proj.weight is (16, 48)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else None)
def test_what_cannot_be_expressed_is_refused_by_name(folders, tmp_path, name, changes, message):
    source = tmp_path / name
    shutil.copytree(folders / name, source)
    (source / "config.json").write_text(json.dumps(fields_of(source) | changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        import_decoder(source)


def test_windows_that_no_layer_uses_are_no_obstacle(folders, tmp_path):
    source = tmp_path / "qwen2"
    shutil.copytree(folders / "qwen2", source)
    fields = fields_of(source)
    for unused in (
        {"use_sliding_window": False, "sliding_window": 16},
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": None, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "layer_types": None, "max_window_layers": 0},
    ):
        (source / "config.json").write_text(json.dumps(fields | unused))
        import_decoder(source)


@pytest.mark.parametrize(
    ("fields", "published"),
    [
        # Qwen3-0.6B and Llama-3.2-1B as published
        (
            {
                "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
                "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1000000,
                "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "sliding_window": None, "max_window_layers": 28,
            },
            596_049_920,
        ),
        (
            {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
                "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rope_theta": 500000.0,
                "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
                "rope_scaling": {
                    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192, "rope_type": "llama3",
                },
            },
            1_235_814_400,
        ),
    ],
)  # fmt: skip
def test_published_models_have_the_published_sizes(tmp_path, fields, published):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = decoder_config(tmp_path, fields, kind_of(tmp_path, fields), fields["vocab_size"])
    assert count(config, fields["vocab_size"]) == published


# ---- the mask token ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory):
    """A function that writes a tokenizer with these added tokens."""
    return lambda *added, **named: byte_level(tmp_path_factory.mktemp("tokenizer"), *added, **named)


def test_the_mask_is_a_reserved_id_a_spare_row_or_a_new_one(tokenizers_of, tmp_path):
    """<|end|> is id 300; what is added follows."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(3)]
    cases = {
        "reserved": (tokenizers_of(*reserved), 304, None, (301, reserved[0], RESERVED_ID, 304)),
        "named": (tokenizers_of(*reserved, pad_token=reserved[0]), 304, None, (302, reserved[1], RESERVED_ID, 304)),
        "own": (tokenizers_of(*reserved, "[MASK]"), 320, None, (304, "[MASK]", OWN, 320)),
        "spare": (tokenizers_of("<|im_start|>"), 320, None, (302, "<|mask|>", SPARE_ROW, 320)),
        "new": (tokenizers_of("<|im_start|>"), 302, None, (302, "<|mask|>", NEW_ROW, 303)),
        "given": (tokenizers_of(*reserved), 304, 304, (304, "<|mask|>", NEW_ROW, 305)),
        "third": (tokenizers_of(*reserved), 320, 303, (303, reserved[2], RESERVED_ID, 320)),
    }
    for name, (folder, rows, given, (token, text, origin, size)) in cases.items():
        mask = choose_mask(folder, rows, given)
        assert (mask.token_id, mask.text, mask.origin, mask.vocab_size) == (token, text, origin, size), name
        assert write_tokenizer(folder, tmp_path / name, mask)
        before, after = load_tokenizer(folder), load_tokenizer(tmp_path / name)
        assert (after.vocab_size, after.mask_token_id) == (size, token), name
        sentence = f"def f(x): {text} <|unused_305|> {reserved[2]}"
        assert after.encode(sentence) == before.encode(sentence), "and no text makes any of the new ones"
        assert after.decode([token], keep_special=True) == text
    assert choose_mask(cases["reserved"][0], 304, None, {301}).token_id == 302, "not one that the model names"
    with pytest.raises(ValueError, match="has 304 ids, the model 303"):
        choose_mask(cases["reserved"][0], 303)
    for bad in (305, 300, -1):
        with pytest.raises(ValueError, match=rf"mask_token_id \({bad}\)"):
            choose_mask(cases["reserved"][0], 304, bad)


def test_a_reserved_id_that_the_chat_template_writes_is_taken(tokenizers_of):
    folder = tokenizers_of("<|reserved_0|>", "<|reserved_1|>")
    (folder / "chat_template.jinja").write_text("{{ '<|reserved_0|>' }}")
    assert choose_mask(folder, 303).text == "<|reserved_1|>"


def test_a_reserved_row_keeps_its_numbers(folders, tokenizers_of, tmp_path):
    """The exported folder names the mask in config.json and in the tokenizer's files."""
    source = tmp_path / "llama"
    shutil.copytree(folders / "llama", source)
    for file in tokenizers_of("<|reserved_0|>").iterdir():
        shutil.copyfile(file, source / file.name)
    decoder = import_decoder(source)
    assert (decoder.mask.token_id, decoder.meta["vocab_size"]) == (301, VOCAB)
    write_weights(tmp_path / "native", decoder.weights, decoder.meta)
    write_tokenizer(source, tmp_path / "native" / "tokenizer", decoder.mask)
    tokenizer = load_tokenizer(tmp_path / "native" / "tokenizer")
    export_hf(open_checkpoint(tmp_path / "native"), tmp_path / "hf", tokenizer=tokenizer)
    assert fields_of(tmp_path / "hf")["mask_token_id"] == 301
    assert torch.equal(
        stored(tmp_path / "hf")["backbone.vocab_embed.embedding"], stored(source)["model.embed_tokens.weight"]
    )
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (loaded.mask_token, loaded.mask_token_id, len(loaded)) == ("<|reserved_0|>", 301, VOCAB)
