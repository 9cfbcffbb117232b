"""One optimizer step: rows -> noise -> pipeline -> loss -> update -> StepReport."""

from collections.abc import Callable, Sequence

from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.diffusion.loss import num_loss_tokens
from bd3lm_scale.diffusion.noising import noise_rows, stream_hash
from bd3lm_scale.engine import Engine, run_pass, sum_over_ranks
from bd3lm_scale.optim.lr import learning_rate
from bd3lm_scale.rng import derive_key
from bd3lm_scale.runtime import faults
from bd3lm_scale.runtime.anomaly import OK, AnomalyPolicy
from bd3lm_scale.values import NoisyRows, Rows, StepReport


def train_step(
    engine: Engine,
    config: RunConfig,
    step: int,
    rows: Sequence[Rows],
    interval: tuple[float, float],
    policy: AnomalyPolicy,
    waiting: Callable[[], None] = lambda: None,
) -> tuple[StepReport, str]:
    """Noise this rank's micro-batches and update the model on them.

    Args:
        engine: the parts.
        config: of the run.
        step: 0-based optimizer step, from which all randomness follows.
        rows: this data-parallel rank's micro-batches.
        interval: clip interval in force.
        policy: judges the loss and the gradient norm.
        waiting: called when this rank's own work is done and it begins to wait for the others.

    Returns:
        (report, verdict): the report is equal on all ranks; the verdict is the policy's.
    """
    noisy = [
        noise_rows(
            batch,
            engine.process,
            seed=config.seed,
            step=step,
            global_batch_size=config.train.global_batch_size,
            interval=interval,
        )
        for batch in rows
    ]
    return train_step_on(engine, config, step, noisy, interval, policy, waiting)


def train_step_on(
    engine: Engine,
    config: RunConfig,
    step: int,
    noisy: Sequence[NoisyRows],
    interval: tuple[float, float],
    policy: AnomalyPolicy,
    waiting: Callable[[], None] = lambda: None,
) -> tuple[StepReport, str]:
    """The same for given (x_0, x_t, t): parity runs and probes."""
    optimizer = engine.optimizer
    if optimizer is None:
        raise ValueError("this engine was built for evaluation; build it with for_training=True")
    batch_size = config.train.global_batch_size
    tokens = num_loss_tokens(engine.process, batch_size)
    dropout_keys = None
    if config.model.dropout > 0:
        dropout_keys = [derive_key(config.seed, "dropout", step, int(n.position_B[0])) & (2**63 - 1) for n in noisy]
    optimizer.train()
    faults.point("forward", step)
    # The schedule divides by the number of micro-batches, DeepSpeed by the data-parallel size.
    scale = len(noisy) * engine.mesh.data_size / tokens
    sums = run_pass(engine, noisy, loss_scale=scale, dropout_keys=dropout_keys)
    own_loss = sum(float(s.weighted_nll) for s in sums) if engine.reports_loss else 0.0
    own_hash = sum(stream_hash(n) for n in noisy) if engine.reports_loss else 0
    waiting()
    (total,), (stream,) = sum_over_ranks(engine, [own_loss], [own_hash])
    loss = float("nan") if faults.point("loss", step) else total / tokens
    lr = learning_rate(step, config.optim, config.train.steps)
    discards = bool(policy.suspicion(loss))
    faults.point("optimizer", step)
    grad_norm, was_skipped = optimizer.step(lr, discard=discards)
    faults.point("updated", step)
    verdict = policy.observe(step, loss, float("inf") if was_skipped and not discards else grad_norm)
    report = StepReport(
        step=step + 1,
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        tokens=(step + 1) * batch_size * config.data.context_length,
        stream_hash=stream,
        clip_low=interval[0],
        clip_high=interval[1],
        was_skipped=verdict != OK,
    )
    return report, verdict
