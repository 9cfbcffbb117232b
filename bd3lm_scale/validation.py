"""Held-out rows -> NELBO, perplexity and the moments of the loss over time; in any layout, any batch size.

Shapes: B rows in a micro-batch, J noise draws.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.data.batches import BatchPlan
from bd3lm_scale.data.stream import RowStream
from bd3lm_scale.diffusion.clip_search import CountMoments
from bd3lm_scale.diffusion.likelihood import DocumentSums, Likelihood, LikelihoodSums
from bd3lm_scale.diffusion.loss import row_losses
from bd3lm_scale.diffusion.noising import noise_rows_for_evaluation
from bd3lm_scale.engine import Engine, run_pass, sum_over_ranks
from bd3lm_scale.errors import BadShardError
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.runtime.log import get_logger
from bd3lm_scale.values import LossSum, NoisyRows, Rows

log = get_logger(__name__)


@dataclass(frozen=True)
class Validation:
    """What held-out text says of the model.

    Attributes:
        likelihood: NELBO, PPL, bits per token, standard errors.
        moments: moments of the block losses by number of masked tokens, over all ranks, for the clip search.
        stream: the rows without those of damaged shards, which were left out.
        by_set: the likelihood of each dataset of a mixture that has scored rows, as "NUMBER:PATH".
        documents: losses of the documents of packed rows; None where rows are a stream.
    """

    likelihood: Likelihood
    moments: CountMoments
    stream: RowStream
    by_set: dict[str, Likelihood]
    documents: DocumentSums | None = None


def validate(
    engine: Engine,
    config: RunConfig,
    stream: RowStream,
    *,
    rows: int | None = None,
    draws: int = 1,
    micro_batch_size: int | None = None,
    use_ema: bool = False,
    beat: Callable[[int], object] = lambda done: None,
) -> Validation:
    """Estimate the likelihood of the first `rows` validation rows (all by default). Collective.

    Noise is keyed by (seed, draw, row), so the figures do not depend on batch size or number of ranks.

    Args:
        engine: the parts; with an optimizer, `use_ema` evaluates the averaged weights.
        config: of the run.
        stream: the validation split.
        rows: how many rows; None: all.
        draws: noise draws per row.
        micro_batch_size: rows per rank and pass.
        use_ema: swap the averaged weights in (training only; otherwise the engine holds what was loaded).
        beat: told the number of rows done so far.

    Raises:
        BadShardError: on every rank, where data.on_bad_shard is stop.
    """
    size = micro_batch_size or config.evaluation.micro_batch_size or config.train.micro_batch_size
    stream, plan = _sound_rows(engine, stream, rows, size, config.data.on_bad_shard == "skip")
    num_rows = plan.global_batch_size
    sets = () if config.data.stream_text else tuple(f"{i}:{m.path}" for i, m in enumerate(config.data.mixture))
    sums = [LikelihoodSums.empty() for _ in sets or ("all rows",)]
    moments = CountMoments(engine.process.block_size)
    documents = DocumentSums(stream.num_documents, draws) if config.data.packing == "documents" else None
    _set_mode(engine, training=False)
    with engine.optimizer.ema_weights() if use_ema and engine.optimizer else nullcontext():
        for group in _groups(plan, stream, engine.mesh.pipeline_size):
            noisy_by_draw = [[_noise(r, engine, config, draw, num_rows) for r in group] for draw in range(draws)]
            losses_by_draw = [run_pass(engine, noisy) for noisy in noisy_by_draw]
            if engine.reports_loss:
                for index, noisy in enumerate(noisy_by_draw[0]):
                    row_losses_BJ = [row_losses(losses[index], engine.process) for losses in losses_by_draw]
                    found = _likelihood_sums(noisy, torch.stack(row_losses_BJ, dim=1).cpu(), stream, len(sets))
                    sums = [before + more for before, more in zip(sums, found, strict=True)]
                if documents is not None:
                    _add_documents(documents, noisy_by_draw[0], losses_by_draw, stream)
                for noisy, losses in zip(noisy_by_draw, losses_by_draw, strict=True):
                    for n, loss in zip(noisy, losses, strict=True):
                        moments.accumulate(n, loss)
            beat(min(num_rows, int(group[-1].position_B[-1]) + 1))
    _set_mode(engine, training=True)
    likelihoods, moments = _reduce(engine, sums, moments)
    by_set = {name: found for name, found in zip(sets, likelihoods[1:], strict=False) if found is not None}
    assert likelihoods[0] is not None
    result = Validation(likelihoods[0], moments, stream, by_set)
    if documents is None:
        return result
    total, _ = sum_over_ranks(engine, documents.as_tensor().tolist(), [])
    documents = documents.filled(torch.tensor(total, dtype=torch.float64))
    return replace(result, likelihood=documents.estimate(), documents=documents)


def _sound_rows(
    engine: Engine, stream: RowStream, rows: int | None, micro_batch_size: int, skips: bool
) -> tuple[RowStream, BatchPlan]:
    """The stream without its damaged shards, as all ranks agree, and how its rows are shared. Collective.

    Each rank reads its rows once before any of them computes, so that none waits for one that cannot read.
    """
    mesh = engine.mesh
    agreement = Agreement(mesh.rank, mesh.world_size, engine.host_group) if engine.host_group else Agreement()
    while True:
        num_rows = stream.num_rows if rows is None else min(rows, stream.num_rows)
        if num_rows == 0:
            raise ValueError("evaluation.rows (0): there is no validation row to score; prepare a validation split")
        plan = BatchPlan(num_rows, micro_batch_size, mesh.data_rank, mesh.data_size)
        bad_shard = None
        try:
            for index in range(plan.num_micro_batches):
                position = plan.positions(index)
                if (mine := position[position < num_rows]).size:  # an uneven split leaves some ranks without rows
                    stream.read_held_out(mine)
        except BadShardError as error:
            bad_shard = (error.shard, error.reason)
        found = dict(sorted(filter(None, agreement.exchange(bad_shard))))
        if not found:
            return stream, plan
        if not skips:
            raise BadShardError(*next(iter(found.items())))
        if mesh.is_main_rank:
            said = "; ".join(f"{shard} ({reason})" for shard, reason in found.items())
            log.warning("leaving out damaged shards of the validation split: %s", said)
        stream = stream.without(tuple(sorted({*stream.source.excluded, *found})))


def _set_mode(engine: Engine, training: bool) -> None:
    if engine.optimizer is not None:
        engine.optimizer.train(training)
    else:
        for chunk in engine.chunks:
            chunk.eval()


def _noise(rows: Rows, engine: Engine, config: RunConfig, draw: int, num_rows: int) -> NoisyRows:
    return noise_rows_for_evaluation(rows, engine.process, seed=config.seed, draw=draw, num_rows=num_rows)


def _groups(plan: BatchPlan, stream: RowStream, pipeline_size: int) -> Iterator[list[Rows]]:
    """Micro-batches in groups that keep the pipeline busy; interleaving wants multiples of the pipeline size."""
    size = 4 * pipeline_size if pipeline_size > 1 else 1
    for first in range(0, plan.num_micro_batches, size):
        count = min(size, -(-(plan.num_micro_batches - first) // pipeline_size) * pipeline_size)
        yield [read_rows(plan.positions(first + i), plan.global_batch_size, stream) for i in range(count)]


def read_rows(position: np.ndarray, num_rows: int, stream: RowStream) -> Rows:
    """Rows at the given places of a split; places from num_rows on become rows that are not real."""
    is_real = position < num_rows
    place = np.where(is_real, position, 0)
    tokens, layout = stream.read_held_out(place), stream.held_out_layout(place)
    return Rows(torch.from_numpy(tokens), torch.from_numpy(position), torch.from_numpy(is_real), **layout)


def _likelihood_sums(noisy: NoisyRows, loss_BJ: torch.Tensor, stream: RowStream, num_sets: int) -> list[LikelihoodSums]:
    """Of one micro-batch: of each dataset of a mixture, or of all rows."""
    tokens_B, is_real_B = noisy.counts_BL.sum(1), noisy.is_real_B
    if not num_sets:
        return [LikelihoodSums.of_rows(loss_BJ[is_real_B], tokens_B[is_real_B])]
    position_R = noisy.position_B[is_real_B].numpy()
    set_R = torch.from_numpy(stream.set_of(position_R))
    loss_RJ, tokens_R = loss_BJ[is_real_B], tokens_B[is_real_B]
    return [LikelihoodSums.of_rows(loss_RJ[set_R == number], tokens_R[set_R == number]) for number in range(num_sets)]


def _add_documents(
    documents: DocumentSums, noisy: list[NoisyRows], losses_by_draw: list[list[LossSum]], stream: RowStream
) -> None:
    for index, part in enumerate(noisy):
        place = torch.where(part.is_real_B, part.position_B, 0).numpy()
        numbers = torch.from_numpy(stream.held_out_documents(place))
        documents.add(part, [losses[index] for losses in losses_by_draw], numbers)


def _reduce(
    engine: Engine, sums: list[LikelihoodSums], moments: CountMoments
) -> tuple[list[Likelihood | None], CountMoments]:
    """Over all ranks: the likelihood of everything, of each part (None where nothing was scored), and the moments."""
    first = torch.stack([part.as_tensor() for part in sums])
    figures, _ = sum_over_ranks(engine, torch.cat([first.flatten(), moments.as_tensor().flatten()]).tolist(), [])
    total = torch.tensor(figures, dtype=torch.float64)
    parts = [LikelihoodSums(part) for part in total[: first.numel()].view_as(first)]
    whole = LikelihoodSums(torch.stack([part.as_tensor() for part in parts]).sum(0))
    scored = [part.estimate() if part.as_tensor()[0] > 0 else None for part in parts]
    return [whole.estimate(), *scored], CountMoments.from_tensor(total[first.numel() :], moments.block_size)
