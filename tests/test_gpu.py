"""One-GPU checks, skipped without CUDA: kernels equal the oracle, a GPU run equals a CPU run, resume and recompute.

Megatron and DeepSpeed are bound to one device per process, so each device has a process of its own.
"""

import dataclasses
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.data.batches import BatchPlan
from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.engine import build_engine
from bd3lm_scale.model.attention import AttentionPattern
from bd3lm_scale.model.head import linear_fp32
from bd3lm_scale.model.inference import CachedDecoder
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.training.step import noise_step, train_step
from bd3lm_scale.values import Rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCAB = 500
SMALL = [
    "data.context_length=128", "diffusion.block_size=16", "model.hidden_size=128", "model.num_heads=4",
    "model.num_layers=3", "model.cond_dim=32", "train.global_batch_size=8", "train.micro_batch_size=4",
    "optim.warmup_steps=0", "optim.lr=0.001", "train.threads=4",
]  # fmt: skip


def _leave_parent_behind() -> None:
    """Other tests of this pytest process have chosen the CPU."""
    os.environ.pop("DS_ACCELERATOR", None)


@pytest.fixture(scope="module")
def on():
    """on(device, function, ...): what the function returns in the process of that device."""
    spawn = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, spawn, _leave_parent_behind) for name in ("cpu", "cuda")}
    yield (
        lambda device, function, *args, **kwargs: (
            pools[device].submit(function, *args, device=device, **kwargs).result()
        )
    )
    for pool in pools.values():
        pool.shutdown()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("length", "block_size"), [(1024, 4), (256, 256), (200, 1)])
@pytest.mark.parametrize("half", [False, True])
def test_flex_equals_dense_forward_and_backward(on, dtype, tolerance, length, block_size, half):
    """Also where rows end inside a tile, and where only the noisy half asks (the last layer)."""
    dense, flex = (
        on("cuda", attend, backend, length, block_size, length if half else 2 * length - block_size, dtype)
        for backend in ("dense", "flex")
    )
    for ours, oracle in zip(flex, dense, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, oracle, rtol=tolerance, atol=tolerance)


def test_bf16_head_gives_fp32_logits(on):
    """The kernel with bf16 operands and an fp32 result rounds nothing to bf16."""
    logits, exact = on("cuda", head_logits)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)


def head_logits(device: str) -> list[torch.Tensor]:
    """Logits of random bf16 operands, and float64's."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, device=device, generator=generator).bfloat16() for shape in ((64, 128), (500, 128), (500,))
    )
    exact = x.double() @ weight.double().t() + bias.double()
    return [linear_fp32(x, weight, bias).cpu(), exact.cpu()]


def attend(backend: str, length: int, block_size: int, queries: int, dtype: torch.dtype, device: str) -> list:
    """Output and gradients of attention on random input."""
    generator = torch.Generator(device).manual_seed(0)
    positions = 2 * length - block_size
    shape = (positions, 2, 2, 64)
    q, k, v = (torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    pattern = AttentionPattern(training_visibility("bd3lm", length, block_size).first(positions), backend)
    out = pattern.attend(q, k, v, queries)
    weight = torch.randn(out.shape, device=device, generator=generator).to(dtype)
    (out * weight).sum().backward()
    return [t.detach().float().cpu() for t in (out, q.grad, k.grad, v.grad)]


def train(*overrides: str, device: str, save_at: int | None = None, store=None) -> list:
    """Reports of 6 steps, or of those after the newest checkpoint of `store`; saves there after step `save_at`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms("train.deterministic=true" in overrides)
    config = load_config("configs/demo.yaml", [*SMALL, f"runtime.device={device}", *overrides])
    mesh = init_mesh(config.parallel, device)
    engine = build_engine(config, mesh, VOCAB, VOCAB - 1)
    first, keeper = 0, store and CheckpointStore(*store)
    start = keeper and keeper.newest()
    if start is not None:
        start.fill(engine.optimizer.slices())
        engine.optimizer.restored(start.meta["optimizer_step"])
        first = start.meta["step"]
    plan, reports = BatchPlan(config.train.global_batch_size, config.train.micro_batch_size), []
    for step in range(first, 6):
        rows = []
        for micro_step in range(plan.num_micro_batches):
            position = plan.positions(micro_step)
            seeds = [np.random.default_rng([step, int(p)]) for p in position]
            tokens = np.stack([rng.integers(0, VOCAB - 1, config.data.context_length) for rng in seeds])
            rows.append(Rows(torch.from_numpy(tokens), torch.from_numpy(position), torch.ones(len(position)).bool()))
        noised = noise_step(engine, config, step, rows, (0.0, 1.0))
        reports.append(train_step(engine, config, step, noised, AnomalyPolicy(config.runtime)).report)
        if step + 1 == save_at:
            keeper.save(save_at, engine.optimizer.slices(), {"optimizer_step": engine.optimizer.updates})
            keeper.wait()
    shutdown()
    return reports


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gpu_equals_cpu(on, stage):
    overrides = ["precision=fp32", f"optim.zero_stage={stage}"]
    for cpu, gpu in zip(on("cpu", train, *overrides), on("cuda", train, *overrides), strict=True):
        assert cpu.stream_hash == gpu.stream_hash
        assert gpu.loss == pytest.approx(cpu.loss, rel=1e-4)
        assert gpu.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-3)


