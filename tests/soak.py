#!/usr/bin/env python3
"""Random faults on a real Slurm with virtual nodes, minute after minute; the end must equal the run left alone.

    python tests/soak.py [--minutes 120] [--seed 1]

A job of slurm/train_owt.sh on two of four nodes, always in the same layout, meets one fault after another, drawn by
weight from FAULTS with pauses in between; then a STOP file ends it. An undisturbed job of as many steps follows:
stream hashes, losses, gradient norms and all final state must agree bit by bit. Needs what the tests marked `slurm`
need (root, Slurm).
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.lock import owner_of
from tests.launcher.test_slurm import Job, make_data
from tests.slurm_cluster.cluster import DONE, Cluster, why_not
from tests.training_runs import assert_same_run

SETTINGS = ("train.steps=1000000", "checkpoint.every_steps=20", "evaluation.every_steps=100", "checkpoint.keep_last=2")
SLOWLY = "slow@step:seconds=0.1"
PAUSE_SECONDS = (10.0, 40.0)  # between a fault and the next, beyond the time the run needs to get going again
PATIENCE_SECONDS = 300.0


@dataclass
class Soak:
    """One run under faults."""

    cluster: Cluster
    job: Job
    draw: random.Random

    def ranks(self) -> list[psutil.Process]:
        """The training processes of all nodes that are on."""
        found = []
        for init in self.cluster._inits.values():
            if init.poll() is None:
                found += [p for p in psutil.Process(init.pid).children(recursive=True) if is_rank(p)]
        return found

    def signal_rank(self, how: str) -> None:
        if ranks := self.ranks():
            getattr(self.draw.choice(ranks), how)()

    def nodes(self) -> tuple[str, list[str]]:
        """(the batch host, the job's other nodes)"""
        record = self.cluster.job(self.job.number)
        names = self.cluster.slurm("scontrol", "show", "hostnames", record.get("NodeList", "")).split()
        host = record.get("BatchHost", "")
        return host, [name for name in names if name != host]

    def power_cut(self, of_host: bool) -> None:
        host, others = self.nodes()
        victim = host if of_host else self.draw.choice(others or [host])
        self.cluster.power_cut(victim)
        time.sleep(15)
        self.cluster.boot(victim)

    def unplug(self) -> None:
        host, others = self.nodes()
        victim = self.draw.choice([host, *others])
        self.cluster.unplug(victim)
        time.sleep(self.draw.choice([3, 15, 25]))
        self.cluster.plug_in(victim)

    def usr1(self) -> None:
        self.cluster.slurm("scancel", "--batch", "--signal=USR1", self.job.number)

    def controller_away(self) -> None:
        with self.cluster.without_controller():
            if self.draw.random() < 0.5 and (owner := owner_of(self.job.run_dir)):
                self.signal_rank("kill")
                print(f"  meanwhile, under {owner['node']}", flush=True)
            time.sleep(15)

    def second_start(self) -> None:
        first, options = self.job.number, self.job.options
        self.job.options = ("--nodes=2", "--output=second.out")
        number = self.job.submit().number
        self.job.number, self.job.options = first, options
        try:
            code = self.cluster.wait(number, 120)["ExitCode"]
        except TimeoutError:  # it waits for nodes
            self.cluster.slurm("scancel", number)
            return
        assert code == f"{ExitCode.IN_USE}:0", code


FAULTS: dict[str, tuple[int, Callable[[Soak], None]]] = {
    "rank killed": (6, lambda soak: soak.signal_rank("kill")),
    "rank frozen": (3, lambda soak: soak.signal_rank("suspend")),
    "USR1": (2, Soak.usr1),
    "power cut of a node": (2, lambda soak: soak.power_cut(of_host=False)),
    "power cut of the batch host": (2, lambda soak: soak.power_cut(of_host=True)),
    "network partition": (2, Soak.unplug),
    "slurmctld away": (1, Soak.controller_away),
    "second start": (2, Soak.second_start),
}
"""Name -> (weight, what it does)."""


def is_rank(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return "bd3lm_scale.train" in words and "srun" not in words[0] and "bd3lm_scale.launch" not in words


def furthest(job: Job) -> int:
    return max((row["step"] for row in job.rows), default=0) if (job.run_dir / "metrics.jsonl").exists() else 0


def wait_for_progress(soak: Soak, step: int) -> None:
    """Until the run is beyond `step`; a job that ended for good is an error."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while furthest(soak.job) <= step:
        state = soak.cluster.job(soak.job.number)["JobState"]
        assert state not in DONE, f"the job ended ({state}):\n{soak.job.output[-5000:]}"
        assert time.monotonic() < deadline, f"no step beyond {step}:\n{soak.job.output[-5000:]}"
        time.sleep(0.5)


def soak(minutes: float, seed: int, folder: Path) -> int:
    """The exit code; 0 when the runs are equal."""
    done: Counter[str] = Counter()
    data = make_data(folder)
    with Cluster(folder / "cluster", 4, slurmd_timeout=10) as cluster:
        options = {"options": ("--time=UNLIMITED",), "nodes": "2"}
        disturbed = Job(cluster, folder, data, "faults", *SETTINGS, faults=SLOWLY, **options)
        straight = Job(cluster, folder, data, "straight", *SETTINGS, **options)  # now: both copy the code as it is
        run = Soak(cluster, disturbed, random.Random(seed))
        run.job.submit(MAX_FAILURES="20")
        wait_for_progress(run, 5)
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            names = list(FAULTS)
            name = run.draw.choices(names, [FAULTS[name][0] for name in names])[0]
            step = furthest(run.job)
            print(f"step {step}: {name}", flush=True)
            FAULTS[name][1](run)
            done[name] += 1
            wait_for_progress(run, step + 2)
            time.sleep(run.draw.uniform(*PAUSE_SECONDS))
        (run.job.run_dir / "STOP").touch()
        assert int(cluster.wait(run.job.number, PATIENCE_SECONDS)["ExitCode"].split(":")[0]) == ExitCode.STOPPED
        steps = furthest(run.job)
        repeated = len(run.job.every_line) - steps
        cluster.repair()
        straight.arguments.append(f"train.steps={steps}")
        straight.submit()
        cluster.wait(straight.number, 60 + steps)
        compare(run.job.run_dir, straight.run_dir, steps)
    print(f"seed {seed}, {minutes:g} minutes: {sum(done.values())} faults {dict(done)}")
    print(f"{steps} steps, {repeated} done again; equal to the undisturbed run bit by bit")
    return 0


def compare(run_dir: Path, straight: Path, steps: int) -> None:
    """The undisturbed run also validates after its last step, which the stopped one had no reason to do."""
    for folder in (run_dir, straight):
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if not (f'"step": {steps},' in line and '"validation"' in line)]
        (folder / "metrics.jsonl").write_text("".join(kept))
    assert_same_run(run_dir, straight)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if why_not():
        parser.error(why_not())
    folder = Path(tempfile.mkdtemp(prefix="bd3lm-soak-"))
    folder.chmod(0o755)  # munge insists
    print(f"seed {args.seed}, in {folder}", flush=True)
    code = soak(args.minutes, args.seed, folder)
    shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
