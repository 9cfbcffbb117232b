"""Train: build the parts, restore, loop, save, stop.

    python -m bd3lm_scale.train CONFIG [a.b=c ...] [--dry-run] [--fresh] [--checkpoint STEP]

Alone, under torchrun or under srun: one process per device. A run_dir that holds a checkpoint is resumed.
"""

import logging
import sys
from contextlib import ExitStack

import torch

from bd3lm_scale.config.checks import check
from bd3lm_scale.config.load import load_config, to_dict
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.summary import dry_run, summary
from bd3lm_scale.data.stream import RowStream, open_stream
from bd3lm_scale.errors import BadShardError, CheckpointError, ConfigError, FencedError, PreflightError, RunInUseError
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.parallel.mesh import choose_device, init_mesh, new_host_group, read_launch, shutdown
from bd3lm_scale.runtime.command_line import parse_train_arguments
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.lock import RunLock, lock_run
from bd3lm_scale.runtime.log import get_logger, set_up_logging
from bd3lm_scale.runtime.metrics import MetricsWriter
from bd3lm_scale.runtime.preflight import run_preflight
from bd3lm_scale.runtime.run_folder import write_status
from bd3lm_scale.runtime.stop import BY_NEW_OWNER, StopRequest
from bd3lm_scale.runtime.watchdog import Watchdog
from bd3lm_scale.training.loop import run_loop
from bd3lm_scale.training.trainer import open_session, set_threads

log = get_logger(__name__)

# Errors raised on all ranks together, which rank 0 reports once; anything else is local to one rank.
EXIT_CODES = {
    ConfigError: ExitCode.CONFIG,
    CheckpointError: ExitCode.CONFIG,
    BadShardError: ExitCode.CONFIG,
    RunInUseError: ExitCode.IN_USE,
    PreflightError: ExitCode.PREFLIGHT,
    FencedError: ExitCode.FENCED,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the process's exit code (runtime.exit_codes)."""
    args = parse_train_arguments(argv)
    local_rank = 0
    try:
        launch = read_launch()
        local_rank = launch.local_rank
        config = load_config(args.config, args.overrides)
        if args.dry_run:
            print(dry_run(config, launch.world_size if launch.world_size > 1 else None, _known_vocab(config)))
            return ExitCode.FINISHED
        check(config, launch.world_size)
        device = choose_device(config.runtime.device, launch.local_rank)
        set_up_logging(None, launch.rank)  # the run folder may be another job's
    except (ValueError, OSError) as error:  # a ConfigError is a ValueError
        if local_rank == 0:  # once per machine: the ranks cannot talk yet
            print(error, file=sys.stderr)
        return ExitCode.CONFIG
    return train(config, device, args.fresh, args.checkpoint)


def train(config: RunConfig, device: torch.device, fresh: bool = False, step: int | None = None) -> int:
    """One attempt at the run: from wherever it stands to its end, or to a stop request. Returns the exit code."""
    set_threads(config, device)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    mesh = init_mesh(config.parallel, config.runtime.device, config.runtime.collective_timeout_seconds)
    agreement = Agreement(mesh.rank, mesh.world_size, new_host_group())
    session, lock = None, None
    try:
        lock = lock_run(config.run_dir, agreement)
        set_up_logging(config.run_dir, mesh.rank)
        if lock.taken_from:
            log.warning("taking over the run folder from %s", lock.taken_from)
        with ExitStack() as parts:  # closes what was opened, last first, however this ends
            limit, is_owner = config.train.time_limit_minutes, lock.is_held
            stop = agreement.run_on_all_ranks(lambda: StopRequest(config.run_dir, limit, is_owner=is_owner)).install()
            stream, held_out = agreement.run_on_all_ranks(lambda: _open_data(config, mesh.world_size))
            watchdog = Watchdog(config.run_dir, config.runtime, mesh.rank, mesh.world_size, lock.attempt).start()
            parts.callback(watchdog.stop)
            run_preflight(config.run_dir, to_dict(config), mesh.device, agreement, attempt=lock.attempt)
            log.info("\n%s", summary(config, mesh.world_size, stream.vocab_size))
            if stream.source.has_layout:
                log.info("packing     %s rows per epoch, %.2f%% padding", f"{stream.num_rows:,}",
                         100 * stream.source.padding_share)  # fmt: skip
            session = open_session(config, mesh, stream, agreement, lock, fresh, step)
            parts.callback(session.close)
            metrics = MetricsWriter(config.run_dir, lock.attempt, config.logging, mesh.is_main_rank, to_dict(config))
            parts.callback(metrics.close)
            code, reason = run_loop(session, held_out, stop, metrics, watchdog)
    except tuple(EXIT_CODES) as error:
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        reason = str(error)
    except Exception as error:
        code, reason = ExitCode.FAILED, f"{type(error).__name__}: {error}"
        log.exception("this rank failed")
    if mesh.is_main_rank:
        code = _report(config, code, reason, session.step if session else None, lock)
    if lock is not None:
        lock.release()
    if (
        code != ExitCode.FAILED
    ):  # after a failure the other ranks may be gone, and leaving the groups would wait for them
        shutdown()
    return code


def _report(config: RunConfig, code: ExitCode, reason: str, step: int | None, lock: RunLock | None) -> ExitCode:
    """Log the outcome and, as long as the run folder is this attempt's, write status.json; the exit code (rank 0)."""
    attempt = lock.attempt if lock is not None and lock.is_held() else None
    if lock is not None and attempt is None:
        code, reason = ExitCode.FENCED, BY_NEW_OWNER
    where = "" if step is None else f" at step {step}"
    level = logging.INFO if code in (ExitCode.FINISHED, ExitCode.STOPPED) else logging.ERROR
    log.log(level, "%s%s: %s", code.name.lower(), where, reason)
    try:
        if attempt is not None:
            write_status(config.run_dir, code, reason, step or 0, attempt)
    except OSError as error:
        log.warning("runtime/status.json cannot be written: %s", error)
    return code


def _known_vocab(config: RunConfig) -> int | None:
    """The vocabulary of the data, where it is already prepared."""
    try:
        return open_stream(config.data, config.seed).vocab_size
    except (ValueError, OSError):
        return None


def _open_data(config: RunConfig, world_size: int) -> tuple[RowStream, RowStream]:
    try:
        train, held_out = (
            open_stream(config.data, config.seed, split, block_size=config.document_block)
            for split in ("train", "validation")
        )
    except ValueError as error:
        raise ConfigError([str(error)], source="the data") from error
    check(config, world_size, train.vocab_size)
    return train, held_out


if __name__ == "__main__":
    sys.exit(main())
