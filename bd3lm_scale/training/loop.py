"""The training loop: step, validate, save, until the last step, a request to stop, or a divergence."""

import time
from dataclasses import dataclass, field

from bd3lm_scale.data.stream import RowStream
from bd3lm_scale.errors import BadShardError, CheckpointError
from bd3lm_scale.runtime import faults
from bd3lm_scale.runtime.anomaly import OK, ROLLBACK, STOP
from bd3lm_scale.runtime.bad_batches import dump_batch
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.runtime.metrics import MetricsWriter
from bd3lm_scale.runtime.progress import Progress
from bd3lm_scale.runtime.stop import StopRequest
from bd3lm_scale.runtime.stragglers import StragglerWatch
from bd3lm_scale.runtime.watchdog import Watchdog
from bd3lm_scale.training.ahead import StepBatch
from bd3lm_scale.training.step import train_step
from bd3lm_scale.training.trainer import Session, Votes
from bd3lm_scale.validation import validate
from bd3lm_scale.values import StepReport

log = get_logger(__name__)


ExitReason = tuple[ExitCode, str]
"""How a loop ended, and why."""


def run_loop(
    session: Session, held_out: RowStream, stop: StopRequest, metrics: MetricsWriter, watchdog: Watchdog
) -> ExitReason:
    """Steps until the last one, a stop request, or a divergence. Returns (exit code, reason)."""
    config, mesh = session.config, session.engine.mesh
    tokens_per_step = config.train.global_batch_size * config.data.context_length
    shows = mesh.is_main_rank and config.logging.progress
    progress = Progress(session.step, config.train.steps, tokens_per_step, shows)
    stragglers = StragglerWatch(config.runtime, session.agreement)
    try:
        code, reason = Loop(session, held_out, stop, metrics, watchdog, progress, stragglers).run()
    finally:
        progress.close()
    if code == ExitCode.DIVERGED:
        return code, reason
    if session.saved_at != session.step:
        _save(session, metrics, watchdog)
    problem = _problem_of_last_save(session)
    return (code, reason) if problem is None else (ExitCode.FAILED, problem)


@dataclass
class Loop:
    """The parts of a training loop. `votes` are the flags that ranks raised in the last step, equal on all of them."""

    session: Session
    held_out: RowStream
    stop: StopRequest
    metrics: MetricsWriter
    watchdog: Watchdog
    progress: Progress
    stragglers: StragglerWatch
    votes: Votes = field(default_factory=Votes)

    def run(self) -> ExitReason:
        """Step until something ends it; a validation and a save are part of the step before them."""
        session, config = self.session, self.session.config
        self._vote()
        while session.step < config.train.steps:
            self.watchdog.beat(session.step)
            faults.point("step", session.step)
            ending = self._heed_votes() or self._step()
            if ending is not None:
                return ending
        return ExitCode.FINISHED, "all steps are done"

    def _heed_votes(self) -> ExitReason | None:
        while self.votes.bad_shard and not self.votes.stop:
            try:
                self.session.exclude_bad_shards()
            except BadShardError as error:
                return ExitCode.CONFIG, str(error)
            self._vote()
        return (ExitCode.STOPPED, self.stop.reason or "another rank was asked to stop") if self.votes.stop else None

    def _step(self) -> ExitReason | None:
        session, config = self.session, self.session.config
        started, waited = time.perf_counter(), session.ahead.wait_seconds
        self.stragglers.start()
        batch = session.read()
        outcome = train_step(
            session.engine, config, session.step, batch.noised, session.policy,
            raise_flags=self._raise_flags, waiting=self._waiting,
        )  # fmt: skip
        report, self.votes = outcome.report, Votes(*outcome.votes)
        if outcome.verdict != OK:
            _keep_bad_batch(session, batch)
        if outcome.verdict == STOP:
            return ExitCode.DIVERGED, session.policy.reason
        if outcome.verdict == ROLLBACK:
            return self._roll_back(report.step)
        session.advance()
        if report.step % config.logging.every_steps == 0 or report.was_skipped:
            _log_step(session, report, self.metrics, time.perf_counter() - started, session.ahead.wait_seconds - waited)
        if spread := self.stragglers.look(session.step):
            self.metrics.write("spread", session.step, **vars(spread))
        self.progress.update(session.step, report.loss)
        if session.step % config.evaluation.every_steps == 0 or session.step == config.train.steps:
            try:
                self.held_out = _validate(session, self.held_out, self.metrics, self.watchdog)
            except BadShardError as error:
                return ExitCode.CONFIG, str(error)
        if session.step % config.checkpoint.every_steps == 0:
            _save(session, self.metrics, self.watchdog)
        return None

    def _roll_back(self, step: int) -> ExitReason | None:
        reason = self.session.policy.reason
        self.metrics.write("event", step, event=f"rollback: {reason}")
        try:
            self.session.roll_back()
        except CheckpointError as error:
            return ExitCode.DIVERGED, f"{reason}; {error}"
        self._vote()
        return None

    def _vote(self) -> None:
        self.votes = self.session.vote(self.stop.reason is not None)

    def _raise_flags(self) -> tuple[int, int]:
        return self.session.flags(self.stop.reason is not None)

    def _waiting(self) -> None:
        self.stragglers.waiting()
        self.watchdog.waiting()


