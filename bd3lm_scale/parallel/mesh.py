"""Who am I: rank layout, process groups and device, from torchrun's or srun's environment, or alone.

Ranks are numbered tensor fastest, then data, then pipeline: rank = (pipeline * DP + data) * TP + tensor.
"""

import datetime
import os
import socket
import subprocess
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from bd3lm_scale.config.environment import number_from_environment
from bd3lm_scale.config.schema import ParallelConfig
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.parallel import cpu_shim
from bd3lm_scale.parallel.groups import connect_when_needed, few_groups, raise_descriptor_limit


@dataclass(frozen=True)
class Mesh:
    """This process's position in the layout."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    pipeline_rank: int
    pipeline_size: int

    @property
    def is_last_stage(self) -> bool:
        """Holds the head and computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main_rank(self) -> bool:
        """The one rank that writes metrics and talks to the user."""
        return self.rank == 0


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int


def read_launch() -> Launch:
    """Rank and world from torchrun (RANK ...) or srun (SLURM_PROCID ...); alone when neither started us.

    Also sets the variables torch.distributed and DeepSpeed read.
    """
    env = os.environ
    rank, world = number_from_environment("RANK"), number_from_environment("WORLD_SIZE")
    if rank is not None and world is not None:
        _refuse_inherited(world)
        launch = Launch(rank, world, number_from_environment("LOCAL_RANK") or 0)
    elif env.get("SLURM_PROCID") and env.get("SLURM_STEP_NUM_TASKS"):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        launch = Launch(*(number_from_environment(name) or 0 for name in names))
        if not env.get("MASTER_ADDR"):
            env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST", ""))
        # Any port derived from the job id is the same on all nodes and rarely taken twice.
        if not env.get("MASTER_PORT"):
            env["MASTER_PORT"] = str(20000 + (number_from_environment("SLURM_JOB_ID") or 0) % 20000)
    else:
        launch = Launch(0, 1, 0)
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(
            [f"RANK ({launch.rank}): outside WORLD_SIZE ({launch.world_size}); unset both"], "environment"
        )
    env.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank))
    env["MASTER_ADDR"] = env.get("MASTER_ADDR") or "127.0.0.1"
    env["MASTER_PORT"] = env.get("MASTER_PORT") or (str(_free_port()) if launch.world_size == 1 else "29500")
    return launch


def _refuse_inherited(world: int) -> None:
    """ConfigError where RANK and WORLD_SIZE are those of the shell that srun was called in: all tasks are that rank."""
    tasks = number_from_environment("SLURM_STEP_NUM_TASKS") or 1
    if tasks > world and not os.environ.get("TORCHELASTIC_RUN_ID"):
        problem = f"WORLD_SIZE ({world}): fewer than the {tasks} tasks of this srun step; unset RANK and WORLD_SIZE"
        raise ConfigError([problem], "environment")


def _first_host(nodes: str) -> str:
    """The first name of a Slurm node list."""
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        problem = f"MASTER_ADDR: not set, and scontrol cannot read SLURM_STEP_NODELIST ({nodes!r}: {error}); set it"
        raise ConfigError([problem], "environment") from error


_OWN_GPU = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND")
"""Set by srun --gpus-per-task=1 and --gpu-bind=single:1: each task sees one GPU, which is its device 0."""


def choose_device(requested: str, local_rank: int) -> torch.device:
    """The device of this process for runtime.device auto | cpu | cuda."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "runtime.device (cuda): this machine has no usable CUDA device; use runtime.device=auto or cpu"
        )
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank < count:
        return torch.device("cuda", local_rank)
    if count == 1 and any(os.environ.get(name) for name in _OWN_GPU):
        return torch.device("cuda", 0)
    raise ValueError(
        f"local rank {local_rank} has no GPU of its own: this process sees {count}; start fewer processes per node, "
        "or let each see all GPUs of its node (SLURM_GPUS_PER_TASK and SLURM_GPU_BIND say where each has its own)"
    )


def init_mesh(parallel: ParallelConfig, device: str = "auto", timeout_seconds: float = 1800.0) -> Mesh:
    """Start torch.distributed and Megatron's groups for this layout.

    Args:
        parallel: sizes; the world must be a multiple of TP * PP (checked by the configuration before).
        device: auto | cpu | cuda.
        timeout_seconds: after which a collective that does not complete raises on every rank.

    Raises:
        ValueError: no such device, or CUDA after the CPU in one process.
    """
    launch = read_launch()
    chosen = choose_device(device, launch.local_rank)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it, and warns on CPUs too
    if chosen.type == "cuda":
        if cpu_shim.is_installed():
            raise ValueError(
                "runtime.device (cuda): this process has set Megatron and DeepSpeed up for the CPU; "
                "use a process of its own for each device"
            )
        torch.cuda.set_device(chosen)
        os.environ["DS_ACCELERATOR"] = "cuda"
        os.environ["LOCAL_RANK"] = str(chosen.index)  # DeepSpeed takes it for the number of the device
        # read when cuBLAS starts; without it torch refuses matrix products under train.deterministic
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        cpu_shim.install()
    if not dist.is_initialized():
        connect_when_needed()
        raise_descriptor_limit()
        # NCCL alone on GPUs: with both, every group of Megatron's would have a gloo twin; host groups name gloo
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        store = dist.HashStore() if launch.world_size == 1 else None
        dist.init_process_group(
            backend,
            timeout=datetime.timedelta(seconds=timeout_seconds),
            rank=launch.rank,
            world_size=launch.world_size,
            store=store,  # no device_id: it would connect NCCL for every group, also those that are never used
        )
    return _init_groups(parallel, launch, chosen, timeout_seconds)


def _init_groups(parallel: ParallelConfig, launch: Launch, device: torch.device, timeout_seconds: float) -> Mesh:
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.is_initialized():
        with few_groups():
            parallel_state.initialize_model_parallel(
                parallel.tensor_parallel_size,
                parallel.pipeline_parallel_size,
                parallel.interleaved_chunks,
                distributed_timeout_minutes=max(1, round(timeout_seconds / 60)),
                create_gloo_process_groups=False,
            )
        if device.type == "cuda":
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        else:
            tracker: Any = tensor_parallel.get_cuda_rng_tracker()
            tracker.reset()
            tracker.add("model-parallel-rng", 1)
    return Mesh(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        device=device,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
    )


def shutdown() -> None:
    """Leave the groups in order; harmless when they never started."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def new_host_group() -> dist.ProcessGroup | None:
    """A gloo group over all ranks for small host-side agreements; None when alone."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if dist.get_world_size() > 1 else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
