"""Before the first step: is every node fit for the run? One table, bad nodes by name.

Every rank measures itself, the verdict is computed from the same gathered measurements on all ranks, so all of them
come to the same conclusion.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.distributed as dist

from bd3lm_scale.errors import PreflightError
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.parallel.groups import descriptors_needed, raise_descriptor_limit
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import current_attempt, node_name, runtime_folder, try_write_json

log = get_logger(__name__)

MAX_CLOCK_SKEW_SECONDS = 5.0
MIN_MEMORY_SHARE = 0.8
SLOW_FACTOR = 1.5
GIB = 2**30


@dataclass(frozen=True)
class NodeReport:
    """What one rank measured about its machine.

    Attributes:
        free_memory_gib: of the device (GPU), or of the machine (CPU).
        free_disk_gib: where the run folder lies.
        clock: seconds since the epoch, taken right after a barrier.
        matmul_ms: time of a fixed small matrix product: a throttled device shows here.
        versions, code, config: must be equal everywhere.
        descriptors: how many files and sockets a process may have open.
    """

    rank: int
    node: str
    device: str
    free_memory_gib: float
    free_disk_gib: float
    clock: float
    matmul_ms: float
    versions: str
    code: str
    config: str
    descriptors: int


@dataclass(frozen=True)
class Problem:
    """Something wrong with one node; fatal ones end the run before it starts."""

    node: str
    text: str
    is_fatal: bool


def run_preflight(
    run_dir: str | Path,
    config: dict,
    device: torch.device,
    agreement: Agreement,
    min_disk_gib: float = 1.0,
    attempt: str | None = None,
) -> list[NodeReport]:
    """Measure, gather, log the table (rank 0), and raise PreflightError naming the bad nodes.

    Args:
        run_dir: where the table is kept as runtime/preflight.json.
        config: the resolved configuration, as loaded by this rank.
        device: this rank's device.
        agreement: over all ranks.
        min_disk_gib: free space the run folder must have.
        attempt: this attempt's name; by default what the launcher says.
    """
    entry = measure(Path(run_dir), config, device, agreement)
    # JSON, since object collectives would unpickle
    entries = [NodeReport(**other) for other in agreement.exchange(asdict(entry))]
    bandwidth = None if agreement.world_size == 1 else all_reduce_gb_per_second(device, agreement.group)
    problems = judge(entries, min_disk_gib)
    fatal = [problem for problem in problems if problem.is_fatal]
    if agreement.rank == 0:
        log.info("preflight\n%s", table(entries, bandwidth))
        for problem in problems:
            (log.error if problem.is_fatal else log.warning)("preflight: node %s: %s", problem.node, problem.text)
        record = {
            "attempt": attempt or current_attempt(),
            "bad_nodes": sorted({problem.node for problem in fatal}),
            "problems": [asdict(problem) for problem in problems],
            "all_reduce_gb_per_second": bandwidth,
            "ranks": [asdict(entry) for entry in entries],
        }
        try_write_json(runtime_folder(run_dir) / "preflight.json", record)
    if fatal:
        raise PreflightError("; ".join(f"node {problem.node}: {problem.text}" for problem in fatal))
    return entries


def measure(run_dir: Path, config: dict, device: torch.device, agreement: Agreement) -> NodeReport:
    """This rank's entry; a barrier aligns the clocks of all ranks first."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    run_dir.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}" + (f", CUDA {torch.version.cuda}" if on_gpu else "")
    milliseconds = matmul_milliseconds(device)
    if agreement.world_size > 1:
        dist.barrier(agreement.group)
    return NodeReport(
        rank=agreement.rank,
        node=node_name(),
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        free_memory_gib=round(free / GIB, 2),
        free_disk_gib=round(shutil.disk_usage(run_dir).free / GIB, 2),
        clock=time.time(),
        matmul_ms=round(milliseconds, 3),
        versions=versions,
        code=code_hash(),
        config=hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12],
        descriptors=raise_descriptor_limit(),
    )


