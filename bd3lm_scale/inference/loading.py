"""A trained model from a checkpoint, without its optimizer, for evaluation and sampling in any layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bd3lm_scale.checkpoint.reader import CheckpointReader, find_checkpoint, open_checkpoint
from bd3lm_scale.config.checks import check
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.engine import Engine, build_engine
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.parallel.mesh import choose_device, init_mesh, new_host_group, read_launch
from bd3lm_scale.parallel.shards import description_of, state_slice

ONE_PROCESS = (
    "parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1",
    "parallel.virtual_pipeline_parallel_size=null", "parallel.sequence_parallel=false", "parallel.recompute=none",
    "optim.zero_stage=1", "train.compile=false",
)  # fmt: skip
"""What a saved configuration is overridden with, before what the user asks for."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to evaluate.

    Attributes:
        engine: its parts on this rank, without optimizer.
        config: the run's configuration with the layout in force here.
        reader: the checkpoint.
        weights: which weights were loaded: "ema" or "master".
        tokenizer_path: the run's tokenizer, None if it cannot be found.
    """

    engine: Engine
    config: RunConfig
    reader: CheckpointReader
    weights: str
    tokenizer_path: Path | None


def load_model(
    source: str | Path, overrides: Sequence[str] = (), weights: str = "ema", step: int | None = None
) -> Loaded:
    """Open a checkpoint under the layout of this world.

    The saved layout is not taken over: everything is 1 unless `overrides` say otherwise (parallel.*), and what the
    world leaves is data parallel. Nor are compiled layers, which would be compiled anew for every length of decoding.

    Args:
        source: run folder or checkpoint folder.
        overrides: `a.b=c` changes to the saved configuration.
        weights: ema | raw; a checkpoint without averaged weights gives its only ones.
        step: choose this step's checkpoint.

    Raises:
        ConfigError, CheckpointError: naming what is wrong and the remedy.
    """
    reader = open_checkpoint(find_checkpoint(source, step))
    meta = reader.meta
    if not isinstance(meta.get("config"), dict):
        raise ConfigError([f"{reader.path}: holds no configuration; it was not written by this program"])
    config = from_dict(meta["config"], [*ONE_PROCESS, *overrides])
    launch = read_launch()
    check(config, launch.world_size, meta["vocab_size"])
    device = choose_device(config.runtime.device, launch.local_rank)
    if device.type == "cpu":
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
    mesh = init_mesh(config.parallel, config.runtime.device, config.runtime.collective_timeout_seconds)
    group = new_host_group() if dist.is_initialized() else None
    vocabulary = (meta["vocab_size"], meta["mask_token_id"])
    engine = build_engine(config, mesh, *vocabulary, group, for_training=False, with_values=False)
    kind = "ema" if weights == "ema" and "ema" in reader.kinds() else "master"
    load_weights(engine, reader, kind)
    return Loaded(engine, config, reader, kind, find_tokenizer(reader.path, config))


@torch.no_grad()
def load_weights(engine: Engine, reader: CheckpointReader, kind: str = "ema") -> None:
    """Fill the working weights of this rank's chunks from a checkpoint, one parameter at a time."""
    for _, parameter in named_parameters(engine.chunks):
        run = {kind: torch.empty(parameter.numel())}
        part = state_slice(description_of(parameter), engine.mesh, 0, parameter.numel(), run)
        reader.fill([part])
        parameter.copy_(part.tensors[kind].view(parameter.shape))
    if engine.transformer.bf16:
        for chunk in engine.chunks:
            chunk.bfloat16()


def find_tokenizer(checkpoint: Path, config: RunConfig) -> Path | None:
    """The tokenizer of a checkpoint: in its own folder, its run folder, or beside the training shards."""
    candidates = [checkpoint / "tokenizer", checkpoint.parent.parent / "tokenizer"]
    if config.data.path:
        candidates.append(Path(config.data.path) / "tokenizer")
    return next((path for path in candidates if path.exists()), None)
