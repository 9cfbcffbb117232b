"""Sampling speed on one thread: tokens per CPU-second, beside what the same arithmetic costs as bare matrix products.

A random-weight model of 6 layers, width 256, 8 heads, 8192 ids, context 256, blocks of 16; nucleus 0.9. CPU time of the
process, minimum over the repeats.

Shapes: B samples, S tokens in a block, D width, V vocabulary.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bd3lm_scale.config.load import from_dict
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.inference.batches import draw_samples

VOCAB_SIZE = 8192
CASES = {
    # name: (sampler, tokens, batch)
    "first_hitting": ("first_hitting", 256, 1),
    "first_hitting_batch16": ("first_hitting", 256, 16),
    "first_hitting_1024": ("first_hitting", 1024, 1),
    "ancestral16": ("ancestral", 256, 1),
    "ancestral16_batch16": ("ancestral", 256, 16),
    "confidence_batch16": ("confidence", 256, 16),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `benchmark.py sample`."""
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decoder", choices=("fast", "cached"), default="fast", help="fast: what `sample` uses")
    parser.add_argument("--steps", type=int, default=16, help="T of ancestral")


def base_config() -> RunConfig:
    """The published shape of this benchmark."""
    return from_dict(
        {
            "run_dir": "benchmark",
            "precision": "fp32",
            "data": {"path": "none", "context_length": 256},
            "diffusion": {"objective": "bd3lm", "block_size": 16},
            "model": {"num_layers": 6, "hidden_size": 256, "num_heads": 8, "cond_dim": 128, "vocab_size": VOCAB_SIZE},
            "sampling": {"nucleus_p": 0.9},
        }
    )


def random_model(config: RunConfig) -> Any:
    """A model in which no weight is zero, so that nothing is cheaper than in a trained one."""
    from bd3lm_scale.engine import build_engine
    from bd3lm_scale.parallel.mesh import init_mesh

    mesh = init_mesh(config.parallel, "cpu")
    model = build_engine(config, mesh, VOCAB_SIZE, VOCAB_SIZE - 1, for_training=False).chunks[0].eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and not parameter.any():
                parameter.normal_(0.0, 0.05, generator=generator)
    return model


def cpu_seconds(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Least CPU time of the process over the repeats, after one run that is not counted; and the last result."""
    result = work()
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        result = work()
        best = min(best, time.process_time() - started)
    return best, result


def gemm_gflops(rows: int) -> float:
    """GFLOP per CPU-second of (rows, 256) @ (256, 1024) in fp32, what the layers mostly do."""
    a, b = torch.randn(rows, 256), torch.randn(1024, 256)
    count = max(50, 200_000 // rows)

    def work() -> None:
        for _ in range(count):
            torch.nn.functional.linear(a, b)

    return count * 2 * rows * 256 * 1024 / cpu_seconds(work, 3)[0] / 1e9


def network_gflop(config: RunConfig, samples: list, calls: int) -> float:
    """Arithmetic of a batch: layers and attention of each call's block, and the head on the rows it is asked for."""
    width, size, layers = config.model.hidden_size, config.block_size, config.model.num_layers
    window = config.data.context_length
    context = sum(min(start, window - size) + size for start in range(0, config.sampling.length, size))
    mean_context = context / (config.sampling.length // size)
    per_call = layers * (24 * width**2 * size + 4 * size * mean_context * width)
    scored = sum(len(s.tokens) - s.prompt_length for s in samples)
    return (per_call * calls * len(samples) + 2 * width * VOCAB_SIZE * scored) / 1e9


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of all cases."""
    from bd3lm_scale.model.fast_decoder import FastDecoder, FastWeights
    from bd3lm_scale.model.inference import CachedDecoder

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    config = base_config()
    model = random_model(config)
    weights = FastWeights(model)
    figures: dict[str, Any] = {"gemm_gflops_16_rows": gemm_gflops(16), "gemm_gflops_256_rows": gemm_gflops(256)}
    for name in args.cases:
        sampler, length, batch = CASES[name]
        sampling = replace(config.sampling, sampler=sampler, length=length, batch_size=batch, steps=args.steps)
        case = replace(config, sampling=sampling)

        def open_network(rows: int, case: RunConfig = case) -> Any:
            if args.decoder == "cached":
                return CachedDecoder(model, case.block_size, rows, window=case.data.context_length)
            return FastDecoder(weights, case.block_size, rows, window=case.data.context_length)

        def work(case: RunConfig = case, batch: int = batch, open_network: Callable = open_network) -> list:
            mask, eos = VOCAB_SIZE - 1, 1
            samples = draw_samples(
                open_network, case, [(eos,)] * batch, range(batch), mask_token_id=mask, eos_token_id=eos
            )
            return list(samples)

        seconds, samples = cpu_seconds(work, args.repeats)
        tokens = sum(len(s.tokens) - s.prompt_length for s in samples)
        calls = samples[0].forward_calls
        figures[f"{name}_tokens_per_cpu_second"] = tokens / seconds
        figures[f"{name}_nfe"] = sum(s.nfe for s in samples) / len(samples)
        figures[f"{name}_forward_calls"] = calls
        figures[f"{name}_ms_per_call"] = 1e3 * seconds / calls
        figures[f"{name}_gflops"] = network_gflop(case, samples, calls) / seconds
    return figures
