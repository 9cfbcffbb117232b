"""One pass through the model in any layout, shared by training, validation and the probes.

    NoisyRows (on every rank, by a pure function) -> Megatron's schedule -> LossSum on the last stage

Shapes: B rows, L tokens in a row, R scored rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

import bd3lm_scale.parallel.quiet_megatron  # noqa: F401  before anything that imports Megatron
from bd3lm_scale.checkpoint.boxes import boxes_of
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.diffusion.loss import score_rows
from bd3lm_scale.diffusion.process import Process, make_process
from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.model.denoiser import ChunkList, Denoiser, build_chunks, named_parameters, pipeline_sequence_length
from bd3lm_scale.model.initialize import draw
from bd3lm_scale.model.parameters import parameters
from bd3lm_scale.model.transformer_config import DenoiserConfig, make_transformer_config
from bd3lm_scale.optim.zero import ZeroOptimizer
from bd3lm_scale.parallel.mesh import Mesh
from bd3lm_scale.parallel.pipeline import schedule_of_layout
from bd3lm_scale.parallel.shards import description_of, state_slice
from bd3lm_scale.parallel.sums import sum_on_host
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
        mesh: this rank's position in the layout.
        host_group: gloo group for small agreements; None when alone.
        schedule: Megatron's function that runs micro-batches through the stages of this layout.
        sequence_length: rows of what travels between stages.
        reports_loss: one rank per data-parallel index holds the loss of its rows, and counts them once.
    """

    process: Process
    transformer: DenoiserConfig
    chunks: list[Denoiser]
    optimizer: ZeroOptimizer | None
    mesh: Mesh
    host_group: dist.ProcessGroup | None
    schedule: Callable[..., list[LossSum]]
    sequence_length: int
    reports_loss: bool


def build_engine(
    config: RunConfig,
    mesh: Mesh,
    vocab_size: int,
    mask_token_id: int,
    host_group: dist.ProcessGroup | None = None,
    for_training: bool = True,
    with_values: bool = True,
) -> Engine:
    """Build this rank's part of the model and, for training, its optimizer.

    Args:
        config: the checked run configuration.
        mesh: this rank's position in the layout.
        vocab_size, mask_token_id: of the tokenizer.
        host_group: gloo group for small agreements; None when alone.
        for_training: whether there is an optimizer.
        with_values: draw the initial weights; without, they are to come from a checkpoint (or `draw_weights`).
    """
    transformer = make_transformer_config(config, vocab_size, mask_token_id, mesh.device)
    visibility = training_visibility(config.diffusion.objective, config.data.context_length, config.block_size)
    pattern = visibility.first(config.sequence_length)
    chunks = build_chunks(transformer, mesh, pattern, with_memory=not for_training)
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
    engine = Engine(
        process,
        transformer,
        chunks,
        optimizer,
        mesh,
        host_group,
        schedule=schedule_of_layout(),
        sequence_length=pipeline_sequence_length(transformer),
        reports_loss=mesh.is_last_stage and mesh.tensor_rank == 0,
    )
    if with_values:
        draw_weights(engine, config.seed)
    return engine


def draw_weights(engine: Engine, seed: int) -> None:
    """Give the model its initial weights: each rank draws what it keeps, all layouts the same."""
    if engine.optimizer is None:
        whole = [(description_of(parameter), parameter) for _, parameter in named_parameters(engine.chunks)]
        parts = [state_slice(d, engine.mesh, 0, p.numel(), {"master": p.detach().view(-1)}) for d, p in whole]
    else:
        parts = engine.optimizer.slices()
    table = {parameter.name: parameter for parameter in parameters(engine.transformer.architecture)}
    for part in parts:
        for box in boxes_of(part):
            out = part.tensors["master"].narrow(0, box.start, box.volume)
            draw(out, table[part.name], box.offset, box.shape, seed, engine.transformer.params_dtype)
    if engine.optimizer is not None:
        engine.optimizer.restored(0)
        engine.optimizer.reset_ema()


def staged(engine: Engine, config: RunConfig) -> Engine:
    """The same parts with the process of another configuration of the run: a stage of its block-size schedule."""
    process = engine.process
    length, vocab_size, mask = process.context_length, process.vocab_size, process.mask_token_id
    return replace(engine, process=make_process(config.diffusion, length, vocab_size, mask))


def show_blocks(engine: Engine, config: RunConfig) -> None:
    """Let the network's tokens see each other in the blocks of this configuration from now on."""
    visibility = training_visibility(config.diffusion.objective, config.data.context_length, config.block_size)
    for chunk in engine.chunks:
        chunk.set_visibility(visibility.first(engine.transformer.sequence_length))
        chunk.prepare_attention()


