"""Real runs through kills, full disks, signals, NaNs and bad shards: they end as if nothing had been, or say why."""

import os
import random
import re
import resource
import shutil
import signal

import numpy as np
import pytest
import torch

from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.errors import BadShardError
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.metrics import read_metrics
from bd3lm_scale.runtime.run_folder import read_json
from tests.training_runs import Killer, assert_same_run, attempts_of, losses_of, rows_of, state_of, stream_of, wait_for

pytestmark = pytest.mark.faults

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def thaw(job, rank=0):
    """Wait until an ordered freeze has struck; the returned function lets the rank go on."""
    pid = job.pids[rank]
    assert wait_for(lambda: state_letter(pid) == "T", 120), job.output
    return lambda: os.kill(pid, signal.SIGCONT)


def state_letter(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def meta_of(run_dir):
    return open_checkpoint(find_checkpoint(run_dir)).meta


class TestKills:
    def test_ten_kills_in_every_phase_change_nothing(self, trainer, tmp_path):
        """Two ranks, one of them killed in each life; nothing tells the end from that of a run left alone."""
        settings = ("train.steps=80", "checkpoint.every_steps=4", "optim.zero_stage=2")
        trainer.train(tmp_path / "straight", *settings, world=2)
        killer = Killer(random.Random(5), world=2, steps=80, reach=6)
        for life in range(10):
            fault = killer.next(tmp_path / "killed")
            job = trainer.start(tmp_path / "killed", *settings, world=2, faults=fault).wait()
            assert -signal.SIGKILL in job.codes, f"life {life}, {fault}\n{job.output}"
        trainer.train(tmp_path / "killed", *settings, world=2)
        assert len(attempts_of(tmp_path / "killed")) > 5, "the kills struck all over the run"
        assert_same_run(tmp_path / "killed", tmp_path / "straight")
        assert not list((tmp_path / "killed/checkpoints").glob(".*")), "dead saves are cleared away"

    def test_survivors_of_a_kill_in_a_save_end_by_themselves(self, trainer, tmp_path):
        """Not one waits in its save for a rank that waits for it in training."""
        layout = ("parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2")
        job = trainer.start(tmp_path, *layout, world=4, faults="kill@save:copied:rank=2").wait()
        failed = ExitCode.FAILED
        assert job.codes == [failed, failed, -signal.SIGKILL, failed], job.output

    def test_an_error_on_one_rank_ends_the_other(self, trainer, tmp_path):
        job = trainer.start(tmp_path, world=2, faults="error@forward:step=7:rank=1").wait()
        assert job.codes == [ExitCode.FAILED, ExitCode.FAILED], job.output
        assert read_json(tmp_path / "runtime/status.json")["code"] == ExitCode.FAILED
        assert "injected at forward" in (tmp_path / "runtime/rank_00001.log").read_text()
        trainer.train(tmp_path, world=2)
        assert attempts_of(tmp_path) == [(1, 7), (6, 20)]


class TestFullDisk:
    def limit(self, job, size):
        hard = resource.prlimit(job.pids[0], resource.RLIMIT_FSIZE)[1]
        resource.prlimit(job.pids[0], resource.RLIMIT_FSIZE, (size, hard))

    def test_run_goes_on_and_saves_again_when_there_is_room(self, trainer, tmp_path, straight):
        """From step 7 to 12 no file can grow: the save of step 10 is lost, nothing else."""
        job = trainer.start(tmp_path, faults="freeze@step=7,freeze@step=12")
        go_on = thaw(job)
        self.limit(job, 100)
        go_on()
        assert wait_for(lambda: state_letter(job.pids[0]) != "T", 10)
        go_on = thaw(job)
        assert max(rows_of(tmp_path)) <= 7
        self.limit(job, resource.RLIM_INFINITY)
        go_on()
        assert job.wait().codes == [0], job.output
        steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert steps == ["step_00000005", "step_00000015", "step_00000020"]
        assert_same_run(tmp_path, straight)

    def test_a_last_save_that_fails_is_a_failure_that_a_restart_repairs(self, trainer, tmp_path, straight):
        job = trainer.start(tmp_path, faults="freeze@step=18")
        go_on = thaw(job)
        self.limit(job, 100_000)
        go_on()
        assert job.wait().codes == [ExitCode.FAILED], job.output
        assert "checkpoint of step 20 was NOT saved" in job.output
        assert "the last checkpoint could not be saved" in read_json(tmp_path / "runtime/status.json")["reason"]
        trainer.train(tmp_path)
        assert attempts_of(tmp_path) == [(1, 20), (16, 20)]
        assert_same_run(tmp_path, straight)


class TestStops:
    def test_signals_finish_the_step_and_save_and_a_second_one_does_no_harm(self, trainer, tmp_path, straight):
        faults = "freeze@forward:step=7,freeze@save:before_manifest"
        jobs = [trainer.start(tmp_path / number.name, "checkpoint.every_steps=50", faults=faults) for number in SIGNALS]
        for number, job in zip(SIGNALS, jobs, strict=True):
            go_on = thaw(job)
            job.signal(number)
            go_on()
            assert wait_for(lambda job=job: state_letter(job.pids[0]) != "T", 10)
            go_on = thaw(job)  # now it is in the middle of its save
            for again in SIGNALS:
                job.signal(again)
            go_on()
        for number, job in zip(SIGNALS, jobs, strict=True):
            assert job.wait().codes == [ExitCode.STOPPED], job.output
            status = read_json(job.run_dir / "runtime/status.json")
            assert (status["reason"], status["step"]) == (f"signal {number.name}", 8)
            assert meta_of(job.run_dir)["step"] == max(rows_of(job.run_dir)) == 8
        jobs = [trainer.start(job.run_dir, "checkpoint.every_steps=50") for job in jobs]
        for job in jobs:
            assert job.wait().codes == [0], job.output
            assert attempts_of(job.run_dir) == [(1, 20)]
            assert_same_run(job.run_dir, straight)

    def test_a_signal_to_one_rank_stops_all_after_the_same_step(self, trainer, tmp_path):
        job = trainer.start(tmp_path, "checkpoint.every_steps=50", world=2, faults="freeze@forward:step=7:rank=1")
        go_on = thaw(job, rank=1)
        job.signal(signal.SIGTERM, rank=1)
        go_on()
        assert job.wait().codes == [ExitCode.STOPPED] * 2, job.output
        assert meta_of(tmp_path)["step"] == max(rows_of(tmp_path)) == 8

    def test_stop_file_and_time_limit(self, trainer, tmp_path, straight):
        long = ("train.steps=100000", "evaluation.every_steps=8", "checkpoint.every_steps=100000")
        asked = trainer.start(tmp_path / "asked", *long)
        limited = trainer.start(tmp_path / "limited", *long, "train.time_limit_minutes=0.02")
        asked.wait_for_step(3)
        (asked.run_dir / "STOP").touch()
        for job, reason in ((asked, "STOP file"), (limited, "time limit")):
            assert job.wait().codes == [ExitCode.STOPPED], job.output
            status = read_json(job.run_dir / "runtime/status.json")
            assert status["reason"] == reason
            assert status["step"] == meta_of(job.run_dir)["step"] == max(rows_of(job.run_dir))
        done = meta_of(asked.run_dir)["step"]
        trainer.train(asked.run_dir, f"train.steps={done + 2}", *long[1:])
        assert attempts_of(asked.run_dir) == [(1, done + 2)], "a STOP file binds only the job it was meant for"
        common = min(done, 20)
        assert losses_of(asked.run_dir)[:common] == losses_of(straight)[:common]


class TestNan:
    def test_a_skipped_update_leaves_everything_as_it_was(self, trainer, tmp_path):
        settings = ("checkpoint.every_steps=1", "train.steps=10", "checkpoint.keep_last=20")
        job = trainer.train(tmp_path / "run", *settings, world=2, faults="nan@loss:step=6")
        before, after = state_of(tmp_path / "run", 6), state_of(tmp_path / "run", 7)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not all(torch.equal(state_of(tmp_path / "run", 8)[key], before[key]) for key in before)
        row = rows_of(tmp_path / "run")[7]
        assert np.isnan(row["loss"])
        assert row["was_skipped"]
        assert "loss is nan" in row["event"]
        assert meta_of(tmp_path / "run")["optimizer_step"] == 9
        assert job.codes == [0, 0]
        trainer.start(
            tmp_path / "killed", *settings, world=2, faults="nan@loss:step=6,kill@updated:step=8:rank=1"
        ).wait()
        trainer.train(tmp_path / "killed", *settings, world=2)
        assert attempts_of(tmp_path / "killed")[-1] == (9, 10)
        assert state_of(tmp_path / "killed").keys() == before.keys()
        assert all(torch.equal(state_of(tmp_path / "killed")[k], state_of(tmp_path / "run")[k]) for k in before)

    def test_rollback_goes_on_from_the_checkpoint_past_the_bad_rows(self, trainer, tmp_path, straight):
        settings, fault = ("runtime.on_nan=rollback",), "nan@loss:step=12:times=1"
        trainer.train(tmp_path / "run", *settings, world=2, faults=fault)
        assert attempts_of(tmp_path / "run") == [(1, 12), (11, 20)]
        meta = meta_of(tmp_path / "run")
        assert (meta["step"], meta["optimizer_step"], meta["cursor"]["data_offset"]) == (20, 20, 3 * 8)
        events = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "event"]
        assert [(row["step"], row["event"]) for row in events] == [(13, "rollback: loss is nan")]
        here, there = stream_of(tmp_path / "run"), stream_of(straight)
        assert here[:10] == there[:10]
        assert not {row[1] for row in here[10:]} & {row[1] for row in there[10:]}
        # killed before the next checkpoint it has to find the way again
        trainer.start(tmp_path / "killed", *settings, world=2, faults=f"{fault},kill@save:before_rename:times=1").wait()
        job = trainer.start(tmp_path / "killed", *settings, world=2, faults=f"{fault},kill@step=14:rank=1").wait()
        assert -signal.SIGKILL in job.codes
        trainer.train(tmp_path / "killed", *settings, world=2, faults=fault)
        assert_same_run(tmp_path / "killed", tmp_path / "run")

    @pytest.mark.parametrize(
        ("policy", "faults", "words"),
        [
            ("stop", "nan@loss:step=7", "loss is nan"),
            ("rollback", "nan@loss:step=12", "3 times in a row is the limit (runtime.max_rollbacks)"),
            ("rollback", "nan@loss:step=3", "has no checkpoint to roll back to"),
        ],
    )
    def test_a_run_that_cannot_go_on_says_so(self, trainer, tmp_path, policy, faults, words):
        job = trainer.train(tmp_path, f"runtime.on_nan={policy}", faults=faults, expect=ExitCode.DIVERGED)
        status = read_json(tmp_path / "runtime/status.json")
        assert status["code"] == ExitCode.DIVERGED
        assert words in status["reason"]
        assert "Traceback" not in job.output


