"""A run that is stopped, killed, moved to another layout or damaged goes on as if nothing had happened.

Real processes throughout. fp32 losses of different layouts agree to 1e-5 (order of summation); in one layout every
number is the same bit by bit.
"""

import re
import shutil
import signal

import pytest
import torch

from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.config.load import load_config
from bd3lm_scale.runtime.exit_codes import ExitCode
from tests.training_runs import assert_same_run, attempts_of, losses_of, prepare_tiny_data, rows_of, state_of, stream_of

TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
LONG = ("train.steps=160", "checkpoint.every_steps=100", "evaluation.every_steps=20")
KILL = "kill@step=12:rank=0"
# (processes, settings): every leg in another layout, each four steps
CHAIN = [
    (4, ["optim.zero_stage=1", TP2, PP2]),
    (4, ["optim.zero_stage=3"]),
    (2, ["optim.zero_stage=2"]),
    (1, []),
    (4, [TP2, "train.micro_batch_size=1"]),
]  # fmt: skip


def assert_same_losses(run_dir, other, steps=None, tolerance=1e-5):
    here, there = rows_of(run_dir), rows_of(other)
    steps = sorted(there) if steps is None else steps
    assert set(steps) <= set(here)
    for step in steps:
        assert here[step]["loss"] == pytest.approx(there[step]["loss"], rel=tolerance), step


