"""Saving: how long training stands still, and how long until the checkpoint is on disk.

Synchronous and asynchronous saves alternate, so that whatever else the machine does meets both; medians are reported,
and the best of each, which is what an otherwise idle machine would show.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bd3lm_scale.checkpoint.store import CheckpointStore, SaveReport
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.values import StateSlice

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--millions", type=float, nargs="+", default=[10, 100], help="parameters, in millions")
    parser.add_argument("--saves", type=int, default=5, help="saves of each sort")
    parser.add_argument("--folder", help="file system to write to (default: the system's temporary folder)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for millions in args.millions:
        slices = state_of(millions)
        folder = Path(tempfile.mkdtemp(prefix="benchmark_checkpoint_", dir=args.folder))
        try:
            measured = measure(slices, args.saves, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        figures |= {f"{millions:g}M_{key}": value for key, value in measured.items()}
    return figures


def state_of(millions: float) -> list[StateSlice]:
    """State of one rank that owns everything, in matrices of a DiT's sizes."""
    width, slices = 1024, []
    for i in range(max(1, round(millions * 1e6 / (4 * width * width)))):
        size = 4 * width * width
        tensors = {kind: torch.randn(size) for kind in KINDS}
        slices.append(StateSlice(f"layers.{i}.weight", (4 * width, width), None, 0, 1, 0, size, True, tensors))
    return slices


def measure(slices: list[StateSlice], saves: int, folder: Path) -> dict[str, Any]:
    """Figures for one size."""
    synchronous = CheckpointStore(folder / "sync", CheckpointConfig(keep_last=1, asynchronous=False))
    asynchronous = CheckpointStore(folder / "async", CheckpointConfig(keep_last=1, asynchronous=True))
    asynchronous.prepare(slices)
    asynchronous.wait()
    pairs = [(save(synchronous, step, slices), save(asynchronous, step, slices)) for step in range(saves)]
    sync = [first.total_seconds for first, _ in pairs]
    stall = [second.stall_seconds for _, second in pairs]
    started = time.perf_counter()
    reader = synchronous.newest()
    verified = time.perf_counter()
    if reader is None:
        raise SystemExit("the checkpoint is not found again")
    reader.fill(slices)
    return {
        "state_mb": sum(tensor.nbytes for part in slices for tensor in part.tensors.values()) / 1e6,
        "sync_seconds": statistics.median(sync),
        "sync_seconds_best": min(sync),
        "async_stall_seconds": statistics.median(stall),
        "async_stall_seconds_best": min(stall),
        "async_first_stall_seconds": stall[0],
        "async_total_seconds": statistics.median(second.total_seconds for _, second in pairs),
        "stall_over_sync": statistics.median(stall) / statistics.median(sync),
        "stall_over_sync_best": min(stall) / min(sync),
        "verify_seconds": verified - started,
        "fill_seconds": time.perf_counter() - verified,
    }


def save(store: CheckpointStore, step: int, slices: list[StateSlice]) -> SaveReport:
    """One save, finished."""
    store.save(step, slices, {})
    store.wait()
    if store.last_save is None or store.last_save.problem:
        raise SystemExit(f"the save failed: {store.last_save}")
    return store.last_save
