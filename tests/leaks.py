#!/usr/bin/env python3
"""Does a long run grow? Memory, descriptors, threads and temporary files of a run of many short steps, with slopes.

    python tests/leaks.py [--steps 3000] [a.b=c ...]

One process trains a tiny model, validates every 50 steps and saves every 100; the second half of the run is judged,
by a straight line through what was sampled a few times per second.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.training_runs import Trainer, prepare_tiny_data, rows_of

SETTINGS = ("evaluation.every_steps=50", "checkpoint.every_steps=100", "checkpoint.keep_last=2", "optim.lr=1e-4")


@dataclass(frozen=True)
class Sample:
    """One look at the process."""

    step: int
    rss_mib: float
    descriptors: int
    threads: int
    files: int


def look(pid: int, run_dir: Path) -> Sample | None:
    """None before the first step and after the last."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        rss, threads = float(status["VmRSS"].split()[0]) / 1024, int(status["Threads"])
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, KeyError):
        return None
    steps = rows_of(run_dir)
    own = [path for path in run_dir.rglob("*") if "checkpoints" not in path.parts]
    return Sample(max(steps), rss, descriptors, threads, len(own)) if steps else None


def measure(trainer: Trainer, run_dir: Path, steps: int, *settings: str) -> dict[str, float]:
    """Slope of each figure per 1,000 steps over the second half of a run."""
    job = trainer.start(run_dir, f"train.steps={steps}", *SETTINGS, *settings)
    samples: list[Sample] = []
    while job.codes == [None]:
        if (sample := look(job.pids[0], run_dir)) is not None:
            samples.append(sample)
        time.sleep(max(0.2, steps / 5000))
    assert job.codes == [0], job.output
    late = [sample for sample in samples if steps / 2 < sample.step < steps]  # at the end everything is closed
    assert len(late) >= 5, f"{len(late)} samples of the second half"
    at = np.array([sample.step for sample in late]) / 1000
    names = ("rss_mib", "descriptors", "threads", "files")
    return {name: float(np.polyfit(at, [getattr(sample, name) for sample in late], 1)[0]) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="a.b=c")
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), prepare_tiny_data(Path(folder) / "tiny"))
        try:
            slopes = measure(trainer, Path(folder) / "run", args.steps, *args.settings)
        finally:
            trainer.close()
    print(f"per 1,000 steps, in the second half of {args.steps:,}:")
    for name, slope in slopes.items():
        print(f"  {name:12s} {slope:+.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