def copy_of(run_dir, folder, until=None):
    """The run folder at another place; only checkpoints up to `until`."""
    shutil.copytree(run_dir, folder)
    for path in (folder / "checkpoints").iterdir():
        if until is not None and int(path.name.removeprefix("step_")) > until:
            shutil.rmtree(path)
    (folder / "metrics.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def two(trainer, tmp_path_factory):
    """The user's own command under torchrun, two processes."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    done = trainer.command(run_dir, world=2)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def long(trainer, tmp_path_factory):
    """160 steps of one process."""
    run_dir = tmp_path_factory.mktemp("long") / "run"
    trainer.train(run_dir, *LONG)
    return run_dir


@pytest.fixture(scope="module")
def chain(trainer, tmp_path_factory):
    """One run folder through five layouts; what each leg ended with is kept."""
    run_dir = tmp_path_factory.mktemp("chain") / "run"
    outputs = []
    for leg, (world, settings) in enumerate(CHAIN, 1):
        outputs.append(trainer.train(run_dir, *settings, f"train.steps={4 * leg}", world=world).output)
    return run_dir, outputs


@pytest.fixture(scope="module")
def saved_by_two(trainer, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("saved_by_two") / "run"
    trainer.train(run_dir, "train.steps=10", world=2)
    return run_dir


class TestSameLayout:
    def test_torchrun_of_two_processes_equals_one(self, two, straight):
        assert len(losses_of(two)) == 20
        assert stream_of(two) == stream_of(straight)
        assert_same_losses(two, straight)

    @pytest.mark.parametrize("world", [1, 2])
    def test_killed_run_resumes_bit_by_bit(self, trainer, tmp_path, straight, two, world):
        # saved before the next step, so that the kill two steps later finds it whole on any machine
        killed = trainer.start(tmp_path, "checkpoint.asynchronous=false", world=world, faults=KILL).wait()
        assert killed.codes[0] == -signal.SIGKILL, killed.output
        assert max(rows_of(tmp_path)) == 12
        resumed = trainer.command(tmp_path, world=world)
        assert resumed.returncode == 0, resumed.stderr
        assert attempts_of(tmp_path) == [(1, 12), (11, 20)]
        assert_same_run(tmp_path, straight if world == 1 else two)


class TestOtherLayouts:
    def test_chain_of_five_layouts_equals_the_uninterrupted_run(self, chain, straight):
        run_dir, outputs = chain
        assert attempts_of(run_dir) == [(1, 20)], "no step was trained twice"
        assert stream_of(run_dir) == stream_of(straight)
        assert_same_losses(run_dir, straight)
        assert len({row["clip_low"] for row in rows_of(run_dir).values()}) > 1, "the interval moved on the way"
        layouts = ["'tensor': 2, 'pipeline': 2, 'data': 1", "'data': 4", "'data': 2", "'data': 1"]
        for output, layout in zip(outputs[1:], layouts, strict=True):
            assert "resumed" in output
            assert layout in output

    def test_weights_and_moments_follow_the_chain(self, chain, straight):
        here, there = state_of(chain[0]), state_of(straight)
        assert here.keys() == there.keys()
        for key, tensor in there.items():
            assert (here[key] - tensor).abs().max() <= 1e-3 * tensor.abs().max() + 1e-7, key

    def test_a_lost_node_from_four_to_three(self, trainer, chain, straight, tmp_path):
        """8 rows on 3 ranks: one rank-row has no weight, nothing else changes."""
        run_dir = copy_of(chain[0], tmp_path / "run", until=8)
        trainer.train(run_dir, "optim.zero_stage=3", "train.micro_batch_size=1", "train.steps=12", world=3)
        assert sorted(rows_of(run_dir)) == [9, 10, 11, 12]
        assert stream_of(run_dir) == stream_of(straight)[8:12]
        assert_same_losses(run_dir, straight, range(9, 13))

    @pytest.mark.slow
    @pytest.mark.parametrize("layout", [(2, [TP2]), (2, ["optim.zero_stage=3"])], ids=["tensor", "data"])
    def test_the_stream_is_equal_for_ever_and_losses_for_the_first_steps(self, trainer, long, tmp_path, layout):
        """At a high learning rate training amplifies the last digit: what is true at step 110 is not true at 160."""
        world, settings = layout
        run_dir = copy_of(long, tmp_path / "run", until=100)
        trainer.train(run_dir, *LONG, *settings, world=world)
        assert sorted(rows_of(run_dir)) == list(range(101, 161))
        assert stream_of(run_dir) == stream_of(long)[100:]
        assert_same_losses(run_dir, long, range(101, 111))
        assert losses_of(run_dir) != losses_of(long)[100:], "another order of summation"

    def test_bf16_differs_within_its_precision(self, trainer, tmp_path):
        bf16 = ["precision=bf16", "diffusion.clip_search.apply=false"]
        whole = trainer.start(tmp_path / "whole", *bf16, "train.steps=8")
        trainer.train(tmp_path / "legs", *bf16, "optim.zero_stage=3", "train.steps=4", world=2)
        trainer.train(tmp_path / "legs", *bf16, TP2, "train.steps=8", world=2)
        assert whole.wait().codes == [0], whole.output
        assert stream_of(tmp_path / "legs") == stream_of(tmp_path / "whole")
        assert_same_losses(tmp_path / "legs", tmp_path / "whole", tolerance=2e-2)
        assert losses_of(tmp_path / "legs") != losses_of(tmp_path / "whole")


class TestDropout:
    SETTINGS = ("model.dropout=0.2", "train.steps=14", TP2, "parallel.sequence_parallel=true")

    def test_same_layout_is_bitwise_and_another_keeps_the_stream(self, trainer, tmp_path, straight):
        trainer.train(tmp_path / "whole", *self.SETTINGS, world=2)
        trainer.start(tmp_path / "killed", *self.SETTINGS, world=2, faults=KILL).wait()
        other = copy_of(tmp_path / "killed", tmp_path / "other")
        trainer.train(tmp_path / "killed", *self.SETTINGS, world=2)
        assert attempts_of(tmp_path / "killed") == [(1, 12), (11, 14)]
        assert_same_run(tmp_path / "killed", tmp_path / "whole")
        assert losses_of(tmp_path / "whole")[-1] != pytest.approx(losses_of(straight)[13], rel=1e-3)
        moved = trainer.train(other, *self.SETTINGS[:2])
        assert "dropout" in moved.output
        here, there = rows_of(other), rows_of(tmp_path / "whole")
        assert [here[s]["stream_hash"] for s in (11, 12)] == [there[s]["stream_hash"] for s in (11, 12)]
        assert here[12]["loss"] != pytest.approx(there[12]["loss"], rel=1e-5)


class TestChoices:
    def test_an_older_step_can_be_chosen(self, trainer, straight, tmp_path):
        run_dir = copy_of(straight, tmp_path / "run")
        job = trainer.train(run_dir, "--checkpoint", "10")
        assert sorted(rows_of(run_dir)) == list(range(11, 21))
        assert losses_of(run_dir) == losses_of(straight)[10:]
        assert all(torch.equal(tensor, state_of(straight)[key]) for key, tensor in state_of(run_dir).items())
        assert "step_00000010" in job.output

    def test_a_run_can_be_prolonged(self, trainer, straight, tmp_path):
        """Its last step lies between two validations and must not change the clip interval."""
        trainer.train(tmp_path, "train.steps=13", "evaluation.every_steps=8")
        assert sorted(rows_of(tmp_path, "validation")) == [8, 13]
        trainer.train(tmp_path)
        assert stream_of(tmp_path) == stream_of(straight)
        assert losses_of(tmp_path) == losses_of(straight)

    def test_a_prolonged_cosine_equals_one_that_was_long_from_the_start(self, trainer, tmp_path):
        """The end of the cosine is that of the first start: not one rate or loss differs, and the log says so."""
        short, straight = tmp_path / "short", tmp_path / "straight"
        settings = ("optim.schedule=cosine", "optim.min_lr=1e-3", "diffusion.clip_search.enabled=false")
        trainer.train(short, *settings, "train.steps=8")
        job = trainer.train(short, *settings, "train.steps=12")
        trainer.train(straight, *settings, "train.steps=12", "optim.decay_steps=8")
        rates = [rows_of(run)[step]["lr"] for run in (short, straight) for step in range(1, 13)]
        assert rates[:12] == rates[12:]
        assert rates[7] > 1e-3 == rates[8] == rates[11]
        assert losses_of(short) == losses_of(straight)
        assert "cosine ends at step 8" in job.output
        assert load_config(short / "config.yaml").optim.decay_steps == 8

    def test_a_new_run_can_start_from_the_average_of_another(self, trainer, straight, tmp_path):
        settings = (f"train.init_from={straight}", "train.steps=1", "optim.lr=1e-30", "optim.zero_stage=2")
        trainer.train(tmp_path, *settings, world=2)
        source, here = state_of(straight), state_of(tmp_path)
        for name in {name for name, _ in source}:
            assert torch.equal(here[name, "master"], source[name, "ema"]), name
            assert not here[name, "exp_avg"].equal(source[name, "exp_avg"]), name
            assert torch.allclose(here[name, "ema"], source[name, "ema"], rtol=1e-6, atol=0), name
        meta = open_checkpoint(next((tmp_path / "checkpoints").iterdir())).meta
        assert (meta["step"], meta["optimizer_step"], meta["cursor"]["step"]) == (1, 1, 1)

    def test_a_checkpoint_of_its_own_goes_before_init_from(self, trainer, straight, tmp_path):
        run_dir = copy_of(straight, tmp_path / "run", until=15)
        trainer.train(run_dir, f"train.init_from={tmp_path / 'nowhere'}")
        assert losses_of(run_dir) == losses_of(straight)[15:]


class TestRefusals:
    def test_settings_that_would_change_the_run_are_listed_once(self, trainer, straight, tmp_path):
        run_dir = copy_of(straight, tmp_path / "run")
        kept = [run_dir / "config.yaml", *(run_dir / "tokenizer").iterdir(), *(run_dir / "checkpoints").rglob("*")]
        before = [path.stat().st_mtime_ns for path in kept]
        changed = ("optim.lr=1", "seed=4", "model.dropout=0.5", "train.steps=30", "optim.zero_stage=2")
        job = trainer.train(run_dir, *changed, world=2, expect=ExitCode.CONFIG)
        for line in ("optim.lr (1.0): the checkpoint was trained with 0.01", "seed (4)", "model.dropout (0.5)"):
            assert job.output.count(line) == 1
        assert "train.steps (" not in job.output
        assert "Traceback" not in job.output
        assert [path.stat().st_mtime_ns for path in kept] == before
        assert not rows_of(run_dir)

    def test_fresh_and_missing_steps_are_refused(self, trainer, straight, tmp_path):
        run_dir = copy_of(straight, tmp_path / "run")
        fresh = trainer.train(run_dir, "--fresh", expect=ExitCode.CONFIG)
        assert "use another run_dir, or drop --fresh" in fresh.output
        missing = trainer.train(run_dir, "--checkpoint", "7", expect=ExitCode.CONFIG)
        assert "there is no checkpoint of step 7" in missing.output
        assert "5, 10, 15, 20" in missing.output
        assert not rows_of(run_dir)

    def test_another_tokenizer_is_refused(self, trainer, straight, tmp_path):
        other = prepare_tiny_data(tmp_path / "other", seed=1)
        run_dir = copy_of(straight, tmp_path / "run")
        job = trainer.train(run_dir, f"data.path={other}", world=2, expect=ExitCode.CONFIG)
        assert job.output.count("its tokenizer is not the one") == 1
        assert not rows_of(run_dir)

    def test_other_shards_are_refused_and_a_copy_elsewhere_is_not(self, trainer, tiny_data, straight, tmp_path):
        """The same tokenizer, other text."""
        other = prepare_tiny_data(tmp_path / "other", seed=1, tokenizer=tiny_data / "tokenizer")
        run_dir = copy_of(straight, tmp_path / "run", until=10)
        job = trainer.train(run_dir, f"data.path={other}", world=2, expect=ExitCode.CONFIG)
        assert job.output.count("its shards are not those step_00000010 was trained with") == 1
        assert not rows_of(run_dir)
        moved = shutil.copytree(tiny_data, tmp_path / "moved")
        trainer.train(run_dir, f"data.path={moved}")
        assert stream_of(run_dir) == stream_of(straight)[10:]

    def test_one_rank_without_data_ends_all_with_its_reason(self, trainer, tmp_path):
        nowhere = tmp_path / "nowhere"
        job = trainer.start(tmp_path / "run", world=2, last_rank=(f"data.path={nowhere}",)).wait()
        assert job.codes == [ExitCode.CONFIG] * 2, job.output
        assert job.output.count(f"data.path ({nowhere})") == 1
        assert "rank 1: the data" in job.output
        assert "Traceback" not in job.output

    def test_one_job_per_run_folder(self, trainer, straight, tmp_path):
        first = trainer.start(tmp_path, faults="hang@step=7")
        first.wait_for_step(7)
        second = trainer.train(tmp_path, world=2, expect=ExitCode.IN_USE)
        assert second.output.count(f"is in use by process {first.pids[0]}") == 1
        assert not (tmp_path / "runtime/status.json").exists(), "the second job leaves the first one's files alone"
        first.kill()
        third = trainer.train(tmp_path)
        assert "taking over the run folder" in third.output
        assert_same_run(tmp_path, straight)


class TestDamage:
    def test_any_damaged_file_means_the_checkpoint_before(self, trainer, saved_by_two, straight, tmp_path):
        def flip(path):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

        def truncate(path):
            path.write_bytes(path.read_bytes()[:-8])

        newest = saved_by_two / "checkpoints" / "step_00000010"
        names = sorted(path.name for path in newest.iterdir())
        assert names == ["manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"]
        jobs = []
        for name, damage in zip(names, (flip, truncate, lambda path: path.unlink()), strict=True):
            run_dir = copy_of(saved_by_two, tmp_path / name)
            damage(run_dir / "checkpoints" / newest.name / name)
            jobs.append((name, trainer.start(run_dir, "train.steps=12")))
        for name, job in jobs:
            assert job.wait().codes == [0], job.output
            assert re.search(rf"WARNING: checkpoint step_00000010 is damaged: .*{name}", job.output)
            assert sorted(rows_of(job.run_dir)) == list(range(6, 13))
            assert_same_losses(job.run_dir, straight, range(6, 13))
            assert (job.run_dir / "checkpoints" / f"{newest.name}.damaged").is_dir()

    def test_nothing_left_to_resume_is_an_error(self, trainer, saved_by_two, tmp_path):
        run_dir = copy_of(saved_by_two, tmp_path / "run")
        for path in (run_dir / "checkpoints").iterdir():
            (path / "rank_00001.safetensors").write_bytes(b"\x80\x04.")
        job = trainer.train(run_dir, world=2, expect=ExitCode.CONFIG)
        assert job.output.count("every checkpoint in") == 1
        assert "Traceback" not in job.output
        assert not rows_of(run_dir)
