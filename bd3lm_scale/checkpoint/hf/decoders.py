"""From a folder of an autoregressive decoder (Llama, Qwen2 or Qwen3, dense) to native weights of objective `ar`.

Only config.json, generation_config.json, tokenizer files and weights are read; code that lies in the folder is never
run. Weights are safetensors, or pickles through torch's restricted loader (tensors and plain values, nothing else).
What our network cannot express is refused by name, all at once.
"""

import pickle
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bd3lm_scale.checkpoint.hf.importing import INDEX, MAX_PROBLEMS, WEIGHTS, Weights, read_json, tensor_files
from bd3lm_scale.checkpoint.hf.mask_token import MaskToken, choose_mask
from bd3lm_scale.checkpoint.metadata import UNKNOWN_DATA, split_mask_override, weights_meta
from bd3lm_scale.checkpoint.names import Architecture, Entry, shape_problems, table, to_ours
from bd3lm_scale.config.load import from_dict, to_dict
from bd3lm_scale.config.schema import RunConfig

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LONGEST_ROW = 4096
"""data.context_length of an import, unless the model's own is shorter or an override says otherwise."""
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
LLAMA3 = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_context_length",
}
NEUTRAL = {
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "logit_scale": (None, 1, 1.0),
    "partial_rotary_factor": (None, 1, 1.0), "quantization_config": (None,), "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1), "add_cross_attention": (None, False), "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
}  # fmt: skip
"""Fields that would change the function, and the values under which they do not."""
REASONS = {
    "attention_bias": "the output projection of attention has no bias here",
    "hidden_act": "the gate of model.mlp is a SiLU",
    "quantization_config": "save the weights in float32, bfloat16 or float16",
}
KINDS = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""Class in `architectures` -> model_type."""
LAYER = {
    "norm1.weight": ("input_layernorm.weight",),
    "attn_qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn_qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "q_norm.weight": ("self_attn.q_norm.weight",),
    "k_norm.weight": ("self_attn.k_norm.weight",),
    "attn_out.weight": ("self_attn.o_proj.weight",),
    "norm2.weight": ("post_attention_layernorm.weight",),
    "mlp.0.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.0.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp.2.weight": ("mlp.down_proj.weight",),
    "mlp.2.bias": ("mlp.down_proj.bias",),
}
ENDS = {
    "vocab_embed.embedding": "model.embed_tokens.weight",
    "output_layer.norm_final.weight": "model.norm.weight",
    "output_layer.linear.weight": "lm_head.weight",
}
"""Published BD3-LM names -> the decoders' names, whose rows are put one after the other."""


@dataclass(frozen=True)
class Decoder:
    """A decoder folder that can be imported.

    Attributes:
        weights: (our name, "master", float32 tensor), reading one tensor at a time.
        meta: the record of the checkpoint they make.
        mask: the mask token, an id of the model or a new one.
    """

    weights: Weights
    meta: dict[str, Any]
    mask: MaskToken


def is_other_architecture(source: Path) -> bool:
    """Whether a folder's config.json names a model_type that is not ours."""
    path = source / "config.json"
    return path.is_file() and read_json(path).get("model_type", "bd3lm") != "bd3lm"


def import_decoder(source: Path, tokenizer: Path | None = None, overrides: Sequence[str] = ()) -> Decoder:
    """Weights of a Llama, Qwen2 or Qwen3 folder under our names, with a mask token.

    Args:
        source: a folder with config.json and weights (safetensors or pytorch_model.bin; single or sharded).
        tokenizer: folder of the tokenizer, which may have an id for the mask; default: the source.
        overrides: `a.b=c` on the resulting configuration; `mask_token_id=N`, an id of the model that is to be the
            mask, or the number of its ids for a new one.

    Raises:
        ValueError: another architecture, fields that cannot be expressed, unreadable files, or tensors that do not fit.
    """
    fields = read_json(source / "config.json")
    kind = kind_of(source, fields)
    check_fields(source, fields, kind)
    rows = fields["vocab_size"]
    given, overrides = split_mask_override(overrides)
    mask = choose_mask(tokenizer or source, rows, given, _named_ids(source, fields))
    config = decoder_config(source, fields, kind, mask.vocab_size, overrides)
    arch = Architecture.of(config, mask.vocab_size)
    files = stored_tensors(source)
    check_tensors(files, replace(arch, vocab_size=rows))
    meta = weights_meta(config, mask.vocab_size, mask.token_id, source.name)
    return Decoder(_weights(files, arch, rows), meta, mask)


