"""The power is cut before each call of a whole short run: the resumed run is the undisturbed one, nothing is broken."""

import json
import subprocess
import sys

import pytest

from bd3lm_scale.checkpoint.folders import list_steps
from bd3lm_scale.checkpoint.reader import find_checkpoint
from bd3lm_scale.checkpoint.verify import verify
from bd3lm_scale.config.load import load_config
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.runtime.metrics import run_id
from tests.power_cut import materialize, states
from tests.training_runs import ROOT, assert_same_run, clean_environment, rows_of

pytestmark = pytest.mark.faults

SETTINGS = ("train.steps=6", "checkpoint.every_steps=2", "checkpoint.keep_last=1", "evaluation.every_steps=3")
LIVE = ("log.txt", "heartbeat", "stacks", ".pid")


@pytest.fixture(scope="module")
def recorded(trainer, tmp_path_factory):
    """(the recording, the undisturbed run in the watched folder)"""
    folder = tmp_path_factory.mktemp("power")
    watched, record = folder / "disk", folder / "record"
    watched.mkdir()
    arguments = trainer.arguments(watched / "runs" / "a", *SETTINGS)
    command = [sys.executable, "-m", "tests.power_cut", str(record), str(watched), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return record, watched / "runs" / "a"


def matters(state):
    """The part of a tree that a resumed run depends on."""
    return {path: digest for path, digest in state.files().items() if not any(word in path for word in LIVE)}


def test_no_cut_leaves_a_file_that_a_later_start_cannot_use(recorded, tmp_path, trainer):
    record, straight = recorded
    found = states(record)
    assert len({state.call for state in found}) >= 6, "every kind of call was met"
    assert len(found) > 50
    reference = load_tokenizer(straight / "tokenizer").hash
    for number, state in enumerate(found):
        run = materialize(state, record, tmp_path / str(number)) / "runs" / "a"
        where = f"cut {number} ({state.kind}, before {state.call})"
        checkpoints = list_steps(run / "checkpoints")
        newest = checkpoints[0][0] if checkpoints else 0
        if checkpoints:
            assert all(report.is_valid for report in verify(find_checkpoint(run))), where
        if (run / "config.yaml").exists():
            load_config(run / "config.yaml", [])
        if (run / "tokenizer").exists():
            assert load_tokenizer(run / "tokenizer").hash == reference, where
        for path in (run / "runtime").glob("*"):
            if path.is_file() and not path.name.startswith(".") and path.suffix != ".log":
                assert isinstance(json.loads(path.read_text()), dict), f"{where}: {path.name}"
        kept = [step for step in rows_of(run) if step <= newest]
        assert sorted(kept) == list(range(1, newest + 1)), f"{where}: metrics of steps that are not done again"


def test_every_cut_resumes_to_the_undisturbed_run(recorded, tmp_path, trainer):
    record, straight = recorded
    different = {json.dumps(sorted(matters(state))): state for state in states(record)}
    jobs = []
    for number, state in enumerate(different.values()):
        run = materialize(state, record, tmp_path / str(number)) / "runs" / "a"
        jobs.append(trainer.start(run, *SETTINGS))
        if len(jobs) % 2 == 0:
            jobs[-2].wait()
    for job, state in zip(jobs, different.values(), strict=True):
        assert job.wait().codes == [0], f"{state.kind}, before {state.call}:\n{job.output}"
        assert_same_run(job.run_dir, straight)
        assert not list(job.run_dir.rglob("*.tmp")), "leftovers are cleared away"
        assert not [path for path in (job.run_dir / "checkpoints").iterdir() if path.name.startswith(".")]
    assert len(jobs) >= 10


def test_a_spoilt_tokenizer_is_replaced_and_the_run_can_be_exported(recorded, tmp_path, trainer):
    """What earlier versions left after a power cut: an empty tokenizer.model, config.yaml and wandb_id."""
    record, straight = recorded
    run = materialize(states(record)[-1], record, tmp_path) / "runs" / "a"
    for path in (run / "tokenizer" / "tokenizer.model", run / "config.yaml"):
        path.write_bytes(b"")
    (run / "wandb_id").write_text("")
    job = trainer.train(run, *SETTINGS)
    assert "not the tokenizer of the data: replaced" in job.output
    assert load_tokenizer(run / "tokenizer").hash == load_tokenizer(straight / "tokenizer").hash
    assert (run / "config.yaml").read_text().replace(str(run), str(straight)) == (straight / "config.yaml").read_text()
    assert len(run_id(run)) == 8
    assert run_id(run) == run_id(run)
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "to-hf", str(run), str(tmp_path / "hf")]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "tokenizer   sentencepiece" in done.stdout
