"""From a Hugging Face folder (ours or a published BD3-LM checkpoint) to native weights.

Only config.json and safetensors files are read; code that lies in the folder is never run.
"""

import inspect
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bd3lm_scale.checkpoint.hf.configuration_bd3lm import NETWORK, BD3LMConfig
from bd3lm_scale.checkpoint.hf.network import model_fields
from bd3lm_scale.checkpoint.metadata import UNKNOWN_DATA, default_mask_id, shortest, split_mask_override, weights_meta
from bd3lm_scale.checkpoint.names import PREFIX, Architecture, shape_problems, table, to_ours
from bd3lm_scale.config.load import from_dict, to_dict
from bd3lm_scale.config.schema import RunConfig

PUBLISHED_FIELDS = ("block_size", "vocab_size", "model_length", "hidden_dim", "n_blocks", "n_heads")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_PROBLEMS = 40
MAX_NUMBER = 1 << 62
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
FLOATS = ("F64", "F32", "F16", "BF16")

Weights = Iterator[tuple[str, str, Tensor]]


def import_hf(source: str | Path, overrides: Sequence[str] = ()) -> tuple[Weights, dict[str, Any]]:
    """Weights of a Hugging Face folder under our names, and the record of the checkpoint they make.

    Args:
        source: a folder with config.json and model.safetensors (or shards and an index).
        overrides: `a.b=c` on the resulting configuration, and `mask_token_id=N` where the folder does not say it
            (published LM1B models use BERT's).

    Returns:
        An iterator of (our name, "master", float32 tensor), reading one tensor at a time, and `meta`.

    Raises:
        ValueError: not a BD3-LM folder, unreadable files, or tensors that do not fit: all are listed by name.
    """
    source = Path(source)
    fields = read_config(source)
    mask, overrides = split_mask_override(overrides)
    if mask is None:
        mask = fields.get("mask_token_id") or default_mask_id(fields["vocab_size"])
    hf_config = hf_config_of(source, {**fields, "mask_token_id": mask})
    files = tensor_files(source)
    if hf_config.n_blocks > len(files):  # before anything of that size is built
        raise ValueError(f"{source}: n_blocks ({hf_config.n_blocks:,}) with {len(files)} tensors; is it complete?")
    buffers = read_buffers(files)
    config = run_config(hf_config, buffers, source.name, overrides)
    arch = Architecture.of(config, hf_config.vocab_size)
    check_published(files, arch)
    meta = weights_meta(config, hf_config.vocab_size, mask, source.name)
    training = fields.get("training") or {}
    meta |= {name: _whole_number(source, training, name) for name in ("step", "tokens")}
    return _weights(files, arch), meta


def read_config(source: Path) -> dict[str, Any]:
    """config.json, checked to be of a BD3-LM and to hold values of the right kinds."""
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{source}: no config.json; give a folder as save_pretrained or to-hf writes it")
    fields = read_json(path)
    kind = fields.get("model_type")
    if kind != "bd3lm":
        raise ValueError(
            f"{path}: model_type is {reprlib.repr(kind)}, another architecture; only bd3lm folders can be imported"
        )
    missing = [name for name in PUBLISHED_FIELDS if name not in fields]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; is it complete?")
    problems = [
        f"{name} ({reprlib.repr(fields[name])}): not {expected}"
        for name, (is_right, expected) in FIELD_KINDS.items()
        if name in fields and not is_right(fields[name])
    ]
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return fields


def hf_config_of(source: Path, fields: dict[str, Any]) -> BD3LMConfig:
    """The configuration object of these fields; those that BD3-LM does not know, and auto_map, are left out."""
    known = {name: value for name, value in fields.items() if name in KNOWN_FIELDS}
    try:
        return BD3LMConfig(**known)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{source / 'config.json'}: {type(error).__name__} {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not valid JSON ({str(error)[:200]})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found


def _whole_number(source: Path, fields: dict[str, Any], name: str) -> int:
    value = fields.get(name, 0)
    if not _is_count(value) and value != 0:
        raise ValueError(f"{source / 'config.json'}: training.{name} ({reprlib.repr(value)}): not a count")
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MAX_NUMBER


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_count_or_derived(value: object) -> bool:
    return value is None or _is_count(value)


COUNT, SHARE, FLAG = (_is_count, "a count"), (_is_number, "a number from 0 to 1"), (_is_flag, "true or false")
FIELD_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys((*PUBLISHED_FIELDS, "cond_dim", "mlp_ratio"), COUNT),
    **dict.fromkeys(("dropout", "sampling_eps_min", "sampling_eps_max"), SHARE),
    **dict.fromkeys(("cross_attn", "adaln", "causal", "time_conditioning", "var_min", "tied_head"), FLAG),
    "ignore_bos": (lambda value: value is None or _is_flag(value), "true, false or null"),
    "mask_token_id": (lambda value: value is None or value == 0 or _is_count(value), "an id"),
    "objective": (lambda value: value is None or isinstance(value, str), "a name"),
    "training": (lambda value: value is None or isinstance(value, dict), "an object"),
    **dict.fromkeys(("norm", "mlp"), (lambda value: isinstance(value, str), "a name")),
    **dict.fromkeys(("ffn_hidden_size", "n_kv_heads", "head_dim"), (_is_count_or_derived, "a count")),
    **dict.fromkeys(("qk_norm", "qkv_bias", "mlp_bias", "head_bias", "shift_targets"), FLAG),
    "norm_eps": SHARE,
    "rope": (lambda value: value is None or isinstance(value, dict), "an object"),
}
"""What config.json may hold, as far as anything is built from it."""
KNOWN_FIELDS = {*inspect.signature(BD3LMConfig.__init__).parameters, *NETWORK, *FIELD_KINDS, "dtype", "torch_dtype"}
KNOWN_FIELDS -= {"self", "kwargs"}


