"""One optimizer step: noise -> schedule (forward, loss, backward) -> reduce -> update.

`noise_step` is a pure function of (seed, step, interval, rows), so it may run ahead, while the step before computes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.diffusion.loss import num_loss_tokens
from bd3lm_scale.diffusion.noising import noise_rows, stream_hash
from bd3lm_scale.engine import Engine, MicroBatch, prepare_batch, run_schedule
from bd3lm_scale.optim.lr import learning_rate
from bd3lm_scale.parallel.sums import DeviceSum
from bd3lm_scale.rng import derive_key
from bd3lm_scale.runtime import faults
from bd3lm_scale.runtime.anomaly import OK, AnomalyPolicy
from bd3lm_scale.values import Interval, NoisyRows, Rows, StepReport, Targets

FULL_RANGE = Interval(0.0, 1.0)


@dataclass(frozen=True)
class NoisedStep:
    """A data-parallel rank's part of a global batch, noised and ready for the device.

    Attributes:
        clip_interval: clip interval that the times were drawn from.
        micro_batches: in order.
        stream_hash: of this rank's rows, masks and times; ranks' hashes add up to the step's.
        targets: of the whole global batch; None: every token.
    """

    clip_interval: Interval
    micro_batches: list[MicroBatch]
    stream_hash: int
    targets: Targets | None = None


@dataclass(frozen=True)
class StepOutcome:
    """What a step led to, equal on all ranks.

    Attributes:
        report: for the log.
        verdict: the anomaly policy's.
        votes: how many ranks raised each of the flags.
    """

    report: StepReport
    verdict: str
    votes: tuple[int, ...]


def noise_step(engine: Engine, config: RunConfig, step: int, rows: Sequence[Rows], interval: Interval) -> NoisedStep:
    """Draw times and masks of this rank's micro-batches."""
    size = config.train.global_batch_size
    noisy = []
    for batch in rows:
        noisy.append(
            noise_rows(batch, engine.process, seed=config.seed, step=step, global_batch_size=size, interval=interval)
        )
    return given_step(config, step, noisy, interval, rows[0].targets)


def given_step(
    config: RunConfig,
    step: int,
    noisy: Sequence[NoisyRows],
    interval: Interval = FULL_RANGE,
    targets: Targets | None = None,
) -> NoisedStep:
    """The same for (x_0, x_t, t) decided elsewhere."""
    keys: list[int | None] = [None] * len(noisy)
    if config.model.dropout > 0:
        keys = [derive_key(config.seed, "dropout", step, int(n.position_B[0])) & (2**63 - 1) for n in noisy]
    batches = list(map(prepare_batch, noisy, keys))
    return NoisedStep(Interval(*interval), batches, sum(map(stream_hash, noisy)), targets)


def train_step(
    engine: Engine,
    config: RunConfig,
    step: int,
    noised: NoisedStep,
    policy: AnomalyPolicy,
    *,
    raise_flags: Callable[[], Sequence[int]] = tuple,
    waiting: Callable[[], object] = bool,
) -> StepOutcome:
    """Update the model on one global batch.

    The loss, the stream's hash and the flags travel in one small sum on the device's own group, and the decision to
    drop the update is taken on the device: the host waits once per step, inside DeepSpeed, for the gradient's norm.

    Args:
        engine: the parts.
        config: of the run.
        step: 0-based optimizer step, from which all randomness follows.
        noised: this data-parallel rank's micro-batches.
        policy: judges the loss and the gradient norm.
        raise_flags: 0 or 1 for each thing that all ranks must hear of; called when own work is done.
        waiting: called when this rank's own work is done and it begins to wait for the others.
    """
    optimizer = engine.optimizer
    if optimizer is None:
        raise ValueError("this engine was built for evaluation; build it with for_training=True")
    tokens = num_loss_tokens(engine.process, config.train.global_batch_size, noised.targets)
    faults.point("forward", step)
    # The schedule divides by the number of micro-batches, DeepSpeed by the data-parallel size.
    scale = len(noised.micro_batches) * engine.mesh.data_size / tokens
    sums = run_schedule(engine, noised.micro_batches, scale)

    poison = float("nan") if faults.point("loss", step) else 1.0
    flags = raise_flags()
    waiting()
    own_loss = sum(s.weighted_nll for s in sums) if engine.reports_loss else 0.0
    own_hash = noised.stream_hash if engine.reports_loss else 0
    total = DeviceSum([own_loss * poison], [own_hash, *flags], engine.mesh.world_size, engine.mesh.device)

    lr = learning_rate(step, config.optim, config.train.steps)
    limit = policy.loss_limit()

    def discard() -> Tensor:
        loss = total.on_device()[0] / tokens
        return ~(loss.isfinite() & (loss <= limit))

    faults.point("optimizer", step)
    grad_norm = optimizer.step(lr, discard)
    faults.point("updated", step)
    (loss_sum,), (stream, *votes) = total.on_host()
    verdict = policy.observe(step, loss_sum / tokens, grad_norm)
    report = StepReport(
        step=step + 1,
        loss=loss_sum / tokens,
        grad_norm=grad_norm,
        lr=lr,
        tokens=(step + 1) * config.train.global_batch_size * config.data.context_length,
        stream_hash=stream,
        clip_low=noised.clip_interval.low,
        clip_high=noised.clip_interval.high,
        was_skipped=verdict != OK,
    )
    return StepOutcome(report, verdict, tuple(votes))
