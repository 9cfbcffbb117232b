"""Attention under the block-diffusion visibility: dense SDPA, chunked SDPA, FlexAttention; forward and backward."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.model.attention import AttentionPattern


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=1024, help="L; the transformer reads 2L positions")
    parser.add_argument("--block-size", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--batch", type=int, default=0, help="rows (default: 16 on a GPU, 1 on a CPU)")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    batch, dtype = args.batch or (16 if on_gpu else 1), torch.bfloat16 if on_gpu else torch.float32
    if not on_gpu:
        torch.set_num_threads(1)
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "cpu, 1 thread"}
    shape = (2 * args.length, batch, args.heads, args.head_width)
    qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    for block_size in tqdm(args.block_size, unit="block size"):
        visibility = training_visibility("bd3lm", args.length, block_size)
        for backend in ("dense", "flex") if on_gpu else ("dense", "chunked"):
            pattern = AttentionPattern(visibility, backend)

            def once(pattern: AttentionPattern = pattern) -> None:
                out = pattern.attend(*qkv, num_queries=shape[0])
                out.backward(torch.ones_like(out))

            figures[f"block{block_size}_{backend}_ms"] = 1e3 * best_seconds(once, on_gpu)
        fast = "flex" if on_gpu else "chunked"
        figures[f"block{block_size}_speedup"] = (
            figures[f"block{block_size}_dense_ms"] / figures[f"block{block_size}_{fast}_ms"]
        )
    return figures


def best_seconds(once: Callable[[], None], on_gpu: bool, repeats: int = 10) -> float:
    """Best of several runs after two of warm-up (compilation included there)."""
    best = float("inf")
    for repeat in range(2 + repeats):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        once()
        if on_gpu:
            torch.cuda.synchronize()
        if repeat >= 2:
            best = min(best, time.perf_counter() - started)
    return best
