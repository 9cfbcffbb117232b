"""Train: build the parts, restore, loop, save, stop.

    python -m bd3lm_scale.train CONFIG [a.b=c ...] [--dry-run] [--fresh] [--checkpoint STEP]

Alone, under torchrun or under srun: one process per device. A run_dir that holds a checkpoint is resumed.
"""

import argparse
import sys
import time

import torch

from bd3lm_scale.checkpoint.lock import RunInUseError, lock_run
from bd3lm_scale.config import ConfigError, RunConfig
from bd3lm_scale.config_checks import check
from bd3lm_scale.config_load import load_config, to_dict
from bd3lm_scale.config_summary import dry_run, summary
from bd3lm_scale.data.stream import RowStream, open_stream
from bd3lm_scale.parallel.mesh import choose_device, init_mesh, new_host_group, read_launch, shutdown
from bd3lm_scale.runtime import faults
from bd3lm_scale.runtime.anomaly import ROLLBACK, STOP
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import get_logger, set_up_logging
from bd3lm_scale.runtime.metrics import MetricsWriter
from bd3lm_scale.runtime.preflight import PreflightError, run_preflight
from bd3lm_scale.runtime.progress import Progress
from bd3lm_scale.runtime.run_folder import write_status
from bd3lm_scale.runtime.stop import StopRequest
from bd3lm_scale.runtime.watchdog import Watchdog
from bd3lm_scale.session import Session, open_session, set_threads
from bd3lm_scale.step import train_step
from bd3lm_scale.validation import validate

log = get_logger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the process's exit code (runtime.exit_codes)."""
    parser = argparse.ArgumentParser(prog="python -m bd3lm_scale.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields to set, e.g. train.steps=100")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument("--fresh", action="store_true", help="refuse if run_dir holds a checkpoint")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="resume from this step, not the newest")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        launch = read_launch()
        if args.dry_run:
            print(dry_run(config, launch.world_size if launch.world_size > 1 else None))
            return ExitCode.FINISHED
        check(config, launch.world_size)
        set_up_logging(config.run_dir, launch.rank)
        return train(config, args.fresh, args.checkpoint)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIG
    except RunInUseError as error:
        log.error("%s", error)
        return ExitCode.IN_USE
    except PreflightError as error:
        log.error("preflight failed: %s", error)
        return ExitCode.PREFLIGHT


def train(config: RunConfig, fresh: bool = False, step: int | None = None) -> int:
    """One attempt at the run: from wherever it stands to its end, or to a stop request."""
    launch = read_launch()
    device = choose_device(config.runtime.device, launch.local_rank)
    set_threads(config, device)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    stop = StopRequest(config.run_dir, config.train.time_limit_minutes).install()
    stream = _open_data(config, "train")
    held_out = _open_data(config, "validation")
    check(config, launch.world_size, stream.vocab_size)
    mesh = init_mesh(config.parallel, config.runtime.device, config.runtime.collective_timeout_seconds)
    host_group = new_host_group()
    lock = lock_run(config.run_dir, mesh.rank, mesh.world_size, host_group)
    watchdog = Watchdog(config.run_dir, config.runtime, mesh.rank, mesh.world_size).start()
    run_preflight(config.run_dir, to_dict(config), device, host_group)
    log.info("\n%s", summary(config, mesh.world_size, stream.vocab_size))
    session = open_session(config, mesh, stream, host_group, fresh, step)
    metrics = MetricsWriter(config.run_dir, None, config.logging, mesh.reports, to_dict(config))
    try:
        code, reason = _loop(session, held_out, stop, metrics, watchdog)
    finally:
        session.close()
        metrics.close()
    watchdog.stop()
    if mesh.reports:
        write_status(config.run_dir, code, reason, session.step)
        log.info("%s at step %d (%s)", ExitCode(code).name.lower(), session.step, reason)
    lock.release()
    shutdown()
    return code


def _loop(
    session: Session, held_out: RowStream, stop: StopRequest, metrics: MetricsWriter, watchdog: Watchdog
) -> tuple[int, str]:
    """Steps until the last one, a stop request, or a divergence. Returns (exit code, reason)."""
    config = session.config
    tokens_per_step = config.train.global_batch_size * config.data.context_length
    shows = session.engine.mesh.reports and config.logging.progress
    progress = Progress(session.step, config.train.steps, tokens_per_step, shows)
    saved_at = session.step if session.resumed_from else -1
    reason = "all steps are done"
    while session.step < config.train.steps:
        watchdog.beat(session.step)
        faults.point("step", session.step)
        stops, rows = session.agree(stop.reason is not None)
        if rows is None or stops:
            reason = stop.reason or "another rank was asked to stop"
            break
        started, waited = time.perf_counter(), session.batches.wait_seconds
        report, verdict = train_step(session.engine, config, session.step, rows, session.interval, session.policy)
        if verdict == STOP:
            return ExitCode.DIVERGED, session.policy.reason
        if verdict == ROLLBACK:
            session.roll_back()
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
        progress.update(session.step, report.loss)
        if session.step % config.evaluation.every_steps == 0 or session.step == config.train.steps:
            _validate(session, held_out, metrics, watchdog)
        if session.step % config.checkpoint.every_steps == 0:
            watchdog.beat(session.step, "save")
            session.save()
            saved_at = session.step
    progress.close()
    if saved_at != session.step:
        watchdog.beat(session.step, "save")
        session.save()
    finished = session.step >= config.train.steps
    return (ExitCode.FINISHED, "all steps are done") if finished else (ExitCode.STOPPED, reason)


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
    table = session.search_clip_interval(result)
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
        variance={f"{low:g}-{high:g}": value for (low, high), value in table.items()},
    )


def _open_data(config: RunConfig, split: str) -> RowStream:
    try:
        return open_stream(config.data, config.seed, split)
    except ValueError as error:
        raise ConfigError([str(error)], source="the data") from error


if __name__ == "__main__":
    sys.exit(main())
