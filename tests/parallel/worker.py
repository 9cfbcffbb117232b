"""Run under torchrun: train a tiny model for a few steps under each of several layouts, one after another.

    torchrun --nproc-per-node N tests/parallel/worker.py OUTPUT_DIR

OUTPUT_DIR/cases.json: {"name": ["a.b=c", ...], ...}. For each case, OUTPUT_DIR/name.json gets losses, norms,
hashes and the validation figure, and OUTPUT_DIR/name/checkpoints a checkpoint. A case with `gradients=record`
leaves OUTPUT_DIR/name.rankN.npz: what entered the reduction on rank N, and what came out.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections import deque
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config.checks import check
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig, RuntimeConfig
from bd3lm_scale.data.batches import BatchPlan
from bd3lm_scale.engine import Engine, build_engine
from bd3lm_scale.optim import zero
from bd3lm_scale.parallel.mesh import Mesh, init_mesh, new_host_group, shutdown
from bd3lm_scale.parallel.mpu import ModelParallelUnit
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.training.step import noise_step, train_step
from bd3lm_scale.validation import validate
from bd3lm_scale.values import PADDING, Rows, Targets

VOCAB = 100
STEPS = 5
BAD_STEP = 2
ROOT = Path(__file__).parents[2]
TINY = [
    "data.context_length=32", "diffusion.block_size=4", "model.hidden_size=64", "model.num_heads=4",
    "model.num_layers=4", "model.cond_dim=16", "model.dropout=0.0", "train.global_batch_size=8",
    "train.micro_batch_size=2", "optim.warmup_steps=2", "optim.lr=0.003", "optim.ema_decay=0.9",
    "evaluation.micro_batch_size=3", "precision=fp32", "data.path=unused", "checkpoint.asynchronous=false",
]  # fmt: skip


@dataclasses.dataclass
class RandomStream:
    """Rows drawn from their index alone; of several documents where `document_block` is given, each from a block on."""

    context_length: int
    document_block: int | None = None
    num_rows: int = 10
    vocab_size: int = VOCAB
    mask_token_id: int = VOCAB - 1

    def read(self, index: np.ndarray) -> np.ndarray:
        rows = [np.random.default_rng(int(i)).integers(0, VOCAB - 1, self.context_length) for i in index]
        return np.array(rows, np.int64).reshape(len(index), self.context_length)

    read_held_out = read

    def held_out_layout(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        """Two documents and padding, or one and much padding."""
        if self.document_block is None:
            return {}
        document = torch.full((len(index), self.context_length), PADDING)
        for row, number in enumerate(index.tolist()):
            first, second = 5 + number % 9, number % 12
            start = -(-first // self.document_block) * self.document_block
            document[row, :first] = 0
            document[row, start : start + second] = 1
        return {"document_BL": document, "is_target_BL": document >= 0}

    @property
    def num_documents(self) -> int:
        return 2 * self.num_rows

    def held_out_documents(self, index: np.ndarray) -> np.ndarray:
        return 2 * index[:, None] + np.arange(2)


def stream_of(config: RunConfig) -> RandomStream:
    packed = config.data.packing == "documents"
    return RandomStream(config.data.context_length, config.document_block if packed else None)


def batches_of(config: RunConfig, mesh: Mesh, step: int) -> list[Rows]:
    size = config.train.global_batch_size
    plan = BatchPlan(size, config.train.micro_batch_size, mesh.data_rank, mesh.data_size)
    stream = stream_of(config)
    whole = stream.held_out_layout(step * size + np.arange(size)).get("document_BL")
    targets = None
    if whole is not None:
        targets = Targets(int((whole >= 0).sum()), int((whole.amax(dim=1) + 1).sum()))
    out = []
    for micro_step in range(plan.num_micro_batches):
        position = plan.positions(micro_step)
        is_real = position < size
        tokens = stream.read(step * size + position) * is_real[:, None]
        layout = stream.held_out_layout(step * size + position)
        plain = (torch.from_numpy(tokens), torch.from_numpy(position), torch.from_numpy(is_real))
        out.append(Rows(*plain, **layout, targets=targets))
    return out


class NoModelParallelUnit(ModelParallelUnit):
    """What DeepSpeed assumes when it gets no mpu: all ranks are replicas."""

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return 1

    @staticmethod
    def get_model_parallel_rank() -> int:
        return 0

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return dist.group.WORLD

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return dist.get_world_size()

    @staticmethod
    def get_data_parallel_rank() -> int:
        return dist.get_rank()

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        return list(range(dist.get_world_size()))

    @staticmethod
    def get_data_parallel_src_rank() -> int:
        return 0


@contextlib.contextmanager
def sabotage(what: str):
    """Leave out one piece of the engine: the comparison with one process must notice."""
    if what == "no mpu":
        patch = mock.patch.object(zero, "ModelParallelUnit", NoModelParallelUnit)
    elif what == "no hook":
        patch = mock.patch.object(zero.ZeroOptimizer, "_sum_sequence_parallel_gradients")
    elif what == "no tied sum":
        patch = mock.patch.object(zero.ZeroOptimizer, "_sum_tied_gradients")
    else:
        patch = contextlib.nullcontext()
    with patch:
        yield


@contextlib.contextmanager
def partition_everything():
    """ZeRO-3 keeps small parameters whole, which here are all; partition and gather them as it does large ones."""
    derived = zero.engine_config

    def engine_config(*args):
        config = derived(*args)
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 20_000}
        return config

    with mock.patch.object(zero, "engine_config", engine_config):
        yield


@contextlib.contextmanager
def harm(what: str, engine: Engine, policy: AnomalyPolicy):
    """A step gone bad: a gradient that is nan on the last rank alone, or a loss that the policy dislikes."""
    with contextlib.ExitStack() as stack:
        if what == "nan" and engine.mesh.rank == engine.mesh.world_size - 1:
            _, parameter = engine.optimizer.named[-1]
            stack.callback(parameter.register_hook(lambda gradient: gradient * float("nan")).remove)
        elif what == "spike":
            stack.enter_context(mock.patch.object(policy, "config", RuntimeConfig(spike_factor=1.5)))
            stack.enter_context(mock.patch.object(policy, "_losses", deque([1e-3] * 20)))
        yield


def record_gradients(overrides: list[str], output: Path, world_size: int) -> None:
    """At step BAD_STEP: each parameter's gradients as they leave backward here, and the reduced ones Adam is given.

    With beta1 = 0 the first moment is the gradient itself; the clip is out of reach; the steps before it move the
    weights that start at zero, behind which there is no gradient.
    """
    exact = ["optim.beta1=0", "optim.grad_clip=1e9", "optim.warmup_steps=0"]
    config = load_config(ROOT / "configs" / "demo.yaml", [*TINY, *overrides, *exact])
    check(config, world_size, VOCAB)
    mesh = init_mesh(config.parallel, "cpu", 600)
    engine = build_engine(config, mesh, VOCAB, VOCAB - 1, new_host_group())
    seen: dict[str, list[np.ndarray]] = {name: [] for name, _ in engine.optimizer.named}
    for name, parameter in engine.optimizer.named:
        parameter.register_hook(lambda grad, kept=seen[name]: kept.append(grad.float().flatten().numpy().copy()))
    policy = AnomalyPolicy(config.runtime)
    for step in range(BAD_STEP + 1):
        for kept in seen.values():
            kept.clear()
        noised = noise_step(engine, config, step, batches_of(config, mesh, step), (0.0, 1.0))
        train_step(engine, config, step, noised, policy)
    arrays = {f"{name}/in": np.stack(gradients) for name, gradients in seen.items()}
    for s in engine.optimizer.slices():
        arrays[f"{s.name}/out/{s.start}"] = s.tensors["exp_avg"].numpy()
    np.savez(output.with_name(f"{output.name}.rank{mesh.rank}.npz"), **arrays)
    parallel_state.destroy_model_parallel()


def run_case(name: str, overrides: list[str], output: Path, world_size: int) -> None:
    """Overrides that are none: `sabotage=` what is left out, `harm=` at step BAD_STEP, `partition=all`."""
    if "gradients=record" in overrides:
        record_gradients([o for o in overrides if o != "gradients=record"], output / name, world_size)
        return
    own = {"sabotage": "", "harm": "", "partition": ""}
    own |= dict(o.split("=", 1) for o in overrides if o.split("=", 1)[0] in own)
    with sabotage(own["sabotage"]), partition_everything() if own["partition"] else contextlib.nullcontext():
        rest = [o for o in overrides if o.split("=", 1)[0] not in own]
        _run_case(name, rest, own["harm"], output, world_size, saves=own["sabotage"] != "no mpu")


def _run_case(name: str, overrides: list[str], harms: str, output: Path, world_size: int, saves: bool) -> None:
    config = load_config(ROOT / "configs" / "demo.yaml", [*TINY, *overrides])
    check(config, world_size, VOCAB)
    mesh = init_mesh(config.parallel, "cpu", 600)
    group = new_host_group()
    engine = build_engine(config, mesh, VOCAB, VOCAB - 1, group)
    policy = AnomalyPolicy(config.runtime)
    steps = []
    for step in range(STEPS):
        what = harms if step == BAD_STEP else ""
        if what == "absent":
            continue
        with harm(what, engine, policy):
            noised = noise_step(engine, config, step, batches_of(config, mesh, step), (0.0, 1.0))
            outcome = train_step(engine, config, step, noised, policy)
        assert outcome.verdict == ("skip" if what else "ok"), (name, step, outcome.verdict)
        if not what:
            steps.append(dataclasses.asdict(outcome.report))
    result = validate(engine, config, stream_of(config), rows=10, draws=2, use_ema=True)
    if saves:  # without mpu state is owned twice or not at all, and the store refuses that
        store = CheckpointStore(output / name / "checkpoints", config.checkpoint, mesh.rank, world_size, group)
        store.save(STEPS, engine.optimizer.slices(), {"optimizer_step": engine.optimizer.updates})
        assert store.last_save is None or store.last_save.problem is None, store.last_save
    if mesh.rank == 0:
        record = {"steps": steps, "validation": vars(result.likelihood)}
        (output / f"{name}.json").write_text(json.dumps(record))
    parallel_state.destroy_model_parallel()


def main() -> None:
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    cases = json.loads((output / "cases.json").read_text())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for name, overrides in cases.items():
        run_case(name, overrides, output, world)
    shutdown()


if __name__ == "__main__":
    main()
