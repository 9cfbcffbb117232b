"""Saving: how long training stands still, and how long until the checkpoint is on disk."""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config import CheckpointConfig
from bd3lm_scale.values import StateSlice

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--millions", type=float, nargs="+", default=[10, 100], help="parameters, in millions")
    parser.add_argument("--saves", type=int, default=5, help="saves of each sort; the median counts")
    parser.add_argument("--folder", help="file system to write to (default: the system's temporary folder)")


def state_of(millions: float) -> list[StateSlice]:
    """State of one rank that owns everything, in matrices of a DiT's sizes."""
    width, slices = 1024, []
    for i in range(max(1, round(millions * 1e6 / (4 * width * width)))):
        size = 4 * width * width
        tensors = {kind: torch.randn(size) for kind in KINDS}
        slices.append(StateSlice(f"layers.{i}.weight", (4 * width, width), None, 0, 1, 0, size, True, tensors))
    return slices


def run(args: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for millions in args.millions:
        slices = state_of(millions)
        key = f"{millions:g}M"
        figures[f"{key}_state_mb"] = sum(t.nbytes for s in slices for t in s.tensors.values()) / 1e6
        for name, asynchronous in (("sync", False), ("async", True)):
            reports = measure(slices, asynchronous, args.saves, args.folder)
            seconds = [r.total_seconds for r in reports]
            if asynchronous:
                figures[f"{key}_async_first_stall_seconds"] = reports[0].stall_seconds
                stall = statistics.median(r.stall_seconds for r in reports[1:])
                figures[f"{key}_async_stall_seconds"] = stall
                figures[f"{key}_stall_over_sync"] = stall / figures[f"{key}_sync_seconds"]
            figures[f"{key}_{name}_seconds"] = statistics.median(seconds[1:])
        figures[f"{key}_verify_and_fill_seconds"] = resume_seconds(slices, args.folder)
    return figures


def measure(slices: list[StateSlice], asynchronous: bool, saves: int, folder: str | None) -> list[Any]:
    path = Path(tempfile.mkdtemp(prefix="benchmark_checkpoint_", dir=folder))
    try:
        store = CheckpointStore(path, CheckpointConfig(keep_last=1, asynchronous=asynchronous))
        reports = []
        for step in range(saves + 1):
            store.save(step, slices, {})
            store.wait()
            if store.last_save is None or store.last_save.problem:
                raise SystemExit(f"the save failed: {store.last_save}")
            reports.append(store.last_save)
        return reports
    finally:
        shutil.rmtree(path, ignore_errors=True)


def resume_seconds(slices: list[StateSlice], folder: str | None) -> float:
    """Verify every byte and read everything back."""
    path = Path(tempfile.mkdtemp(prefix="benchmark_checkpoint_", dir=folder))
    try:
        store = CheckpointStore(path, CheckpointConfig(asynchronous=False))
        store.save(0, slices, {})
        started = time.perf_counter()
        reader = store.newest()
        if reader is None:
            raise SystemExit("the checkpoint is not found again")
        reader.fill(slices)
        return time.perf_counter() - started
    finally:
        shutil.rmtree(path, ignore_errors=True)
