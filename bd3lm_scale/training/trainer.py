"""A training run at work: its parts, its position in the data, its checkpoints. train.py drives it.

open_session -> parts built, newest valid checkpoint restored -> step, validate, save ... -> close
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bd3lm_scale.checkpoint.reader import CheckpointReader, find_checkpoint, open_checkpoint
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config.load import to_dict
from bd3lm_scale.config.resume import decay_news, keep_decay_steps
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.stages import Stage, stages
from bd3lm_scale.data.batches import BatchPlan, BatchReader
from bd3lm_scale.data.stream import RowStream
from bd3lm_scale.diffusion.clip_search import LossMoments, choose_interval, loss_table
from bd3lm_scale.engine import Engine, build_engine, draw_weights, show_blocks, staged, sum_over_ranks
from bd3lm_scale.errors import BadShardError, CheckpointError, FencedError
from bd3lm_scale.optim.zero import ZeroOptimizer
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.parallel.mesh import Mesh, new_host_group
from bd3lm_scale.runtime import faults
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.runtime.lock import RunLock
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.training.ahead import ReadAhead, StepBatch
from bd3lm_scale.training.checks import refuse_differences, refuse_other_model
from bd3lm_scale.training.run_files import write_run_files
from bd3lm_scale.training.step import NoisedStep, noise_step
from bd3lm_scale.validation import Validation
from bd3lm_scale.values import Cursor, Interval, Rows

log = get_logger(__name__)

VERSIONS = ("torch", "megatron-core", "deepspeed", "numpy")


class Votes(NamedTuple):
    """How many ranks want to stop, and how many cannot read the next batch."""

    stop: int = 0
    bad_shard: int = 0


@dataclass
class Session:
    """The parts and the state of a run on this rank.

    Attributes:
        config: of the run.
        engine: model, optimizer and position in the layout.
        stream: the training rows; its tokenizer is the run's.
        ahead: this rank's micro-batches, read and noised ahead.
        store: the run's checkpoints.
        agreement: how the ranks tell each other small things.
        policy: what to do with bad steps.
        cursor: where training stands in the data; cursor.step is the number of steps done.
        clip_interval: clip interval in force.
        validations: how many validations there were (the clip search counts them).
        stages: of the block-size schedule, with the engine of each; the last one alone without a schedule.
        stage: the one whose blocks the network sees; None after a change of position.
        resumed_from: the checkpoint this attempt started from, if any.
        saved_at: steps done at the last save, or when the checkpoint that this attempt resumed was saved.
    """

    config: RunConfig
    engine: Engine
    stream: RowStream
    ahead: ReadAhead
    store: CheckpointStore
    agreement: Agreement
    policy: AnomalyPolicy
    cursor: Cursor
    clip_interval: Interval
    validations: int = 0
    stages: tuple[tuple[Stage, Engine], ...] = ()
    stage: Stage | None = None
    resumed_from: Path | None = None
    saved_at: int = -1

    @property
    def optimizer(self) -> ZeroOptimizer:
        """The engine's optimizer (training always has one)."""
        assert self.engine.optimizer is not None
        return self.engine.optimizer

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.cursor.step

    def flags(self, wants_stop: bool) -> tuple[int, int]:
        """What all ranks must hear of from this one: a wish to stop, a damaged shard in the next batch."""
        return int(wants_stop), int(self.ahead.bad_shard() is not None)

    def vote(self, wants_stop: bool) -> Votes:
        """How many ranks raise each flag; the ranks wait for each other. Within a step the flags travel with the loss.

        Needed before the first step and after a change of position: all ranks stop, or leave out a shard, together.
        """
        self.ahead.start(self.step, self.clip_interval)
        _, votes = sum_over_ranks(self.engine, [], self.flags(wants_stop))
        return Votes(*votes)

    def read(self) -> StepBatch:
        """The batch of this step; the one after it is begun."""
        self.enter_stage()
        self.ahead.start(self.step, self.clip_interval)
        batch = self.ahead.take(self.clip_interval)
        if self.step + 1 < self.config.train.steps:
            self.ahead.start(self.step + 1, self.clip_interval)
        return batch

    def enter_stage(self) -> None:
        """Go over to the block size of this step, and to its clip interval where it begins here."""
        if len(self.stages) < 2:
            return
        stage, engine = stage_at(self.stages, self.step)
        if stage is self.stage:
            return
        self.engine, self.stage = engine, stage
        show_blocks(engine, stage.config)
        diffusion = stage.config.diffusion
        if self.step == stage.first_step:
            self.clip_interval = engine.process.training_interval(diffusion.clip_low, diffusion.clip_high)
        if self.engine.mesh.is_main_rank:
            log.info("step %d: blocks of %d", self.step, diffusion.block_size)

    def exclude_bad_shards(self) -> None:
        """Leave out, on all ranks, the shards that any rank found damaged.

        Raises:
            BadShardError: on every rank, where data.on_bad_shard is stop, or no shard is left.
        """
        error = self.ahead.bad_shard()
        reports = self.agreement.exchange(None if error is None else (error.shard, error.reason))
        found = dict(sorted(filter(None, reports)))
        if self.config.data.on_bad_shard != "skip":
            raise BadShardError(*next(iter(found.items())))
        if self.engine.mesh.is_main_rank:
            names = "; ".join(f"{shard} ({reason})" for shard, reason in found.items())
            log.warning("leaving out damaged shards from step %d on: %s", self.step, names)
        excluded = tuple(sorted({*self.cursor.excluded_shards, *found}))
        self.seek(replace(self.cursor, excluded_shards=excluded))

    def seek(self, cursor: Cursor) -> None:
        """Continue at another position in the data; NoShardLeftError (and no change) where all its shards are gone."""
        self.ahead.drop()
        self.ahead.batches.seek(cursor)
        self.cursor = cursor

    def advance(self) -> None:
        """A step is done."""
        self.cursor = replace(self.cursor, step=self.cursor.step + 1)

    def search_clip_interval(self, validation: Validation) -> dict[Interval, LossMoments]:
        """The loss under every candidate interval; the best is used for training from now on, if so configured."""
        search, self.validations = self.config.diffusion.clip_search, self.validations + 1
        is_due = search.enabled and self.config.diffusion.objective in ("bd3lm", "mdlm")
        if not is_due or self.validations % search.every_validations:
            return {}
        table = loss_table(validation.moments, self.engine.process, search.widths, search.step, self.clip_interval)
        best = choose_interval(table, self.clip_interval)
        if search.apply and best != self.clip_interval:
            log.info("clip interval U[%g, %g] -> U[%g, %g]", *self.clip_interval, *best)
            self.clip_interval = best
        return table

    def save(self) -> None:
        """Save a checkpoint of the steps done.

        Raises:
            FencedError: on every rank, when the run folder is no longer this job's.
            ConnectionError: on every rank, when saves cannot succeed any more: better to start again now than later.
        """
        _, (cut_off,) = sum_over_ranks(self.engine, [], [int(self.store.is_cut_off)])
        if cut_off:
            raise ConnectionError("ranks lost touch with each other during a save")
        owner = self.agreement.share(self.store.foreign_owner() if self.engine.mesh.is_main_rank else None)
        if owner is not None:
            raise FencedError(owner)
        self.store.save(self.step, self.optimizer.slices(), self._meta())
        self.saved_at = self.step

    def roll_back(self) -> None:
        """Return to the newest checkpoint and move the data past all that was read since then.

        Raises:
            CheckpointError: there is none.
        """
        failed = self.cursor
        self.store.wait()
        reader = self.store.newest()
        if reader is None:
            raise CheckpointError(f"{self.store.folder} has no checkpoint to roll back to; use runtime.on_nan=skip")
        restore(self, reader)
        # from the offset of the failed attempt: the checkpoint knows nothing of an earlier rollback to it
        offset = failed.data_offset + (failed.step + 1 - self.step) * self.config.train.global_batch_size
        skipped = offset - self.cursor.data_offset
        if self.engine.mesh.is_main_rank:
            log.warning("rolled back from step %d to %d; %d rows are left out", failed.step, self.step, skipped)
        self.seek(Cursor(self.step, offset, failed.excluded_shards))

    def close(self) -> None:
        """Finish the save in flight and stop reading."""
        self.store.wait()
        self.ahead.close()

    def layout(self) -> dict[str, Any]:
        """How the model and the batch are cut over the ranks."""
        mesh = self.engine.mesh
        return {
            "tensor": mesh.tensor_size,
            "pipeline": mesh.pipeline_size,
            "data": mesh.data_size,
            "zero_stage": self.config.optim.zero_stage,
            "sequence_parallel": self.config.parallel.sequence_parallel,
            "micro_batch_size": self.config.train.micro_batch_size,
        }

    def _meta(self) -> dict[str, Any]:
        return {
            "tokens": self.step * self.config.train.global_batch_size * self.config.data.context_length,
            "optimizer_step": self.optimizer.updates,
            "cursor": asdict(self.cursor),
            "clip": {"low": self.clip_interval[0], "high": self.clip_interval[1], "validations": self.validations},
            "policy": self.policy.state(),
            "config": to_dict(self.config),
            "layout": self.layout(),
            "vocab_size": self.stream.vocab_size,
            "mask_token_id": self.stream.mask_token_id,
            "tokenizer_hash": self.stream.tokenizer_hash,
            "data_hash": self.stream.data_hash,
            "versions": {name: version(name) for name in VERSIONS},
        }


