"""The training loop: step, validate, save, until the last step, a request to stop, or a divergence."""

import time

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
from bd3lm_scale.training.step import train_step
from bd3lm_scale.training.trainer import Session
from bd3lm_scale.validation import validate
from bd3lm_scale.values import Rows

log = get_logger(__name__)


def run_loop(
    session: Session, held_out: RowStream, stop: StopRequest, metrics: MetricsWriter, watchdog: Watchdog
) -> tuple[ExitCode, str]:
    """Steps until the last one, a stop request, or a divergence. Returns (exit code, reason)."""
    config = session.config
    tokens_per_step = config.train.global_batch_size * config.data.context_length
    shows = session.engine.mesh.is_main_rank and config.logging.progress
    progress = Progress(session.step, config.train.steps, tokens_per_step, shows)
    stragglers = StragglerWatch(config.runtime, session.agreement)
    saved_at = session.step if session.resumed_from else -1
    code, reason = ExitCode.FINISHED, "all steps are done"
    while session.step < config.train.steps:
        watchdog.beat(session.step)
        faults.point("step", session.step)
        watchdog.waiting()
        waited = session.batches.wait_seconds
        try:
            stops, rows = session.agree(stop.reason is not None)
        except BadShardError as error:
            code, reason = ExitCode.CONFIG, str(error)
            break
        if stops:
            code, reason = ExitCode.STOPPED, stop.reason or "another rank was asked to stop"
            break
        started = time.perf_counter()
        stragglers.start()
        report, verdict = train_step(
            session.engine, config, session.step, rows, session.interval, session.policy, stragglers.waiting
        )
        _keep_bad_batch(session, report.step, rows, verdict)
        if verdict == STOP:
            return ExitCode.DIVERGED, session.policy.reason
        if verdict == ROLLBACK:
            metrics.write("event", report.step, event=f"rollback: {session.policy.reason}")
            try:
                session.roll_back()
            except CheckpointError as error:
                return ExitCode.DIVERGED, f"{session.policy.reason}; {error}"
            continue
        session.advance()
        seconds = time.perf_counter() - started
        if report.step % config.logging.every_steps == 0 or report.was_skipped:
            metrics.write(
                "train",
                **{**vars(report), "stream_hash": f"{report.stream_hash:016x}"},
                tokens_per_second=tokens_per_step / seconds,
                step_seconds=seconds,
                data_wait_seconds=session.batches.wait_seconds - waited,
                event=session.policy.reason,
            )
        if spread := stragglers.look(session.step):
            metrics.write("spread", session.step, **vars(spread))
        progress.update(session.step, report.loss)
        if session.step % config.evaluation.every_steps == 0 or session.step == config.train.steps:
            _validate(session, held_out, metrics, watchdog)
        if session.step % config.checkpoint.every_steps == 0:
            _save(session, metrics, watchdog)
            saved_at = session.step
    progress.close()
    if saved_at != session.step:
        _save(session, metrics, watchdog)
    problem = _problem_of_last_save(session)
    return (code, reason) if problem is None else (ExitCode.FAILED, problem)


def _problem_of_last_save(session: Session) -> str | None:
    """An attempt whose last steps are not on the disk did not do them."""
    session.store.wait()
    save = session.store.last_save
    if save is None or save.step != session.step or save.problem is None:
        return None
    return f"the last checkpoint could not be saved: {save.problem}"


def _keep_bad_batch(session: Session, step: int, rows: list[Rows], verdict: str) -> None:
    config, engine = session.config, session.engine
    if verdict != OK and config.runtime.dump_bad_batches and engine.reports_loss:
        offset = session.cursor.data_offset
        dump_batch(config.run_dir, step, engine.mesh.data_rank, rows, config.seed, offset, session.policy.reason)


def _save(session: Session, metrics: MetricsWriter, watchdog: Watchdog) -> None:
    watchdog.beat(session.step, "save")
    metrics.sync()
    session.save()


def _validate(session: Session, held_out: RowStream, metrics: MetricsWriter, watchdog: Watchdog) -> None:
    """NELBO on held-out rows, and the clip interval of least variance."""
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
        clip_low=session.interval[0],
        clip_high=session.interval[1],
        variance={f"{low:g}-{high:g}": loss.variance for (low, high), loss in table.items()},
        relative_variance={f"{low:g}-{high:g}": loss.relative for (low, high), loss in table.items()},
    )
