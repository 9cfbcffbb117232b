"""The text --dry-run prints and a run logs at its start: layout, sizes, tokens per step, memory per rank."""

from collections.abc import Sequence
from dataclasses import fields

from bd3lm_scale.config.checks import check, num_micro_batches, padded_vocab_size
from bd3lm_scale.config.schema import ModelConfig, RunConfig
from bd3lm_scale.config.sizes import MIB, Memory, count, count_on_rank, memory, stage_layers

GPT2_VOCAB_SIZE = 50258
"""Counted with where neither the configuration nor a tokenizer says otherwise: GPT-2's ids and the mask."""


def dry_run(config: RunConfig, world_size: int | None = None, vocab_size: int | None = None) -> str:
    """What --dry-run prints, after the checks.

    Args:
        config: the run.
        world_size: number of processes; None for the smallest number the layout allows.
        vocab_size: the tokenizer's ids including the mask, where known.

    Raises:
        ConfigError: if the run could not start.
    """
    smallest = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    check(config, world_size or smallest, vocab_size)
    note = "" if world_size else f"shown for {smallest} processes, the smallest number this layout allows\n"
    return note + summary(config, world_size or smallest, vocab_size)


def summary(config: RunConfig, world_size: int, vocab_size: int | None = None) -> str:
    """What this configuration does on world_size processes; it must have passed config.checks.problems.

    Args:
        config: the run.
        world_size: number of processes.
        vocab_size: the tokenizer's ids including the mask, where known.
    """
    known = vocab_size or config.model.vocab_size
    vocab = known or GPT2_VOCAB_SIZE
    note = "" if known else "  (assumed: no tokenizer read yet)"
    lines = [
        f"{config.run_dir}: {_objective(config)}, {config.precision}, seed {config.seed}",
        f"layout      {_layout(config, world_size)}",
        f"model       {config.model.num_layers} layers, width {config.model.hidden_size}, "
        f"{_heads(config.model)}, vocabulary {vocab:,} padded to {padded_vocab_size(vocab):,}{note}",
        f"parameters  {count(config, vocab):,}, without embedding and head "
        f"{count(config, vocab, with_embeddings=False):,}",
        f"step        {_step(config, world_size)}",
        f"training    {config.train.steps:,} steps = {_amount(_num_tokens(config))} tokens",
        "",
        *_stage_table(config, world_size, vocab),
        "",
        "memory per rank in MiB (activations and head: estimates, head at its worst)",
        *_memory_table(config, world_size, vocab),
    ]
    return "\n".join(lines)


def _heads(model: ModelConfig) -> str:
    """The heads, and what is not the paper's network."""
    groups = f" ({model.num_kv_heads} of keys and values)" if model.num_kv_heads else ""
    kinds = [kind for kind, usual in ((model.norm, "layernorm"), (model.mlp, "gelu")) if kind != usual]
    return ", ".join([f"{model.num_heads} heads{groups}", *kinds])


def _num_tokens(config: RunConfig) -> int:
    return config.train.steps * config.train.global_batch_size * config.data.context_length


def _amount(number: float) -> str:
    """262144000000 as "262.1 billion"."""
    for size, name in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:,.1f}{name}"
    return f"{number:,.0f}"


def _objective(config: RunConfig) -> str:
    objective, length = config.diffusion.objective, config.data.context_length
    stages = [f"{stage.block_size} ({stage.steps:,} steps)" for stage in config.diffusion.block_size_schedule]
    sizes = ", ".join([*stages, f"then {config.block_size}" if stages else str(config.block_size)])
    blocks = f", blocks of {sizes}" if objective == "bd3lm" else ""
    return f"{objective}, rows of {length} tokens{blocks}"


def _layout(config: RunConfig, world_size: int) -> str:
    parallel = config.parallel
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    chunks = parallel.virtual_pipeline_parallel_size or 1
    replicas = world_size // (tensor * stages)
    parts = [
        f"{world_size} = tensor {tensor} x pipeline {stages} x data {replicas}",
        f"ZeRO-{config.optim.zero_stage}",
        *([f"interleaved {chunks}"] if chunks > 1 else []),
        *(["sequence parallel"] if parallel.sequence_parallel else []),
        *([f"recompute {parallel.recompute}"] if parallel.recompute != "none" else []),
    ]
    return ", ".join(parts)


def _step(config: RunConfig, world_size: int) -> str:
    """Rows, micro-batches and what padding the last ones costs."""
    parallel, train = config.parallel, config.train
    replicas = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    micro_steps = num_micro_batches(config, replicas)
    computed = micro_steps * replicas * train.micro_batch_size
    idle = computed - train.global_batch_size
    text = (
        f"{train.global_batch_size} rows x {config.data.context_length} = "
        f"{train.global_batch_size * config.data.context_length:,} tokens, "
        f"{micro_steps} micro-batches of {train.micro_batch_size} rows per rank"
    )
    return f"{text}; {idle} zero-weight rows of {computed} ({idle / computed:.1%} of the work)" if idle else text


def _stage_table(config: RunConfig, world_size: int, vocab: int) -> list[str]:
    """Who holds what: one line per pipeline stage."""
    tensor, stages = config.parallel.tensor_parallel_size, config.parallel.pipeline_parallel_size
    per_stage = world_size // stages
    shard = padded_vocab_size(vocab) // tensor
    rows = [("stage", "ranks", "layers", "vocabulary ids per rank", "parameters per rank", "optimizer MiB per rank")]
    for stage, layers in enumerate(stage_layers(config)):
        ends = [name for name, here in (("embedding", stage == 0), ("head", stage == stages - 1)) if here]
        ranges = f"{', '.join(ends)}: {shard:,} each" if ends else "-"
        sizes = memory(config, world_size, vocab, stage)
        optimizer = (sizes.masters + sizes.adam + sizes.ema) / MIB
        ranks = f"{stage * per_stage}-{(stage + 1) * per_stage - 1}"
        size = count_on_rank(config, vocab, stage)
        rows.append((str(stage), ranks, _runs(layers), ranges, f"{size:,}", f"{optimizer:,.0f}"))
    return _table(rows)


def _memory_table(config: RunConfig, world_size: int, vocab: int) -> list[str]:
    names = [item.name for item in fields(Memory)]
    rows: list[tuple[str, ...]] = [("stage", *names, "total")]
    for stage in range(config.parallel.pipeline_parallel_size):
        sizes = memory(config, world_size, vocab, stage)
        figures = [*(getattr(sizes, name) for name in names), sizes.total]
        rows.append((str(stage), *(f"{figure / MIB:,.0f}" for figure in figures)))
    return _table(rows)


def _runs(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 6, 7, 8] as "0-2, 6-8"."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
