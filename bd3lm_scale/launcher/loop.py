"""The restart loop: start the ranks, watch them, decide what comes next, until the run is over.

The same on one machine, on several, and under Slurm: what differs is behind launcher.local.Ranks.
"""

import os
import secrets
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.launcher.local import Ranks
from bd3lm_scale.launcher.monitor import Monitor
from bd3lm_scale.launcher.policy import (
    Action,
    Ending,
    History,
    Limits,
    choose_nodes,
    decide,
    last_logged_step,
    newest_checkpoint_step,
)
from bd3lm_scale.runtime.exit_codes import NEVER_RETRIED, ExitCode
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.run_folder import claim_attempt, node_name, read_json, read_status, runtime_folder, write_json
from bd3lm_scale.runtime.stop import BY_USER, forget_stop_file

log = get_logger(__name__)

POLL_SECONDS = 0.25
BEAT_SECONDS = 2.0
ASK_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Plan:
    """What the launcher starts and within which bounds.

    Attributes:
        run_dir: the run folder, shared by all nodes.
        config: the run's configuration.
        command: what each rank executes.
        min_nodes: fewer than these: requeue (Slurm) or give up.
        max_nodes: train on at most so many; the rest of the allocation are spares. None: all.
        stop_seconds: time for the last checkpoint after a request to stop.
    """

    run_dir: Path
    config: RunConfig
    command: list[str]
    ranks_per_node: int
    min_nodes: int = 1
    max_nodes: int | None = None
    stop_seconds: float = 240.0
    limits: Limits = field(default_factory=Limits)

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one model replica."""
        return self.config.parallel.tensor_parallel_size * self.config.parallel.pipeline_parallel_size

    def command_for(self, attempt: str) -> list[str]:
        """The ranks' command; a restart goes on with the newest checkpoint, whatever the first start asked for."""
        is_first = attempt.endswith(".0") and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
        return [word for word in self.command if is_first or word != "--fresh"]


