"""From a PyTorch Lightning checkpoint of the reference implementation to native weights; nothing in it is executed.

The file is a pickle. It is read by torch's restricted loader, and every class it names that the loader does not know
(omegaconf nodes, tokenizers) is replaced by an inert stand-in that only keeps what it is given. Whatever a damaged or
hostile file holds is refused with a message that names the file; no size in it is believed beyond the bytes it has.
"""

import re
import reprlib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3lm_scale.checkpoint.metadata import UNKNOWN_DATA, default_mask_id, shortest, split_mask_override, weights_meta
from bd3lm_scale.checkpoint.names import PREFIX, Architecture, shape_problems, table, to_ours
from bd3lm_scale.config.load import from_dict, to_dict
from bd3lm_scale.config.schema import RunConfig

BUFFERS = ("sampling_eps_min", "sampling_eps_max", f"{PREFIX}rotary_emb.inv_freq")
WIDTH_OF = f"{PREFIX}vocab_embed.embedding"
DIMENSIONS = {
    WIDTH_OF: 2, f"{PREFIX}sigma_map.mlp.0.bias": 1, f"{PREFIX}blocks.0.mlp.0.bias": 1,
    f"{PREFIX}rotary_emb.inv_freq": 1, "sampling_eps_min": 0, "sampling_eps_max": 0,
}  # fmt: skip
"""Of the tensors that sizes and the clip interval are read from."""
OBJECTIVES = ("bd3lm", "mdlm", "sedd", "ar")
MAX_NUMBER = 1 << 62
MAX_DEPTH, MAX_VALUES = 64, 100_000
"""Of a configuration in a file: far beyond the reference's."""


class Inert:
    """Stands in for every object of a class that is not a tensor or a plain value: keeps its state, does nothing."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        """Arguments are dropped."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignored."""

    def extend(self, values: Any) -> None:
        """Ignored."""


def import_lightning(
    source: str | Path, overrides: Sequence[str] = ()
) -> tuple[Iterator[tuple[str, str, Tensor]], dict[str, Any]]:
    """Weights and EMA of a Lightning checkpoint under our names, and the record of the checkpoint they make.

    Args:
        source: the .ckpt file.
        overrides: `a.b=c` on the resulting configuration, and `mask_token_id=N`. A file without the reference's
            configuration needs data.context_length and diffusion.block_size this way.

    Returns:
        An iterator of (our name, "master" or "ema", float32 tensor), and `meta`.

    Raises:
        ValueError: not such a file, or tensors that do not fit: all are listed by name.
    """
    source = Path(source)
    content = load_restricted(source)
    state = content.get("state_dict")
    if not isinstance(state, dict) or WIDTH_OF not in state:
        raise ValueError(f"{source}: has no state_dict with {WIDTH_OF}; not a BD3-LM Lightning checkpoint")
    average = _part(content, "ema").get("shadow_params")
    if average is not None and not isinstance(average, list | tuple):
        raise ValueError(f"{source}: ema.shadow_params is no list of tensors")
    average = None if average is None else list(average)
    refuse_odd_tensors(source, {**state, **{f"ema.shadow_params[{i}]": t for i, t in enumerate(average or ())}})
    step = content.get("global_step", 0)
    if not isinstance(step, int) or not 0 <= step < MAX_NUMBER:
        raise ValueError(f"{source}: global_step ({reprlib.repr(step)}) is no number of steps")
    mask_override, overrides = split_mask_override(overrides)
    try:
        reference = plain(_part(content, "hyper_parameters").get("config"))
    except RecursionError as error:
        raise ValueError(f"{source}: its configuration is nested without end") from error
    config = run_config(state, reference if isinstance(reference, dict) else {}, source.stem, overrides)
    vocab_size = int(state[WIDTH_OF].shape[0])
    arch = Architecture.of(config, vocab_size)
    check_tensors(source, state, average, arch)
    mask = default_mask_id(vocab_size) if mask_override is None else mask_override
    meta = weights_meta(config, vocab_size, mask, source.name)
    meta["step"] = meta["optimizer_step"] = step
    return _weights(state, average, arch), meta