def open_session(
    config: RunConfig,
    mesh: Mesh,
    stream: RowStream,
    agreement: Agreement,
    lock: RunLock | None = None,
    fresh: bool = False,
    step: int | None = None,
) -> Session:
    """Build the parts and restore the newest valid checkpoint of run_dir, or init_from, or start at random weights.

    Args:
        config: checked against world size and vocabulary.
        mesh: this rank's position in the layout.
        stream: the training rows.
        agreement: over all ranks.
        lock: on the run folder.
        fresh: refuse if run_dir holds a checkpoint.
        step: resume from this step's checkpoint instead of the newest.

    Raises:
        ConfigError: the checkpoint was trained with another configuration, or `fresh` is refused.
        CheckpointError: no usable checkpoint where there should be one.
    """
    session = build_session(config, mesh, stream, agreement, lock)
    try:
        initialize(session, fresh, step)
        agreement.run_on_all_ranks(lambda: write_run_files(session.config, stream) if mesh.is_main_rank else None)
    except BaseException:
        session.close()  # its data workers would outlive it
        raise
    return session


def build_session(
    config: RunConfig, mesh: Mesh, stream: RowStream, agreement: Agreement, lock: RunLock | None = None
) -> Session:
    """The parts of a run, at step 0; the weights have no values yet."""
    vocabulary = (stream.vocab_size, stream.mask_token_id)
    engine = build_engine(config, mesh, *vocabulary, agreement.group, with_values=False)
    folder = Path(config.run_dir) / "checkpoints"
    store = CheckpointStore(folder, config.checkpoint, mesh.rank, mesh.world_size, new_host_group(), lock)
    plan = BatchPlan(config.train.global_batch_size, config.train.micro_batch_size, mesh.data_rank, mesh.data_size)
    batches = BatchReader(stream, plan, Cursor(), config.data.workers, config.data.prefetch_steps, True)
    of_stages = tuple((stage, staged(engine, stage.config)) for stage in stages(config))

    def noise(step: int, rows: Sequence[Rows], interval: Interval) -> NoisedStep:
        return noise_step(stage_at(of_stages, step)[1], config, step, rows, interval)

    ahead = ReadAhead(batches, noise)
    interval = Interval(config.diffusion.clip_low, config.diffusion.clip_high).floored(config.diffusion.time_epsilon)
    return Session(
        config,
        engine,
        stream,
        ahead,
        store,
        agreement,
        AnomalyPolicy(config.runtime),
        Cursor(),
        interval,
        stages=of_stages,
    )


