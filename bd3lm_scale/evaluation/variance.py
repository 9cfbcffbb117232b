"""How noisy training from a checkpoint is: the variance of its loss and of its gradient (evaluate --variance).

Two depths. The loss of one block under every clip interval and every schedule follows in closed form from what the
likelihood evaluation drew anyway. The gradient is measured: one fixed batch, many noise draws, the trace of the
covariance of what an optimizer step would use; with its cost, so that objectives of different cost compare.

Shapes: B rows in a micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from bd3lm_scale.config.flops import flops_per_token
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.data.batches import BatchPlan
from bd3lm_scale.data.stream import RowStream
from bd3lm_scale.diffusion.clip_search import LossMoments, least_noisy, loss_table
from bd3lm_scale.diffusion.loss import num_loss_tokens
from bd3lm_scale.diffusion.mask_counts import unseen_share
from bd3lm_scale.diffusion.noising import noise_rows
from bd3lm_scale.diffusion.registry import SCHEDULES
from bd3lm_scale.diffusion.variance import GradientMoments, GradientSpread, Spread, spread
from bd3lm_scale.engine import Engine, run_pass, sum_over_ranks
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.parallel.pipeline import data_group, embedding_group, tensor_group
from bd3lm_scale.parallel.shards import description_of
from bd3lm_scale.validation import Validation, read_rows
from bd3lm_scale.values import Interval, Rows


@dataclass(frozen=True)
class Probe:
    """What noise does to one optimizer step's loss and gradient.

    Attributes:
        interval: times are drawn from it.
        loss: of the batch, nats per token (paper, Eq. 10).
        gradient: of the same.
    """

    interval: Interval
    loss: Spread
    gradient: GradientSpread


@dataclass(frozen=True)
class VarianceReport:
    """Everything measured.

    Attributes:
        schedule: the one that the model is trained under; the probes' and the first table's.
        tables: by schedule, a block's loss under every interval, with the run's noise; empty for ar, which draws none.
        probes: by interval.
        num_rows: rows of the probes' batch.
    """

    schedule: str
    tables: dict[str, dict[Interval, LossMoments]]
    probes: list[Probe]
    num_rows: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON: intervals as "low-high"."""
        return {
            "schedule": self.schedule,
            "tables": self._figures(lambda loss: loss.variance),
            "table_stderrs": self._figures(lambda loss: loss.stderr),
            "relative_tables": self._figures(lambda loss: loss.relative),
            "probes": [
                {
                    "interval": _label(probe.interval),
                    "loss": asdict(probe.loss),
                    "gradient": asdict(probe.gradient)
                    | {
                        "noise_to_signal": probe.gradient.noise_to_signal,
                        "variance_per_flop": probe.gradient.variance_per_flop,
                    },
                }
                for probe in self.probes
            ],
            "probe_rows": self.num_rows,
        }

    def _figures(self, figure: Callable[[LossMoments], float]) -> dict[str, dict[str, float]]:
        """One figure of every table, by schedule and interval."""
        return {
            name: {_label(interval): figure(loss) for interval, loss in table.items()}
            for name, table in self.tables.items()
        }


def measure_variance(
    engine: Engine,
    config: RunConfig,
    stream: RowStream,
    validation: Validation,
    in_force: Interval,
    *,
    rows: int | None = None,
    draws: int = 16,
) -> VarianceReport:
    """Variance tables from a finished evaluation, and probes of the gradient. Collective, in any layout.

    Probed are the full interval, the one in force and the best of the table, on the first
    min(train.global_batch_size, rows) rows of the stream, without dropout.

    Args:
        engine: built for evaluation.
        config: of the run, with the layout in force.
        stream: rows to probe on.
        validation: the evaluation whose moments give the tables.
        in_force: clip interval that training uses.
        rows: at most so many rows.
        draws: noise draws per probe, at least 2.
    """
    if draws < 2:
        raise ValueError(f"--noise-draws ({draws}): a variance needs at least 2 draws; use for example 16")
    num_rows = min(config.train.global_batch_size, stream.num_rows, rows or stream.num_rows)
    tables = _tables(engine, config, validation, in_force)
    own = config.diffusion.schedule
    if config.diffusion.objective == "ar":
        intervals, draws = [Interval(1.0, 1.0)], 2  # nothing is drawn: two equal gradients
    else:
        best = least_noisy(tables[own]) or in_force
        intervals = list(dict.fromkeys([Interval(config.diffusion.time_epsilon, 1.0), in_force, best]))
    batches = _batches(engine, config, stream, num_rows)
    with tqdm(total=len(intervals) * draws, unit="draw", disable=not engine.mesh.is_main_rank) as bar:
        probes = [probe(engine, config, batches, num_rows, i, draws, bar.update) for i in intervals]
    return VarianceReport(own, tables, probes, num_rows)


