"""One-GPU checks, skipped without CUDA: kernels equal the oracle, a GPU run equals a CPU run, resume and recompute."""

import dataclasses

import numpy as np
import pytest
import torch

from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config import CheckpointConfig
from bd3lm_scale.config_load import load_config
from bd3lm_scale.data.batches import BatchPlan
from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.engine import build_engine
from bd3lm_scale.model.attention import AttentionPattern
from bd3lm_scale.model.inference import CachedDecoder
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.step import train_step
from bd3lm_scale.values import Rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCAB = 500
SMALL = [
    "data.context_length=128", "diffusion.block_size=16", "model.hidden_size=128", "model.num_heads=4",
    "model.num_layers=3", "model.cond_dim=32", "train.global_batch_size=8", "train.micro_batch_size=4",
    "optim.warmup_steps=0", "optim.lr=0.001", "train.threads=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_groups():
    yield
    shutdown()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("length", "block_size"), [(1024, 4), (256, 256), (200, 1)])
@pytest.mark.parametrize("half", [False, True])
def test_flex_equals_dense_forward_and_backward(dtype, tolerance, length, block_size, half):
    """Also where 2L is no multiple of the tile, and where only the noisy half asks (the last layer)."""
    visibility = training_visibility("bd3lm", length, block_size)
    queries = length if half else 2 * length
    results = []
    for backend in ("dense", "flex"):
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (2 * length, 2, 2, 64)
        q, k, v = (torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_() for _ in range(3))
        out = AttentionPattern(visibility, backend).attend(q, k, v, queries)
        weight = torch.randn(out.shape, device="cuda", generator=generator).to(dtype)
        (out * weight).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for ours, oracle in zip(results[1], results[0], strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.float(), oracle.float(), rtol=tolerance, atol=tolerance)


def train(device: str, *overrides: str, steps: int = 6, save_at: int | None = None, start=None, store=None) -> list:
    """Reports of a few steps; saves after step `save_at`, or starts from `start`."""
    config = load_config("configs/demo.yaml", [*SMALL, f"runtime.device={device}", *overrides])
    mesh = init_mesh(config.parallel, device)
    engine = build_engine(config, mesh, VOCAB, VOCAB - 1)
    first = 0
    if start is not None:
        start.fill(engine.optimizer.slices())
        engine.optimizer.restored(start.meta["optimizer_step"])
        first = start.meta["step"]
    plan, reports = BatchPlan(config.train.global_batch_size, config.train.micro_batch_size), []
    for step in range(first, steps):
        rows = []
        for micro_step in range(plan.num_micro_batches):
            position = plan.positions(micro_step)
            seeds = [np.random.default_rng([step, int(p)]) for p in position]
            tokens = np.stack([rng.integers(0, VOCAB - 1, config.data.context_length) for rng in seeds])
            rows.append(Rows(torch.from_numpy(tokens), torch.from_numpy(position), torch.ones(len(position)).bool()))
        reports.append(train_step(engine, config, step, rows, (0.0, 1.0), AnomalyPolicy(config.runtime))[0])
        if step + 1 == save_at:
            store.save(save_at, engine.optimizer.slices(), {"optimizer_step": engine.optimizer.updates})
            store.wait()
    shutdown()
    return reports


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gpu_equals_cpu(stage):
    torch.backends.cuda.matmul.allow_tf32 = False
    overrides = ["precision=fp32", f"optim.zero_stage={stage}"]
    for cpu, gpu in zip(train("cpu", *overrides), train("cuda", *overrides), strict=True):
        assert cpu.stream_hash == gpu.stream_hash
        assert gpu.loss == pytest.approx(cpu.loss, rel=1e-4)
        assert gpu.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-3)


@pytest.mark.parametrize(
    "overrides", [["precision=fp32"], ["precision=bf16"], ["precision=bf16", "optim.zero_stage=3"]]
)
def test_resume_is_bitwise_on_the_gpu(tmp_path, overrides):
    overrides = [*overrides, "model.dropout=0.1", "train.deterministic=true"]
    for asynchronous in (False, True):
        store = CheckpointStore(tmp_path / str(asynchronous), CheckpointConfig(asynchronous=asynchronous))
        whole = train("cuda", *overrides, save_at=3, store=store)
        resumed = train("cuda", *overrides, start=store.newest())
        assert [dataclasses.astuple(r) for r in resumed] == [dataclasses.astuple(r) for r in whole[3:]]


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_repeats_dropout(recompute):
    overrides = ["precision=fp32", "model.dropout=0.2"]
    plain, again = train("cuda", *overrides), train("cuda", *overrides, f"parallel.recompute={recompute}")
    for a, b in zip(plain, again, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


def test_compiled_layers_compute_the_same():
    overrides = ["precision=fp32"]
    for a, b in zip(train("cuda", *overrides), train("cuda", *overrides, "train.compile=true"), strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


def test_bf16_stays_near_fp32():
    for a, b in zip(train("cuda", "precision=fp32"), train("cuda", "precision=bf16"), strict=True):
        assert b.loss == pytest.approx(a.loss, rel=2e-2)


def test_cached_decoding_on_the_gpu_equals_the_cpu():
    config = load_config("configs/demo.yaml", [*SMALL, "precision=fp32"])
    logits = []
    for device in ("cpu", "cuda"):
        mesh = init_mesh(config.parallel, device)
        model = build_engine(config, mesh, VOCAB, VOCAB - 1, for_training=False).chunks[0]
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        decoder = CachedDecoder(model, 16, batch_size=2)
        decoder.commit(torch.arange(96).reshape(2, 48))
        logits.append(decoder.denoise(torch.full((2, 16), VOCAB - 1)).cpu())
        shutdown()
    is_real = logits[0].isfinite()
    torch.testing.assert_close(logits[1][is_real], logits[0][is_real], rtol=1e-4, atol=1e-4)