def _log_step(session: Session, report: StepReport, metrics: MetricsWriter, seconds: float, waited: float) -> None:
    config = session.config
    metrics.write(
        "train",
        **{**vars(report), "stream_hash": f"{report.stream_hash:016x}"},
        tokens_per_second=config.train.global_batch_size * config.data.context_length / seconds,
        step_seconds=seconds,
        data_wait_seconds=waited,
        event=session.policy.reason,
    )


def _problem_of_last_save(session: Session) -> str | None:
    """An attempt whose last steps are not on the disk did not do them."""
    session.store.wait()
    save = session.store.last_save
    if save is None or save.step != session.step or save.problem is None:
        return None
    return f"the last checkpoint could not be saved: {save.problem}"


def _keep_bad_batch(session: Session, batch: StepBatch) -> None:
    config, engine = session.config, session.engine
    if config.runtime.dump_bad_batches and engine.reports_loss:
        step, rank, offset = batch.step + 1, engine.mesh.data_rank, session.cursor.data_offset
        dump_batch(config.run_dir, step, rank, batch.rows, config.seed, offset, session.policy.reason)


def _save(session: Session, metrics: MetricsWriter, watchdog: Watchdog) -> None:
    watchdog.beat(session.step, "save")
    metrics.sync()
    session.save()


def _validate(session: Session, held_out: RowStream, metrics: MetricsWriter, watchdog: Watchdog) -> RowStream:
    """NELBO on held-out rows, and the clip interval of least variance. Returns the rows without damaged shards."""
    config = session.config
    result = validate(
        session.engine,
        config,
        held_out,
        rows=config.evaluation.rows,
        draws=config.evaluation.draws,
        use_ema=config.evaluation.weights == "ema",
        beat=lambda _: watchdog.beat(session.step, "validation"),
    )
    # the last step may lie between two validations, and the run may be prolonged: it must not learn from this one
    is_due = session.step % config.evaluation.every_steps == 0
    table = session.search_clip_interval(result) if is_due else {}
    likelihood = result.likelihood
    log.info(
        "step %d: validation NELBO %.4f +- %.4f, PPL %.2f",
        session.step,
        likelihood.nelbo,
        likelihood.stderr,
        likelihood.ppl,
    )
    metrics.write(
        "validation",
        session.step,
        **vars(likelihood),
        **({"sets": {name: vars(figures) for name, figures in result.by_set.items()}} if result.by_set else {}),
        clip_low=session.clip_interval.low,
        clip_high=session.clip_interval.high,
        variance={f"{low:g}-{high:g}": loss.variance for (low, high), loss in table.items()},
        relative_variance={f"{low:g}-{high:g}": loss.relative for (low, high), loss in table.items()},
    )
    return result.stream