def tensor_files(source: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Every stored tensor: its file and its shape; headers are read, data is not."""
    if (source / INDEX).is_file():
        weight_map = read_json(source / INDEX).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) and weight_map else [None]
        odd = [name for name in names if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name)]
        if odd:
            raise ValueError(
                f"{source / INDEX}: weight_map names {reprlib.repr(odd[0])}; not a safetensors file beside it"
            )
        files = [source / name for name in sorted(map(str, set(names)))]
    elif (source / WEIGHTS).is_file():
        files = [source / WEIGHTS]
    else:
        pickled = sorted(path.name for path in source.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is not read: save it as safetensors" if pickled else ""
        raise ValueError(f"{source}: no {WEIGHTS} and no {INDEX}{hint}")
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file; fetch it again")
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    stored = opened.get_slice(name)
                    if stored.get_dtype() not in FLOATS:
                        raise ValueError(f"{file}: {name[:80]} is {stored.get_dtype()}, not floating-point numbers")
                    found[name] = (file, tuple(stored.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: unreadable or cut off ({error}); fetch it again") from error
    return found


def read_buffers(files: dict[str, tuple[Path, tuple[int, ...]]]) -> dict[str, float]:
    """The clipped interval stored beside the weights, each bound as the shortest decimal that gives its bits."""
    buffers = {}
    for name in ("sampling_eps_min", "sampling_eps_max"):
        if name in files:
            with safe_open(files[name][0], "pt") as opened:
                if files[name][1]:
                    raise ValueError(f"{files[name][0]}: {name} has shape {files[name][1]}, not one number")
                buffers[name] = shortest(opened.get_tensor(name))
    return buffers


def run_config(
    hf_config: BD3LMConfig, buffers: dict[str, float], name: str, overrides: Sequence[str] = ()
) -> RunConfig:
    """The resolved configuration that the imported weights stand for; ConfigError if it is not a legal one."""
    objective = hf_config.objective
    values = to_dict(RunConfig(run_dir=name))
    values["data"]["path"] = UNKNOWN_DATA
    values["data"]["context_length"] = hf_config.model_length
    values["model"] |= {
        "num_layers": hf_config.n_blocks,
        "hidden_size": hf_config.hidden_dim,
        "num_heads": hf_config.n_heads,
        "cond_dim": hf_config.cond_dim,
        "mlp_ratio": hf_config.mlp_ratio,
        "dropout": hf_config.dropout,
        "tie_embeddings": hf_config.tied_head,
        **model_fields(hf_config),
        "vocab_size": hf_config.vocab_size,
    }
    # our exports say how they were trained
    training = getattr(hf_config, "training", None) or {}
    stored = str(getattr(hf_config, "dtype", None) or getattr(hf_config, "torch_dtype", None))
    values["precision"] = training.get("precision") or ("bf16" if "bfloat16" in stored else "fp32")
    values["data"]["wrap_rows"] = bool(training.get("wrap_rows", values["data"]["wrap_rows"]))
    diffusion = values["diffusion"] | (training.get("diffusion") or {})
    diffusion |= {"objective": objective, "ignore_bos": bool(hf_config.ignore_bos)}
    diffusion["shift_targets"] = bool(hf_config.shift_targets)
    diffusion["time_conditioning"] = None if objective == "ar" else bool(hf_config.time_conditioning)
    if objective == "bd3lm":
        diffusion["block_size"] = hf_config.block_size
        diffusion["clip_low"] = buffers.get("sampling_eps_min", diffusion["clip_low"])
        diffusion["clip_high"] = buffers.get("sampling_eps_max", diffusion["clip_high"])
    return from_dict({**values, "diffusion": diffusion}, overrides)


def check_published(files: dict[str, tuple[Path, tuple[int, ...]]], arch: Architecture) -> None:
    """ValueError listing every missing, extra or misshapen tensor by name."""
    buffers = {"sampling_eps_min", "sampling_eps_max", f"{PREFIX}rotary_emb.inv_freq"}
    found = {name: shape for name, (_, shape) in files.items() if name not in buffers}
    problems = shape_problems({PREFIX + entry.published: entry.shape for entry in table(arch)}, found)
    if problems:
        more = f"\n  and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        listed = "\n  ".join(problems[:MAX_PROBLEMS])
        raise ValueError(f"the weights do not fit config.json ({len(problems)} tensors):\n  {listed}{more}")


def _weights(files: dict[str, tuple[Path, tuple[int, ...]]], arch: Architecture) -> Weights:
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, "pt")) for path in {path for path, _ in files.values()}}
        embedding = None
        for entry in table(arch):
            tensor = opened[files[PREFIX + entry.published][0]].get_tensor(PREFIX + entry.published).float()
            if arch.tied_head and entry.ours == "embedding.weight":
                if embedding is not None and not torch.equal(tensor, embedding):
                    raise ValueError("config.json says tied_head, but output_layer.linear.weight is not the embedding")
                if embedding is not None:
                    continue
                embedding = tensor
            yield entry.ours, "master", to_ours(entry, tensor, arch)
