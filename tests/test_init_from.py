"""Fine-tuning: MDLM pretraining -> blocks of 16 -> blocks of 4, by the train command; other models are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.metrics import read_metrics
from tests.tiny_data import prepare_tiny

ROOT = Path(__file__).parents[1]
TINY = [
    "data.context_length=32", "data.workers=0", "model.hidden_size=64", "model.num_heads=4", "model.num_layers=2",
    "model.cond_dim=16", "train.global_batch_size=8", "train.micro_batch_size=8", "optim.lr=0.01",
    "optim.warmup_steps=5", "optim.ema_decay=0.9", "evaluation.rows=64", "evaluation.draws=8", "runtime.device=cpu",
    "logging.progress=false",
]  # fmt: skip


def train(run_dir: Path, data: Path, *overrides: str) -> subprocess.CompletedProcess:
    config = str(ROOT / "configs" / "demo.yaml")
    command = [sys.executable, "-m", "bd3lm_scale.train", config, *TINY, f"run_dir={run_dir}", f"data.path={data}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=300)


def steps(count: int) -> list[str]:
    return [f"train.steps={count}", f"evaluation.every_steps={count}", f"checkpoint.every_steps={count}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The chain of the paper, every link started from the run folder before it."""
    folder = tmp_path_factory.mktemp("chain")
    data = prepare_tiny(folder / "tiny")
    links = {
        "pretrain": ["diffusion.objective=mdlm", "diffusion.clip_search.enabled=false", *steps(80)],
        "block16": ["diffusion.block_size=16", f"train.init_from={folder / 'pretrain'}", *steps(1)],
        "block4": ["diffusion.block_size=4", f"train.init_from={folder / 'block16'}", *steps(40)],
        "raw": ["diffusion.block_size=4", f"train.init_from={folder / 'pretrain'}",
                "train.init_weights=raw", *steps(1)],
        "scratch": ["diffusion.block_size=4", *steps(40)],
    }  # fmt: skip
    for name, overrides in links.items():
        done = train(folder / name, data, *overrides)
        assert done.returncode == ExitCode.FINISHED, done.stderr[-4000:]
    return folder


def checkpoint(folder: Path):
    return open_checkpoint(find_checkpoint(folder))


def lines(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == kind]


def test_a_run_starts_at_the_averaged_weights_of_another(runs):
    """The first step of a warm-up has learning rate 0: what is saved after it is what was taken over, average too."""
    source, here = checkpoint(runs / "pretrain"), checkpoint(runs / "block16")
    assert here.names() == source.names()
    for name in source.names():
        start = source.read(name, "ema")
        assert torch.equal(here.read(name, "master"), start)
        assert torch.equal(here.read(name, "ema"), start)
    assert not torch.equal(source.read("embedding.weight", "ema"), source.read("embedding.weight", "master"))


def test_or_at_its_raw_weights(runs):
    source, here = checkpoint(runs / "pretrain"), checkpoint(runs / "raw")
    assert torch.equal(here.read("embedding.weight"), source.read("embedding.weight", "master"))


def test_optimizer_step_and_clip_interval_are_fresh(runs):
    meta = checkpoint(runs / "block4").meta
    assert (meta["step"], meta["optimizer_step"], meta["cursor"]["step"]) == (40, 40, 40)
    train_lines = lines(runs / "block4", "train")
    assert [row["step"] for row in train_lines] == list(range(1, 41))
    assert train_lines[0]["lr"] < train_lines[-1]["lr"], "the warm-up starts again"
    assert (train_lines[0]["clip_low"], train_lines[0]["clip_high"]) == (0.001, 1.0)


def test_fine_tuning_goes_on_from_what_was_learned(runs):
    """The first batch is already likelier than at random weights, and the end better than the same steps alone."""
    fine, scratch = lines(runs / "block4", "train"), lines(runs / "scratch", "train")
    assert fine[0]["stream_hash"] == scratch[0]["stream_hash"], "same seed, same rows and noise"
    assert fine[0]["loss"] < 0.8 * scratch[0]["loss"]
    (after,), (alone,) = lines(runs / "block4", "validation"), lines(runs / "scratch", "validation")
    assert after["nelbo"] < alone["nelbo"] - alone["stderr"]


def test_an_existing_checkpoint_goes_before_init_from(runs):
    overrides = ["diffusion.block_size=4", "train.init_from=/does/not/exist", *steps(41)]
    done = train(runs / "block4", runs / "tiny" / "data", *overrides)
    assert done.returncode == ExitCode.FINISHED, done.stderr[-4000:]
    assert checkpoint(runs / "block4").meta["step"] == 41


@pytest.mark.parametrize(
    ("overrides", "reasons"),
    [
        (
            ["model.hidden_size=32", "model.num_layers=3"],
            ["train.init_from", "missing: decoder.layers.2.", "more", "use its model.*"],
        ),
        (["diffusion.objective=ar"], ["not expected: ", "modulation.bias (384,)"]),
        (["data.path=OTHER"], ["vocab_size is 300, the data's tokenizer has 310"]),
    ],
    ids=["size", "objective", "vocabulary"],
)
def test_other_models_are_refused(runs, tmp_path, overrides, reasons):
    if "data.path=OTHER" in overrides:
        overrides = [f"data.path={prepare_tiny(tmp_path / 'other', vocab_size=310)}"]
    start = f"train.init_from={runs / 'pretrain'}"
    done = train(tmp_path / "run", runs / "tiny" / "data", start, *steps(1), *overrides)
    assert done.returncode == ExitCode.CONFIG, done.stderr[-4000:]
    for reason in reasons:
        assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
