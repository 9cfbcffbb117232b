"""Real training runs on tiny data: started, killed, stopped and read back by test_resume, test_faults and kill_many."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from bd3lm_scale.data.documents import Options, find_inputs
from bd3lm_scale.data.prepare import prepare
from bd3lm_scale.data.tokenizing import Preparation
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece
from bd3lm_scale.launcher.policy import newest_checkpoint_step
from bd3lm_scale.runtime.metrics import read_metrics

ROOT = Path(__file__).parents[1]
GRACE_SECONDS = 20.0  # for the ranks that are left when one has fallen
CONFIG = """
run_dir: ???
seed: 3
precision: fp32
data: {path: "???", context_length: 32, workers: 0, shuffle_window: 2}
diffusion: {block_size: 8}
model: {num_layers: 4, hidden_size: 32, num_heads: 4, cond_dim: 16, dropout: 0.0}
optim: {lr: 1.0e-2, warmup_steps: 3, ema_decay: 0.9}
train: {steps: 20, global_batch_size: 8, micro_batch_size: 2}
evaluation: {every_steps: 8, rows: 8}
checkpoint: {every_steps: 5, keep_last: 10}
runtime: {device: cpu, collective_timeout_seconds: 120}
logging: {progress: false}
"""
WORDS = ("a", "block", "clean", "head", "layer", "loss", "mask", "noise", "one", "rank", "row", "step", "token", "two")


def prepare_tiny_data(folder: Path, seed: int = 0, tokenizer: Path | None = None) -> Path:
    """Some tens of KB of text, a tokenizer of 300 ids (or this one), 20 shards of a thousand tokens."""
    draw = np.random.default_rng(seed)
    lines = [" ".join(draw.choice(WORDS, 40)) for _ in range(180)]
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    model = tokenizer or train_sentencepiece(lines, folder, vocab_size=290 + 10 * (seed == 0))
    task = Preparation(
        inputs=tuple(find_inputs([str(folder / "text.txt")])),
        validation_documents=10,
        options=Options(document="line"),
        shard_tokens=1024,
        chunk_tokens=256,
    )
    prepare(task, str(model), folder / "data", workers=0)
    return folder / "data"


def free_port() -> int:
    """Below the ports that the system deals out, so that nobody takes it before the run's rank 0 does."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Job:
    """The processes of one start of a run."""

    def __init__(self, run_dir: Path, logs: list[Path]) -> None:
        self.run_dir = run_dir
        self.logs = logs
        self.started = time.monotonic()

    @property
    def pids(self) -> list[int]:
        """Process id of each rank, once it is there."""
        return [int(wait_for(lambda p=p: _read(p.with_name(p.name + ".pid")), 120)) for p in self.logs]

    @property
    def codes(self) -> list[int | None]:
        """Exit code of each rank; -n for death by signal n, None while it runs."""
        found = [_read(path.with_name(path.name + ".exit")) for path in self.logs]
        return [None if text is None else int(text) for text in found]

    @property
    def output(self) -> str:
        """All that the ranks said."""
        return "\n".join(path.read_text(errors="replace") for path in self.logs if path.exists())

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.pids[rank], number)

    def wait(self, timeout: float = 240) -> "Job":
        """Until all ranks have ended; as a launcher does, end those that outlive a fallen one for long."""
        deadline = time.monotonic() + timeout
        while None in (codes := self.codes):
            if any(codes):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                self.kill()
                wait_for(lambda: None not in self.codes, 10)
                if not any(codes):
                    raise AssertionError(f"still running after {timeout} s:\n{self.output}")
            time.sleep(0.02)
        return self

    def kill(self) -> None:
        for pid, code in zip(self.pids, self.codes, strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        """Until `step` is in metrics.jsonl."""
        wait_for(lambda: step in rows_of(self.run_dir) or any(c is not None for c in self.codes), timeout)
        assert step in rows_of(self.run_dir), self.output


class Trainer:
    """Starts training processes on one set of shards."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.data = data
        self.count = 0
        self.config = folder / "tiny.yaml"
        self.config.write_text(CONFIG)
        errors = (folder / "zygote.txt").open("w")
        command = [sys.executable, "-m", "tests.zygote"]
        self.zygote = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdin=subprocess.PIPE, stderr=errors)

    def close(self) -> None:
        assert self.zygote.stdin is not None
        self.zygote.stdin.close()
        self.zygote.wait()

    def arguments(self, run_dir: Path, *overrides: str) -> list[str]:
        return [str(self.config), f"run_dir={run_dir}", f"data.path={self.data}", *overrides]

    def start(self, run_dir: Path, *overrides: str, world: int = 1, faults: str = "", last_rank: tuple = ()) -> Job:
        """One process per rank, as torchrun and srun make them; `last_rank` gets further overrides."""
        port, self.count = free_port(), self.count + 1
        logs = [self.folder / f"job{self.count}_rank{rank}.txt" for rank in range(world)]
        for rank, log in enumerate(logs):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port} if world > 1 else {}
            variables = {**place, "MASTER_ADDR": "127.0.0.1", "BD3LM_FAULTS": faults}
            more = last_rank if rank == world - 1 else ()
            request = {
                "arguments": self.arguments(run_dir, *overrides, *more),
                "environment": {**clean_environment(), **{name: str(value) for name, value in variables.items()}},
                "log": str(log),
            }
            assert self.zygote.stdin is not None
            self.zygote.stdin.write(json.dumps(request).encode() + b"\n")
        self.zygote.stdin.flush()
        return Job(run_dir, logs)

    def train(self, run_dir: Path, *overrides: str, world: int = 1, faults: str = "", expect: int = 0) -> Job:
        """Start, wait, and check every rank's exit code."""
        job = self.start(run_dir, *overrides, world=world, faults=faults).wait()
        assert job.codes == [expect] * world, job.output
        return job

    def command(self, run_dir: Path, *overrides: str, world: int = 1, faults: str = "") -> subprocess.CompletedProcess:
        """The user's command in a process of its own: python -m bd3lm_scale.train, under torchrun for several ranks."""
        torchrun = ["torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(free_port()), "-m"]
        words = [sys.executable, "-m", *(torchrun if world > 1 else []), "bd3lm_scale.train"]
        return subprocess.run(
            [*words, *self.arguments(run_dir, *overrides)],
            cwd=ROOT, env=clean_environment() | {"BD3LM_FAULTS": faults}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip


FIRST_RANK_ONLY = ("folder_made", "before_manifest", "before_rename", "after_rename")
PLACES = (
    "anywhere", "restore", "step", "forward", "optimizer", "updated", "save:copied", "save:run_written",
    "save:file_written", *(f"save:{phase}" for phase in FIRST_RANK_ONLY),
)  # fmt: skip


class Killer:
    """Chooses who is killed where: every phase of a step and of a save, and moments that are no phase at all.

    Args:
        draw: where randomness comes from.
        world: ranks of the run.
        steps: of the run.
        reach: a life ends at most so many steps after the checkpoint it began with, or in its first save.
    """

    def __init__(self, draw: random.Random, world: int, steps: int, reach: int) -> None:
        self.draw, self.world, self.steps, self.reach = draw, world, steps, reach
        self.places: list[str] = []

    def next(self, run_dir: Path) -> str:
        """The next fault for BD3LM_FAULTS, given where the run stands."""
        if not self.places:
            self.places = self.draw.sample(PLACES, len(PLACES))
        place = self.places.pop()
        done = newest_checkpoint_step(run_dir)
        if place == "restore" and done < 0:
            place = "step"
        first_only = place.removeprefix("save:") in FIRST_RANK_ONLY
        rank = 0 if first_only else self.draw.randrange(self.world)
        step = min(max(done, 0) + self.draw.randrange(self.reach), self.steps - 1)
        if place == "anywhere":
            return f"kill@forward:rank={rank}:step={step}:after={self.draw.random() / 10:.3f}"
        where = f":step={step}" if place in ("step", "forward", "optimizer", "updated") else ""
        return f"kill@{place}:rank={rank}{where}"


def clean_environment() -> dict[str, str]:
    """Ours without what a launcher, a scheduler or another test has put there."""
    foreign = ("SLURM", "BD3LM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"OMP_NUM_THREADS": "1"}


def rows_of(run_dir: Path, kind: str = "train") -> dict[int, dict]:
    """Rows of metrics.jsonl by step; empty before there is one."""
    if not (run_dir / "metrics.jsonl").exists():
        return {}
    return {row["step"]: row for row in read_metrics(run_dir) if row["kind"] == kind}


def losses_of(run_dir: Path) -> list[float]:
    return [row["loss"] for _, row in sorted(rows_of(run_dir).items())]


def stream_of(run_dir: Path) -> list[tuple]:
    """What was trained on, step by step: hash of tokens, masks and times, and the clip interval."""
    return [
        (step, row["stream_hash"], row["clip_low"], row["clip_high"]) for step, row in sorted(rows_of(run_dir).items())
    ]


def attempts_of(run_dir: Path) -> list[tuple[int, int]]:
    """(first, last) step of every uninterrupted stretch of metrics.jsonl."""
    steps = [
        json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines() if '"train"' in line
    ]
    starts = [i for i, step in enumerate(steps) if i == 0 or step != steps[i - 1] + 1]
    return [(steps[a], steps[b - 1]) for a, b in zip(starts, [*starts[1:], len(steps)], strict=True)]


def state_of(run_dir: Path, step: int | None = None) -> dict[tuple[str, str], torch.Tensor]:
    """Every number of a checkpoint: weights, moments, average."""
    reader = open_checkpoint(find_checkpoint(run_dir, step))
    return {(name, kind): reader.read(name, kind) for kind in reader.kinds() for name in reader.names(kind)}


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Losses, norms, hashes, validations and the whole final state are equal bit by bit."""
    for kind in ("train", "validation"):
        here, there = rows_of(run_dir, kind), rows_of(other, kind)
        assert sorted(here) == sorted(there)
        for step, row in there.items():
            for name in ("loss", "grad_norm", "lr", "stream_hash", "nelbo", "clip_low", "clip_high"):
                assert here[step].get(name) == row.get(name), (step, name)
    ours, theirs = state_of(run_dir), state_of(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def wait_for(condition, timeout: float):
    """The first true value of `condition`, or the last false one."""
    deadline = time.monotonic() + timeout
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
