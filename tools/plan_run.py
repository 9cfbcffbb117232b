#!/usr/bin/env python3
"""Plan a run: memory by part, FLOPs, days for the token budget, and a layout that fits.

FLOPs are the model's own, without recomputation: matrix products over the positions the transformer really reads, and
attention over exactly the pairs its visibility allows. Days follow from an assumed MFU (share of the GPU's peak).
"""

import argparse
import itertools
import json
import math
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from bd3lm_scale.config.checks import num_micro_batches, problems
from bd3lm_scale.config.flops import attention_pairs, flops_per_token, forward_flops
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.sizes import memory
from bd3lm_scale.config.summary import GPT2_VOCAB_SIZE, summary
from bd3lm_scale.config.traffic import traffic
from bd3lm_scale.errors import ConfigError

GIB = 2**30
SECONDS_PER_DAY = 86_400
MEMORY_MARGIN = 0.85
"""Share of the GPU's memory to plan with; the rest is for buffers, fragmentation and the libraries."""
GPUS_PER_NODE = 8
"""Tensor parallelism stays inside a node."""


@dataclass(frozen=True)
class Gpu:
    """Peak dense FLOP/s as the vendor states them, memory in GiB, and bytes per second that one GPU sends.

    Inside a node: NVLink in one direction (PCIe for l40s); between nodes: one network port of each GPU.
    """

    bf16: float
    fp32: float
    memory_gib: float
    inside_node: float
    between_nodes: float


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 80, 300e9, 25e9),
    "h100": Gpu(989e12, 67e12, 80, 450e9, 50e9),
    "h200": Gpu(989e12, 67e12, 141, 450e9, 50e9),
    "b200": Gpu(2250e12, 75e12, 180, 900e9, 50e9),
    "l40s": Gpu(362e12, 91.6e12, 48, 32e9, 12.5e9),
}


def bubble(config: RunConfig, replicas: int) -> float:
    """Share of the step the pipeline's stages wait for each other."""
    stages = config.parallel.pipeline_parallel_size
    chunks = config.parallel.virtual_pipeline_parallel_size or 1
    return (stages - 1) / (num_micro_batches(config, replicas) * chunks + stages - 1)


def peak_memory(config: RunConfig, world_size: int, vocab_size: int) -> float:
    """Bytes on the fullest rank."""
    stages = range(config.parallel.pipeline_parallel_size)
    return max(memory(config, world_size, vocab_size, stage).total for stage in stages)


def computing_seconds(config: RunConfig, world_size: int, vocab_size: int, gpu: Gpu, mfu: float) -> float:
    """One step's computation: the model's FLOPs at the assumed MFU, recomputation, padding rows, the bubble."""
    parallel = config.parallel
    replicas = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    rows = num_micro_batches(config, replicas) * replicas * config.train.micro_batch_size  # with zero-weight rows
    flops = 3 * rows * sum(forward_flops(config, vocab_size).values())
    peak = gpu.fp32 if config.precision == "fp32" else gpu.bf16
    seconds = flops / (world_size * peak * mfu) / (1 - bubble(config, replicas))
    return seconds * (4 / 3 if parallel.recompute == "full" else 1.0)


def step_seconds(config: RunConfig, world_size: int, vocab_size: int, gpu: Gpu, mfu: float) -> float:
    """Computation, and what the slowest stage sends, nothing overlapping: an estimate for ranking layouts."""
    stages = range(config.parallel.pipeline_parallel_size)
    sent = max(
        traffic(config, world_size, vocab_size, stage, GPUS_PER_NODE).seconds(gpu.inside_node, gpu.between_nodes)
        for stage in (stages[0], stages[-1])
    )
    small = 1 + 0.02 / config.train.micro_batch_size  # small matrices
    return computing_seconds(config, world_size, vocab_size, gpu, mfu) * small + sent


def candidates(config: RunConfig, world_size: int) -> Iterator[RunConfig]:
    """Layouts of this model on this many GPUs that pass every check."""
    sizes = [2**i for i in range(8)]
    for tensor, stages, chunks, zero, recompute, rows in itertools.product(
        [s for s in sizes if s <= GPUS_PER_NODE], sizes, (None, 2, 4), (1, 2, 3), ("none", "selective", "full"), sizes
    ):
        if world_size % (tensor * stages) or rows > config.train.global_batch_size or (stages > 1 and zero > 1):
            continue
        candidate = replace(
            config,
            parallel=replace(
                config.parallel,
                tensor_parallel_size=tensor,
                pipeline_parallel_size=stages,
                virtual_pipeline_parallel_size=chunks,
                sequence_parallel=tensor > 1,
                recompute=recompute,
            ),
            optim=replace(config.optim, zero_stage=zero),
            train=replace(config.train, micro_batch_size=rows),
        )
        if not problems(candidate, world_size):
            yield candidate