def stage_at(of_stages: tuple[tuple[Stage, Engine], ...], step: int) -> tuple[Stage, Engine]:
    """The stage that a 0-based step belongs to, and its engine."""
    return [pair for pair in of_stages if pair[0].first_step <= step][-1]


def initialize(session: Session, fresh: bool = False, step: int | None = None) -> None:
    """Weights from the run's newest valid checkpoint (or that of `step`), or from train.init_from, or drawn."""
    config, reader = session.config, session.store.newest(step)
    if reader is not None:
        session.agreement.run_on_all_ranks(lambda: refuse_differences(reader, config, session.stream, fresh))
    fix_decay(session, None if reader is None else reader.meta["config"])
    if reader is not None:
        resume(session, reader)
        if step is not None:
            session.store.go_back_to(step)
    elif config.train.init_from:
        start_from(session, config.train.init_from, config.train.init_weights)
    else:
        draw_weights(session.engine, config.seed)
    session.store.prepare(session.optimizer.slices())


def fix_decay(session: Session, saved: dict[str, Any] | None) -> None:
    """Settle where the learning rate's cosine ends, from the configuration of the checkpoint that is resumed."""
    session.config = keep_decay_steps(session.config, saved)
    if session.engine.mesh.is_main_rank:
        for line in decay_news(session.config, saved):
            log.info(line)


