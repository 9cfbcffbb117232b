"""Training: what the engine costs over plain PyTorch, and how it scales over processes.

(default)      one CPU thread: plain training loop vs the engine (Megatron + DeepSpeed ZeRO-1), and objectives
--scaling      tokens/s at 1, 2, 4 processes for DP, TP, PP
--config FILE  time this configuration as it is (GPU: tokens/s, TFLOP/s, memory)
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bd3lm_scale.checkpoint.hf.configuration_bd3lm import BD3LMConfig
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.diffusion.loss import num_loss_tokens, score_rows
from bd3lm_scale.diffusion.noising import noise_rows
from bd3lm_scale.diffusion.process import Process, make_process
from bd3lm_scale.engine import build_engine, prepare_batch
from bd3lm_scale.optim.ema import AdamWithEma
from bd3lm_scale.parallel.mesh import Mesh, init_mesh
from bd3lm_scale.values import HeadRows, Interval, NoisyRows

ROOT = Path(__file__).resolve().parents[2]
# The shape of the published CPU figures: 6 layers, D 256, H 8, V 8192, L 256, L' 16, batch 8.
SHAPE = [
    "model.num_layers=6", "model.hidden_size=256", "model.num_heads=8", "model.cond_dim=128", "model.vocab_size=8192",
    "data.context_length=256", "diffusion.block_size=16", "train.global_batch_size=8", "train.micro_batch_size=8",
    "model.dropout=0.0", "precision=fp32", "runtime.device=cpu", "optim.warmup_steps=0",
]  # fmt: skip
DEMO = str(ROOT / "configs" / "demo.yaml")
OBJECTIVES = ("bd3lm", "mdlm", "sedd", "ar")
LAYOUTS = {
    "dp": "train.global_batch_size={rows}",
    "tp": "parallel.tensor_parallel_size={n}",
    "pp": "parallel.pipeline_parallel_size={n}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="time this configuration instead")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", help="overrides")
    parser.add_argument("--scaling", action="store_true", help="DP, TP and PP at 1, 2, 4 processes")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (after 2 of warm-up)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.config:
        return launch(1, args.config, args.steps, args.set)
    if args.scaling:
        return scaling(args.steps, args.set)
    return wrapping(args.steps, args.set)


def launch(world: int, config: str, steps: int, overrides: list[str]) -> dict[str, float]:
    """Time a configuration in processes of its own."""
    script = str(Path(__file__).with_name("train_step.py"))
    command = [sys.executable, script, config, str(steps), "2", *overrides]
    if world > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(port)]
        command = [sys.executable, *torchrun, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def wrapping(steps: int, overrides: list[str]) -> dict[str, Any]:
    """The same model and batch: plain loop with torch's AdamW vs the whole engine; then the other objectives."""
    figures: dict[str, Any] = {
        "module_tokens_per_cpu_second": module_rate(steps, overrides),
        "plain_tokens_per_cpu_second": plain_rate(steps, overrides),
    }
    for objective in tqdm(OBJECTIVES, unit="objective"):
        timed = launch(1, DEMO, steps, [*SHAPE, f"diffusion.objective={objective}", *overrides])
        figures[f"{objective}_tokens_per_cpu_second"] = timed["tokens_per_cpu_second"]
        figures[f"{objective}_gflops"] = timed["tflops"] * 1e3
    figures["gemm_gflops"] = gemm_rate()
    figures["cost_over_plain_module"] = figures["module_tokens_per_cpu_second"] / figures["bd3lm_tokens_per_cpu_second"]
    figures["wrapping_cost"] = figures["plain_tokens_per_cpu_second"] / figures["bd3lm_tokens_per_cpu_second"]
    figures["bd3lm_over_mdlm_cost"] = figures["mdlm_tokens_per_cpu_second"] / figures["bd3lm_tokens_per_cpu_second"]
    return figures


