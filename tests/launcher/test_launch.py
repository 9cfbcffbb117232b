"""The restart loop on one machine: real processes that are killed, frozen, hung and stopped, and run on as if nothing
had happened. The trainer is a stand-in with the same protocol (tests/runtime/stand_in.py); the real one is put
through the same faults under Slurm in test_slurm.py.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from bd3lm_scale.launch import interpreter
from bd3lm_scale.launcher.policy import (
    Action,
    AttemptEnd,
    History,
    Limits,
    choose_nodes,
    decide,
    describe_code,
    newest_checkpoint_step,
)
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.metrics import read_metrics
from bd3lm_scale.runtime.run_folder import read_json, write_json

ROOT = Path(__file__).parents[2]
STEPS = 40
SETTINGS = [
    "data.path=unused", f"train.steps={STEPS}", "train.global_batch_size=12", "checkpoint.every_steps=10",
    "runtime.heartbeat_seconds=0.2", "runtime.silent_seconds=3", "runtime.hang_min_seconds=1.5",
    "runtime.hang_factor=5", "runtime.collective_timeout_seconds=30",
]  # fmt: skip


PATIENT = ("runtime.silent_seconds=60", "runtime.hang_min_seconds=60")  # where a busy machine must not look like a hang


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text("run_dir: ???\nprecision: fp32\n")
    return path


class Run:
    """One launcher process and what it left behind."""

    def __init__(self, config, run_dir, *settings, faults="", nproc=2, options=(), environment=()):
        self.run_dir = run_dir
        command = [sys.executable, "-m", "bd3lm_scale.launch", "--nproc-per-node", str(nproc), *options]
        command += ["--backoff-seconds", "0.2", "--stop-seconds", "10", "--", "tests.runtime.stand_in", str(config)]
        command += [f"run_dir={run_dir}", *SETTINGS, *settings]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "BD3LM"))}
        environment = inherited | {"OMP_NUM_THREADS": "1", "BD3LM_FAULTS": faults, **dict(environment)}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, timeout=60):
        try:
            self.output = self.process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.output = self.process.communicate()[0]
            pytest.fail(f"still running after {timeout} s:\n{self.output}")
        self.seconds = time.monotonic() - self.started
        return self

    def wait_for_step(self, step, timeout=30):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if (self.run_dir / "metrics.jsonl").exists() and len(read_metrics(self.run_dir)) >= step:
                return
            time.sleep(0.02)
        pytest.fail(f"step {step} never came:\n{self.finish(1).output}")

    @property
    def losses(self):
        return [row["loss"] for row in read_metrics(self.run_dir)]

    @property
    def attempts(self):
        return sorted({row["attempt"] for row in read_metrics(self.run_dir)})


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    run = Run(config, tmp_path_factory.mktemp("undisturbed")).finish()
    assert run.process.returncode == 0, run.output
    assert len(run.losses) == STEPS
    return run.losses


@pytest.mark.parametrize(
    ("faults", "word"),
    [
        ("kill@step=23:rank=1:attempt=0.0", "killed by SIGKILL"),
        ("kill@save:before_manifest:step=20:rank=0:attempt=0.0", "killed by SIGKILL"),
        ("hang@step=23:rank=1:attempt=0.0", "suspect: rank 1"),
        ("freeze@step=23:rank=1:attempt=0.0", "rank 1"),
    ],
    ids=["killed", "killed in a save", "hangs", "frozen"],
)
def test_run_with_faults_equals_the_undisturbed_one(config, tmp_path, undisturbed, faults, word):
    run = Run(config, tmp_path / "run", faults=faults).finish()
    assert run.process.returncode == 0, run.output
    assert run.losses == undisturbed
    assert run.attempts == ["0.0", "0.1"]
    assert word in run.output
    assert (tmp_path / "run" / "log.txt").read_text().count("-> restart") == 1


def test_crash_loop_ends_with_a_diagnosis(config, tmp_path):
    run = Run(config, tmp_path / "run", faults="kill@step=23:rank=1", options=("--max-failures", "2")).finish()
    assert run.process.returncode == ExitCode.CRASH_LOOP
    assert "2 failures without a checkpoint beyond step 20" in run.output
    assert "the program, its data or its settings" in run.output
    assert len(read_json(tmp_path / "run/runtime/failures.json")["failures"]) == 2


def test_failures_that_get_further_are_no_loop(config, tmp_path, undisturbed):
    faults = "error@step=12:rank=0:attempt=0.0,kill@step=22:rank=1:attempt=0.1,kill@step=31:rank=0:attempt=0.2"
    run = Run(config, tmp_path / "run", faults=faults, options=("--max-failures", "2")).finish()
    assert run.process.returncode == 0, run.output
    assert run.output.count("-> restart") == 3
    assert run.attempts[-1] == "0.3"
    assert run.losses == undisturbed


def test_wrong_configuration_starts_nothing(config, tmp_path):
    run = Run(config, tmp_path / "run", "train.step=3", "model.num_heads=7").finish()
    assert run.process.returncode == ExitCode.CONFIG
    assert "train.step" in run.output
    assert "train.steps" in run.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [signal.SIGUSR1, "STOP"])
def test_stop_saves_and_the_same_command_resumes(config, tmp_path, undisturbed, how):
    run = Run(config, tmp_path / "run")
    run.wait_for_step(3)
    if how == "STOP":
        (tmp_path / "run" / "STOP").touch()
    else:
        run.process.send_signal(how)
        run.process.send_signal(how)
    assert run.finish().process.returncode == ExitCode.STOPPED, run.output
    stopped_at = len(run.losses)
    assert 3 <= stopped_at < STEPS
    assert newest_checkpoint_step(run.run_dir) == stopped_at, "saved at the very step"
    again = Run(config, tmp_path / "run", nproc=3).finish()
    assert again.process.returncode == 0, again.output
    assert again.losses == undisturbed
    assert again.attempts == ["0.0", "1.0"]


def everything_in(run_dir):
    """Identity and content of every file, but for those that a live run goes on writing."""
    live = ("metrics.jsonl", "log.txt", "heartbeat", "checkpoints")
    files = sorted(path for path in run_dir.rglob("*") if path.is_file() and not {*path.parts} & {*live})
    return [(path, path.stat().st_ino, path.read_bytes()) for path in files if not path.name.startswith(".")]


def test_second_launcher_is_refused_at_once_and_the_first_never_notices(config, tmp_path, undisturbed):
    first = Run(config, tmp_path / "run", "train.steps=100000", *PATIENT)
    first.wait_for_step(3)
    before, log = everything_in(first.run_dir), (first.run_dir / "log.txt").read_text()
    seconds = [Run(config, tmp_path / "run", "train.steps=50").finish() for _ in range(2)]
    for second in seconds:
        assert second.process.returncode == ExitCode.IN_USE, second.output
        assert f"in use by process {first.process.pid}" in second.output
    assert everything_in(first.run_dir) == before
    assert (first.run_dir / "log.txt").read_text() == log
    first.process.send_signal(signal.SIGTERM)
    assert first.finish().process.returncode == ExitCode.STOPPED, first.output
    done = min(len(first.losses), STEPS)
    assert first.losses[:done] == undisturbed[:done]
    assert first.attempts == ["0.0"]


def test_of_launchers_that_start_together_one_runs(config, tmp_path, undisturbed):
    runs = [Run(config, tmp_path / "run", *PATIENT, faults="slow@step:seconds=0.1") for _ in range(3)]
    codes = sorted(run.finish().process.returncode for run in runs)
    assert codes == [0, ExitCode.IN_USE, ExitCode.IN_USE], [run.output for run in runs]
    assert runs[0].losses == undisturbed
    assert runs[0].attempts == ["0.0"]


def test_launcher_that_was_believed_dead_leaves_the_newer_one_alone(config, tmp_path):
    run = Run(config, tmp_path / "run", "train.steps=100000")
    run.wait_for_step(3)
    newer = {"attempt": "1.0-abcdef", "job": "42", "restarts": 1, "pid": 1, "host": "node7", "machine": "elsewhere"}
    write_json(run.run_dir / "runtime/lock.1", newer)  # as the scheduler's second start would
    assert run.finish().process.returncode == ExitCode.FENCED, run.output
    assert read_json(run.run_dir / "runtime/lock.1") == newer
    assert [path.name for path in (run.run_dir / "runtime").glob("lock.*")] == ["lock.1"]
    assert not (run.run_dir / "runtime/status.json").exists()


def test_what_earlier_starts_left_says_nothing_about_this_one(config, tmp_path, undisturbed):
    """A status and a hang of a start without a launcher, of an older version, of another start of the same number."""
    runtime = tmp_path / "run" / "runtime"
    runtime.mkdir(parents=True)
    for name in ("0.0", "0.0-0123456789ab"):
        write_json(runtime / "status.json", {"attempt": name, "code": 0, "reason": "done", "step": 10})
        write_json(runtime / "hang.json", {"attempt": name, "ranks": [1], "text": "long ago"})
        write_json(runtime / "stop_request.json", {"attempt": name, "reason": "SIGTERM"})
    write_json(runtime / "preflight.json", {"attempt": "0.0", "bad_nodes": [socket.gethostname()]})
    run = Run(config, tmp_path / "run", *PATIENT, faults="kill@step=23:rank=0:attempt=0.0").finish()
    assert run.process.returncode == 0, run.output
    assert run.losses == undisturbed
    assert run.attempts == ["0.0", "0.1"]
    assert "killed by SIGKILL -> restart" in run.output


class FullDisk:
    """While entered, no file of this process, or of those it starts, can grow; children are let off at once."""

    def __init__(self, process):
        self.process = psutil.Process(process.pid)
        self.leaving = threading.Event()

    def set(self, process, limit):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def let_children_off(self):
        while not self.leaving.wait(0.01):
            for child in self.process.children():
                with contextlib.suppress(ProcessLookupError):
                    self.set(child, resource.RLIM_INFINITY)

    def __enter__(self):
        self.set(self.process, 0)
        threading.Thread(target=self.let_children_off, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.leaving.set()
        with contextlib.suppress(ProcessLookupError):
            self.set(self.process, resource.RLIM_INFINITY)


@pytest.mark.faults
def test_full_disk_does_not_end_the_launcher(config, tmp_path, undisturbed):
    """Nothing that it writes is worth a run: neither which attempt begins, nor its memory, nor a request to stop."""
    run = Run(config, tmp_path / "run", *PATIENT, faults="slow@step:seconds=0.1")
    run.wait_for_step(12)
    with FullDisk(run.process) as disk:
        disk.process.children()[-1].kill()
        run.wait_for_step(15)
    run.process.send_signal(signal.SIGTERM)
    run.finish()
    assert run.process.returncode == ExitCode.STOPPED, run.output
    assert "cannot be written" in run.output
    assert "bd3lm_scale/launch" not in run.output, "no traceback of the launcher's"
    assert run.attempts == ["0.0", "0.1"]
    again = Run(config, tmp_path / "run", *PATIENT, faults="slow@step:seconds=0.1")
    again.wait_for_step(len(run.losses) + 2)
    with FullDisk(again.process):
        again.process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert again.process.poll() is None, "asked again when there is room"
    assert again.finish().process.returncode == ExitCode.STOPPED, again.output
    assert Run(config, tmp_path / "run", *PATIENT).finish().losses == undisturbed


@pytest.mark.parametrize(
    ("killed_at", "resumed_at"),
    [pytest.param(13, 11, id="before a save"), pytest.param(23, 21, id="after one", marks=pytest.mark.faults)],
)
def test_only_the_first_attempt_goes_back(config, tmp_path, undisturbed, killed_at, resumed_at):
    assert Run(config, tmp_path / "run", *PATIENT).finish().process.returncode == 0
    fault = f"kill@step={killed_at}:rank=1:attempt=1.0"
    run = Run(config, tmp_path / "run", *PATIENT, "--checkpoint", "10", faults=fault).finish()
    assert run.process.returncode == 0, run.output
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").open()]
    first = {line["attempt"]: line["step"] for line in reversed(lines)}
    assert first == {"0.0": 1, "1.0": 11, "1.1": resumed_at}
    assert run.losses == undisturbed
    names = sorted(path.name for path in (run.run_dir / "checkpoints").iterdir())
    old = [f"step_000000{step}.abandoned" for step in (20, 30, 40)]
    assert names == sorted([*old, *(f"step_000000{step}" for step in (10, 20, 30, 40))])


@pytest.mark.parametrize("how", ["STOP", signal.SIGTERM])
def test_a_stop_whose_last_save_fails_is_a_failure(config, tmp_path, how):
    """85 would promise that nothing is lost; and nobody starts again what was told to stop."""
    faults = "slow@step:seconds=0.1,error@save:before_manifest"
    run = Run(config, tmp_path / "run", *PATIENT, "checkpoint.every_steps=1000", faults=faults)
    run.wait_for_step(3)
    if how == "STOP":
        (tmp_path / "run" / "STOP").mkdir()  # a folder is as good as a file
    else:
        run.process.send_signal(how)
    assert run.finish().process.returncode == ExitCode.FAILED, run.output
    assert run.attempts == ["0.0"]


def test_a_stop_file_that_cannot_be_removed_is_named(config, tmp_path):
    (tmp_path / "run" / "STOP" / "notes").mkdir(parents=True)
    run = Run(config, tmp_path / "run").finish()
    assert run.process.returncode == ExitCode.CONFIG
    assert f"{tmp_path}/run/STOP: asks the run to stop and cannot be removed" in run.output
    assert "Traceback" not in run.output


def test_wrong_command_lines_and_folders_start_nothing(config, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    runs = {
        "--bogus": Run(config, tmp_path / "run", "--bogus"),
        "--checkpoint": Run(config, tmp_path / "run", "--checkpoint", "five"),
        "'--nproc'": Run(config, tmp_path / "run", options=("--nproc", "2")),
        "No closing quotation": Run(config, tmp_path / "run", options=("--srun-args=--comment='a",)),
        "cannot be written": Run(config, tmp_path / "file"),
        "SLURM_GPUS_ON_NODE": Run(
            config, tmp_path / "run", nproc=0, environment={"SLURM_GPUS_ON_NODE": "eight"}
        ),
    }  # fmt: skip
    for words, run in runs.items():
        assert run.finish().process.returncode == ExitCode.CONFIG, (words, run.output)
        assert words.strip("'") in run.output
        assert "Traceback" not in run.output
    assert not (tmp_path / "run").exists()


def test_python_in_a_path_with_spaces(config, tmp_path):
    python = tmp_path / "my programs" / "python 3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert interpreter(str(python)) == [str(python)]
    assert interpreter("apptainer exec 'my image' python") == ["apptainer", "exec", "my image", "python"]
    options = ("--python", f"env A_WORD='two words' '{python}'")
    run = Run(config, tmp_path / "a run", "train.steps=2", nproc=1, options=options).finish()
    assert run.process.returncode == 0, run.output


@pytest.mark.slow
def test_two_machines_lose_one_and_go_on(config, tmp_path, undisturbed):
    """Two launchers, as on two machines without a scheduler."""
    slowly = "slow@step:seconds=0.1"
    machines = [
        Run(config, tmp_path / "run", faults=slowly, nproc=1, options=("--nnodes", "2", "--node-rank", rank))
        for rank in ("0", "1")
    ]
    machines[0].wait_for_step(12)
    machines[1].process.kill()  # its rank dies with it
    leader, _ = (machine.finish(timeout=120) for machine in machines)
    assert leader.process.returncode == 0, leader.output
    assert leader.losses == undisturbed
    worlds = [row["world"] for row in read_metrics(leader.run_dir)]
    assert (worlds[0], worlds[-1]) == (2, 1)


def test_two_machines_restart_together_and_end_together(config, tmp_path, undisturbed):
    faults = "kill@step=23:rank=1:attempt=0.0"
    machines = [
        Run(config, tmp_path / "run", faults=faults, nproc=1, options=("--nnodes", "2", "--node-rank", rank))
        for rank in ("0", "1")
    ]
    outputs = [machine.finish(timeout=120).output for machine in machines]
    assert [machine.process.returncode for machine in machines] == [0, 0], outputs
    assert machines[0].losses == undisturbed
    assert {row["world"] for row in read_metrics(machines[0].run_dir)} == {2}


def test_ranks_die_with_their_launcher(config, tmp_path):
    run = Run(config, tmp_path / "run", "train.steps=100000")
    run.wait_for_step(3)
    run.process.kill()
    run.finish(timeout=10)  # the pipe closes only when every rank is gone
    steps = len(run.losses)
    time.sleep(0.3)
    assert len(run.losses) == steps


def test_check_says_what_would_run(config, tmp_path):
    run = Run(config, tmp_path / "run", options=("--check", "--nnodes", "4")).finish()
    assert run.process.returncode == 0, run.output
    assert not (tmp_path / "run").exists()
    run = Run(
        config, tmp_path / "run", "parallel.tensor_parallel_size=3", options=("--check", "--nnodes", "4")
    ).finish()
    assert run.process.returncode == ExitCode.CONFIG
    assert "parallel.tensor_parallel_size" in run.output


@pytest.mark.parametrize(
    ("code", "reason", "stop_asked", "can_requeue", "action"),
    [
        (0, "done", False, True, Action.END),
        (0, "done", True, True, Action.END),
        (ExitCode.CONFIG, "", False, True, Action.END),
        (ExitCode.CONFIG, "", True, True, Action.END),
        (ExitCode.DIVERGED, "", False, True, Action.END),
        (ExitCode.STOPPED, "launcher: SIGUSR1", True, True, Action.REQUEUE),
        (ExitCode.STOPPED, "signal SIGTERM", False, True, Action.REQUEUE),
        (ExitCode.STOPPED, "signal SIGTERM", False, False, Action.END),
        (ExitCode.STOPPED, "STOP file", False, True, Action.END),
        (1, "STOP file", False, True, Action.END),
        (ExitCode.STOPPED, "time limit", False, True, Action.END),
        (ExitCode.HANG, "", False, True, Action.RESTART),
        (ExitCode.HANG, "", True, True, Action.REQUEUE),
        (1, "", False, False, Action.RESTART),
        (-9, "", True, False, Action.END),
        (ExitCode.IN_USE, "", False, False, Action.RESTART),
        (ExitCode.FENCED, "", False, True, Action.END),
        (ExitCode.FENCED, "", True, True, Action.END),
    ],
)
def test_decisions(code, reason, stop_asked, can_requeue, action):
    assert decide(AttemptEnd(code, reason), stop_asked, can_requeue) is action


def test_memory_survives_requeues_and_new_checkpoints_clear_it(tmp_path):
    limits = Limits(backoff_seconds=2)
    memory = History(tmp_path)
    memory.note_checkpoint(10)
    pauses = []
    for number in range(1, 4):
        assert memory.add_failure(AttemptEnd(1, "x", step=12)) == number
        pauses.append(memory.backoff(limits))
        memory = History(tmp_path)
    assert pauses == [0, 2, 4]
    memory.blame_node()
    assert memory.add_failure(AttemptEnd(1, "x")) == 3, "a lost node does not count"
    memory.note_checkpoint(10)
    assert len(memory.failures) == 4
    memory.note_checkpoint(20)
    assert History(tmp_path).failures == []


@pytest.mark.parametrize(
    ("available", "per_node", "replica", "least", "most", "count"),
    [(4, 8, 4, 1, None, 4), (3, 8, 16, 1, None, 2), (4, 1, 1, 1, 3, 3), (1, 8, 1, 2, None, 0), (5, 2, 8, 1, None, 4)],
)
def test_layout_takes_whole_replicas(available, per_node, replica, least, most, count):
    nodes = [f"n{i}" for i in range(available)]
    assert choose_nodes(nodes, per_node, replica, least, most) == nodes[:count]


def test_codes_are_explained():
    assert describe_code(-9) == describe_code(137) == "killed by SIGKILL"
    assert describe_code(87) == "exit 87 (hang)"
    assert describe_code(3) == "exit 3"


def test_launcher_needs_no_engine():
    """It runs on batch hosts outside the container that has torch."""
    code = "import sys, bd3lm_scale.launch; print({'torch', 'numpy', 'megatron', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
