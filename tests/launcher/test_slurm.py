"""slurm/train_owt.sh on a real Slurm with virtual nodes: what happens when things break, with the real trainer.

Every test submits the shipped script with a tiny configuration, breaks something, and then holds the run against an
undisturbed one: the stream of rows, masks and times must be equal, losses bitwise where the number of ranks stayed
the same and within 1e-5 where it changed. The time lost to each fault is printed at the end.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.lock import owner_of
from bd3lm_scale.runtime.metrics import read_metrics
from tests.slurm_cluster.cluster import DONE, Cluster, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]

ROOT = Path(__file__).parents[2]
STEPS = 60
CHECKPOINT_STEPS = 10
SLOWLY = "slow@step:seconds=0.1"  # so that there is time to break something from outside
CONFIG = f"""
run_dir: ???
precision: fp32
data: {{context_length: 64, workers: 0}}
diffusion: {{block_size: 8}}
model: {{num_layers: 2, hidden_size: 64, num_heads: 2, cond_dim: 32, dropout: 0.0}}
optim: {{warmup_steps: 5, ema_decay: 0.9}}
train: {{steps: {STEPS}, global_batch_size: 12, micro_batch_size: 2}}
evaluation: {{every_steps: 25, rows: 4}}
checkpoint: {{every_steps: {CHECKPOINT_STEPS}}}
runtime: {{heartbeat_seconds: 0.5, silent_seconds: 6, hang_min_seconds: 5, hang_factor: 10,
          collective_timeout_seconds: 60}}
"""


@pytest.fixture(scope="module")
def folder():
    path = Path(tempfile.mkdtemp(prefix="bd3lm-slurm-"))
    path.chmod(0o755)  # munge insists
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def data(folder):
    return make_data(folder)


def make_data(folder):
    """Shards of a few hundred kilobytes of this repository's own source."""
    text = folder / "text"
    text.mkdir()
    for i, source in enumerate(sorted((ROOT / "bd3lm_scale").rglob("*.py"))):
        (text / f"{i:03d}.txt").write_text(source.read_text() or "\n")
    command = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), str(text), "--vocab-size", "512"]
    os.spawnv(os.P_WAIT, sys.executable, [*command, "--output", str(folder / "tokenizer")])
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), str(text), "--workers", "1"]
    command += ["--tokenizer", str(folder / "tokenizer"), "--output", str(folder / "data")]
    command += ["--validation-fraction", "0.1", "--shard-tokens", "65536"]
    assert os.spawnv(os.P_WAIT, sys.executable, command) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def running_cluster(folder):
    with Cluster(folder / "cluster", 4) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster):
    running_cluster.repair()
    yield running_cluster
    running_cluster.cancel_everything()


@pytest.fixture(scope="module")
def losses_of_time(request):
    lost: dict[str, str] = {}
    yield lost
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\ntime lost per fault (longest stretch without a new step, and the steps done twice)")
        for name, text in lost.items():
            print(f"  {name:50s} {text}")


