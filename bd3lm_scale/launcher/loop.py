"""The restart loop: start the ranks, watch them, decide what comes next, until the run is over.

The same on one machine, on several, and under Slurm: what differs is behind launcher.local.Ranks.
"""

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from bd3lm_scale.config.environment import number_from_environment
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.errors import ConfigError, FencedError, RunInUseError
from bd3lm_scale.launcher.local import Ranks, RanksExit
from bd3lm_scale.launcher.monitor import Monitor
from bd3lm_scale.launcher.policy import (
    Action,
    AttemptEnd,
    History,
    Limits,
    choose_nodes,
    decide,
    last_logged_step,
    newest_checkpoint_step,
)
from bd3lm_scale.runtime.command_line import for_a_restart
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.lock import RunLock
from bd3lm_scale.runtime.log import get_logger, set_up_logging
from bd3lm_scale.runtime.run_folder import label_of, read_json, read_status, try_write_json
from bd3lm_scale.runtime.stop import BY_NEW_OWNER, forget_stop_file, has_stop_file

log = get_logger(__name__)

POLL_SECONDS = 0.25
CHECK_SECONDS = 1.0
SCHEDULER_SECONDS = 3.0
ASK_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

REFUSALS = {
    RunInUseError: ExitCode.IN_USE,
    FencedError: ExitCode.FENCED,
    ConfigError: ExitCode.CONFIG,
}
"""Why a launcher may not begin."""