def suggest(config: RunConfig, world_size: int, vocab_size: int, gpu: Gpu, mfu: float = 0.4) -> RunConfig | None:
    """The fastest layout that fits into the GPU's memory, or None."""
    room = MEMORY_MARGIN * gpu.memory_gib * GIB
    fitting = [c for c in candidates(config, world_size) if peak_memory(c, world_size, vocab_size) <= room]
    return min(fitting, key=lambda c: step_seconds(c, world_size, vocab_size, gpu, mfu)) if fitting else None


def layout_overrides(config: RunConfig) -> list[str]:
    """A layout as `a.b=c` arguments."""
    parallel = config.parallel
    return [
        f"parallel.tensor_parallel_size={parallel.tensor_parallel_size}",
        f"parallel.pipeline_parallel_size={parallel.pipeline_parallel_size}",
        *(
            [f"parallel.virtual_pipeline_parallel_size={parallel.virtual_pipeline_parallel_size}"]
            if parallel.virtual_pipeline_parallel_size
            else []
        ),
        f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}",
        f"parallel.recompute={parallel.recompute}",
        f"optim.zero_stage={config.optim.zero_stage}",
        f"train.micro_batch_size={config.train.micro_batch_size}",
    ]


def plan(config: RunConfig, world_size: int, vocab_size: int, gpu: Gpu, mfu: float) -> dict[str, object]:
    """All figures of the plan; `suggested` is None where nothing fits."""
    parallel = config.parallel
    replicas = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    forward = forward_flops(config, vocab_size)
    per_token = flops_per_token(config, vocab_size)
    tokens = config.train.steps * config.train.global_batch_size * config.data.context_length
    peak = gpu.fp32 if config.precision == "fp32" else gpu.bf16
    lost = 1 - (1 - bubble(config, replicas)) / (4 / 3 if parallel.recompute == "full" else 1)
    as_ar = replace(config, diffusion=replace(config.diffusion, objective="ar"))
    suggested = suggest(config, world_size, vocab_size, gpu, mfu)
    sent = traffic(config, world_size, vocab_size, 0, GPUS_PER_NODE)
    return {
        "tokens": tokens,
        "attention_pairs_per_row": attention_pairs(config),
        "forward_flops_per_row": forward,
        "training_flops_per_token": per_token,
        "cost_relative_to_ar": per_token / flops_per_token(as_ar, vocab_size),
        "total_flops": per_token * tokens,
        "mfu": mfu,
        "pipeline_bubble": bubble(config, replicas),
        "tokens_per_second": world_size * peak * mfu * (1 - lost) / per_token,
        "days": per_token * tokens / (world_size * peak * mfu * (1 - lost)) / SECONDS_PER_DAY,
        "memory_gib": [
            {k: v / GIB for k, v in asdict(memory(config, world_size, vocab_size, stage)).items()}
            for stage in range(parallel.pipeline_parallel_size)
        ],
        "peak_memory_gib": peak_memory(config, world_size, vocab_size) / GIB,
        "fits": peak_memory(config, world_size, vocab_size) <= MEMORY_MARGIN * gpu.memory_gib * GIB,
        "building_memory_gib": building_memory(config, world_size, vocab_size) / GIB,
        "traffic_gb_per_step": {kind: getattr(sent, kind) / 1e9 for kind in sent.links},
        "traffic_links": sent.links,
        "step_seconds": step_seconds(config, world_size, vocab_size, gpu, mfu),
        "sending_seconds": sent.seconds(gpu.inside_node, gpu.between_nodes),
        "open_files": open_files(world_size),
        "suggested": layout_overrides(suggested) if suggested else None,
    }


def building_memory(config: RunConfig, world_size: int, vocab_size: int) -> float:
    """Bytes on the fullest rank before the first step: nothing but what it keeps (docs/parallelism.md, Building)."""
    stages = range(config.parallel.pipeline_parallel_size)
    sizes = [memory(config, world_size, vocab_size, stage) for stage in stages]
    return max(s.weights + s.masters + s.adam + s.ema + s.gradients for s in sizes)


