"""One pass through the model in any layout, shared by training, validation and the probes.

    NoisyRows (on every rank, by a pure function) -> Megatron's schedule -> LossSum on the last stage

Shapes: B rows, L tokens in a row, R scored rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

import bd3lm_scale.parallel.quiet_megatron  # noqa: F401  before anything that imports Megatron
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.diffusion.loss import score_rows
from bd3lm_scale.diffusion.noising import Process, make_process
from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.model.denoiser import ChunkList, Denoiser, build_chunks, named_parameters, pipeline_sequence_length
from bd3lm_scale.model.transformer_config import DenoiserConfig, make_transformer_config
from bd3lm_scale.optim.zero import ZeroOptimizer
from bd3lm_scale.parallel import pipeline
from bd3lm_scale.parallel.mesh import Mesh
from bd3lm_scale.values import HeadRows, LossSum, NoisyRows

_ROW_MULTIPLE = 128
_MAX_GRAPHS = 64


@dataclass(frozen=True)
class Engine:
    """The parts of a model at work on this rank.

    Attributes:
        process: the forward process of the objective.
        transformer: Megatron's configuration and ours.
        chunks: this rank's pieces of the model.
        optimizer: DeepSpeed's engine; None when only evaluating.
        mesh: this rank's place.
        host_group: gloo group for small agreements; None when alone.
    """

    process: Process
    transformer: DenoiserConfig
    chunks: list[Denoiser]
    optimizer: ZeroOptimizer | None
    mesh: Mesh
    host_group: dist.ProcessGroup | None

    @property
    def reports_loss(self) -> bool:
        """One rank per data-parallel index: holds the loss of its rows and counts them once."""
        return self.mesh.is_last_stage and self.mesh.tensor_rank == 0


def build_engine(
    config: RunConfig,
    mesh: Mesh,
    vocab_size: int,
    mask_token_id: int,
    host_group: dist.ProcessGroup | None = None,
    for_training: bool = True,
) -> Engine:
    """Build this rank's part of the model and, for training, its optimizer."""
    transformer = make_transformer_config(config, vocab_size, mask_token_id, mesh.device)
    visibility = training_visibility(config.diffusion.objective, config.data.context_length, config.block_size)
    chunks = build_chunks(transformer, mesh, visibility, config.seed)
    if config.train.compile:
        compile_layers(chunks)
    optimizer = None
    if for_training:
        optimizer = ZeroOptimizer(
            ChunkList(chunks),
            named_parameters(chunks),
            config.optim,
            config.precision,
            config.train.micro_batch_size,
            mesh,
            config.model.tie_embeddings,
        )
    process = make_process(config.diffusion, config.data.context_length, vocab_size, mask_token_id)
    return Engine(process, transformer, chunks, optimizer, mesh, host_group)


def compile_layers(chunks: list[Denoiser], backend: str = "inductor") -> None:
    """torch.compile each transformer layer in place: the layers share their graphs, but for the last one's.

    Each mode (training, validation, other micro-batch sizes) adds some, and torch gives up silently after a few.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    for chunk in chunks:
        for layer in cast(Any, chunk.decoder.layers):
            # its key is a number on the host: traced, it would mean a graph for every layer and place
            layer.apply_dropout = torch.compiler.disable(layer.apply_dropout)
            layer.compile(dynamic=False, backend=backend)


def run_pass(
    engine: Engine,
    batches: Sequence[NoisyRows],
    *,
    loss_scale: float = 0.0,
    dropout_keys: Sequence[int] | None = None,
) -> list[LossSum]:
    """All micro-batches through the model; backward too where loss_scale is not 0.

    Args:
        engine: the parts.
        batches: this data-parallel rank's micro-batches, equal on all its tensor and pipeline peers.
        loss_scale: factor on the summed weighted nll of the backward pass (before the schedule's division by the
            number of micro-batches and DeepSpeed's by the data-parallel size); 0 evaluates.
        dropout_keys: one per micro-batch; None: no dropout.

    Returns:
        The detached sums of each micro-batch on the last stage, an empty list elsewhere.
    """
    keys = [None] * len(batches) if dropout_keys is None else dropout_keys
    prepared = [prepare_batch(noisy, key, engine.mesh.device) for noisy, key in zip(batches, keys, strict=True)]

    def forward_step(batch: Batch, chunk: nn.Module) -> tuple[Tensor, pipeline.LossFunction]:
        inputs = (batch.noisy.input_BP, batch.noisy.sigma_B, batch.dropout_key, batch.index_R, batch.target_R)
        out = (
            chunk(*inputs)
            if engine.optimizer is None
            else engine.optimizer(engine.chunks.index(cast(Denoiser, chunk)), *inputs)
        )

        def loss_function(out: Tensor) -> tuple[Tensor, dict[str, Any]]:
            head = HeadRows(out[0], out[1], batch.index_R, batch.is_real_R)
            sums = score_rows(head, batch.noisy, engine.process)
            # The schedule divides the returned loss in place, so the report holds a copy.
            report = replace(sums, weighted_nll=sums.weighted_nll.detach().clone())
            return (sums.weighted_nll * loss_scale).float(), {"sums": report}

        return out, loss_function

    evaluates = loss_scale == 0.0
    with torch.set_grad_enabled(not evaluates):
        reports = pipeline.run_schedule(
            engine.chunks,
            forward_step,
            prepared,
            micro_batch_size=prepared[0].noisy.input_BP.shape[0],
            sequence_length=pipeline_sequence_length(engine.transformer),
            forward_only=evaluates,
        )
    return [report["sums"] for report in reports]


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device, with the rows the head is evaluated at (R is padded; is_real_R says where)."""

    noisy: NoisyRows
    index_R: Tensor
    target_R: Tensor
    is_real_R: Tensor
    dropout_key: Tensor | None


def prepare_batch(noisy: NoisyRows, dropout_key: int | None, device: torch.device) -> Batch:
    """Move a micro-batch to the device; R is padded to a multiple, at least one, so that the head always runs."""
    index_R = torch.nonzero(noisy.is_scored_BL.flatten()).flatten()
    padded = max(1, -(-len(index_R) // _ROW_MULTIPLE)) * _ROW_MULTIPLE
    is_real_R = torch.arange(padded) < len(index_R)
    index_R = torch.nn.functional.pad(index_R, (0, padded - len(index_R)))
    target_R = noisy.target_BL.flatten()[index_R]
    moved = {f.name: getattr(noisy, f.name).to(device, non_blocking=True) for f in fields(noisy)}
    return Batch(
        NoisyRows(**moved),
        index_R.to(device),
        target_R.to(device),
        is_real_R.to(device),
        None if dropout_key is None else torch.tensor(dropout_key, dtype=torch.int64),
    )


def sum_over_ranks(engine: Engine, floats: Sequence[float], integers: Sequence[int]) -> tuple[list[float], list[int]]:
    """Add figures over all ranks on the host: floats in float64, integers modulo 2^64 (returned in [0, 2^64))."""
    float_sums = torch.tensor(floats, dtype=torch.float64)
    signed = [(i + 2**63) % 2**64 - 2**63 for i in integers]
    integer_sums = torch.tensor(signed, dtype=torch.int64)
    if engine.host_group is not None:
        dist.all_reduce(float_sums, group=engine.host_group)
        dist.all_reduce(integer_sums, group=engine.host_group)
    return float_sums.tolist(), [i % 2**64 for i in integer_sums.tolist()]