@dataclass(frozen=True)
class Plan:
    """What the launcher starts and within which bounds.

    Attributes:
        run_dir: the run folder, shared by all nodes.
        config: the run's configuration.
        program: what each rank executes: interpreter, -m, module.
        arguments: of the program: CONFIG, overrides, options.
        min_nodes: fewer than these: requeue (Slurm) or give up.
        max_nodes: train on at most so many; the rest of the allocation are spares. None: all.
        stop_seconds: time for the last checkpoint after a request to stop.
        goes_back_to: the step of --checkpoint among the arguments.
    """

    run_dir: Path
    config: RunConfig
    program: list[str]
    arguments: list[str]
    ranks_per_node: int
    min_nodes: int = 1
    max_nodes: int | None = None
    stop_seconds: float = 240.0
    goes_back_to: int | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one model replica."""
        return self.config.parallel.tensor_parallel_size * self.config.parallel.pipeline_parallel_size


class Launcher:
    """The restart loop. Only the launcher that holds the run's lock starts ranks, and writes in the run folder."""

    def __init__(self, plan: Plan, ranks: Ranks, lock: RunLock) -> None:
        self.plan = plan
        self.ranks = ranks
        self.lock = lock
        self.runtime = plan.run_dir / "runtime"
        self.memory = History(plan.run_dir)
        self.stop_asked = ""
        self.is_under_way = False
        self.known_nodes: list[str] = []
        self.excluded: set[str] = set()

    def run(self) -> int:
        """Supervise until the run is over; the launcher's exit code."""
        for number in ASK_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_signal)
        try:
            self.lock.acquire()
            set_up_logging(self.plan.run_dir, rank=0)
            if self.lock.taken_from:
                log.warning("taking over the run folder from %s", self.lock.taken_from)
            forget_stop_file(self.plan.run_dir)
        except tuple(REFUSALS) as error:
            log.error("%s", error)
            self.lock.release()
            return REFUSALS[type(error)]
        except OSError as error:
            log.error("run_dir (%s): cannot be written now: %s", self.plan.run_dir, error)
            self.lock.release()
            return ExitCode.FAILED
        try:
            code = self._supervise()
            self.ranks.dismiss(code)
            return code
        finally:
            self.lock.release()

    def _supervise(self) -> int:
        self.memory = History(self.plan.run_dir)  # as its last owner left it
        # requeues and the elements of an array are one start to the user, who asked once for --fresh or --checkpoint
        is_continued = bool(number_from_environment("SLURM_RESTART_COUNT")) or "SLURM_ARRAY_JOB_ID" in os.environ
        self.is_under_way = is_continued and self.memory.under_way == job_name()
        self.memory.note_checkpoint(newest_checkpoint_step(self.plan.run_dir))
        while True:
            end = self._attempt()
            self.memory.note_checkpoint(newest_checkpoint_step(self.plan.run_dir))
            action = decide(end, bool(self.stop_asked), self.ranks.can_requeue)
            log.info("%s -> %s", end.line(), action.value)
            if action is Action.RESTART:
                action = self._count_failure(end)
            if action is not Action.RESTART:
                return self._finish(end, action)

    def _attempt(self) -> AttemptEnd:
        """Start the ranks once and watch them until they are gone."""
        plan = self.plan
        answering = self._answering_nodes()
        label = label_of(self.lock.attempt)
        if self.stop_asked:
            return AttemptEnd(ExitCode.STOPPED, f"launcher: {self.stop_asked}", label)
        if not self.lock.is_held():
            return AttemptEnd(ExitCode.FENCED, BY_NEW_OWNER, label)
        if set(self.known_nodes) - set(answering):
            self.memory.blame_node()
        self.known_nodes = answering
        available = [node for node in answering if node not in self.excluded]
        nodes = choose_nodes(available, plan.ranks_per_node, plan.model_parallel_size, plan.min_nodes, plan.max_nodes)
        if not nodes:
            text = f"{len(available)} nodes answer, the layout needs {plan.min_nodes} of {plan.ranks_per_node} ranks"
            return AttemptEnd(ExitCode.PREFLIGHT, text, label, blames_node=True)
        attempt = self.lock.begin_attempt()
        log.info("attempt %s: %d ranks on %s", label_of(attempt), len(nodes) * plan.ranks_per_node, ",".join(nodes))
        arguments = for_a_restart(plan.arguments) if self.is_under_way else plan.arguments
        self.ranks.start(attempt, nodes, [*plan.program, *arguments])
        return self._watch(attempt)

    def _answering_nodes(self) -> list[str]:
        """The nodes that answer, as soon as the scheduler can tell; empty when the launcher has to end before."""
        while (nodes := self.ranks.usable_nodes()) is None:
            if self.stop_asked or not self.lock.is_held():
                return []
            log.warning("the scheduler does not answer; asking again")
            self._rest(SCHEDULER_SECONDS)
        return nodes

    def _watch(self, attempt: str) -> AttemptEnd:
        monitor = Monitor(self.plan.run_dir, attempt, self.plan.config.runtime)
        stop = _StopAsker(self.runtime, attempt, self.plan.stop_seconds)
        complaint = ""
        next_check = time.monotonic() + CHECK_SECONDS
        while (exit := self.ranks.poll()) is None:
            trouble = monitor.look()
            if time.monotonic() >= next_check:
                next_check = time.monotonic() + CHECK_SECONDS
                trouble = trouble if self.lock.is_held() else BY_NEW_OWNER
            if self.stop_asked:
                trouble = stop.ask(self.stop_asked) or trouble
            if trouble and not complaint:
                complaint = trouble
                log.error("%s; ending attempt %s", trouble, label_of(attempt))
                self.ranks.kill()
            time.sleep(POLL_SECONDS)
        monitor.look(at_once=True)
        end = self._end_of(attempt, exit, complaint, monitor.step)
        if not self.is_under_way and (end.step or monitor.has_trained):
            self.is_under_way = True
            self.memory.note_under_way(job_name(), self.plan.goes_back_to)
        return end

    def _end_of(self, attempt: str, exit: RanksExit, complaint: str, step: int) -> AttemptEnd:
        """What happened, by the most reliable source: rank 0's status, the watchdog's finding, then exit codes."""
        label, status = label_of(attempt), read_status(self.plan.run_dir, attempt)
        step = max(step, int(status.get("step", 0)), last_logged_step(self.plan.run_dir, attempt))
        hang = read_json(self.runtime / "hang.json")
        # a STOP file forbids a restart, but only rank 0's status can say that the last steps are saved
        by_user = has_stop_file(self.plan.run_dir)
        if status and status["code"] != ExitCode.FAILED:
            return AttemptEnd(status["code"], str(status["reason"]), label, step, by_user=by_user)
        if hang.get("attempt") == attempt:
            return AttemptEnd(ExitCode.HANG, str(hang.get("text")), label, step, by_user=by_user)
        if complaint:
            return AttemptEnd(ExitCode.HANG, complaint, label, step, by_user=by_user)
        # rank 0 often reports only that another rank is gone: the first rank that ended says more
        reasons = [text for text in (exit.who, str(status.get("reason", ""))) if text]
        reason = "; ".join(reasons) or "ended without a message"
        return AttemptEnd(exit.code or ExitCode.FAILED, reason, label, step, by_user=by_user)

    def _count_failure(self, end: AttemptEnd) -> Action:
        """Start again, unless failures repeat without progress."""
        if end.blames_node and not self.ranks.can_requeue:
            return Action.END
        if end.blames_node:
            return Action.REQUEUE
        if end.code == ExitCode.PREFLIGHT:
            self._exclude_unfit_nodes()
        if self.memory.add_failure(end) >= self.plan.limits.max_failures:
            return Action.GIVE_UP
        self._rest(self.memory.backoff(self.plan.limits))
        return Action.RESTART

    def _exclude_unfit_nodes(self) -> None:
        found = read_json(self.runtime / "preflight.json")
        unfit = set(found.get("bad_nodes", ())) if found.get("attempt") == self.lock.attempt else set()
        if not unfit >= set(self.known_nodes):  # all of them: what they share is at fault, such as a full disk
            self.excluded |= unfit

    def _finish(self, end: AttemptEnd, action: Action) -> int:
        if not self.lock.is_held():
            log.error("%s: ending without writing anything", BY_NEW_OWNER)
            return ExitCode.FENCED
        if action is Action.REQUEUE:
            if self.memory.add_requeue() <= self.plan.limits.max_requeues:
                # Slurm ends a requeued job with SIGTERM: end at once instead of waiting for its SIGKILL
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                return self.ranks.requeue(self.lock.is_held)
            log.error("requeued %d times without a new checkpoint", self.plan.limits.max_requeues)
            action = Action.GIVE_UP
        if action is Action.GIVE_UP:
            log.error("giving up: %s", self.memory.diagnosis())
            return ExitCode.CRASH_LOOP
        # asked to stop, but the ranks died or hung before they had saved: 85 would promise that nothing is lost
        return end.code if end.code in set(ExitCode) - {ExitCode.HANG} else ExitCode.FAILED

    def _rest(self, seconds: float) -> None:
        if seconds:
            log.info("waiting %.0f s before the next start", seconds)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.stop_asked:
            time.sleep(POLL_SECONDS)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.stop_asked = self.stop_asked or signal.Signals(number).name


class _StopAsker:
    """Asks the ranks of one attempt to save and stop, by a file."""

    def __init__(self, runtime: Path, attempt: str, stop_seconds: float) -> None:
        self.path = runtime / "stop_request.json"
        self.attempt = attempt
        self.stop_seconds = stop_seconds
        self._asked_at: float | None = None
        self._is_written = False
        self._next_try = 0.0

    def ask(self, reason: str) -> str | None:
        """Ask once, again while the disk is full; what is wrong when the ranks run on for too long."""
        now = time.monotonic()
        self._asked_at = now if self._asked_at is None else self._asked_at
        if not self._is_written and now >= self._next_try:
            self._next_try = now + CHECK_SECONDS
            self._is_written = try_write_json(self.path, {"attempt": self.attempt, "reason": reason})
        is_late = now - self._asked_at > self.stop_seconds
        return f"not stopped {self.stop_seconds:.0f} s after the request" if is_late else None


def job_name() -> str:
    """The Slurm job, or array of jobs, that this launcher belongs to; empty without one."""
    return os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID") or ""
