"""What a configuration weighs: parameters by name and stage, layers by stage, memory per rank by part.

Shapes: V padded vocabulary, D hidden_size, C cond_dim. Everything here is arithmetic on the configuration; the
activation part of the memory is an estimate (attention kernels keep no scores), the rest is exact.
"""

from dataclasses import dataclass, fields, replace

from bd3lm_scale.config.checks import num_micro_batches
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.model.parameters import Architecture, Parameter, padded_vocab_size
from bd3lm_scale.model.parameters import parameters as parameter_table

MIB = 2**20


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
    return {parameter.name: parameter for parameter in parameter_table(Architecture.of(config, vocab_size), vocab_size)}


def count(config: RunConfig, vocab_size: int, with_embeddings: bool = True) -> int:
    """Parameters of the whole model; without embeddings: neither the embedding nor the head's matrix and bias."""
    layer, ends = _layer_and_ends(config, vocab_size, vocab_size)
    vocabulary = ("embedding.", "head.output.")
    counted = [p.size for p in ends if with_embeddings or not p.name.startswith(vocabulary)]
    return config.model.num_layers * sum(p.size for p in layer) + sum(counted)


def count_on_rank(config: RunConfig, vocab_size: int, stage: int) -> int:
    """Parameters one rank of a pipeline stage computes with (its tensor-parallel shard, ZeRO not counted).

    A tied embedding is held at both ends.
    """
    tensor, stages = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
    layer, ends = _layer_and_ends(config, vocab_size)

    def is_here(parameter: Parameter) -> bool:
        is_tied = config.model.tie_embeddings and parameter.name == "embedding.weight"
        return (stage == stages - 1 and (parameter.is_at_head or is_tied)) or (stage == 0 and not parameter.is_at_head)

    def on_rank(held: list[Parameter]) -> int:
        return sum(p.size // (1 if p.shard_dim is None else tensor) for p in held)

    return config.model.num_layers // stages * on_rank(layer) + on_rank([p for p in ends if is_here(p)])


def _layer_and_ends(
    config: RunConfig, vocab_size: int, rows: int | None = None
) -> tuple[list[Parameter], list[Parameter]]:
    """The parameters of one layer, which are those of every other, and those outside the layers."""
    table = parameter_table(replace(Architecture.of(config, vocab_size), num_layers=1), rows)
    return [p for p in table if p.layer is not None], [p for p in table if p.layer is None]


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
    cut = element * sum(_cut_widths(config)) / tensor
    # Held by every rank unless sequence-parallel: two residual inputs in fp32, two modulated norms, two outputs,
    # and the dropout masks.
    whole = model.hidden_size * (2 * 4 + 4 * element + (2 if model.dropout else 0)) / spread
    per_layer = tokens * (cut + whole)
    kept = tokens * model.hidden_size * 4 / spread if parallel.recompute == "full" else per_layer
    layers = model.num_layers // stages
    total = num_micro_batches(config, replicas)
    if chunks == 1:
        in_flight = min(total, stages - stage) * layers
    else:  # warm-up of the interleaved schedule, counted in model chunks
        warm_up = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, total * chunks)
        in_flight = warm_up * layers // chunks
    return kept * in_flight + (per_layer if parallel.recompute == "full" else 0)


def _cut_widths(config: RunConfig) -> list[int]:
    """Widths of what a layer keeps for its backward pass in pieces, from the matrices that are cut: the outputs of
    those cut by rows, the inputs of the others."""
    layer, _ = _layer_and_ends(config, 1)
    return [p.shape[p.shard_dim] for p in layer if p.shard_dim is not None and len(p.shape) == 2]


def _head(config: RunConfig, vocab_size: int, element: int) -> float:
    """Bytes of logits and their gradient if every token of the micro-batch were masked: the worst case."""
    rows = config.train.micro_batch_size * config.data.context_length
    return rows * padded_vocab_size(vocab_size) / config.parallel.tensor_parallel_size * (2 * 4 + element)
