"""What a configuration weighs: parameters by name and stage, layers by stage, memory per rank by part.

Shapes: V padded vocabulary, D hidden_size, C cond_dim. Everything here is arithmetic on the configuration; the
activation part of the memory is counted layer by layer (attention kernels keep no scores), the rest is exact.
"""

from dataclasses import dataclass, fields, replace

from bd3lm_scale.config.checks import num_micro_batches
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.model.parameters import Architecture, Parameter, padded_vocab_size
from bd3lm_scale.model.parameters import parameters as parameter_table

MIB = 2**20
CPU_QUERIES = 128
"""Queries that attention on the CPU takes at once (model/attention.py)."""


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
    """Bytes kept for the backward pass: each layer's, times the micro-batches in flight."""
    parallel, model = config.parallel, config.model
    stages = parallel.pipeline_parallel_size
    chunks = parallel.virtual_pipeline_parallel_size or 1
    per_layer = layer_activations(config, element)
    kept = _residual(config) if parallel.recompute == "full" else per_layer
    layers = model.num_layers // stages
    total = num_micro_batches(config, replicas)
    if chunks == 1:
        in_flight = min(total, stages - stage) * layers
    else:  # warm-up of the interleaved schedule, counted in model chunks
        warm_up = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, total * chunks)
        in_flight = warm_up * layers // chunks
    if parallel.recompute == "full":
        return kept * in_flight + per_layer
    spared = per_layer - layer_activations(config, element, is_last=True) if stage == stages - 1 else 0
    return kept * in_flight - spared


def _residual(config: RunConfig) -> float:
    """Bytes of the fp32 stream between two layers, for one micro-batch."""
    spread = config.parallel.tensor_parallel_size if config.parallel.sequence_parallel else 1
    return config.train.micro_batch_size * config.sequence_length * config.model.hidden_size * 4 / spread


def layer_activations(config: RunConfig, element: int, is_last: bool = False) -> float:
    """Bytes that one layer keeps for its backward pass, for one micro-batch; without, or with selective, recomputation.

    Counted tensor by tensor as the layer is written (model/layer.py) and compared with what autograd saves. The last
    layer of block diffusion computes no more than keys and values for its clean half.
    """
    parallel, model, rows = config.parallel, config.model, config.train.micro_batch_size
    arch, tensor = Architecture.of(config, 1), config.parallel.tensor_parallel_size
    width, queries, keys = arch.hidden_size, arch.num_heads * arch.head_width, arch.kv_heads * arch.head_width
    length, spread = config.sequence_length, tensor if parallel.sequence_parallel else 1
    outputs = config.data.context_length if is_last and config.scores_noisy_half_only else length
    is_chunked = config.diffusion.objective == "bd3lm"  # otherwise torch's own kernel serves, in one piece
    # fp32 and as wide as the stream: what each norm reads, what it scales, what the modulation multiplies
    norm = 4 * width * ((2 if arch.norm == "rmsnorm" else 1) + (1 if arch.uses_adaln else 0))
    gated = 4 * width if arch.uses_adaln else 0  # what the gate multiplies
    dropped = width if model.dropout else 0  # masks of one byte
    whole = length * (norm + element * width) + outputs * (norm + element * width + 2 * gated + 2 * dropped)
    # q, k and v side by side, q and k turned, what attention returns; the inner layer of the MLP
    cut = length * element * (2 * queries + 3 * keys) + outputs * element * queries
    if arch.qk_norm:
        cut += length * _head_norms(arch.norm, element, queries, keys)
    if parallel.recompute != "selective":  # otherwise attention runs again
        cut += outputs * (4 * arch.num_heads + (element * queries if is_chunked else 0))
        cut += element * 2 * keys * _gathered_positions(config, outputs < length)
    cut += outputs * element * arch.inner * (5 if arch.gates else 2)
    angles = 4 * length * arch.head_width * element
    modulation = rows * 8 * width * 4 if arch.uses_adaln else 0
    return rows * (whole / spread + cut / tensor) + angles + modulation


def _head_norms(norm: str, element: int, queries: int, keys: int) -> int:
    """Bytes per position that the norms of queries and keys keep: fp32 inputs, and under RMSNorm what is scaled."""
    if norm == "rmsnorm":
        return 8 * queries + (4 if element == 4 else 8) * keys
    return 0 if element == 4 else 4 * (queries + keys)


def _gathered_positions(config: RunConfig, only_noisy: bool) -> int:
    """Keys that the CPU's attention copies, where a run of queries sees several ranges of them."""
    length, size = config.data.context_length, config.block_size
    if config.runtime.device != "cpu" or config.diffusion.objective != "bd3lm":
        return 0
    run = max(size, CPU_QUERIES // size * size)
    if length <= run:
        return 0  # one run for each half, whose keys lie end to end
    ends = [min(start + run, length) for start in range(0, length, run)]
    noisy = sum(end - start + end - size for start, end in zip([0, *ends], ends, strict=False) if end > size)
    clean = config.sequence_length - length
    return noisy if only_noisy else noisy + sum(min(end, clean) for end in ends[1:])


def _head(config: RunConfig, vocab_size: int, element: int) -> float:
    """Bytes of logits and their gradient if every token of the micro-batch were masked: the worst case."""
    rows = config.train.micro_batch_size * config.data.context_length
    return rows * padded_vocab_size(vocab_size) / config.parallel.tensor_parallel_size * (2 * 4 + element)