class Job:
    """One submission of slurm/train_owt.sh from a copy of the repository of its own."""

    def __init__(self, cluster, folder, data, name, *overrides, nodes="2", faults="", options=(), script="train_owt"):
        self.cluster = cluster
        self.project = folder / f"project-{name}"
        self.run_dir = folder / f"run-{name}"
        for part in ("bd3lm_scale", "slurm"):
            shutil.copytree(ROOT / part, self.project / part, ignore=shutil.ignore_patterns("__pycache__"))
        (self.project / "tiny.yaml").write_text(CONFIG)
        self.environment = {
            "PYTHON": sys.executable, "RANKS_PER_NODE": "1", "BD3LM_FAULTS": faults, "OMP_NUM_THREADS": "1",
            "STOP_SECONDS": "20", "MIN_NODES": nodes.split("-")[0],
            # a shell in which something distributed has run: nothing of this may reach the ranks
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
        }  # fmt: skip
        self.arguments = ["tiny.yaml", f"run_dir={self.run_dir}", f"data.path={data}", *overrides]
        self.options = (f"--nodes={nodes}", "--output=job.out", *options)
        self.script = f"slurm/{script}.sh"

    def submit(self, **environment):
        self.number = self.cluster.submit(
            self.script, *self.arguments, options=self.options, cwd=self.project, env=self.environment | environment
        )
        return self

    def submit_from_login_node(self, **environment):
        """`bash slurm/train_owt.sh ...`: checks, then submits with what cluster.env says."""
        command = ["bash", self.script, *self.options, *self.arguments]
        site = {"SBATCH_GPUS_PER_NODE": "", "SBATCH_TIMELIMIT": "10", "BD3LM_ROOT": str(self.project)}
        environment = self.cluster.environment | self.environment | site | environment
        done = subprocess.run(command, cwd=self.project, env=environment, capture_output=True, text=True, timeout=60)
        self.submitted = done
        if match := re.search(r"Submitted batch job (\d+)", done.stdout):
            self.number = match[1]
        return self

    def wait_for_step(self, step, timeout=90):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (self.run_dir / "metrics.jsonl").exists() and any(row["step"] >= step for row in self.rows):
                return self
            if self.cluster.job(self.number)["JobState"] in DONE:
                break
            time.sleep(0.2)
        pytest.fail(f"step {step} never came\n{self.output}")

    def wait(self, state="COMPLETED", timeout=150):
        record = self.cluster.wait(self.number, timeout)
        assert record["JobState"] == state, f"{record['JobState']}, {record['ExitCode']}\n{self.output}"
        self.restarts = int(record["Restarts"])
        self.exit_code = int(record["ExitCode"].split(":")[0])
        self.started = time.mktime(time.strptime(record["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        return self

    @property
    def output(self):
        path = self.project / "job.out"
        return path.read_text() if path.exists() else "(no output)"

    @property
    def rows(self):
        return [row for row in read_metrics(self.run_dir) if row["kind"] == "train"]

    @property
    def attempts(self):
        """(attempt, first step) of each attempt that took a step, in order."""
        firsts: dict[str, int] = {}
        for line in self.every_line:
            firsts.setdefault(line["attempt"], line["step"])
        return list(firsts.items())

    @property
    def every_line(self):
        lines = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").open()]
        return [line for line in lines if line["kind"] == "train"]

    def time_lost(self):
        """(longest stretch without a new step in seconds, steps done twice)."""
        furthest, times = 0, []
        for line in self.every_line:
            if line["step"] > furthest:
                furthest = line["step"]
                times.append(line["time"])
        gap = max(after - before for before, after in itertools.pairwise(times))
        return gap, len(self.every_line) - furthest

    def seconds_after_slurm(self):
        """From Slurm's last start of this job until the first new step: our part of what a requeue costs."""
        before = max((line["step"] for line in self.every_line if line["time"] < self.started), default=0)
        return min(line["time"] for line in self.every_line if line["step"] > before) - self.started

    def check_against(self, reference, tolerance=0.0):
        assert [row["step"] for row in self.rows] == list(range(1, STEPS + 1)), self.output
        assert [row["stream_hash"] for row in self.rows] == [row["stream_hash"] for row in reference]
        for row, expected in zip(self.rows, reference, strict=True):
            if tolerance:
                assert row["loss"] == pytest.approx(expected["loss"], rel=tolerance), row["step"]
            else:
                assert (row["loss"], row["grad_norm"]) == (expected["loss"], expected["grad_norm"]), row["step"]


@pytest.fixture
def job(cluster, folder, data, request):
    def make(*overrides, **options):
        return Job(cluster, folder, data, request.node.name.removeprefix("test_"), *overrides, **options)

    return make


@pytest.fixture(scope="module")
def undisturbed(running_cluster, folder, data):
    job = Job(running_cluster, folder, data, "undisturbed").submit_from_login_node().wait()
    assert len(job.rows) == STEPS
    assert job.restarts == 0
    return job.rows


@pytest.fixture
def note(losses_of_time, request):
    def note(job):
        seconds, steps = job.time_lost()
        name = request.node.name.removeprefix("test_").replace("_", " ")
        losses_of_time[name] = f"{seconds:5.1f} s   {steps:3d} steps"
        if job.restarts:
            losses_of_time[name] += f"   {job.seconds_after_slurm():5.1f} s since Slurm started the job again"
        assert steps <= 2 * CHECKPOINT_STEPS, f"{job.attempts}\n{job.output}"
        return seconds

    return note


def test_wrong_configuration_ends_the_job_with_its_reasons(job):
    ended = job("model.num_heads=5", "train.step=3").submit().wait("FAILED", timeout=40)
    assert ended.exit_code == ExitCode.CONFIG
    assert ended.restarts == 0
    assert "model.num_heads" in ended.output
    assert "did you mean" in ended.output or "train.steps" in ended.output


def test_login_node_refuses_a_wrong_configuration_before_the_queue(job, cluster):
    refused = job("model.num_heads=5").submit_from_login_node()
    assert refused.submitted.returncode == ExitCode.CONFIG
    assert "model.num_heads" in refused.submitted.stderr
    assert not hasattr(refused, "number")
    assert cluster.slurm("squeue", "--noheader").strip() == ""


def test_data_and_evaluation_scripts(job, cluster, folder, undisturbed):
    """What comes before and after training; `undisturbed` has left its run folder."""
    here = job()
    output = folder / "prepared-by-job"
    inputs = [str(folder / "text"), "--tokenizer", str(folder / "tokenizer"), "--output", str(output)]
    settings = {"cwd": here.project, "env": here.environment, "options": ("--output=job.out", "--nodes=1")}
    shutil.copytree(ROOT / "tools", here.project / "tools")
    number = cluster.submit("slurm/prepare_data.sh", *inputs, "--validation-fraction", "0.1", **settings)
    assert cluster.wait(number, 60)["JobState"] == "COMPLETED", here.output
    assert (output / "train" / "manifest.json").exists()
    settings["options"] = ("--output=job.out", "--nodes=2")
    figures = folder / "figures.json"
    run = str(folder / "run-undisturbed")
    number = cluster.submit("slurm/evaluate.sh", run, "--rows", "8", "--json", str(figures), **settings)
    assert cluster.wait(number, 60)["JobState"] == "COMPLETED", here.output
    assert json.loads(figures.read_text())


def test_chain_of_slots_without_requeue(job, cluster, undisturbed):
    """An array whose elements run one after another; each goes on where the last one stopped."""
    chain = job(faults=SLOWLY, options=("--array=1-3%1",)).submit(REQUEUE="no").wait_for_step(15)
    # what Slurm does before the time limit; its own `scancel --batch` refuses elements of an array (22.05)
    launcher = owner_of(chain.run_dir)
    cluster.signal_process(launcher["node"], launcher["pid"], "USR1")
    deadline = time.monotonic() + 200
    while cluster.slurm("squeue", "--noheader").strip() and time.monotonic() < deadline:
        time.sleep(0.3)
    assert [attempt for attempt, _ in chain.attempts] == ["0.0", "1.0"], chain.output
    assert chain.output.count("finished at step 60") == 2, "the third finds the run finished"
    chain.check_against(undisturbed)
    assert len(chain.every_line) == STEPS, "nothing is done twice"


def test_killed_rank(job, undisturbed, note):
    ended = job(faults="kill@step=25:rank=1:attempt=0.0").submit().wait()
    ended.check_against(undisturbed)
    assert ended.attempts == [("0.0", 1), ("0.1", 21)]
    assert ended.restarts == 0
    assert note(ended) < 30


def test_frozen_rank(job, undisturbed, note):
    ended = job(faults="freeze@step=25:rank=1:attempt=0.0").submit().wait()
    ended.check_against(undisturbed)
    assert ended.attempts == [("0.0", 1), ("0.1", 21)]
    assert "rank 1 on bdn2" in ended.output
    assert note(ended) < 45


def test_usr1_saves_requeues_and_resumes_what_was_submitted(job, cluster, undisturbed, note):
    running = job(faults=SLOWLY).submit().wait_for_step(15)
    # edits after the start must not reach the job, not even after a requeue
    (running.project / "bd3lm_scale" / "train.py").write_text("raise SystemExit('edited')\n")
    (running.project / "tiny.yaml").write_text("train: {steps: 1}\n")
    cluster.slurm("scancel", "--batch", "--signal=USR1", running.number)
    ended = running.wait()
    ended.check_against(undisturbed)
    assert ended.restarts == 1
    (_, first), (attempt, second) = ended.attempts
    assert first == 1
    assert attempt == "1.0"
    assert second > 15, "saved at the signal, not at the last periodic checkpoint"
    seconds = note(ended)
    assert len(ended.every_line) == STEPS, "nothing is done twice"
    assert seconds < 45


def test_time_limit(job, undisturbed, note):
    slow_at_first = "slow@step:seconds=1.5:attempt=0.0"
    running = job(faults=slow_at_first, options=("--time=1", "--signal=B:USR1@25")).submit()
    ended = running.wait(timeout=240)
    ended.check_against(undisturbed)
    assert ended.restarts >= 1
    assert len(ended.every_line) == STEPS, "nothing is done twice"
    note(ended)


def test_preemption(job, cluster, undisturbed, note):
    running = job(nodes="3", faults=SLOWLY).submit().wait_for_step(15)
    urgent = cluster.submit(
        "--wrap=sleep 3", options=("--partition=urgent", "--nodes=4", "--exclusive"), cwd=running.project, env={}
    )
    assert cluster.wait(urgent, 90)["JobState"] == "COMPLETED"
    ended = running.wait()
    ended.check_against(undisturbed, tolerance=1e-5)
    assert ended.restarts == 1
    note(ended)


def test_node_lost_goes_on_with_the_others(job, cluster, undisturbed, note):
    running = job(nodes="3", faults=SLOWLY).submit(MIN_NODES="2").wait_for_step(15)
    record = cluster.job(running.number)
    victim = next(node for node in ("bdn3", "bdn2") if node != record["BatchHost"])
    cluster.power_cut(victim)
    ended = running.wait()
    ended.check_against(undisturbed, tolerance=1e-5)
    assert ended.restarts == 0, "the job kept its allocation"
    assert f"nodes {victim} do not answer" in ended.output
    assert "attempt 0.1: 2 ranks" in ended.output
    assert note(ended) < 90, ended.output


def test_spare_node_takes_over(job, cluster, undisturbed, note):
    running = job(nodes="3", faults=SLOWLY).submit(MIN_NODES="2", MAX_NODES="2").wait_for_step(15)
    record = cluster.job(running.number)
    cluster.power_cut(next(node for node in ("bdn2", "bdn1") if node != record["BatchHost"]))
    ended = running.wait()
    ended.check_against(undisturbed)
    assert ended.restarts == 0
    assert note(ended) < 90, ended.output


def test_batch_host_lost(job, cluster, undisturbed, note):
    cluster.set_slurmd_timeout(10)
    try:
        running = job(faults=SLOWLY).submit().wait_for_step(15)
        cluster.power_cut(cluster.job(running.number)["BatchHost"])
        ended = running.wait()
    finally:
        cluster.set_slurmd_timeout(60)
    ended.check_against(undisturbed)
    assert ended.restarts >= 1
    assert note(ended) < 90


def test_network_partition_leaves_no_second_writer(job, cluster, undisturbed, note):
    cluster.set_slurmd_timeout(10)
    try:
        running = job(faults=SLOWLY).submit().wait_for_step(15)
        host = cluster.job(running.number)["BatchHost"]
        cluster.unplug(host)
        running.wait_for_step(40)  # the run has moved; its old half still lives behind the dead link
        cluster.plug_in(host)
        ended = running.wait()
    finally:
        cluster.set_slurmd_timeout(60)
    ended.check_against(undisturbed)
    assert ended.restarts >= 1
    note(ended)


def test_a_job_submitted_twice_is_refused_and_the_first_never_notices(job, cluster, undisturbed):
    """While the first runs, and both released in the same cycle: one owns the run folder from the first file on."""
    running = job(nodes="2", faults=SLOWLY).submit().wait_for_step(5)
    first, output = running.number, running.options
    running.options = ("--nodes=2", "--output=second.out")
    second = running.submit().number
    assert cluster.wait(second, 90)["ExitCode"] == f"{ExitCode.IN_USE}:0"
    assert "is in use by process" in (running.project / "second.out").read_text()
    running.number, running.options = first, output
    running.wait().check_against(undisturbed)
    assert running.attempts == [("0.0", 1)]


def test_of_two_jobs_that_start_together_one_runs(job, cluster, undisturbed):
    running = job(nodes="2")
    running.options = (*running.options, "--hold")
    numbers = [running.submit().number]
    running.options = ("--nodes=2", "--output=second.out", "--hold")
    numbers.append(running.submit().number)
    cluster.slurm("scontrol", "release", ",".join(numbers))
    codes = sorted(int(cluster.wait(number, 150)["ExitCode"].split(":")[0]) for number in numbers)
    assert codes == [0, ExitCode.IN_USE], running.output
    running.check_against(undisturbed)
    assert len({attempt for attempt, _ in running.attempts}) == 1


def test_a_requeue_waits_for_the_controller(job, cluster, undisturbed):
    """slurmctld is away for 40 s, just when the job has saved and wants to go back into the queue."""
    running = job(faults=SLOWLY).submit().wait_for_step(15)
    launcher = owner_of(running.run_dir)
    with cluster.without_controller():
        cluster.signal_process(launcher["node"], launcher["pid"], "USR1")
        time.sleep(40)
    ended = running.wait()
    ended.check_against(undisturbed)
    assert ended.restarts == 1
    assert "Slurm does not answer; trying again" in ended.output
    assert len(ended.every_line) == STEPS, "nothing is done twice"


def test_stop_file_ends_the_run_and_submitting_again_resumes_on_half_the_nodes(job, undisturbed):
    running = job(nodes="4", faults=SLOWLY).submit().wait_for_step(15)
    (running.run_dir / "STOP").touch()
    stopped = running.wait("FAILED", timeout=60)
    assert stopped.exit_code == ExitCode.STOPPED
    assert stopped.restarts == 0
    running.options = ("--nodes=2", *running.options[1:])
    ended = running.submit(MIN_NODES="2").wait()
    ended.check_against(undisturbed, tolerance=1e-5)
    assert len(ended.every_line) == STEPS, "nothing is done twice"


def test_cancelled_job_saves_and_stays_cancelled(job, cluster):
    running = job(faults=SLOWLY).submit().wait_for_step(15)
    cluster.slurm("scancel", running.number)
    running.wait("CANCELLED", timeout=60)
    time.sleep(6)
    assert cluster.job(running.number)["JobState"] == "CANCELLED"
    assert running.rows[-1]["step"] < STEPS


def test_crash_loop_ends_the_job_with_a_diagnosis(job):
    ended = job(faults="error@step=14:rank=0").submit(MAX_FAILURES="2").wait("FAILED", timeout=120)
    assert ended.exit_code == ExitCode.CRASH_LOOP
    assert "2 failures without a checkpoint beyond step 10" in ended.output
    assert ended.restarts == 0
