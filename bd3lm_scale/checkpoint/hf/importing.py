"""From a Hugging Face folder (ours or a published BD3-LM checkpoint) to native weights.

Only config.json and safetensors files are read; code that lies in the folder is never run.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bd3lm_scale.checkpoint.hf.configuration_bd3lm import BD3LMConfig
from bd3lm_scale.checkpoint.hf.network import model_fields
from bd3lm_scale.checkpoint.metadata import UNKNOWN_DATA, default_mask_id, shortest, split_mask_override, weights_meta
from bd3lm_scale.checkpoint.names import PREFIX, Architecture, shape_problems, table, to_ours
from bd3lm_scale.config.load import from_dict, to_dict
from bd3lm_scale.config.schema import RunConfig

PUBLISHED_FIELDS = ("block_size", "vocab_size", "model_length", "hidden_dim", "n_blocks", "n_heads")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_PROBLEMS = 40

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
    hf_config = BD3LMConfig(**{**fields, "mask_token_id": mask})
    files = tensor_files(source)
    buffers = read_buffers(files)
    config = run_config(hf_config, buffers, source.name, overrides)
    arch = Architecture.of(config, hf_config.vocab_size)
    check_published(files, arch)
    meta = weights_meta(config, hf_config.vocab_size, mask, source.name)
    training = fields.get("training") or {}
    meta |= {"step": int(training.get("step", 0)), "tokens": int(training.get("tokens", 0))}
    return _weights(files, arch), meta


def read_config(source: Path) -> dict[str, Any]:
    """config.json, checked to be of a BD3-LM."""
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{source}: no config.json; give a folder as save_pretrained or to-hf writes it")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != "bd3lm":
        raise ValueError(f"{path}: model_type is {kind!r}, another architecture; only bd3lm folders can be imported")
    missing = [name for name in PUBLISHED_FIELDS if name not in fields]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; is it complete?")
    return fields


def tensor_files(source: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Every stored tensor: its file and its shape; headers are read, data is not."""
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        files = [source / name for name in sorted(set(index["weight_map"].values()))]
    elif (source / WEIGHTS).is_file():
        files = [source / WEIGHTS]
    else:
        pickled = sorted(path.name for path in source.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is not read: save it as safetensors" if pickled else ""
        raise ValueError(f"{source}: no {WEIGHTS} and no {INDEX}{hint}")
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    found[name] = (file, tuple(opened.get_slice(name).get_shape()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: unreadable or cut off ({error}); fetch it again") from error
    return found


def read_buffers(files: dict[str, tuple[Path, tuple[int, ...]]]) -> dict[str, float]:
    """The clipped interval stored beside the weights, each bound as the shortest decimal that gives its bits."""
    buffers = {}
    for name in ("sampling_eps_min", "sampling_eps_max"):
        if name in files:
            with safe_open(files[name][0], "pt") as opened:
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