@pytest.mark.parametrize(
    "overrides", [["precision=fp32"], ["precision=bf16"], ["precision=bf16", "optim.zero_stage=3"]]
)
def test_resume_is_bitwise_on_the_gpu(on, tmp_path, overrides):
    overrides = [*overrides, "model.dropout=0.1", "train.deterministic=true"]
    for asynchronous in (False, True):
        store = (tmp_path / str(asynchronous), CheckpointConfig(asynchronous=asynchronous))
        whole = on("cuda", train, *overrides, save_at=3, store=store)
        resumed = on("cuda", train, *overrides, store=store)
        assert [dataclasses.astuple(r) for r in resumed] == [dataclasses.astuple(r) for r in whole[3:]]


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_repeats_dropout(on, recompute):
    overrides = ["precision=fp32", "model.dropout=0.2"]
    again = on("cuda", train, *overrides, f"parallel.recompute={recompute}")
    for a, b in zip(on("cuda", train, *overrides), again, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


@pytest.mark.parametrize("overrides", [["model.dropout=0.0"], ["model.dropout=0.2"], ["optim.zero_stage=3"]])
def test_compiled_layers_compute_the_same(on, overrides):
    overrides = ["precision=fp32", *overrides]
    compiled = on("cuda", train, *overrides, "train.compile=true")
    for a, b in zip(on("cuda", train, *overrides, "train.compile=false"), compiled, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


def test_bf16_stays_near_fp32(on):
    for a, b in zip(on("cuda", train, "precision=fp32"), on("cuda", train, "precision=bf16"), strict=True):
        assert b.loss == pytest.approx(a.loss, rel=2e-2)


def test_heads_too_narrow_for_flex_train_all_the_same(on):
    cpu, gpu = (on(device, train, "precision=fp32", "model.num_heads=16") for device in ("cpu", "cuda"))
    for a, b in zip(cpu, gpu, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


def test_cached_decoding_on_the_gpu_equals_the_cpu(on):
    cpu, gpu = (on(device, decode) for device in ("cpu", "cuda"))
    is_real = cpu.isfinite()
    torch.testing.assert_close(gpu[is_real], cpu[is_real], rtol=1e-4, atol=1e-4)


def decode(device: str) -> torch.Tensor:
    """Logits of a masked block after three clean ones."""
    config = load_config("configs/demo.yaml", [*SMALL, "precision=fp32"])
    mesh = init_mesh(config.parallel, device)
    model = build_engine(config, mesh, VOCAB, VOCAB - 1, for_training=False).chunks[0]
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    decoder = CachedDecoder(model, 16, batch_size=2)
    decoder.commit(torch.arange(96).reshape(2, 48))
    logits = decoder.denoise(torch.full((2, 16), VOCAB - 1)).cpu()
    shutdown()
    return logits