@pytest.fixture(scope="module")
def damaged(tiny_data, tmp_path_factory):
    """(shards of which one is damaged, its name, the first step that needs it)."""
    data = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(tiny_data, data)
    for path in sorted((data / "train").glob("*.tar")):
        intact = path.read_bytes()
        path.write_bytes(intact[:512] + b"\xff" * (len(intact) - 512))
        config = DataConfig(path=str(data), context_length=32, shuffle_window=2, retries=0)
        step = first_bad_step(open_stream(config, 3), 8, 20)
        if step is not None and 6 <= step <= 14:
            return data, path, step
        path.write_bytes(intact)
    raise AssertionError("no shard is met in these steps")


class TestBadShard:
    def test_skipped_by_all_ranks_at_the_same_step_and_remembered(self, trainer, damaged, tmp_path, straight):
        data, shard, step = damaged
        skip = (f"data.path={data}", "data.on_bad_shard=skip", "data.retries=0")
        job = trainer.train(tmp_path / "two", *skip, "data.workers=1", world=2)
        assert job.output.count(f"leaving out damaged shards from step {step} on: {shard.name}") == 1, job.output
        assert meta_of(tmp_path / "two")["cursor"]["excluded_shards"] == [shard.name]
        here, there = stream_of(tmp_path / "two"), stream_of(straight)
        assert here[:step] == there[:step]
        assert here[step:] != there[step:]
        trainer.start(tmp_path / "one", *skip, faults=f"kill@step={step + 5}").wait()
        resumed = trainer.train(tmp_path / "one", *skip)
        assert stream_of(tmp_path / "one") == here
        assert "leaving out" not in resumed.output, "the checkpoint remembers"

    def test_stop_saves_and_names_the_shard_and_repair_resumes(self, trainer, damaged, tmp_path, straight):
        data, shard, step = damaged
        settings = (f"data.path={data}", "data.retries=0")
        job = trainer.train(tmp_path, *settings, world=2, expect=ExitCode.CONFIG)
        assert job.output.count("data.on_bad_shard=skip to go on without it") == 1
        assert re.search(rf"config at step {step}: shard {shard.name}", job.output)
        assert meta_of(tmp_path)["step"] == step
        trainer.train(tmp_path)  # the intact shards
        assert attempts_of(tmp_path) == [(1, 20)]
        assert stream_of(tmp_path) == stream_of(straight)
        assert losses_of(tmp_path) == pytest.approx(losses_of(straight), rel=1e-5)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_when_all_shards_vanish_the_run_saves_and_says_so(self, trainer, tiny_data, tmp_path, straight, workers):
        """Whatever on_bad_shard says; with the shards back it goes on, and leaves none out."""
        data = shutil.copytree(tiny_data, tmp_path / "data")
        settings = (f"data.path={data}", "data.on_bad_shard=skip", "data.retries=0", f"data.workers={workers}")
        job = trainer.start(tmp_path / "run", *settings, world=2, faults="freeze@step=7:rank=0")
        go_on = thaw(job)
        for path in (data / "train").glob("*.tar"):
            os.truncate(path, 0)  # a shard that is open already vanishes, too
            path.unlink()
        go_on()
        assert job.wait().codes == [ExitCode.CONFIG] * 2, job.output
        assert "Traceback" not in job.output
        assert re.search(r"config at step \d+: data.path .*every shard is damaged or missing", job.output)
        meta = meta_of(tmp_path / "run")
        assert meta["step"] >= 7
        trainer.train(tmp_path / "run")
        assert attempts_of(tmp_path / "run") == [(1, 20)]


def first_bad_step(stream, batch, steps):
    for step in range(steps):
        try:
            stream.read(np.arange(step * batch, (step + 1) * batch))
        except BadShardError:
            return step
    return None
