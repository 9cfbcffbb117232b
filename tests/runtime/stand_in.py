"""A trainer without a model that obeys the same protocol as bd3lm_scale.train, for tests of the launcher.

`python -m tests.runtime.stand_in CONFIG [a.b=c ...]`. Its "loss" is an all-reduced sum of a pure function of (seed,
step, position), so that every number of ranks gives the same run; its checkpoints are one JSON file.
"""

import datetime
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bd3lm_scale.checkpoint.folders import set_aside_later
from bd3lm_scale.config.load import load_config
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.launcher.policy import newest_checkpoint_step
from bd3lm_scale.rng import derive_key, uniforms
from bd3lm_scale.runtime import faults
from bd3lm_scale.runtime.command_line import parse_train_arguments
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.lock import RunLock
from bd3lm_scale.runtime.log import set_up_logging
from bd3lm_scale.runtime.metrics import MetricsWriter
from bd3lm_scale.runtime.run_folder import current_attempt, write_json, write_status
from bd3lm_scale.runtime.stop import StopRequest
from bd3lm_scale.runtime.watchdog import Watchdog

STEP_SECONDS = float(os.environ.get("STAND_IN_STEP_SECONDS", "0.02"))


def losses_of(seed: int, step: int, positions: range) -> torch.Tensor:
    draws = np.floor(uniforms(derive_key(seed, "loss", step), positions.stop) * 1024)  # sums of integers are exact
    return torch.tensor(draws[positions.start :: positions.step])


def save(run_dir: Path, step: int, weight: float) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    faults.point("save:before_manifest", step)
    write_json(folder / "manifest.json", {"step": step, "weight": weight})


def main() -> int:
    arguments = parse_train_arguments()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIG
    environment = os.environ
    if "RANK" not in environment:
        environment.update(RANK=environment["SLURM_PROCID"], WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"])
    rank, world, run_dir = int(environment["RANK"]), int(environment["WORLD_SIZE"]), Path(config.run_dir)
    set_up_logging(run_dir, rank)
    lock = RunLock(run_dir).join(current_attempt())
    stop = StopRequest(run_dir, config.train.time_limit_minutes, poll_seconds=0.1).install()
    timeout = datetime.timedelta(seconds=config.runtime.collective_timeout_seconds)
    dist.init_process_group("gloo", timeout=timeout)
    dog = Watchdog(run_dir, config.runtime, rank, world).start()
    writer = MetricsWriter(run_dir, enabled=rank == 0)
    step, weight = max(newest_checkpoint_step(run_dir), 0), 0.0
    if arguments.checkpoint is not None:
        step = arguments.checkpoint
        if rank == 0:
            set_aside_later(run_dir / "checkpoints", step)
    if step:
        found = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
        weight = found["weight"]
    code, reason = ExitCode.FINISHED, "done"
    while step < config.train.steps:
        faults.point("step", step + 1)
        positions = range(rank, config.train.global_batch_size, world)
        total = torch.tensor(
            [losses_of(config.seed, step, positions).sum().item(), float(stop.reason is not None)]
        ).double()
        dog.waiting()
        dist.all_reduce(total)
        step += 1
        weight += total[0].item()
        writer.write("train", step, loss=total[0].item(), world=world)
        time.sleep(STEP_SECONDS)
        dog.beat(step)
        must_stop = total[1].item() > 0
        if must_stop or step % config.checkpoint.every_steps == 0 or step == config.train.steps:
            if not lock.is_held():
                return ExitCode.FENCED
            if rank == 0:
                writer.sync()
                save(run_dir, step, weight)
            dist.barrier()
        if must_stop:
            code, reason = ExitCode.STOPPED, stop.reason or "another rank"
            break
    dog.stop()
    writer.close()
    if rank == 0:
        print(f"stand-in: attempt {current_attempt()} ends at step {step}: {reason}", flush=True)
        write_status(run_dir, code, reason, step)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
