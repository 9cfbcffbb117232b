"""diffusion.block_size_schedule: every stage trains as a run of its block size, and resuming changes nothing."""

import json
import subprocess
import sys

import pytest

from bd3lm_scale.config.load import from_dict
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.stages import stages
from bd3lm_scale.errors import ConfigError
from tests.training_runs import ROOT, assert_same_run, clean_environment, losses_of, rows_of, stream_of

SCHEDULE = (
    "diffusion.block_size_schedule=[{block_size: 1, steps: 4, clip_low: 1, clip_high: 1}, {block_size: 4, steps: 4}]"
)
STEPS = 12
CADENCE = ["evaluation.every_steps=2", "checkpoint.every_steps=1", f"train.steps={STEPS}", "diffusion.clip_low=0.1"]


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """Four steps of blocks of 1, four of 4, four of 8, never interrupted."""
    run_dir = tmp_path_factory.mktemp("sizes") / "whole"
    trainer.train(run_dir, SCHEDULE, *CADENCE, "checkpoint.keep_last=20")
    return run_dir


def test_the_clip_interval_begins_anew_with_every_stage(whole):
    """And is searched inside it. With blocks of one token and full masking there is nothing to search."""
    found = [(row["clip_low"], row["clip_high"]) for _, row in sorted(rows_of(whole).items())]
    assert found[:2] == [(1.0, 1.0)] * 2
    assert found[4] == (0.1, 1.0), "blocks of 4"
    assert found[8] == (0.1, 1.0), "blocks of 8"
    assert len(set(found[4:8])) > 1, "the search goes on"


@pytest.mark.slow
def test_a_stage_reads_what_a_run_of_its_size_reads(whole, trainer, tmp_path):
    """Rows, times and masks follow from seed, step, size and interval, so those of plain runs are equal."""
    here = rows_of(whole)
    for size, step in ((1, 2), (4, 5), (8, 9)):
        low = "diffusion.clip_low=1" if size == 1 else "diffusion.clip_low=0.1"
        plain = [f"diffusion.block_size={size}", "diffusion.clip_search.enabled=false", *CADENCE, low]
        trainer.train(tmp_path / str(size), *plain, f"train.steps={step}", "evaluation.every_steps=100")
        assert rows_of(tmp_path / str(size))[step]["stream_hash"] == here[step]["stream_hash"]
    assert rows_of(tmp_path / "1")[2]["loss"] == here[2]["loss"]


@pytest.mark.slow
def test_the_network_sees_the_blocks_of_the_stage(whole):
    """Validations inside the run are those of the evaluate command with that block size; others differ."""
    sizes = {(2, 1): True, (6, 4): True, (12, 8): True, (6, 8): False}
    commands = [
        [str(whole), "--checkpoint", str(step), "--rows", "8", "--json", str(whole / f"{step}_{size}.json"),
         f"diffusion.block_size={size}"]
        for step, size in sizes
    ]  # fmt: skip
    code = "import json, sys\nfrom bd3lm_scale.evaluate import main\nfor a in json.load(sys.stdin): assert main(a) == 0"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(commands), capture_output=True, text=True, cwd=ROOT,
        env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (step, size), is_equal in sizes.items():
        found = json.loads((whole / f"{step}_{size}.json").read_text())["nelbo"]
        inside = rows_of(whole, "validation")[step]["nelbo"]
        assert (found == pytest.approx(inside, rel=1e-6)) == is_equal


def test_resuming_across_boundaries_changes_nothing(whole, trainer, tmp_path):
    """Stopped at a boundary and inside a stage, which goes on over the next boundary."""
    for stop in (4, 6, STEPS):
        trainer.train(tmp_path / "run", SCHEDULE, *CADENCE, "checkpoint.keep_last=20", f"train.steps={stop}")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_another_layout_goes_through_the_same_sizes(whole, trainer, tmp_path):
    """Tensor and pipeline ranks, resumed inside a stage by one process with another micro-batch."""
    cut = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]
    trainer.train(tmp_path / "run", SCHEDULE, *CADENCE, *cut, "train.steps=6", world=4)
    trainer.train(tmp_path / "run", SCHEDULE, *CADENCE, "train.micro_batch_size=4")
    assert stream_of(tmp_path / "run") == stream_of(whole)
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(whole), rel=1e-4)


def config_of(**diffusion) -> RunConfig:
    return from_dict({"run_dir": "r", "data": {"path": "d", "context_length": 32}, "diffusion": diffusion})


def test_stages_follow_each_other():
    config = config_of(block_size=16, clip_low=0.2, block_size_schedule=[{"steps": 3}, {"block_size": 4, "steps": 2}])
    found = [(s.index, s.first_step, s.config.block_size, s.config.diffusion.clip_low) for s in stages(config)]
    assert found == [(0, 0, 1, 0.2), (1, 3, 4, 0.2), (2, 5, 16, 0.2)]
    assert [s.first_step for s in stages(config_of())] == [0]


@pytest.mark.parametrize(
    ("diffusion", "message"),
    [
        ({"block_size_schedule": [{"block_size": 5}]}, "(stage 1, blocks of 5): there diffusion.block_size (5):"),
        ({"objective": "mdlm", "block_size_schedule": [{}]}, "mdlm has no block size"),
        ({"block_size_schedule": [{"block_size": 2, "clip_low": 1.0}]}, "diffusion.clip_low (1.0): equal to"),
        ({"resample": True, "block_size_schedule": [{}], "clip_low": 0.3, "clip_high": 0.8}, "in a block of 1 gives"),
    ],
)  # fmt: skip
def test_stages_that_cannot_train_are_refused(diffusion, message):
    with pytest.raises(ConfigError, match=r"1 problem.*\n.*diffusion.block_size_schedule \(") as found:
        config_of(**diffusion)
    assert message in str(found.value)


def test_a_schedule_does_not_hide_what_else_is_missing():
    with pytest.raises(ConfigError, match=r"run_dir \(\?\?\?\): is required"):
        from_dict({"data": {"path": "d"}, "diffusion": {"block_size_schedule": [{"block_size": 4}]}})
