"""What a rank sends in one optimizer step: bytes by kind of parallelism, and which link they take.

Collectives are counted as rings: an all-reduce of n bytes over k ranks sends 2 (k - 1) / k n from each, a gather or a
scatter half of that. Arithmetic on the configuration only.
"""

from dataclasses import dataclass

from bd3lm_scale.config.checks import num_micro_batches
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.sizes import count_on_rank

INSIDE, BETWEEN = "inside a node", "between nodes"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank of a stage sends per step.

    Attributes:
        tensor: activations between the ranks that share a layer.
        data: gradients, and weights that ZeRO gathers.
        pipeline: activations and their gradients to the neighboring stages.
        links: for each of these kinds, INSIDE or BETWEEN: the slowest link of its group.
    """

    tensor: float
    data: float
    pipeline: float
    links: dict[str, str]

    def seconds(self, inside: float, between: float) -> float:
        """Time at these speeds (bytes per second and GPU), if nothing overlaps with computation."""
        speeds = {INSIDE: inside, BETWEEN: between}
        return sum(getattr(self, kind) / speeds[link] for kind, link in self.links.items())


def traffic(config: RunConfig, world_size: int, vocab_size: int, stage: int = 0, per_node: int = 8) -> Traffic:
    """Bytes per step of one rank of a pipeline stage.

    Args:
        config: the run.
        world_size: ranks.
        vocab_size: real ids including the mask.
        stage: whose.
        per_node: ranks on a node.
    """
    parallel, optim = config.parallel, config.optim
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    replicas = world_size // (tensor * stages)
    micro_batches = num_micro_batches(config, replicas)
    element, summed = (4 if config.precision == "fp32" else 2), (4 if optim.reduce_dtype == "fp32" else 2)
    size, share = count_on_rank(config, vocab_size, stage), (replicas - 1) / replicas
    if optim.zero_stage == 3:  # each micro-batch gathers weights forward and backward, and scatters gradients
        data = micro_batches * share * size * (2 * element + summed)
    else:  # ZeRO-2 reduces after each micro-batch
        reductions = micro_batches if optim.zero_stage == 2 else 1
        data = share * size * (2 * summed * reductions + element)
    rows = config.train.micro_batch_size * config.sequence_length * config.model.hidden_size
    passes = 6 if parallel.recompute == "full" else 4  # all-reduces in a layer: two forward, two backward
    layers = config.model.num_layers / stages
    cut = passes * layers * micro_batches * 2 * (tensor - 1) / tensor * rows * element
    spread = tensor if parallel.sequence_parallel else 1
    neighbors = (stage > 0) + (stage < stages - 1)
    chunks = parallel.virtual_pipeline_parallel_size or 1
    messages = micro_batches * (neighbors if chunks == 1 else 2 * chunks - (stage in (0, stages - 1)))
    return Traffic(
        tensor=cut,
        data=data,
        pipeline=messages * rows * 4 / spread if stages > 1 else 0.0,
        links={
            "tensor": INSIDE if tensor <= per_node else BETWEEN,
            "data": INSIDE if tensor * replicas <= per_node else BETWEEN,
            "pipeline": INSIDE if world_size <= per_node else BETWEEN,
        },
    )
