#!/usr/bin/env python3
"""Kill a training run again and again and compare what comes out with the run left alone: every bit must agree.

    python tests/kill_many.py --kills 100 [--ranks 2] [--seed 1] [--commands] [a.b=c ...]

Each life of the run begins at its newest checkpoint and ends with SIGKILL of a random rank: in a phase of a step or of
a save, while restoring, or at a moment that is no phase at all. --commands starts every life by the user's own command
(torchrun for several ranks) instead of forking it from a process that has the imports behind it.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from bd3lm_scale.launcher.policy import newest_checkpoint_step
from tests.training_runs import Killer, Trainer, assert_same_run, attempts_of, prepare_tiny_data, rows_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="a.b=c", help="of the run, e.g. parallel.tensor_parallel_size=2")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="of the choice of ranks and moments")
    parser.add_argument("--commands", action="store_true", help="start each life with the user's command: slower")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        return kill_many(args, Path(folder))


def kill_many(args: argparse.Namespace, folder: Path) -> int:
    """The exit code: 0 when the runs are equal."""
    steps = 2 * args.kills + 20
    settings = [f"train.steps={steps}", "checkpoint.every_steps=4", "checkpoint.keep_last=3", *args.settings]
    trainer = Trainer(folder, prepare_tiny_data(folder / "tiny"))
    killer = Killer(random.Random(args.seed), args.ranks, steps, reach=12)
    killed, straight = folder / "killed", folder / "straight"
    started, places = time.monotonic(), Counter()

    def live(run_dir: Path, fault: str = "") -> str:
        """One life; what it said. One that nobody killed must have reached the end."""
        if args.commands:
            done = trainer.command(run_dir, *settings, world=args.ranks, faults=fault)
            codes, output = [done.returncode], done.stderr
        else:
            job = trainer.start(run_dir, *settings, world=args.ranks, faults=fault).wait()
            codes, output = job.codes, job.output
        if any(codes) and "injected fault: kill@" not in output:
            raise SystemExit(f"a life ended with {codes}, and not by {fault or 'a fault'}:\n{output}")
        return output

    try:
        live(straight)
        with tqdm(total=args.kills, unit="kill", dynamic_ncols=True) as bar:
            while places.total() < args.kills:
                fault = killer.next(killed)
                if "injected fault: kill@" in live(killed, fault):
                    places[
                        fault.split("@")[1].partition(":rank")[0] + (" + a moment" if "after=" in fault else "")
                    ] += 1
                    bar.update()
                bar.set_postfix_str(f"checkpoint of step {newest_checkpoint_step(killed)} of {steps}")
        live(killed)
    finally:
        trainer.close()
    lives = attempts_of(killed)
    repeated = sum(last - first + 1 for first, last in lives) - steps
    minutes = (time.monotonic() - started) / 60
    print(f"{places.total()} kills of {args.ranks} ranks in {minutes:.1f} minutes")
    print(f"{steps} steps, {len(rows_of(killed, 'validation'))} validations, {repeated} steps trained again")
    for place, count in sorted(places.items()):
        print(f"  {count:3d}  {place}")
    assert_same_run(killed, straight)
    print("losses, gradient norms, stream hashes, validations and all final state equal the undisturbed run bit by bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