def plain_rate(steps: int, overrides: list[str]) -> float:
    """Tokens per CPU-second of our layers in a plain loop: no schedule, no DeepSpeed."""
    config = load_config(DEMO, [*SHAPE, *overrides])
    mesh, vocab_size = init_mesh(config.parallel, "cpu"), config.model.vocab_size or 8192
    engine = build_engine(config, mesh, vocab_size, vocab_size - 1, for_training=False)
    model = engine.chunks[0]

    def loss_sum(noisy: NoisyRows) -> Tensor:
        batch = prepare_batch(noisy)
        out = model(noisy.input_BP, noisy.sigma_B, None, batch.index_R, batch.target_R)
        return score_rows(HeadRows(out[0], out[1], batch.index_R, batch.is_real_R), noisy, engine.process).weighted_nll

    return loop_rate(config, mesh, engine.process, model, loss_sum, steps)


def module_rate(steps: int, overrides: list[str]) -> float:
    """The same for a plain PyTorch module (the exported class, dense mask) that shares no code with the engine."""
    config = load_config(DEMO, [*SHAPE, *overrides])
    mesh, vocab_size = init_mesh(config.parallel, "cpu"), config.model.vocab_size or 8192
    process = make_process(config.diffusion, config.data.context_length, vocab_size, vocab_size - 1)
    model = BD3LM(
        BD3LMConfig(
            block_size=config.block_size, vocab_size=vocab_size, model_length=config.data.context_length,
            hidden_dim=config.model.hidden_size, cond_dim=config.model.cond_dim, n_blocks=config.model.num_layers,
            n_heads=config.model.num_heads, dropout=0.0, mask_token_id=vocab_size - 1,
        )
    )  # fmt: skip

    def loss_sum(noisy: NoisyRows) -> Tensor:
        logits = model(noisy.input_BP)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        scored = noisy.is_scored_BL
        nll = torch.nn.functional.cross_entropy(logits[scored], noisy.target_BL[scored], reduction="none")
        return (nll * noisy.weight_BL[scored]).sum()

    return loop_rate(config, mesh, process, model, loss_sum, steps)


def loop_rate(
    config: RunConfig,
    mesh: Mesh,
    process: Process,
    model: nn.Module,
    loss_sum: Callable[[NoisyRows], Tensor],
    steps: int,
) -> float:
    """Tokens per CPU-second of noise, forward, backward, clip, AdamW and EMA on one thread."""
    from benchmarks.train_step import random_rows

    torch.set_num_threads(1)
    parameters = list(model.parameters())
    adam, best = AdamWithEma(parameters, lr=config.optim.lr, fused=True), float("inf")
    for parameter in parameters:
        adam.prepare(parameter)
    (rows,), size = random_rows(config, mesh, process.vocab_size), config.train.global_batch_size
    for step in range(2 + steps):
        started = time.process_time()
        noisy = noise_rows(rows, process, seed=1, step=step, global_batch_size=size, interval=Interval(0.0, 1.0))
        (loss_sum(noisy) / num_loss_tokens(process, size)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        if step >= 2:
            best = min(best, time.process_time() - started)
    return size * config.data.context_length / best


def scaling(steps: int, overrides: list[str]) -> dict[str, Any]:
    """Strong scaling for TP and PP (same batch), weak for DP (8 rows per process): share of ideal tokens/s."""
    figures: dict[str, Any] = {"cores": os.cpu_count()}
    shape = [*SHAPE, "model.num_layers=8", "train.micro_batch_size=1", *overrides]
    base = launch(1, DEMO, steps, shape)["tokens_per_second"]
    figures["one_process_tokens_per_second"] = base
    for name, template in tqdm(LAYOUTS.items(), unit="layout"):
        for n in (2, 4):
            rate = launch(n, DEMO, steps, [*shape, template.format(n=n, rows=8 * n)])["tokens_per_second"]
            figures[f"{name}{n}_tokens_per_second"] = rate
            figures[f"{name}{n}_efficiency"] = rate / (n * base)
    return figures


def gemm_rate() -> float:
    """GFLOP/s of one thread multiplying matrices of the model's shape: what the arithmetic alone allows."""
    torch.set_num_threads(1)
    a, b = torch.randn(4096, 256), torch.randn(256, 1024)
    best = float("inf")
    for _ in range(20):
        started = time.process_time()
        for _ in range(5):
            torch.mm(a, b)
        best = min(best, (time.process_time() - started) / 5)
    return 2 * 4096 * 256 * 1024 / best / 1e9