def kind_of(source: Path, fields: dict[str, Any]) -> str:
    """llama | qwen2 | qwen3; ValueError naming any other class."""
    named = fields.get("architectures") or [fields.get("model_type")]
    named = named if isinstance(named, list) else [named]
    found = [KINDS.get(str(name), name if name in KINDS.values() else None) for name in named]
    if len(found) != 1 or found[0] is None or fields.get("model_type", found[0]) != found[0]:
        classes = ", ".join(str(name)[:80] for name in named[:3])
        raise ValueError(
            f"{source / 'config.json'}: architectures ({classes}) with model_type "
            f"({reprlib.repr(fields.get('model_type'))}): another architecture; only {', '.join(KINDS)} and bd3lm "
            "folders can be imported"
        )
    return found[0]


def check_fields(source: Path, fields: dict[str, Any], kind: str) -> None:
    """ValueError naming every field that is missing, of the wrong kind, or beyond what our network expresses."""
    found = [
        f"{name} ({reprlib.repr(fields.get(name))}): not a count" for name in SIZES if not _is_count(fields.get(name))
    ]
    for name in ("num_key_value_heads", "head_dim"):
        if not (fields.get(name) is None or _is_count(fields[name])):
            found.append(f"{name} ({reprlib.repr(fields[name])}): not a count")
    if kind == "llama" and not isinstance(fields.get("mlp_bias", False), bool):
        found.append(f"mlp_bias ({reprlib.repr(fields['mlp_bias'])}): not true or false")
    ignored = {"attention_bias"} if kind == "qwen2" else set()  # always of queries, keys and values only
    for name, neutral in NEUTRAL.items():
        if name not in ignored and not any(fields.get(name) is n or fields.get(name) == n for n in neutral):
            why = REASONS.get(name, "cannot be expressed here")
            found.append(f"{name} ({reprlib.repr(fields[name])}): {why}")
    found += _sliding(fields, kind)
    try:
        rope_fields(fields)
    except ValueError as problem:
        found.append(str(problem))
    if found:
        raise ValueError(f"{source / 'config.json'} cannot be imported:\n  " + "\n  ".join(found))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40


def _sliding(fields: dict[str, Any], kind: str) -> list[str]:
    """Layers that see a window only. Llama's class has none, whatever its configuration holds."""
    if kind == "llama":
        return []
    others = sorted({str(name) for name in fields.get("layer_types") or () if name != "full_attention"})
    if others:
        return [f"layer_types ({', '.join(others)}): every layer must see the whole context (full_attention)"]
    is_used = fields.get("use_sliding_window", False) and fields.get("sliding_window", 4096) is not None
    first = fields.get("max_window_layers", 28)
    if fields.get("layer_types") or not is_used or (_is_count(first) and first >= fields.get("num_hidden_layers", 0)):
        return []
    return [
        f"sliding_window ({fields.get('sliding_window', 4096)}): in use from layer {first} on; "
        "attention to a window cannot be expressed here"
    ]