def resume(session: Session, reader: CheckpointReader) -> None:
    """Go on from a checkpoint of this run."""
    restore(session, reader)
    session.resumed_from, session.saved_at = reader.path, session.step
    log.info("resumed %s (step %d, saved as %s)", reader.path, session.step, reader.meta.get("layout"))
    has_moved = reader.meta.get("layout") != session.layout()
    if session.config.model.dropout > 0 and has_moved and session.engine.mesh.is_main_rank:
        log.warning("another layout with dropout: the same tokens, masks and times, but other dropout masks")


def restore(session: Session, reader: CheckpointReader) -> None:
    """Take up weights, optimizer state, position in the data and clip interval of a checkpoint, whatever its layout."""
    meta = reader.meta
    if meta.get("contents") != "full":
        raise CheckpointError(
            f"{reader.path} holds weights only and cannot be resumed; use train.init_from={reader.path}"
        )
    session.agreement.run_on_all_ranks(lambda: reader.fill(session.optimizer.slices()))
    faults.point("restore", meta["step"])
    session.optimizer.restored(meta["optimizer_step"])
    saved = meta["cursor"]
    session.seek(Cursor(meta["step"], saved["data_offset"], tuple(saved["excluded_shards"])))
    session.clip_interval = Interval(meta["clip"]["low"], meta["clip"]["high"])
    session.validations, session.stage = meta["clip"]["validations"], None
    session.policy.restore(meta["policy"])


def start_from(session: Session, source: str, weights: str) -> None:
    """Begin a new run at the weights of another: optimizer and step fresh, the average starting at those weights.

    Raises:
        ConfigError: the other run's model has other parameters or another vocabulary.
    """

    def fill() -> tuple[CheckpointReader, str]:
        reader = open_checkpoint(find_checkpoint(source))
        refuse_other_model(reader, session.config, session.stream)
        kind = "ema" if weights == "ema" and "ema" in reader.kinds() else "master"
        reader.fill(session.optimizer.slices(), {"master": kind})
        return reader, kind

    reader, kind = session.agreement.run_on_all_ranks(fill)
    session.optimizer.restored(0)
    session.optimizer.reset_ema()
    log.info("started from the %s weights of %s (step %s)", kind, reader.path, reader.meta.get("step"))


def set_threads(config: RunConfig, device: torch.device) -> None:
    """CPU threads per rank: one keeps runs comparable and ranks out of each other's way."""
    if device.type == "cpu" and config.train.threads > 0:
        torch.set_num_threads(config.train.threads)
