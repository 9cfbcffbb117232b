"""Attention under the block-diffusion visibility: dense SDPA, chunked SDPA, FlexAttention; forward and backward."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.model.attention import AttentionPattern
from bd3lm_scale.model.document_attention import document_runs
from bd3lm_scale.model.document_attention import of_documents as visibility_of_documents
from bd3lm_scale.model.tiles import plan_chunks
from bd3lm_scale.values import PADDING, Visibility


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=1024, help="L; the transformer reads 2L positions")
    parser.add_argument("--block-size", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--batch", type=int, default=0, help="rows (default: 16 on a GPU, 1 on a CPU)")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--document", type=int, default=300, help="tokens of each document of packed rows")
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
        figures |= packed(visibility, block_size, fast, qkv, args.document)
    return figures


def packed(visibility: Visibility, block_size: int, backend: str, qkv: list[Tensor], document: int) -> dict[str, float]:
    """Rows of documents of `document` tokens: time once prepared, of preparing, and per pair that is seen."""
    batch, length, name = qkv[0].shape[1], qkv[0].shape[0] // 2, f"block{block_size}_packed"
    stride = -(-document // block_size) * block_size
    position = torch.arange(length)
    row = torch.where((position % stride < document), position // stride, PADDING)
    documents = row.repeat(batch, 1)
    pattern = AttentionPattern(visibility, backend)
    first = visibility_of_documents(visibility, row)
    pairs = sum(
        int(first.may_see(p[:, None], torch.arange(2 * length)).sum()) for p in torch.arange(2 * length).split(256)
    )
    whole = sum(
        int(visibility.may_see(p[:, None], torch.arange(2 * length)).sum()) for p in torch.arange(2 * length).split(256)
    )

    def once() -> None:
        out = pattern.attend_documents(*qkv, num_queries=2 * length, document_BL=documents)
        out.backward(torch.ones_like(out))

    def stream() -> None:
        out = pattern.attend(*qkv, num_queries=2 * length)
        out.backward(torch.ones_like(out))

    def prepare() -> None:
        plan_chunks(first, document_runs(first, 128), qkv[0].dtype, qkv[0].device)

    on_gpu = qkv[0].is_cuda
    seconds, of_stream = best_seconds(once, on_gpu), best_seconds(stream, on_gpu)
    return {
        f"{name}_ms": 1e3 * seconds,
        f"{name}_prepare_ms_per_row": 1e3 * best_seconds(prepare, on_gpu),
        f"{name}_ns_per_pair": 1e9 * seconds / (batch * pairs),
        f"block{block_size}_stream_ns_per_pair": 1e9 * of_stream / (batch * whole),
    }


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
