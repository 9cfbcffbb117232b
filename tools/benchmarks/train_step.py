"""Times optimizer steps of one configuration in this world: started by benchmarks/train.py, alone or under torchrun.

    python tools/benchmarks/train_step.py CONFIG STEPS WARMUP [a.b=c ...]

Rank 0 prints one JSON line: seconds per step (wall, CPU), tokens per second, peak device memory.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from bd3lm_scale.config.checks import check
from bd3lm_scale.config.flops import flops_per_token
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.data.batches import BatchPlan
from bd3lm_scale.engine import build_engine
from bd3lm_scale.parallel.mesh import Mesh, init_mesh, new_host_group, shutdown
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.training.step import FULL_RANGE, noise_step, train_step
from bd3lm_scale.values import Rows

VOCAB_SIZE = 50258


def random_rows(config: RunConfig, mesh: Mesh, vocab_size: int) -> list[Rows]:
    """One step's micro-batches of random text."""
    plan = BatchPlan(config.train.global_batch_size, config.train.micro_batch_size, mesh.data_rank, mesh.data_size)
    rng, rows = np.random.default_rng(0), []
    for micro_step in range(plan.num_micro_batches):
        position = torch.from_numpy(plan.positions(micro_step))
        tokens = rng.integers(0, vocab_size - 1, (len(position), config.data.context_length))
        rows.append(Rows(torch.from_numpy(tokens), position, position < plan.global_batch_size))
    return rows


def time_steps(config: RunConfig, steps: int, warmup: int) -> dict[str, float]:
    """Median step of `steps` after `warmup`."""
    vocab_size = config.model.vocab_size or VOCAB_SIZE
    mesh = init_mesh(config.parallel, config.runtime.device)
    on_gpu = mesh.device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    check(config, mesh.world_size, vocab_size)
    engine = build_engine(config, mesh, vocab_size, vocab_size - 1, new_host_group())
    policy, rows = AnomalyPolicy(config.runtime), random_rows(config, mesh, vocab_size)
    walls, cpus = [], []
    for step in range(warmup + steps):
        wall, cpu = time.perf_counter(), time.process_time()
        train_step(engine, config, step, noise_step(engine, config, step, rows, FULL_RANGE), policy)
        if on_gpu:
            torch.cuda.synchronize()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    tokens = config.train.global_batch_size * config.data.context_length
    wall, cpu = float(np.median(walls[warmup:])), float(np.min(cpus[warmup:]))
    return {
        "step_seconds": wall,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / mesh.world_size / cpu,
        "tflops": flops_per_token(config, vocab_size) * tokens / wall / mesh.world_size / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }


def main() -> None:
    path, steps, warmup, *overrides = sys.argv[1:]
    figures = time_steps(load_config(path, overrides), int(steps), int(warmup))
    if dist.get_rank() == 0:
        print(json.dumps(figures), flush=True)
    shutdown()


if __name__ == "__main__":
    main()