def judge(entries: Sequence[NodeReport], min_disk_gib: float) -> list[Problem]:
    """What is wrong, node by node, each problem once."""
    clock, memory = median(e.clock for e in entries), median(e.free_memory_gib for e in entries)
    speed = median(e.matmul_ms for e in entries)
    usual = {
        name: Counter(getattr(e, name) for e in entries).most_common(1)[0][0] for name in ("versions", "code", "config")
    }
    needed = descriptors_needed(len(entries))
    problems: dict[tuple[str, str], Problem] = {}

    def report(entry: NodeReport, text: str, is_fatal: bool) -> None:
        problems.setdefault((entry.node, text.split(" ")[0]), Problem(entry.node, text, is_fatal))

    for entry in entries:
        for name, expected in usual.items():
            found = getattr(entry, name)
            if found != expected:
                report(entry, f"{name} differ from the other nodes': {found} instead of {expected}", True)
        if entry.free_disk_gib < min_disk_gib:
            report(entry, f"disk: {entry.free_disk_gib} GiB free for the run folder, {min_disk_gib:g} needed", True)
        if entry.descriptors < needed:
            report(
                entry, f"descriptors: {entry.descriptors} open files allowed, {needed} needed; raise ulimit -n", True
            )
        if abs(entry.clock - clock) > MAX_CLOCK_SKEW_SECONDS:
            report(entry, f"clock is {entry.clock - clock:+.0f} s off", False)
        if entry.free_memory_gib < MIN_MEMORY_SHARE * memory:
            report(entry, f"memory: {entry.free_memory_gib} GiB free, others have {memory:.1f}", False)
        # CPUs share their time with other processes: only a GPU's speed says something about the machine
        if entry.device != "cpu" and entry.matmul_ms > SLOW_FACTOR * speed:
            report(entry, f"slow: a matrix product takes {entry.matmul_ms} ms, elsewhere {speed:.3f}", False)
    return list(problems.values())


def table(entries: Sequence[NodeReport], bandwidth: float | None) -> str:
    """One line per node: its worst rank counts."""
    by_node: dict[str, list[NodeReport]] = {}
    for entry in entries:
        by_node.setdefault(entry.node, []).append(entry)
    clock = median(e.clock for e in entries)
    rows = [("node", "ranks", "device", "memory GiB", "disk GiB", "clock s", "matmul ms", "code", "config", "versions")]
    for node, group in by_node.items():
        first = group[0]
        rows.append((
            node, str(len(group)), first.device, f"{min(e.free_memory_gib for e in group):.1f}",
            f"{min(e.free_disk_gib for e in group):.1f}", f"{max((e.clock - clock for e in group), key=abs):+.2f}",
            f"{max(e.matmul_ms for e in group):.2f}", first.code, first.config, first.versions,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if bandwidth is not None:
        lines.append(f"  all-reduce over {len(entries)} ranks: {bandwidth:.2f} GB/s (bus bandwidth)")
    return "\n".join(lines)


def matmul_milliseconds(device: torch.device, size: int | None = None, repeats: int = 3) -> float:
    """Fastest of a few products of square matrices."""
    size = size or (8192 if device.type == "cuda" else 256)
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one also warms up
        synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def all_reduce_gb_per_second(device: torch.device, group: dist.ProcessGroup | None, repeats: int = 3) -> float:
    """Bus bandwidth of an all-reduce as ring algorithms count it: 2 (n-1)/n bytes per byte reduced."""
    on_gpu = device.type == "cuda" and "nccl" in str(dist.get_backend())
    buffer = torch.ones(2**24 if on_gpu else 2**18, device=device if on_gpu else "cpu")
    target = None if on_gpu else group
    ranks, best = dist.get_world_size(target), float("inf")
    for _ in range(repeats):
        dist.barrier(target)
        started = time.perf_counter()
        dist.all_reduce(buffer, group=target)
        synchronize(buffer.device)
        best = min(best, time.perf_counter() - started)
    return round(2 * (ranks - 1) / ranks * buffer.numel() * buffer.element_size() / best / 1e9, 3)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; nothing to do on CPUs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def code_hash() -> str:
    """Hash of the package's source as this process imports it."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(os.fsencode(path.relative_to(package)) + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
