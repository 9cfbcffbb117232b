"""What a configuration weighs: parameters by name and stage, layers by stage, memory per rank by part.

Shapes: V padded vocabulary, D hidden_size, C cond_dim. Everything here is arithmetic on the configuration; the
activation part of the memory is an estimate (attention kernels keep no scores), the rest is exact.
"""

import math
from dataclasses import dataclass, fields

from bd3lm_scale.config.checks import num_micro_batches, padded_vocab_size
from bd3lm_scale.config.schema import RunConfig

FOURIER_FEATURES = 256
MIB = 2**20


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model.

    Attributes:
        shape: its global shape.
        shard_dim: the dimension tensor-parallel ranks cut; None where they hold copies.
        stage: the pipeline stage that holds it.
    """

    shape: tuple[int, ...]
    shard_dim: int | None
    stage: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Memory:
    """Bytes per rank, by part."""

    weights: float
    gradients: float
    masters: float
    adam: float
    ema: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """Bytes of all parts together."""
        return sum(getattr(self, item.name) for item in fields(self))


def stage_layers(config: RunConfig) -> list[list[int]]:
    """For each pipeline stage the layers it holds, in order; interleaved stages hold several runs of layers."""
    stages = config.parallel.pipeline_parallel_size
    chunks = config.parallel.virtual_pipeline_parallel_size or 1
    run = config.model.num_layers // (stages * chunks)
    starts = [[(chunk * stages + stage) * run for chunk in range(chunks)] for stage in range(stages)]
    return [[start + i for start in of_stage for i in range(run)] for of_stage in starts]


def parameters(config: RunConfig, vocab_size: int) -> dict[str, Parameter]:
    """Every parameter by its global name, with vocab_size rows in embedding and head (pad it first for memory)."""
    model, last = config.model, config.parallel.pipeline_parallel_size - 1
    width, cond, inner = model.hidden_size, model.cond_dim, model.mlp_ratio * model.hidden_size
    found = {"embedding.weight": Parameter((vocab_size, width), 0, 0)}
    if config.uses_adaln:
        for name, size_in in (("linear1", FOURIER_FEATURES), ("linear2", cond)):
            found[f"time_embedding.{name}.weight"] = Parameter((cond, size_in), None, 0)
            found[f"time_embedding.{name}.bias"] = Parameter((cond,), None, 0)
    for stage, layers in enumerate(stage_layers(config)):
        for layer in layers:
            shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
                "input_layernorm.weight": ((width,), None),
                "pre_mlp_layernorm.weight": ((width,), None),
                "self_attention.linear_qkv.weight": ((3 * width, width), 0),
                "self_attention.linear_proj.weight": ((width, width), 1),
                "mlp.linear_fc1.weight": ((inner, width), 0),
                "mlp.linear_fc1.bias": ((inner,), 0),
                "mlp.linear_fc2.weight": ((width, inner), 1),
                "mlp.linear_fc2.bias": ((width,), None),
            }
            if config.uses_adaln:
                shapes["modulation.weight"] = ((6 * width, cond), None)
                shapes["modulation.bias"] = ((6 * width,), None)
            for name, (shape, shard_dim) in shapes.items():
                found[f"decoder.layers.{layer}.{name}"] = Parameter(shape, shard_dim, stage)
    found["head.norm.weight"] = Parameter((width,), None, last)
    if config.uses_adaln:
        found["head.modulation.weight"] = Parameter((2 * width, cond), None, last)
        found["head.modulation.bias"] = Parameter((2 * width,), None, last)
    if not model.tie_embeddings:
        found["head.output.weight"] = Parameter((vocab_size, width), 0, last)
    found["head.output.bias"] = Parameter((vocab_size,), 0, last)
    return found


def count(config: RunConfig, vocab_size: int, with_embeddings: bool = True) -> int:
    """Parameters of the whole model; without embeddings: neither the embedding nor the head's matrix and bias."""
    named = parameters(config, vocab_size)
    vocabulary = ("embedding.", "head.output.")
    return sum(p.size for name, p in named.items() if with_embeddings or not name.startswith(vocabulary))


def count_on_rank(config: RunConfig, vocab_size: int, stage: int) -> int:
    """Parameters one rank of a pipeline stage computes with (its tensor-parallel shard, ZeRO not counted)."""
    tensor, last = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size - 1
    named = parameters(config, padded_vocab_size(vocab_size))
    total = sum(p.size // (1 if p.shard_dim is None else tensor) for p in named.values() if p.stage == stage)
    if config.model.tie_embeddings and stage == last > 0:  # the head's copy of the embedding
        total += named["embedding.weight"].size // tensor
    return total


def memory(config: RunConfig, world_size: int, vocab_size: int, stage: int) -> Memory:
    """Bytes one rank of a pipeline stage needs at the peak of a step, by part."""
    parallel, zero = config.parallel, config.optim.zero_stage
    replicas = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    element = 4 if config.precision == "fp32" else 2
    size = count_on_rank(config, vocab_size, stage)
    owned = size / replicas
    weights = element * (owned + size / config.model.num_layers if zero == 3 else size)  # ZeRO-3 gathers a layer
    return Memory(
        weights=weights,
        gradients=4 * (owned if zero >= 2 else size),  # accumulated in fp32
        masters=4 * owned,
        adam=8 * owned,
        ema=4 * owned,
        activations=_activations(config, replicas, stage, element),
        head=_head(config, vocab_size, element) if stage == parallel.pipeline_parallel_size - 1 else 0,
    )


def _activations(config: RunConfig, replicas: int, stage: int, element: int) -> float:
    """Bytes kept for the backward pass: one layer's, times the layers and micro-batches in flight."""
    parallel, model = config.parallel, config.model
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    chunks = parallel.virtual_pipeline_parallel_size or 1
    tokens = config.train.micro_batch_size * config.sequence_length
    spread = tensor if parallel.sequence_parallel else 1
    # Cut over tensor-parallel ranks: q, k, v, attention's output, and both sides of the activation function.
    cut = element * (4 + 2 * model.mlp_ratio) / tensor
    # Held by every rank unless sequence-parallel: two residual inputs in fp32, two modulated norms, two outputs,
    # and the dropout masks.
    whole = (2 * 4 + 4 * element + (2 if model.dropout else 0)) / spread
    per_layer = tokens * model.hidden_size * (cut + whole)
    kept = tokens * model.hidden_size * 4 / spread if parallel.recompute == "full" else per_layer
    layers = model.num_layers // stages
    total = num_micro_batches(config, replicas)
    if chunks == 1:
        in_flight = min(total, stages - stage) * layers
    else:  # warm-up of the interleaved schedule, counted in model chunks
        warm_up = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, total * chunks)
        in_flight = warm_up * layers // chunks
    return kept * in_flight + (per_layer if parallel.recompute == "full" else 0)


def _head(config: RunConfig, vocab_size: int, element: int) -> float:
    """Bytes of logits and their gradient if every token of the micro-batch were masked: the worst case."""
    rows = config.train.micro_batch_size * config.data.context_length
    return rows * padded_vocab_size(vocab_size) / config.parallel.tensor_parallel_size * (2 * 4 + element)
