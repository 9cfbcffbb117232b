"""From a native checkpoint to a Hugging Face folder that loads on transformers 4.49 and later.

    config.json  model.safetensors (or shards and an index)  generation_config.json  README.md
    configuration_bd3lm.py modeling_bd3lm.py and what it imports (CODE_FILES)  tokenizer files

Reads one tensor at a time and holds one shard. What it writes depends on the weights and the training record only,
not on the layout they were saved under.
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from bd3lm_scale.checkpoint.hf.model_card import model_card, training_rows
from bd3lm_scale.checkpoint.hf.network import check_class, variant_fields
from bd3lm_scale.checkpoint.hf.settings_bd3lm import SAMPLERS
from bd3lm_scale.checkpoint.hf.tokenizer_files import TokenizerLike, TokenizerReport, export_tokenizer
from bd3lm_scale.checkpoint.names import (
    PREFIX,
    Architecture,
    Entry,
    num_parameters,
    rotary_frequencies,
    shape_problems,
    table,
    to_published,
)
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.values import Interval

CODE_FILES = tuple(
    f"{part}_bd3lm.py"
    for part in (
        "configuration",
        "modeling",
        "layers",
        "generation",
        "likelihood",
        "progress",
        "settings",
        "inputs",
        "vocabulary",
    )
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class WeightReader(Protocol):
    """What is needed of a checkpoint (CheckpointReader has it)."""

    meta: dict[str, Any]

    def names(self, kind: str = "master") -> list[str]:
        """Parameter names that have this kind of state."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        ...

    def read(self, name: str, kind: str = "master") -> Tensor:
        """The whole parameter."""
        ...


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        destination: the folder.
        num_parameters: of the model, without vocabulary padding.
        size_bytes: of the weight files.
        weight_files: their names.
        weights: "ema" or "raw", what was exported.
        tokenizer: what became of the tokenizer; None when there was none.
    """

    destination: Path
    num_parameters: int
    size_bytes: int
    weight_files: tuple[str, ...]
    weights: str
    tokenizer: TokenizerReport | None


def export_hf(
    reader: WeightReader,
    destination: str | Path,
    *,
    weights: str = "ema",
    dtype: str = "fp32",
    max_shard_size: str | int = "5GB",
    tokenizer: TokenizerLike | None = None,
    figures: dict[str, Any] | None = None,
    sampler: str | None = None,
    end_of_turn: int | None = None,
) -> ExportReport:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        reader: the checkpoint.
        destination: an empty or absent folder (the caller renames it when it is complete).
        weights: "ema" (the trained average; the weights themselves in a checkpoint without one) or "raw".
        dtype: "fp32" or "bf16".
        max_shard_size: bytes, or text as "5GB"; larger models are split, with an index.
        tokenizer: the run's tokenizer; None leaves it out.
        figures: training figures for the model card.
        sampler: what `generate` uses unless told otherwise; None: the run's (sampling.sampler).
        end_of_turn: the token that the tokenizer's chat template writes behind answers; `generate` ends there, too.

    Raises:
        ValueError: an unknown choice, a sampler that the exported class does not have, or a checkpoint whose tensors do
            not fit its configuration.
        FileExistsError: the destination is not empty.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists; choose another destination or remove it")
    if dtype not in DTYPES:
        raise ValueError(f"dtype ({dtype}): unknown; use {' or '.join(DTYPES)}")
    kind = kind_of(reader, weights)
    config, vocab_size = from_dict(reader.meta["config"]), int(reader.meta["vocab_size"])
    chosen = chosen_sampler(config, sampler)
    arch = Architecture.of(config, vocab_size)
    check_native(reader, arch, kind)
    destination.mkdir(parents=True, exist_ok=True)
    written = None
    if tokenizer is not None:
        written = export_tokenizer(tokenizer, destination, vocab_size, int(reader.meta["mask_token_id"]))
    fields = config_fields(config, reader.meta, dtype, written)
    check_class(fields, arch)
    files, size = write_shards(
        _tensors(reader, arch, kind, DTYPES[dtype], fields),
        _sizes(arch, DTYPES[dtype], fields),
        destination,
        parse_size(max_shard_size),
    )
    _write_json(destination / "config.json", fields)
    _write_json(destination / "generation_config.json", generation_fields(config, written, chosen, end_of_turn))
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), destination / name)
    used = "ema" if kind == "ema" else "raw"
    count = num_parameters(arch)
    training = {} if "source" in reader.meta else training_rows(fields, config, figures or {})
    (destination / "README.md").write_text(model_card(fields, count, used, training), encoding="utf-8")
    return ExportReport(destination, count, size, tuple(files), used, written)


def kind_of(reader: WeightReader, weights: str) -> str:
    """The kind of state to read for "ema" or "raw" weights; weights-only checkpoints may have no average."""
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights ({weights}): unknown; use ema or raw")
    return "ema" if weights == "ema" and reader.names("ema") else "master"


def check_native(reader: WeightReader, arch: Architecture, kind: str) -> None:
    """ValueError listing every tensor of the checkpoint that does not fit the architecture."""
    expected = {entry.ours: entry.our_shape for entry in table(arch)}
    problems = shape_problems(expected, {name: tuple(reader.shape(name)) for name in reader.names(kind)})
    if problems:
        raise ValueError("the checkpoint does not fit its own configuration:\n  " + "\n  ".join(problems[:40]))


def config_fields(
    config: RunConfig, meta: dict[str, Any], dtype: str, tokenizer: TokenizerReport | None
) -> dict[str, Any]:
    """The content of config.json: the published fields, and what they leave unsaid."""
    objective = config.diffusion.objective
    clip = meta.get("clip") or {"low": config.diffusion.clip_low, "high": config.diffusion.clip_high}
    low, _ = Interval(float(clip["low"]), float(clip["high"])).floored(config.diffusion.time_epsilon)
    fields = {
        "architectures": ["BD3LM"],
        "auto_map": {
            "AutoConfig": "configuration_bd3lm.BD3LMConfig",
            "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM",
            # what pipeline("text-generation") asks for, and programs that read logits as next-token predictions
            "AutoModelForCausalLM": f"modeling_bd3lm.BD3LM{'' if objective == 'ar' else 'ForCausalLM'}",
        },
        "model_type": "bd3lm",
        "objective": objective,
        "block_size": config.block_size,
        "vocab_size": int(meta["vocab_size"]),
        "mask_token_id": int(meta["mask_token_id"]),
        "model_length": config.data.context_length,
        "cross_attn": objective == "bd3lm",
        "adaln": config.uses_adaln,
        **variant_fields(Architecture.of(config, int(meta["vocab_size"]))),
        **({"shift_targets": True} if config.diffusion.shift_targets else {}),
        "causal": objective == "ar",
        "attn_backend": "sdpa",
        "hidden_dim": config.model.hidden_size,
        "cond_dim": config.model.cond_dim,
        "n_blocks": config.model.num_layers,
        "n_heads": config.model.num_heads,
        "mlp_ratio": config.model.mlp_ratio,
        "dropout": config.model.dropout,
        "time_conditioning": config.time_conditioning,
        "ignore_bos": config.diffusion.ignore_bos and objective != "ar",
        "tied_head": config.model.tie_embeddings,
        "tie_word_embeddings": False,
        "var_min": objective == "bd3lm",
        "sampling_eps_min": low,
        "sampling_eps_max": float(clip["high"]),
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        "transformers_version": "4.49.0",
        "training": {
            "step": meta.get("step", 0),
            "tokens": meta.get("tokens", 0),
            "precision": config.precision,
            "wrap_rows": config.data.wrap_rows,
            "diffusion": _json_values(asdict(config.diffusion)),
        },
    }
    if tokenizer is not None:
        fields |= {name: value for name, value in tokenizer.ids.items() if name != "mask_token_id"}
    return fields


def chosen_sampler(config: RunConfig, sampler: str | None = None) -> str:
    """The sampler of `generate`; ValueError where the exported class does not have it, or not for this schedule."""
    samplers, name = SAMPLERS[config.diffusion.objective], sampler or config.sampling.sampler
    name = samplers[0] if name == "auto" else name
    if name not in samplers:
        raise ValueError(
            f"sampling.sampler ({name}): the exported class of {config.diffusion.objective} models does not have it; "
            f"choose what generate uses with --sampler {' or '.join(samplers)}"
        )
    schedule = config.diffusion.schedule
    if name == "ancestral" and schedule != "loglinear":
        raise ValueError(
            f"diffusion.schedule ({schedule}): the exported class's ancestral sampler follows the loglinear schedule; "
            f"choose one that needs none, with --sampler {samplers[0]}"
        )
    return name


def generation_fields(
    config: RunConfig, tokenizer: TokenizerReport | None, sampler: str, end_of_turn: int | None = None
) -> dict[str, Any]:
    """The content of generation_config.json: defaults of `generate`, what the run's sampling section says.

    bos_token_id is what text without a prompt starts with: the token that precedes documents in training rows, which
    is BOS where rows are wrapped (data.wrap_rows) and otherwise EOS, as the sample command has it.
    """
    sampling = config.sampling
    fields: dict[str, Any] = {
        "do_sample": sampling.temperature > 0,
        "max_new_tokens": sampling.length,
        "temperature": sampling.temperature or 1.0,
        "top_p": sampling.nucleus_p,
        "top_k": sampling.top_k or 0,
        "sampler": sampler,
        "num_steps": min(sampling.steps, config.data.context_length),
        "threshold": sampling.threshold,
        "transformers_version": "4.49.0",
    }
    if tokenizer is not None:
        fields |= {f"{n}_token_id": tokenizer.ids[f"{n}_token_id"] for n in ("bos", "eos", "pad")}
        if not config.data.wrap_rows:
            fields["bos_token_id"] = fields["eos_token_id"]
        if end_of_turn not in (None, fields["eos_token_id"]):
            fields["eos_token_id"] = [fields["eos_token_id"], end_of_turn]
    return fields


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], sizes: dict[str, int], folder: Path, limit_bytes: int
) -> tuple[list[str], int]:
    """Write named tensors, which come in the order of `sizes` (bytes each), in files of at most limit_bytes.

    Returns:
        The file names and the bytes of all tensors. One shard is in memory at a time.
    """
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit_bytes
        shards[-1].append(name)
        room -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    stream = iter(tensors)
    for file, members in zip(names, shards, strict=True):
        # no name for the dictionary here: it would keep this shard alive while the next is read
        save_file(dict(next(stream) for _ in members), folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes files that only their owner can read
    total = sum(sizes.values())
    if len(shards) > 1:
        weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    return names, total


def parse_size(text: str | int) -> int:
    """Bytes of "500MB", "2GiB" or a number."""
    if isinstance(text, int):
        return text
    number, unit = text.strip().upper(), 1
    for name, factor in UNITS.items():
        if number.endswith(name):
            number, unit = number[: -len(name)], factor
            break
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size <= 0:
        raise ValueError(f"max_shard_size ({text}): not a size; use a number with KB, MB or GB, as 5GB")
    return size


def _buffers(arch: Architecture, fields: dict[str, Any]) -> dict[str, Tensor]:
    """What published checkpoints hold besides parameters; float32 in every export."""
    buffers = {f"{PREFIX}rotary_emb.inv_freq": rotary_frequencies(arch)}
    if fields["var_min"]:
        for name in ("sampling_eps_min", "sampling_eps_max"):
            buffers[name] = torch.tensor(fields[name], dtype=torch.float32)
    return buffers


def _sizes(arch: Architecture, dtype: torch.dtype, fields: dict[str, Any]) -> dict[str, int]:
    sizes = {name: tensor.numel() * tensor.itemsize for name, tensor in _buffers(arch, fields).items()}
    return sizes | {PREFIX + entry.published: math.prod(entry.shape) * dtype.itemsize for entry in table(arch)}


def _tensors(
    reader: WeightReader, arch: Architecture, kind: str, dtype: torch.dtype, fields: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    yield from _buffers(arch, fields).items()
    for entry in table(arch):
        yield PREFIX + entry.published, published_tensor(reader, entry, arch, kind).to(dtype)


def published_tensor(reader: WeightReader, entry: Entry, arch: Architecture, kind: str) -> Tensor:
    """One parameter of a checkpoint in the published layout, contiguous and float32."""
    return to_published(entry, reader.read(entry.ours, kind), arch).contiguous()


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
