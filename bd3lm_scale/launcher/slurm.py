"""Ranks as tasks of srun steps inside a Slurm allocation; the launcher is the job's batch process.

Restarts belong to the launcher, so a step is never told to survive a failure, and `--no-kill` is not used: with it a
job whose batch host died would stay RUNNING for ever.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bd3lm_scale.launcher.local import RanksExit
from bd3lm_scale.launcher.policy import describe_code
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import ATTEMPT_VARIABLE, label_of, node_name

log = get_logger(__name__)

# srun would take the first as defaults, and they are stale once the job has shrunk. The last two lines come along from
# a shell that sbatch was called in, and would make every task believe to be that shell's rank.
STALE_VARIABLES = (
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_JOB_NUM_NODES",
    "SLURM_TASKS_PER_NODE", "SLURM_DISTRIBUTION",
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
)  # fmt: skip
PROBE_SECONDS = 60
KILL_SECONDS = 4
RETRY_SECONDS = 3
REQUEUE_SECONDS = 120
MAX_REFUSALS = 3
MAX_FAILED_PROBES = 5
RANK_FAILED = re.compile(
    r"srun: error: (?P<node>\S+): tasks? (?P<rank>[-\d,]+): "
    r"(?P<how>Exited with exit code (?P<code>\d+)|Killed|.*dumped)"
)
WAIT_AFTER_FIRST_EXIT_SECONDS = 10


class SlurmRanks:
    """One srun step per attempt, one task per rank."""

    def __init__(
        self,
        ranks_per_node: int,
        work_folder: Path,
        min_nodes: int,
        srun_args: Sequence[str] = (),
        can_requeue: bool = True,
    ) -> None:
        self.can_requeue = can_requeue
        self.ranks_per_node = ranks_per_node
        self.work_folder = work_folder
        self.min_nodes = min_nodes
        self.srun_args = list(srun_args)
        self.job = os.environ["SLURM_JOB_ID"]
        self.environment = {name: value for name, value in os.environ.items() if name not in STALE_VARIABLES}
        self._failed_probes = 0
        self._step_name = ""
        self._srun: subprocess.Popen | None = None
        self._first_bad: RanksExit | None = None

    def usable_nodes(self) -> list[str] | None:
        """Nodes of the allocation that run a trivial step; silent ones are given back to Slurm.

        Otherwise NODE_FAIL would end the whole job as soon as Slurm notices. Giving back fails harmlessly where the
        site forbids it. None where Slurm does not answer, or not even this very node: that says nothing about nodes.
        """
        nodes = self._allocation()
        if not nodes:
            return nodes
        alive = self._probe(nodes)
        if not alive or (node_name() in nodes and node_name() not in alive):
            self._failed_probes += 1
            return None if self._failed_probes < MAX_FAILED_PROBES else []
        self._failed_probes = 0
        lost = [node for node in nodes if node not in alive]
        if lost and len(alive) >= max(self.min_nodes, 1):
            update = ["scontrol", "update", f"JobId={self.job}", f"NodeList={','.join(alive)}"]
            done = self._ask(update)
            outcome = "gave them back" if done.returncode == 0 else f"cannot give them back: {done.stderr.strip()}"
            log.warning("nodes %s do not answer; %s, going on with %s", ",".join(lost), outcome, ",".join(alive))
        return alive

    def start(self, attempt: str, nodes: Sequence[str], command: Sequence[str]) -> None:
        """Start one task per rank on the nodes."""
        label = label_of(attempt)
        self._step_name = f"train.{label}"
        port = 20000 + (int(self.job) * 37 + sum(int(part) * 11 for part in label.split("."))) % 10000
        rendezvous = {"MASTER_ADDR": self._address(nodes[0]), "MASTER_PORT": str(port), ATTEMPT_VARIABLE: attempt}
        # --overlap: a step on a dead node keeps its CPUs until Slurm gives the node up
        srun = ["srun", "--overlap", f"--job-name={self._step_name}", "--kill-on-bad-exit=1"]
        srun += [f"--wait={WAIT_AFTER_FIRST_EXIT_SECONDS}", *self._placement(nodes, self.ranks_per_node)]
        srun += self.srun_args
        self._first_bad = None
        self._srun = subprocess.Popen(
            [*srun, *command], env=self.environment | rendezvous, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        threading.Thread(target=self._listen, args=(self._srun,), daemon=True).start()

    def poll(self) -> RanksExit | None:
        """The first rank that failed, by srun's messages: srun's exit code is often that of one it ended afterwards."""
        code = None if self._srun is None else self._srun.poll()
        if code is None:
            return None
        return (code and self._first_bad) or RanksExit(code, f"srun: {describe_code(code)}" if code else "")

    def _listen(self, srun: subprocess.Popen) -> None:
        """Pass the ranks' error output on, and keep srun's first message about a failed one."""
        for line in srun.stderr or ():
            with contextlib.suppress(OSError):  # the job's output may be on a full disk; srun must not wait for us
                sys.stderr.write(line)
                sys.stderr.flush()
            if self._first_bad is None and (match := RANK_FAILED.match(line)):
                code = int(match["code"]) if match["code"] else -signal.SIGKILL if match["how"] == "Killed" else 1
                self._first_bad = RanksExit(code, f"rank {match['rank']} on {match['node']}: {describe_code(code)}")

    def kill(self) -> None:
        """End the step; srun itself may hang on a dead node, so it is not waited for without end."""
        assert self._srun is not None, "kill comes after start"
        steps = self._ask(["squeue", "--steps", "--noheader", f"--jobs={self.job}", "--format=%i %j"]).stdout
        for line in steps.splitlines():
            number, _, name = line.strip().partition(" ")
            if name == self._step_name:
                # not waited for: with a dead node among the step's it takes as long as Slurm's time-outs
                subprocess.Popen(["scancel", "--signal=KILL", number], env=self.environment, stderr=subprocess.DEVNULL)
        try:
            self._srun.wait(timeout=KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._srun.kill()
            self._srun.wait()

    def requeue(self, is_owner: Callable[[], bool]) -> int:
        """Put the job back into the queue, as soon as Slurm answers; Slurm ends this process while it waits.

        Preemption and node failures requeue on their own, and a cancelled job must stay cancelled: then the job is no
        longer RUNNING and there is nothing to do. It may also run elsewhere already, while this launcher was cut off
        from the network (`is_owner` is False then): that one must be left in peace.
        """
        refusals = 0
        while is_owner() and refusals < MAX_REFUSALS:
            runs_here = self._is_running_here()
            if runs_here is False:
                break
            if runs_here:
                done = self._ask(["scontrol", "requeue", self.job])
                if done.returncode == 0:
                    log.info("requeued; waiting for Slurm to end this job")
                    time.sleep(REQUEUE_SECONDS)
                    continue
                refusals += self._is_answering()
                log.error("cannot requeue (%s)", done.stderr.strip())
            else:
                log.warning("Slurm does not answer; trying again to requeue")
            time.sleep(RETRY_SECONDS)
        if refusals == MAX_REFUSALS:
            log.error("Slurm refuses to requeue job %s: submit again to resume", self.job)
        return int(ExitCode.STOPPED)

    def dismiss(self, code: int) -> None:
        """Nothing to do: no other launcher waits for this one."""

    def _allocation(self) -> list[str] | None:
        """The job's nodes; None when Slurm does not answer."""
        # not SLURM_JOB_NODELIST: stale after a shrink
        asked = self._ask(["squeue", "--noheader", f"--jobs={self.job}", "--format=%N"])
        if asked.returncode != 0:
            return [] if self._is_gone(asked) else None
        nodes = asked.stdout.strip()
        return self._ask(["scontrol", "show", "hostnames", nodes]).stdout.split() if nodes else []

    def _probe(self, nodes: list[str]) -> list[str]:
        """One srun for all nodes; a dead one costs about ten seconds, whatever their number."""
        command = ["srun", "--overlap", "--job-name=probe", "--kill-on-bad-exit=0", "--wait=3",
                   *self._placement(nodes, 1), "bash", "-c", "echo UP $SLURMD_NODENAME"]  # fmt: skip
        output = self._ask(command, timeout=PROBE_SECONDS).stdout
        up = {line.split()[1] for line in output.splitlines() if line.startswith("UP ")}
        return [node for node in nodes if node in up]

    def _address(self, node: str) -> str:
        """Where Slurm itself reaches the node: its name need not resolve."""
        fields = self._ask(["scontrol", "show", "node", "--oneliner", node]).stdout.split()
        return next((word.removeprefix("NodeAddr=") for word in fields if word.startswith("NodeAddr=")), node)

    def _placement(self, nodes: Sequence[str], tasks_per_node: int) -> list[str]:
        count = len(nodes)
        return [
            "-w",
            ",".join(nodes),
            f"-N{count}",
            f"-n{count * tasks_per_node}",
            f"--ntasks-per-node={tasks_per_node}",
        ]

    def _is_running_here(self) -> bool | None:
        """Whether the job runs, and in this incarnation; None when Slurm does not answer."""
        asked = self._ask(["scontrol", "show", "job", "--oneliner", self.job])
        if asked.returncode != 0:
            return False if self._is_gone(asked) else None
        facts = dict(word.split("=", 1) for word in asked.stdout.split() if "=" in word)
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        return facts.get("JobState") == "RUNNING" and facts.get("Restarts", restarts) == restarts

    def _is_answering(self) -> bool:
        return " UP" in self._ask(["scontrol", "ping"]).stdout

    def _is_gone(self, asked: subprocess.CompletedProcess) -> bool:
        """Whether this is Slurm's answer that it knows no such job, and not its silence."""
        return "Invalid job id" in asked.stderr

    def _ask(self, command: list[str], timeout: float = 30) -> subprocess.CompletedProcess:
        """Run one of Slurm's commands; none of its failures is raised. Resizing leaves scripts in the work folder."""
        try:
            return subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=timeout, cwd=self.work_folder
            )
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            return subprocess.CompletedProcess(command, 124, output, f"no answer within {timeout:.0f} s")
        except OSError as error:  # no memory for a process, the folder is not there
            return subprocess.CompletedProcess(command, 126, "", str(error))