def rope_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The `model.rope_*` fields; ValueError for a scaling that we do not have."""
    said = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(said, dict):
        raise ValueError(f"rope_scaling ({reprlib.repr(said)}): not an object")
    name = said.get("rope_type", said.get("type", "default"))
    theta = said.get("rope_theta", fields.get("rope_theta", 10000.0))
    if said.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor ({said['partial_rotary_factor']}): cannot be expressed here")
    if name in ("default", None):
        return {"rope_theta": float(theta)}
    if name not in ("linear", "llama3"):
        raise ValueError(f"rope_scaling ({reprlib.repr(name)}): not one of default, linear, llama3")
    wanted = LLAMA3 if name == "llama3" else {"factor": "rope_factor"}
    missing = [theirs for theirs in wanted if theirs not in said]
    if missing:
        raise ValueError(f"rope_scaling ({name}): lacks {', '.join(missing)}")
    return {"rope_theta": float(theta), "rope_scaling": name, **{ours: said[t] for t, ours in wanted.items()}}


def decoder_config(
    source: Path, fields: dict[str, Any], kind: str, vocab_size: int, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration of the decoder as a model of objective `ar`; ConfigError if it is not a legal one.

    Fields that config.json leaves out have the defaults of transformers' configuration classes.
    """
    values = to_dict(RunConfig(run_dir=source.resolve().name or "imported"))
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or (128 if kind == "qwen3" else fields["hidden_size"] // heads)
    values["data"]["path"] = UNKNOWN_DATA
    values["data"]["context_length"] = min(fields["max_position_embeddings"], LONGEST_ROW)
    values["model"] |= {
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "ffn_hidden_size": fields["intermediate_size"],
        "norm": "rmsnorm",
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "mlp_bias": kind == "llama" and bool(fields.get("mlp_bias", False)),
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "head_bias": False,
        "adaln": False,
        "dropout": 0.0,
        "tie_embeddings": bool(fields.get("tie_word_embeddings", False)),
        **rope_fields(fields),
        "vocab_size": vocab_size,
    }
    stored = str(fields.get("dtype") or fields.get("torch_dtype"))
    values["precision"] = "bf16" if "bfloat16" in stored else "fp32"
    values["diffusion"]["objective"] = "ar"
    values["train"]["micro_batch_size"] = 1  # of evaluations; whole vocabularies times long rows are large
    return from_dict(values, overrides)


def _named_ids(source: Path, fields: dict[str, Any]) -> set[int]:
    """Special ids that the model's own files name: none of them is free."""
    path = source / "generation_config.json"
    said = [fields, read_json(path) if path.is_file() else {}]
    found: set[int] = set()
    for each in said:
        for name, value in each.items():
            if name.endswith("_token_id"):
                found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return found


# ---- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def stored_tensors(source: Path) -> dict[str, Stored]:
    """Every stored tensor by name, from safetensors where there are any, otherwise from pickles."""
    has_safetensors, has_pickles = (
        any((source / name).is_file() for name in names) for names in ((WEIGHTS, INDEX), (PICKLE, PICKLE_INDEX))
    )
    if has_pickles and not has_safetensors:
        return _pickled(source)
    return {
        name: Stored(shape, lambda file=file, name=name: _from_safetensors(file, name))
        for name, (file, shape) in tensor_files(source).items()
    }


def _from_safetensors(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _pickled(source: Path) -> dict[str, Stored]:
    """Tensors of pytorch_model.bin files; the loader refuses everything but tensors and plain values."""
    names = [PICKLE]
    if (source / PICKLE_INDEX).is_file():
        weight_map = read_json(source / PICKLE_INDEX).get("weight_map")
        names = sorted({str(v) for v in weight_map.values()}) if isinstance(weight_map, dict) else []
        if not names or any(Path(name).name != name or not name.endswith(".bin") for name in names):
            raise ValueError(f"{source / PICKLE_INDEX}: weight_map does not name .bin files beside it")
    found: dict[str, Stored] = {}
    for file in (source / name for name in names):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise ValueError(
                f"{file}: unreadable, or not plain tensors ({str(error).splitlines()[0][:160]}); only weights are "
                "read from pickles: save the model as safetensors"
            ) from error
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError(f"{file}: not a dictionary of tensors; save the model as safetensors")
        for name, tensor in state.items():
            found[str(name)] = Stored(tuple(tensor.shape), lambda tensor=tensor: tensor)
    return found


def their_names(entry: Entry) -> list[str]:
    """The decoder's tensors whose rows make up one of the published BD3-LM tensors."""
    if entry.published in ENDS:
        return [ENDS[entry.published]]
    _, layer, rest = entry.published.split(".", 2)
    return [f"model.layers.{layer}.{name}" for name in LAYER[rest]]


def their_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a decoder of this architecture, without the mask's row."""
    heads = (arch.num_heads * arch.head_width, arch.kv_heads * arch.head_width, arch.kv_heads * arch.head_width)
    found = {}
    for entry in table(arch):
        names = their_names(entry)
        outputs = {1: entry.shape[:1], 2: (arch.inner, arch.inner), 3: heads}[len(names)]
        found |= {name: (rows, *entry.shape[1:]) for name, rows in zip(names, outputs, strict=True)}
    if arch.tied_head:
        del found["lm_head.weight"]
    return found


def check_tensors(files: dict[str, Stored], arch: Architecture) -> None:
    """ValueError listing every missing, extra or misshapen tensor by name; a tied head that is stored must be equal."""
    head, embedding = files.get("lm_head.weight"), files.get("model.embed_tokens.weight")
    if arch.tied_head and head is not None and embedding is not None and not torch.equal(head.read(), embedding.read()):
        raise ValueError("config.json says tie_word_embeddings, but lm_head.weight is not the embedding")
    is_derived = ("rotary_emb.inv_freq", *(["lm_head.weight"] if arch.tied_head else []))
    found = {name: stored.shape for name, stored in files.items() if not name.endswith(is_derived)}
    problems = shape_problems(their_shapes(arch), found)
    if problems:
        more = f"\n  and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        listed = "\n  ".join(problems[:MAX_PROBLEMS])
        raise ValueError(f"the weights do not fit config.json ({len(problems)} tensors):\n  {listed}{more}")


def _weights(files: dict[str, Stored], arch: Architecture, rows: int) -> Iterator[tuple[str, str, Tensor]]:
    """Our tensors; the row of a new mask token is the mean of the others, in the embedding as in the head."""
    seen = set()
    for entry in table(arch):
        if entry.ours in seen:  # the published head of a tied model
            continue
        seen.add(entry.ours)
        tensor = torch.cat([files[name].read().float() for name in their_names(entry)])
        if entry.kind == "vocab" and arch.vocab_size > rows:
            mean = tensor.double().mean(0, keepdim=True).float()
            tensor = torch.cat([tensor, mean.expand(arch.vocab_size - rows, -1)])
        yield entry.ours, "master", to_ours(entry, tensor, arch)