class Launcher:
    """The restart loop."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.plan = plan
        self.ranks = ranks
        self.runtime = runtime_folder(plan.run_dir)
        self.memory = History(plan.run_dir)
        self.start_number = start_number_of(self.runtime) + 1
        self.stop_asked = ""
        self.known_nodes: list[str] = []
        self.excluded: set[str] = set()
        self._identity = {"id": secrets.token_hex(8), "node": node_name(), "pid": os.getpid(),
                          "job": os.environ.get("SLURM_JOB_ID", "")}  # fmt: skip
        self._beats = 0
        self._next_beat = 0.0

    def run(self) -> int:
        """Supervise until the run is over; the launcher's exit code."""
        if self._is_owned_by_another():
            return ExitCode.IN_USE
        for number in ASK_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)
        forget_stop_file(self.plan.run_dir)
        self.memory.note_checkpoint(newest_checkpoint_step(self.plan.run_dir))
        attempt_number = 0
        while True:
            ending = self._attempt(f"{self.start_number}.{attempt_number}")
            attempt_number += 1
            self.memory.note_checkpoint(newest_checkpoint_step(self.plan.run_dir))
            action = decide(ending, bool(self.stop_asked), self.ranks.can_requeue)
            log.info("%s -> %s", ending.line(), action.value)
            if action is Action.RESTART:
                action = self._count_failure(ending)
            if action is not Action.RESTART:
                return self._finish(ending, action)

    def _attempt(self, attempt: str) -> Ending:
        """Start the ranks once and watch them until they are gone."""
        plan = self.plan
        answering = self.ranks.usable_nodes()
        if set(self.known_nodes) - set(answering):
            self.memory.blame_node()
        self.known_nodes = answering
        available = [node for node in answering if node not in self.excluded]
        nodes = choose_nodes(available, plan.ranks_per_node, plan.model_parallel_size, plan.min_nodes, plan.max_nodes)
        if self.stop_asked:
            return Ending(ExitCode.STOPPED, f"launcher: {self.stop_asked}", attempt)
        if self._is_superseded():
            return Ending(ExitCode.FENCED, "a newer start of this run has taken over", attempt)
        if not nodes:
            text = f"{len(available)} nodes answer, the layout needs {plan.min_nodes} of {plan.ranks_per_node} ranks"
            return Ending(ExitCode.PREFLIGHT, text, attempt, blames_node=True)
        claim_attempt(plan.run_dir, attempt)
        log.info("attempt %s: %d ranks on %s", attempt, len(nodes) * plan.ranks_per_node, ",".join(nodes))
        self.ranks.start(attempt, nodes, plan.command_for(attempt))
        return self._watch(attempt)

    def _watch(self, attempt: str) -> Ending:
        monitor = Monitor(self.plan.run_dir, attempt, self.plan.config.runtime)
        complaint = ""
        asked_at: float | None = None
        while (ended := self.ranks.poll()) is None:
            trouble = monitor.look()
            if self._beat_is_due():
                if self._is_superseded():
                    trouble = "a newer start of this run has taken over"
                else:
                    self._beat()
            if self.stop_asked and asked_at is None:
                asked_at = time.monotonic()
                request = {"attempt": attempt, "reason": self.stop_asked}
                write_json(self.runtime / "stop_request.json", request)
            if asked_at is not None and time.monotonic() - asked_at > self.plan.stop_seconds:
                trouble = trouble or f"not stopped {self.plan.stop_seconds:.0f} s after the request"
            if trouble and not complaint:
                complaint = trouble
                log.error("%s; ending attempt %s", trouble, attempt)
                self.ranks.kill()
            time.sleep(POLL_SECONDS)
        monitor.look()
        return self._ending(attempt, ended.code, ended.who, complaint, monitor)

    def _ending(self, attempt: str, code: int, who: str, complaint: str, monitor: Monitor) -> Ending:
        """What happened, by the most reliable witness: rank 0's status, the watchdog's finding, then exit codes."""
        status = read_status(self.plan.run_dir, attempt)
        step = max(monitor.step, int(status.get("step", 0)), last_logged_step(self.plan.run_dir, attempt))
        hang = read_json(self.runtime / "hang.json")
        if status and int(status["code"]) != ExitCode.FAILED:
            return Ending(int(status["code"]), str(status["reason"]), attempt, step)
        if hang.get("attempt") == attempt:
            return Ending(ExitCode.HANG, str(hang["text"]), attempt, step)
        if complaint:
            return Ending(ExitCode.HANG, complaint, attempt, step)
        if (self.plan.run_dir / "STOP").exists():
            return Ending(ExitCode.STOPPED, BY_USER, attempt, step)
        # rank 0 often reports only that its peer is gone: the first rank to fall is the better witness
        reasons = [text for text in (who, str(status.get("reason", ""))) if text]
        return Ending(code or ExitCode.FAILED, "; ".join(reasons) or "ended without a word", attempt, step)

    def _count_failure(self, ending: Ending) -> Action:
        """Start again, unless this goes in circles."""
        if ending.blames_node and not self.ranks.can_requeue:
            return Action.END
        if ending.blames_node:
            return Action.REQUEUE
        if ending.code == ExitCode.PREFLIGHT:
            self.excluded |= set(read_json(self.runtime / "preflight.json").get("bad_nodes", ()))
        if self.memory.add_failure(ending) >= self.plan.limits.max_failures:
            return Action.GIVE_UP
        self._rest(self.memory.backoff(self.plan.limits))
        return Action.RESTART

    def _finish(self, ending: Ending, action: Action) -> int:
        if self._is_superseded():
            log.error("a newer start of this run has taken over: leaving without a trace")
            return ExitCode.FENCED
        self._beat(has_ended=True)
        if action is Action.REQUEUE:
            if self.memory.add_requeue() <= self.plan.limits.max_requeues:
                # Slurm ends a requeued job with SIGTERM: obey at once instead of waiting for its SIGKILL
                for number in ASK_SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                return self.ranks.requeue()
            log.error("requeued %d times without a new checkpoint", self.plan.limits.max_requeues)
            action = Action.GIVE_UP
        if action is Action.GIVE_UP:
            log.error("giving up: %s", self.memory.diagnosis())
            return ExitCode.CRASH_LOOP
        is_final = ending.code == ExitCode.FINISHED or ending.code in NEVER_RETRIED
        return ExitCode.STOPPED if self.stop_asked and not is_final else ending.code

    def _rest(self, seconds: float) -> None:
        if seconds:
            log.info("waiting %.0f s before the next start", seconds)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stop_asked:
            if self._beat_is_due():
                self._beat()
            time.sleep(POLL_SECONDS)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.stop_asked = self.stop_asked or signal.Signals(number).name

    def _beat_is_due(self) -> bool:
        return time.monotonic() >= self._next_beat

    def _beat(self, has_ended: bool = False) -> None:
        """Say that this launcher lives, so that a second one for the same run folder finds out."""
        self._next_beat = time.monotonic() + BEAT_SECONDS
        self._beats += 1
        write_json(self.runtime / "launcher.json", {**self._identity, "beats": self._beats, "has_ended": has_ended})

    def _is_superseded(self) -> bool:
        """Whether the scheduler has started this run elsewhere, believing this node dead (it lost its network)."""
        return start_number_of(self.runtime) > self.start_number

    def _is_owned_by_another(self) -> bool:
        """Whether another launcher is at work in this run folder: its file is watched for a while if need be."""
        path = self.runtime / "launcher.json"
        owner = read_json(path)
        is_gone = owner.get("node") == node_name() and not Path(f"/proc/{owner.get('pid')}").exists()
        same_job = bool(owner.get("job")) and owner.get("job") == self._identity["job"]
        if not owner or owner.get("has_ended") or is_gone or same_job:
            return False
        log.info("run folder was used by %s on %s; looking whether it is still at work", owner["pid"], owner["node"])
        until = time.monotonic() + 4 * BEAT_SECONDS
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 4)
            now = read_json(path)
            if now and now != owner and not now.get("has_ended"):
                log.error("%s is in use by process %s on %s", self.plan.run_dir, now["pid"], now["node"])
                return True
        return False


def start_number_of(runtime: Path) -> int:
    """Which start of a launcher owns the run folder; -1 before the first."""
    return int(str(read_json(runtime / "attempt.json").get("attempt", "-1")).split(".")[0])
