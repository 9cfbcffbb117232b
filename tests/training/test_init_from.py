"""Fine-tuning: MDLM pretraining -> blocks of 16 -> blocks of 4, by the train command; other models are refused."""

from pathlib import Path

import pytest
import torch

from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from bd3lm_scale.runtime.exit_codes import ExitCode
from tests.training_runs import prepare_tiny_data, rows_of


def steps(count: int) -> list[str]:
    return [f"train.steps={count}", f"evaluation.every_steps={count}", f"checkpoint.every_steps={count}"]


@pytest.fixture(scope="module")
def runs(trainer, tmp_path_factory):
    """The chain of the paper, every link started from the run folder before it."""
    folder = tmp_path_factory.mktemp("chain")
    start = f"train.init_from={folder / 'pretrain'}"
    links = {
        "pretrain": ["diffusion.objective=mdlm", "diffusion.clip_search.enabled=false", *steps(60)],
        "block16": ["diffusion.block_size=16", start, *steps(1)],
        "block4": ["diffusion.block_size=4", f"train.init_from={folder / 'block16'}", *steps(8)],
        "raw": ["diffusion.block_size=4", start, "train.init_weights=raw", *steps(1)],
        "scratch": ["diffusion.block_size=4", *steps(8)],
    }
    for name, overrides in links.items():
        trainer.train(folder / name, "evaluation.rows=64", "evaluation.draws=4", *overrides)
    return folder


def checkpoint(folder: Path):
    return open_checkpoint(find_checkpoint(folder))


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
    assert (meta["step"], meta["optimizer_step"], meta["cursor"]["step"]) == (8, 8, 8)
    rows = rows_of(runs / "block4")
    assert sorted(rows) == list(range(1, 9))
    assert rows[1]["lr"] < rows[8]["lr"], "the warm-up starts again"
    assert (rows[1]["clip_low"], rows[1]["clip_high"]) == (0.001, 1.0)


def test_fine_tuning_goes_on_from_what_was_learned(runs):
    """The first batch is already likelier than at random weights, and the end better than the same steps alone."""
    fine, scratch = rows_of(runs / "block4"), rows_of(runs / "scratch")
    assert fine[1]["stream_hash"] == scratch[1]["stream_hash"], "same seed, same rows and noise"
    assert fine[1]["loss"] < 0.8 * scratch[1]["loss"]
    after, alone = (rows_of(runs / name, "validation")[8] for name in ("block4", "scratch"))
    assert after["nelbo"] < alone["nelbo"] - alone["stderr"]


def test_an_existing_checkpoint_goes_before_init_from(runs, trainer):
    trainer.train(runs / "block4", "diffusion.block_size=4", "train.init_from=/does/not/exist", "evaluation.rows=64",
                  "evaluation.draws=4", *steps(9))  # fmt: skip
    assert checkpoint(runs / "block4").meta["step"] == 9


@pytest.mark.parametrize(
    ("overrides", "reasons"),
    [
        (["model.hidden_size=64", "model.num_layers=5"], ["missing: decoder.layers.4.", "more", "use its model.*"]),
        (["diffusion.objective=ar"], ["not expected: ", "modulation.bias (192,)"]),
        (["data.path=OTHER"], ["vocab_size is 300, the data's tokenizer has 290"]),
    ],
    ids=["size", "objective", "vocabulary"],
)
def test_other_models_are_refused(runs, trainer, tmp_path, overrides, reasons):
    if "data.path=OTHER" in overrides:
        overrides = [f"data.path={prepare_tiny_data(tmp_path / 'other', seed=1)}"]
    start = f"train.init_from={runs / 'pretrain'}"
    job = trainer.train(tmp_path / "run", start, *steps(1), *overrides, expect=ExitCode.CONFIG)
    for reason in (start.replace("=", " ("), *reasons):
        assert reason in job.output
    assert "Traceback" not in job.output
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