def compile_layers(chunks: list[Denoiser], backend: str | Callable[..., Any] = "inductor") -> None:
    """torch.compile each transformer layer, and what is done to the head's tiles, in place.

    A layer is one graph forward; the layers share it, but for the last one, whose clean rows are spared. Each mode
    (training, validation, other micro-batch sizes) adds one, and torch gives up silently after a few.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    for chunk in chunks:
        chunk.prepare_attention()
        for layer in cast(Any, chunk.decoder.layers):
            layer.compile(dynamic=False, backend=backend)
        if chunk.post_process:
            chunk.head.output.functions.compile(backend)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch with the rows that the head is evaluated at.

    Attributes:
        noisy: of these the model reads input_BP and sigma_B, the loss weight_BL; only they travel to the device.
        index_R, target_R: flat index b * L + l of the scored rows, padded with zeros, and their target ids.
        is_real_R: False for the padding.
        dropout_key: int64 scalar; None: no dropout.
    """

    noisy: NoisyRows
    index_R: Tensor
    target_R: Tensor
    is_real_R: Tensor
    dropout_key: Tensor | None

    def on(self, device: torch.device) -> "MicroBatch":
        """The same with what a forward pass needs on the device, copied while the host goes on."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        read = {name: move(getattr(self.noisy, name)) for name in ("input_BP", "sigma_B", "weight_BL")}
        rows = {name: move(getattr(self, name)) for name in ("index_R", "target_R", "is_real_R")}
        key = None if self.dropout_key is None else move(self.dropout_key)
        return replace(self, noisy=replace(self.noisy, **read), dropout_key=key, **rows)


def prepare_batch(noisy: NoisyRows, dropout_key: int | None = None) -> MicroBatch:
    """Find the scored rows; R is padded to a multiple, at least one, so that the head always runs."""
    index_R = torch.nonzero(noisy.is_scored_BL.flatten()).flatten()
    padded = max(1, -(-len(index_R) // _ROW_MULTIPLE)) * _ROW_MULTIPLE
    is_real_R = torch.arange(padded) < len(index_R)
    index_R = torch.nn.functional.pad(index_R, (0, padded - len(index_R)))
    target_R = noisy.target_BL.flatten()[index_R]
    key = None if dropout_key is None else torch.tensor(dropout_key, dtype=torch.int64)
    return MicroBatch(noisy, index_R, target_R, is_real_R, key)


def run_pass(
    engine: Engine,
    batches: Sequence[NoisyRows],
    *,
    loss_scale: float = 0.0,
    dropout_keys: Sequence[int] | None = None,
) -> list[LossSum]:
    """All micro-batches through the model; backward too where loss_scale is not 0. See `run_schedule`."""
    keys = [None] * len(batches) if dropout_keys is None else dropout_keys
    prepared = [prepare_batch(noisy, key) for noisy, key in zip(batches, keys, strict=True)]
    return run_schedule(engine, prepared, loss_scale)


def run_schedule(engine: Engine, batches: Sequence[MicroBatch], loss_scale: float = 0.0) -> list[LossSum]:
    """Run Megatron's schedule for this layout: the plain loop at one stage, 1F1B and interleaved 1F1B beyond.

    Args:
        engine: the parts.
        batches: this data-parallel rank's micro-batches, equal on all its tensor and pipeline peers.
        loss_scale: factor on the summed weighted nll of the backward pass (before the schedule's division by the
            number of micro-batches and DeepSpeed's by the data-parallel size); 0 evaluates.

    Returns:
        The detached sums of each micro-batch on the last stage, an empty list elsewhere.
    """
    on_device = [batch.on(engine.mesh.device) for batch in batches]
    evaluates = loss_scale == 0.0
    with torch.set_grad_enabled(not evaluates):
        return engine.schedule(
            forward_step_func=partial(forward_step, engine, loss_scale),
            data_iterator=[iter(on_device) for _ in engine.chunks],  # every chunk walks through all micro-batches
            model=engine.chunks,
            num_microbatches=len(batches),
            seq_length=engine.sequence_length,
            micro_batch_size=batches[0].noisy.input_BP.shape[0],
            forward_only=evaluates,
        )


def forward_step(
    engine: Engine, loss_scale: float, batches: Iterator[MicroBatch], chunk: Denoiser
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, LossSum]]]:
    """The schedule's callback: the next micro-batch through one chunk, and what turns its output into a loss.

    The chunk is called through DeepSpeed when training (ZeRO-2 and 3 rely on its hooks). The schedule calls the
    loss function on the last stage only, and sends the output on from the others.
    """
    batch = next(batches)
    noisy = batch.noisy
    inputs = (noisy.input_BP, noisy.sigma_B, batch.dropout_key, batch.index_R, batch.target_R, noisy.document_BL)
    out = chunk(*inputs) if engine.optimizer is None else engine.optimizer.forward(chunk.number, *inputs)
    return out, partial(scale_loss, engine.process, batch, loss_scale)


def scale_loss(process: Process, batch: MicroBatch, loss_scale: float, out: Tensor) -> tuple[Tensor, LossSum]:
    """(what the schedule differentiates, what it reports) from the head's (2, R) logits and log-sum-exps."""
    sums = score_rows(HeadRows(out[0], out[1], batch.index_R, batch.is_real_R), batch.noisy, process)
    return (sums.weighted_nll * loss_scale).float(), replace(sums, weighted_nll=sums.weighted_nll.detach())


def sum_over_ranks(engine: Engine, floats: Sequence[float], integers: Sequence[int]) -> tuple[list[float], list[int]]:
    """Add figures over all ranks on the host, which waits: floats in float64, integers modulo 2^64."""
    return sum_on_host(floats, integers, engine.host_group)