def open_files(world_size: int) -> dict[str, int]:
    """Open files that rank 0 may need, and the limit in force on this machine."""
    # imports torch, which nothing else here needs
    from bd3lm_scale.parallel.groups import descriptors_needed

    return {"needed": descriptors_needed(world_size), "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[1]}


def report(config: RunConfig, world_size: int, vocab_size: int, gpu_name: str, gpu: Gpu, figures: dict) -> str:
    """The plan as text."""
    forward = figures["forward_flops_per_row"]
    whole = sum(forward.values())
    parts = ", ".join(f"{name} {value / whole:.1%}" for name, value in forward.items())
    fits = "fits" if figures["fits"] else "does NOT fit"
    suggested = figures["suggested"]
    links = figures["traffic_links"]
    sent = ", ".join(f"{kind} {gb:,.2f} GB ({links[kind]})" for kind, gb in figures["traffic_gb_per_step"].items())
    files = figures["open_files"]
    warning = (
        f"the hard limit here is {files['limit']:,}"
        if 0 <= files["limit"] < files["needed"]
        else f"`ulimit -Hn` must be at least that on every node ({files['limit']:,} here)"
    )
    if 0 <= files["limit"] < files["needed"]:
        warning = f"WARNING: {warning}: raise it on every node (LimitNOFILE, limits.conf), or the run will not start"
    remedy = "nothing fits: use more GPUs" if suggested is None else " ".join(suggested)
    return "\n".join(
        [
            summary(config, world_size, vocab_size),
            "",
            f"FLOPs       {figures['training_flops_per_token']:.3e} per token in training "
            f"({figures['cost_relative_to_ar']:.2f} x one AR pass), {figures['total_flops']:.3e} in all",
            f"            forward: {parts}; {figures['attention_pairs_per_row']:,} query-key pairs per row",
            f"time        {figures['days']:,.1f} days for {figures['tokens'] / 1e9:,.1f} billion tokens, "
            f"{figures['tokens_per_second']:,.0f} tokens/s",
            f"            assuming MFU {figures['mfu']:.0%} of {world_size} {gpu_name} outside the pipeline's bubble "
            f"({figures['pipeline_bubble']:.1%} of the step)",
            f"memory      {figures['peak_memory_gib']:.1f} GiB on the fullest rank: {fits} into {MEMORY_MARGIN:.0%} of "
            f"{gpu.memory_gib:g} GiB",
            f"building    {figures['building_memory_gib']:.1f} GiB on the fullest rank before the first step",
            f"traffic     a rank of the first stage sends per step: {sent}",
            f"            {figures['sending_seconds']:.2f} s of {figures['step_seconds']:.2f} s at "
            f"{gpu.inside_node / 1e9:g} GB/s inside and {gpu.between_nodes / 1e9:g} GB/s between nodes, "
            "if nothing overlaps",
            f"open files  {files['needed']:,} on rank 0; {warning}",
            f"suggestion  {remedy}",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Print the plan of a configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak the kernels reach (default: 0.4)")
    parser.add_argument(
        "--vocab-size", type=int, help="ids including the mask (default: the configuration's or GPT-2's)"
    )
    parser.add_argument("--inside-node", type=float, metavar="GB/s", help="what a GPU sends inside a node")
    parser.add_argument("--between-nodes", type=float, metavar="GB/s", help="what a GPU sends to other nodes")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_intermixed_args(argv)
    if not 0 < args.mfu <= 1:
        parser.error(f"--mfu {args.mfu}: must lie in (0, 1]; use for example 0.4")
    for name in ("inside_node", "between_nodes"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: must be a positive number of GB/s; use for example 50")
    speeds = {name: 1e9 * v for name in ("inside_node", "between_nodes") if (v := getattr(args, name)) is not None}
    gpu = replace(GPUS[args.gpu], **speeds)
    try:
        config = load_config(args.config, args.overrides)
        vocab_size = args.vocab_size or config.model.vocab_size or GPT2_VOCAB_SIZE
        found = problems(config, args.gpus, vocab_size)
        if found:
            suggested = suggest(config, args.gpus, vocab_size, gpu, args.mfu) if args.gpus > 0 else None
            hint = [f"a layout for {args.gpus} GPUs: {' '.join(layout_overrides(suggested))}"] if suggested else []
            raise ConfigError([*found, *hint], f"{args.config} on {args.gpus} GPUs")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    figures = plan(config, args.gpus, vocab_size, gpu, args.mfu)
    print(json.dumps(figures, indent=2) if args.json else report(config, args.gpus, vocab_size, args.gpu, gpu, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
