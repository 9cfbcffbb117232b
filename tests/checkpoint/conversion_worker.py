"""Run under torchrun: load one checkpoint under several real layouts, one after another, and save it again.

    torchrun --nproc-per-node N tests/checkpoint/conversion_worker.py CHECKPOINT OUTPUT_DIR

OUTPUT_DIR/cases.json: {"name": ["a.b=c", ...], ...}. For each case, OUTPUT_DIR/name/checkpoints gets the checkpoint as
that layout's optimizers saved it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config.checks import check
from bd3lm_scale.config.load import from_dict, to_dict
from bd3lm_scale.engine import build_engine
from bd3lm_scale.parallel.mesh import init_mesh, new_host_group, shutdown


def run_case(name: str, overrides: list[str], checkpoint: Path, output: Path, world_size: int) -> None:
    reader = open_checkpoint(checkpoint)
    meta = reader.meta
    config = from_dict(meta["config"], ["checkpoint.asynchronous=false", *overrides])
    check(config, world_size, meta["vocab_size"])
    mesh = init_mesh(config.parallel, "cpu", 60)
    group = new_host_group()
    engine = build_engine(config, mesh, meta["vocab_size"], meta["mask_token_id"], group)
    reader.fill(engine.optimizer.slices())
    engine.optimizer.restored(meta["optimizer_step"])
    store = CheckpointStore(output / name / "checkpoints", config.checkpoint, mesh.rank, world_size, group)
    layout = {"tensor": mesh.tensor_size, "pipeline": mesh.pipeline_size, "data": mesh.data_size}
    store.save(meta["step"], engine.optimizer.slices(), {**meta, "layout": layout, "config": to_dict(config)})
    assert store.last_save is None or store.last_save.problem is None, store.last_save
    parallel_state.destroy_model_parallel()


def main() -> None:
    torch.set_num_threads(1)
    checkpoint, output = map(Path, sys.argv[1:])
    for name, overrides in json.loads((output / "cases.json").read_text()).items():
        run_case(name, overrides, checkpoint, output, int(os.environ["WORLD_SIZE"]))
    shutdown()


if __name__ == "__main__":
    main()