def probe(
    engine: Engine,
    config: RunConfig,
    batches: list[Rows],
    num_rows: int,
    interval: Interval,
    draws: int,
    beat: Callable[[], object] = lambda: None,
) -> Probe:
    """Loss and gradient of one global batch under `draws` independent draws of times and masks.

    Args:
        engine: built for evaluation: parameters keep their gradients.
        config: of the run.
        batches: this data-parallel rank's micro-batches of the fixed batch.
        num_rows: rows of the global batch.
        interval: clip interval.
        draws: noise draws.
        beat: called after each.
    """
    tokens = num_loss_tokens(engine.process, num_rows, batches[0].targets)
    moments, losses = GradientMoments(), []
    for chunk in engine.chunks:
        chunk.eval()
    with _gradient_sums(engine) as sums:
        for draw in range(draws):
            noisy = [
                noise_rows(
                    b, engine.process, seed=config.seed, step=draw, global_batch_size=num_rows, interval=interval
                )
                for b in batches
            ]
            parts = run_pass(engine, noisy, loss_scale=len(noisy) / tokens)  # the schedule divides by the number
            own_loss = sum(float(p.weighted_nll) for p in parts) if engine.reports_loss else 0.0
            losses.append(sum_over_ranks(engine, [own_loss], [])[0][0] / tokens)
            moments.add(_whole_gradients(engine, sums))
            for total in sums.values():
                total.zero_()
            beat()
    total, _ = sum_over_ranks(engine, moments.as_tensor().tolist(), [])
    clipped = replace(config, diffusion=replace(config.diffusion, clip_low=interval[0], clip_high=interval[1]))
    flops = flops_per_token(clipped, engine.process.vocab_size) * num_rows * config.data.context_length
    unseen = 0.0
    if config.diffusion.objective != "ar":
        unseen = unseen_share(engine.process, interval, draws * num_rows * engine.process.num_blocks)
    gradient = moments.result(torch.tensor(total, dtype=torch.float64), flops).with_unseen(unseen)
    return Probe(interval, spread(torch.tensor(losses, dtype=torch.float64)).with_unseen(unseen), gradient)


def format_report(report: VarianceReport) -> str:
    """The tables and probes as text."""
    lines = []
    if report.tables:
        names = [report.schedule, *(name for name in report.tables if name != report.schedule)]
        lines += ["", f"variance of a block's loss by clip interval, +- its error (training uses {report.schedule})"]
        lines += ["interval     " + "".join(f"{name:>20}" for name in names)]
        for interval in report.tables[report.schedule]:
            losses = [report.tables[name][interval] for name in names]
            row = "".join(f"{loss.variance:11.4f} +- {loss.stderr:<5.2g}" for loss in losses)
            lines.append(f"{_label(interval):<13}{row}")
        for name in names:
            best = least_noisy(report.tables[name])
            found = "unknown" if best is None else f"U[{best[0]:g}, {best[1]:g}]"
            lines.append(f"least under {name}, relative to the total weight: {found}")
    lines += ["", f"one step on {report.num_rows} rows, over noise draws"]
    lines.append("interval     draws  loss variance       gradient variance     |mean gradient|  per FLOP")
    for p in report.probes:
        loss, gradient = p.loss, p.gradient
        lines.append(
            f"{_label(p.interval):<13}{gradient.count:5}  {loss.variance:.3e} +- {loss.variance_stderr:.0e}"
            f"  {gradient.variance:.4e} +- {gradient.variance_stderr:.0e}"
            f"  {gradient.mean_norm:15.4e}  {gradient.variance_per_flop:.3e}"
        )
    return "\n".join(lines)


def _label(interval: Interval) -> str:
    return f"{interval[0]:g}-{interval[1]:g}"


def _tables(
    engine: Engine, config: RunConfig, validation: Validation, in_force: Interval
) -> dict[str, dict[Interval, LossMoments]]:
    if config.diffusion.objective == "ar":
        return {}
    search = config.diffusion.clip_search
    return {
        name: loss_table(validation.moments, engine.process, search.widths, search.step, in_force, name)
        for name in SCHEDULES
    }


def _batches(engine: Engine, config: RunConfig, stream: RowStream, num_rows: int) -> list[Rows]:
    """This rank's micro-batches of rows 0 ... num_rows - 1; interleaving wants multiples of the pipeline size."""
    mesh = engine.mesh
    size = min(config.train.micro_batch_size, -(-num_rows // mesh.data_size))
    plan = BatchPlan(num_rows, size, mesh.data_rank, mesh.data_size)
    count = -(-plan.num_micro_batches // mesh.pipeline_size) * mesh.pipeline_size
    targets = stream.held_out_targets(num_rows)
    return [replace(read_rows(plan.positions(i), num_rows, stream), targets=targets) for i in range(count)]


@contextmanager
def _gradient_sums(engine: Engine) -> Iterator[dict[nn.Parameter, Tensor]]:
    """fp32 sums of what backward passes give each parameter inside, also where parameters are bf16."""
    parameters = [parameter for _, parameter in named_parameters(engine.chunks)]
    sums = {p: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in parameters}

    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:
            sums[parameter] += parameter.grad  # pyright: ignore[reportArgumentType]
            parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(add) for parameter in parameters]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _whole_gradients(engine: Engine, sums: dict[nn.Parameter, Tensor]) -> list[Tensor]:
    """The global batch's gradient of what this rank answers for: every element is counted by one rank of the world."""
    mesh, mine = engine.mesh, []
    is_tied = engine.transformer.tie_embeddings and mesh.pipeline_size > 1
    for name, parameter in named_parameters(engine.chunks):
        gradient = sums[parameter]
        if parameter.sums_over_tensor_ranks:  # pyright: ignore[reportAttributeAccessIssue]  # each tensor peer saw a share of the positions or heads
            dist.all_reduce(gradient, group=tensor_group())
        is_shared = is_tied and name == "embedding.weight"
        if is_shared:  # first and last stage hold one parameter
            dist.all_reduce(gradient, group=embedding_group())
        if mesh.data_size > 1:
            dist.all_reduce(gradient, group=data_group())
        is_sharded = description_of(parameter).shard_dim is not None and mesh.tensor_size > 1
        is_copy = is_shared and mesh.is_last_stage
        if mesh.data_rank == 0 and (is_sharded or mesh.tensor_rank == 0) and not is_copy:
            mine.append(gradient)
    return mine
