#!/usr/bin/env python3
"""Does a long run grow? Memory, descriptors, threads and files of a run of many short steps, with slopes.

    python tests/leaks.py [--steps 3000] [a.b=c ...]

One process trains a tiny model, validates every 50 steps and saves every 100, and looks at itself every 50. The
second half is judged, by a straight line through what was seen. Only `objects` and `heap` can tell a leak: `rss` also
grows while the C allocator's free pieces become more, up to a level that depends on the sizes that come and go.
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bd3lm_scale.runtime.progress import Progress
from bd3lm_scale.train import main as train
from tests.training_runs import CONFIG, prepare_tiny_data

SETTINGS = ("evaluation.every_steps=50", "checkpoint.every_steps=100", "checkpoint.keep_last=2", "optim.lr=1e-4")
EVERY_STEPS = 50


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


@dataclass(frozen=True)
class Sample:
    """One look at this process.

    Attributes:
        rss: MiB of memory that the process holds.
        heap: MiB that malloc has given out and not got back; free: what it keeps for later.
        objects: blocks of memory of Python objects, in thousands.
    """

    step: int
    rss: float
    heap: float
    free: float
    objects: float
    descriptors: int
    threads: int
    files: int


def look(step: int, run_dir: Path) -> Sample:
    gc.collect()
    memory = ctypes.CDLL(None).mallinfo2
    memory.restype = MallInfo
    found = memory()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own = [path for path in run_dir.rglob("*") if "checkpoints" not in path.parts]
    return Sample(
        step=step,
        rss=float(status["VmRSS"].split()[0]) / 1024,
        heap=(found.uordblks + found.hblkhd) / 2**20,
        free=found.fordblks / 2**20,
        objects=sys.getallocatedblocks() / 1000,
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=int(status["Threads"]),
        files=len(own),
    )


def run(folder: Path, steps: int, *settings: str) -> list[Sample]:
    """Train in this process; what was seen on the way."""
    samples: list[Sample] = []
    config, run_dir, update = folder / "tiny.yaml", folder / "run", Progress.update
    data = prepare_tiny_data(folder / "tiny")
    config.write_text(CONFIG)

    def watched(self: Progress, step: int, loss: float) -> None:
        update(self, step, loss)
        if step % EVERY_STEPS == EVERY_STEPS // 2:  # between validations and saves
            samples.append(look(step, run_dir))

    Progress.update = watched
    try:
        words = [str(config), f"run_dir={run_dir}", f"data.path={data}", f"train.steps={steps}", *SETTINGS, *settings]
        assert train(words) == 0
    finally:
        Progress.update = update
    return samples


def slopes(samples: list[Sample]) -> dict[str, float]:
    """Growth of each figure per 1,000 steps over the second half."""
    late = samples[len(samples) // 2 :]
    at = np.array([sample.step for sample in late]) / 1000
    names = [name for name in asdict(late[0]) if name != "step"]
    return {name: float(np.polyfit(at, [getattr(sample, name) for sample in late], 1)[0]) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="a.b=c")
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = run(Path(folder), args.steps, *args.settings)
    for sample in samples[:: max(1, len(samples) // 20)]:
        print("  ".join(f"{name} {value:g}" for name, value in asdict(sample).items()))
    print(f"per 1,000 steps, in the second half of {args.steps:,}:")
    for name, slope in slopes(samples).items():
        print(f"  {name:12s} {slope:+.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
