"""Count our own files and functions that one training step of the demo passes through.

    python tools/trace_step.py [--list] [--loop DATA]

One step is noise, schedule, reduction and update (training/step.py), in one process on a CPU. With --loop DATA, which
are prepared shards like data/demo, the loop around it is counted too: reading, votes, log, watchdog, progress, and the
thread that prepares the next batch. What is written inside a function, a comprehension for instance, counts with it.
"""

import argparse
import os
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bd3lm_scale"
TRACED_STEP, STEPS, VOCAB = 3, 6, 300


class Trace:
    """Own functions that are called while `is_on`, by file."""

    def __init__(self) -> None:
        self.functions: dict[str, set[str]] = defaultdict(set)
        self.is_on = False

    def __enter__(self) -> "Trace":
        threading.setprofile(self._listen)
        sys.setprofile(self._listen)
        return self

    def __exit__(self, *unused: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # pyright: ignore[reportArgumentType]

    def _listen(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if self.is_on and event == "call" and code.co_filename.startswith(str(PACKAGE)):
            file = os.path.relpath(code.co_filename, PACKAGE)
            self.functions[file].add(code.co_qualname.split(".<locals>")[0])

    def summary(self, listed: bool) -> str:
        """Counts, and the names if they are wanted."""
        lines = [f"  {file}: {', '.join(sorted(names))}" for file, names in sorted(self.functions.items())]
        length = sum((PACKAGE / file).read_text().count("\n") for file in self.functions)
        count = sum(map(len, self.functions.values()))
        return "\n".join([f"{len(lines)} files, {count} functions, {length} lines", *(lines if listed else [])])


def trace_step() -> Trace:
    """The step alone, on random rows; the second one, so that nothing is set up on the way."""
    import torch

    from bd3lm_scale.config.load import load_config
    from bd3lm_scale.engine import build_engine
    from bd3lm_scale.parallel.mesh import init_mesh, shutdown
    from bd3lm_scale.runtime.anomaly import AnomalyPolicy
    from bd3lm_scale.training.step import noise_step, train_step
    from bd3lm_scale.values import Interval, Rows

    config = load_config(str(ROOT / "configs" / "demo.yaml"), ["runtime.device=cpu", "train.threads=1"])
    engine = build_engine(config, init_mesh(config.parallel, "cpu"), VOCAB, VOCAB - 1)
    policy, size, rows = AnomalyPolicy(config.runtime), config.train.micro_batch_size, []
    for first in range(0, config.train.global_batch_size, size):
        tokens = torch.randint(VOCAB - 1, (size, config.data.context_length))
        rows.append(Rows(tokens, torch.arange(first, first + size), torch.ones(size, dtype=torch.bool)))
    interval = Interval(config.diffusion.clip_low, config.diffusion.clip_high)
    with Trace() as trace:
        for step in range(2):
            trace.is_on = step == 1
            train_step(engine, config, step, noise_step(engine, config, step, rows, interval), policy)
    shutdown()
    return trace


def trace_loop(data: Path) -> Trace:
    """One turn of the loop between validations and saves, on prepared shards."""
    import torch

    from bd3lm_scale.config.load import load_config
    from bd3lm_scale.runtime import faults
    from bd3lm_scale.train import train

    trace, plain_point = Trace(), faults.point

    def point(name: str, step: int | None = None) -> bool:
        if name == "step":  # the loop says it at the top of every turn
            trace.is_on = step == TRACED_STEP
        return plain_point(name, step)

    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run_dir={folder}/run", f"data.path={data}", f"train.steps={STEPS}", "evaluation.every_steps=1000",
            "checkpoint.every_steps=1000", "evaluation.rows=4", "runtime.device=cpu", "train.threads=1",
        ]  # fmt: skip
        config = load_config(str(ROOT / "configs" / "demo.yaml"), overrides)
        faults.point = point
        with trace:
            code = train(config, torch.device("cpu"))
        faults.point = plain_point
        if code != 0:
            raise RuntimeError(f"the demo ended with code {code}")
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--loop", type=Path, metavar="DATA", help="count the loop too, on these prepared shards")
    parser.add_argument("--list", action="store_true", help="name every file and function")
    args = parser.parse_args()
    print("step:", trace_step().summary(args.list))
    if args.loop:
        print("loop:", trace_loop(args.loop).summary(args.list))


if __name__ == "__main__":
    main()