def load_restricted(source: Path) -> dict[str, Any]:
    """The file's dictionary, with tensors mapped rather than read, and inert stand-ins for unknown classes."""
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if not zipfile.is_zipfile(source):
        raise ValueError(f"{source}: not a checkpoint that torch.save wrote, or cut off")
    try:
        with zipfile.ZipFile(source) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("has compressed parts, which torch.save never writes")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(source))
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle is a program: a damaged one can fail in any way
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{source}: refused or damaged: {reason[:300]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: holds no dictionary; not a Lightning checkpoint")
    return content


def _part(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A dictionary inside the file's; empty when it is absent or something else."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def refuse_odd_tensors(source: Path, tensors: dict[Any, Any]) -> None:
    """ValueError unless everything is a plain floating-point tensor with all of its numbers in the file.

    A view can claim any size over a few bytes (strides of zero), and would fill the memory when it is copied.
    """
    problems = []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            problems.append(f"{reprlib.repr(name)} is no tensor")
        elif tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            problems.append(f"{name[:80]} is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            problems.append(f"{name[:80]} claims {tensor.numel():,} numbers, the file has fewer")
    for name, dimensions in DIMENSIONS.items():
        tensor = tensors.get(name)
        if isinstance(tensor, Tensor) and (tensor.dim() != dimensions or not tensor.numel()):
            problems.append(f"{name} has shape {tuple(tensor.shape)}")
    if problems:
        listed = "\n  ".join(problems[:40])
        raise ValueError(f"{source}: not the plain floating-point tensors of a checkpoint:\n  {listed}")


def plain(node: Any) -> Any:
    """Plain values of a configuration whose omegaconf nodes became inert stand-ins; None for anything else.

    Raises:
        RecursionError: nested deeper, or with more values, than any configuration.
    """
    count = 0

    def visit(node: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise RecursionError
        if isinstance(node, Inert):
            state = node.state if isinstance(node.state, dict) else {}
            return visit(state["_content"] if "_content" in state else state.get("_val"), depth + 1)
        if isinstance(node, dict):
            return {str(key): visit(value, depth + 1) for key, value in node.items() if isinstance(key, str | int)}
        if isinstance(node, list | tuple):
            return [visit(value, depth + 1) for value in node]
        return node if isinstance(node, str | int | float | bool) else None

    return visit(node, 0)


def look_up(reference: dict[str, Any], name: str, depth: int = 0) -> Any:
    """A dotted field of the reference's configuration, references like ${block_size} followed; None if absent."""
    value: Any = reference
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if match is None:
        return value
    return look_up(reference, match[1], depth + 1) if depth < MAX_DEPTH else None


REFERENCE_FIELDS = {
    "data.context_length": "model.length",
    "model.dropout": "model.dropout",
    "diffusion.block_size": "block_size",
    "diffusion.time_conditioning": "algo.time_conditioning",
    "diffusion.ignore_bos": "algo.ignore_bos",
    "diffusion.mdlm_loss_scale": "algo.mdlm_loss_scale",
    "diffusion.resample": "training.resample",
}
"""Our field -> the reference's."""
_NO_BLOCKS = ("diffusion.block_size", "diffusion.resample")
IDLE_FIELDS = {"bd3lm": (), "mdlm": _NO_BLOCKS, "sedd": _NO_BLOCKS, "ar": ("diffusion.",)}
"""Fields that the reference's files hold under every objective, and that mean nothing under this one."""


def run_config(state: dict[str, Tensor], reference: dict[str, Any], name: str, overrides: Sequence[str]) -> RunConfig:
    """The resolved configuration: sizes from the tensors, the rest from the reference's configuration."""
    said = dict(text.split("=", 1) for text in overrides if "=" in text)
    objective = said.get("diffusion.objective") or look_up(reference, "algo.name")
    if objective not in OBJECTIVES:
        objective = "bd3lm" if f"{PREFIX}sigma_map.mlp.0.weight" in state else "ar"
    values = to_dict(RunConfig(run_dir=name, precision="fp32"))
    values["data"]["path"] = UNKNOWN_DATA
    values["model"] |= sizes(state, reference)
    values["diffusion"]["objective"] = objective
    found = {ours: look_up(reference, theirs) for ours, theirs in REFERENCE_FIELDS.items()}
    needed = ["data.context_length", *(["diffusion.block_size"] if objective == "bd3lm" else [])]
    unsaid = [ours for ours in needed if found[ours] is None and ours not in said]
    if unsaid:
        raise ValueError(
            f"the checkpoint does not say {' and '.join(unsaid)}; add {' '.join(f'{n}=N' for n in unsaid)}"
        )
    for ours, value in found.items():
        if value is not None and not ours.startswith(IDLE_FIELDS[objective]):
            section, _, field = ours.partition(".")
            values[section][field] = value
    for bound, buffer in (("clip_low", "sampling_eps_min"), ("clip_high", "sampling_eps_max")):
        if objective == "bd3lm" and buffer in state:
            values["diffusion"][bound] = shortest(state[buffer])
    return from_dict(values, overrides)


def sizes(state: dict[str, Tensor], reference: dict[str, Any]) -> dict[str, Any]:
    """The model section, read off the tensors (check_tensors compares all of them with it)."""
    vocab_size, width = state[WIDTH_OF].shape
    layers = {match[1] for match in (re.match(rf"{re.escape(PREFIX)}blocks\.(\d+)\.", name) for name in state) if match}
    found = {"num_layers": len(layers), "hidden_size": width, "vocab_size": vocab_size}
    time, inner, frequencies = (
        state.get(f"{PREFIX}{name}") for name in ("sigma_map.mlp.0.bias", "blocks.0.mlp.0.bias", "rotary_emb.inv_freq")
    )
    if time is not None:
        found["cond_dim"] = len(time)
    if inner is not None:
        found["mlp_ratio"] = len(inner) // width
    # one rotary frequency per two dimensions of a head
    num_heads = look_up(reference, "model.n_heads") if frequencies is None else width // (2 * len(frequencies))
    return found if num_heads is None else found | {"num_heads": num_heads}


def check_tensors(source: Path, state: dict[str, Tensor], average: Any, arch: Architecture) -> None:
    """ValueError listing every tensor that does not fit, in the weights and in the EMA list."""
    entries = table(arch)
    found = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in BUFFERS}
    problems = shape_problems({PREFIX + entry.published: entry.shape for entry in entries}, found)
    if average is not None and len(average) != len(entries):
        problems.append(f"ema.shadow_params has {len(average)} tensors, the model {len(entries)} parameters")
    elif average is not None:
        problems += [
            f"wrong shape: ema.shadow_params[{i}] ({entry.published}) is {tuple(tensor.shape)}, not {entry.shape}"
            for i, (entry, tensor) in enumerate(zip(entries, average, strict=True))
            if tuple(tensor.shape) != entry.shape
        ]
    if problems:
        raise ValueError(f"{source}: the weights do not fit:\n  " + "\n  ".join(problems[:40]))


def _weights(
    state: dict[str, Tensor], average: list[Tensor] | None, arch: Architecture
) -> Iterator[tuple[str, str, Tensor]]:
    for i, entry in enumerate(table(arch)):
        yield entry.ours, "master", to_ours(entry, state[PREFIX + entry.published].float(), arch)
        if average is not None:
            yield entry.ours, "ema", to_ours(entry, average[i].float(), arch)
