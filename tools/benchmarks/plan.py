"""Predicted against measured: what a forward pass keeps for its backward pass, under each kind of recomputation."""

import argparse
from dataclasses import replace
from typing import Any

import torch

import bd3lm_scale.parallel.quiet_megatron  # noqa: F401  before anything that imports Megatron
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.sizes import memory
from bd3lm_scale.engine import build_engine
from bd3lm_scale.parallel.mesh import init_mesh
from bd3lm_scale.training.step import FULL_RANGE, noise_step
from bd3lm_scale.values import Rows

VOCAB = 256
SMALL = (
    "data.path=unused", "data.context_length=256", "model.hidden_size=128", "model.num_heads=4", "model.cond_dim=64",
    "train.global_batch_size=4", "train.micro_batch_size=4", "runtime.device=cpu", "model.dropout=0.0",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--config", default="configs/demo.yaml", help="a configuration (its sizes are made small)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides, after the small sizes")


def saved_bytes(config: RunConfig) -> int:
    """Bytes that one forward pass on the CPU saves for its backward pass, parameters and buffers left out.

    Each storage is counted once, whole: a view keeps all of it.
    """
    engine = build_engine(config, init_mesh(config.parallel, "cpu"), VOCAB, VOCAB - 1, for_training=False)
    rows, length = config.train.micro_batch_size, config.data.context_length
    text = torch.randint(0, VOCAB - 1, (rows, length), generator=torch.Generator().manual_seed(0))
    real = torch.ones(rows, dtype=torch.bool)
    batch = noise_step(engine, config, 0, [Rows(text, torch.arange(rows), real)], FULL_RANGE).micro_batches[0]
    (chunk,) = engine.chunks
    own = {t.untyped_storage().data_ptr() for t in (*chunk.parameters(), *chunk.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor  # alive, or its place would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk.train()(batch.noisy.input_BP, batch.noisy.sigma_B, None, batch.index_R, batch.target_R)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def layer_bytes(config: RunConfig) -> tuple[float, float]:
    """(predicted, measured) bytes of one layer that is not the last."""

    def of(layers: int) -> tuple[float, float]:
        deep = replace(config, model=replace(config.model, num_layers=layers))
        return memory(deep, 1, VOCAB, 0).activations, saved_bytes(deep)

    (predicted, measured), (more_predicted, more_measured) = of(2), of(4)
    return (more_predicted - predicted) / 2, (more_measured - measured) / 2


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of one layer as planned and as saved, and their ratio."""
    figures: dict[str, Any] = {}
    for recompute in ("none", "selective", "full"):
        config = load_config(args.config, [*SMALL, *args.overrides, f"parallel.recompute={recompute}"])
        predicted, measured = layer_bytes(config)
        figures[f"{recompute}: predicted MB per layer"] = predicted / 1e6
        figures[f"{recompute}: measured MB per layer"] = measured / 1e6
        figures[f"{recompute}: predicted / measured"] = predicted / measured
    return figures
