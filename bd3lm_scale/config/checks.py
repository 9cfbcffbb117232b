"""What the parts of a configuration demand of each other, found before a device is touched.

Every problem is one line `field (value): reason; use remedy`; layouts that cannot run name the nearest one that can.
"""

import math
from dataclasses import replace

from bd3lm_scale.config.schema import MISSING, ModelConfig, RunConfig
from bd3lm_scale.config.stages import stages
from bd3lm_scale.diffusion.registry import samplers_for
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.model.parameters import VOCAB_MULTIPLE, padded_vocab_size

MIN_FLEX_WIDTH = 16
"""FlexAttention's kernels need heads at least this wide."""


def check(config: RunConfig, world_size: int | None = None, vocab_size: int | None = None) -> None:
    """Raise ConfigError with all problems, if there are any."""
    found = problems(config, world_size, vocab_size)
    if found:
        raise ConfigError(found)


def problems(config: RunConfig, world_size: int | None = None, vocab_size: int | None = None) -> list[str]:
    """Every reason why this configuration cannot run, one line each.

    Args:
        config: the run.
        world_size: processes that will run; None skips what depends on it.
        vocab_size: the tokenizer's ids including the mask; None where it is not known yet.
    """
    checks = (_data, _diffusion, _model, _tensor_parallel, _pipeline, _zero, _training, _sampling, _cadences)
    found = [line for part in checks for line in part(config)]
    if vocab_size is not None and config.model.vocab_size not in (None, vocab_size):
        found.append(
            f"model.vocab_size ({config.model.vocab_size}): the tokenizer has {vocab_size} ids with the mask; "
            f"use {vocab_size}, or null to take it from the tokenizer"
        )
    if world_size is not None:
        found += _world(config, world_size)
    return found


def num_micro_batches(config: RunConfig, data_parallel_size: int) -> int:
    """M: micro-steps per optimizer step; the last ones may hold zero-weight rows."""
    return math.ceil(config.train.global_batch_size / (data_parallel_size * config.train.micro_batch_size))


def _nearest_multiple(value: int, factor: int) -> str:
    low, high = value // factor * factor, (value // factor + 1) * factor
    return f"{low} or {high}" if low else str(high)


def _nearest(wanted: int, legal: list[int]) -> int:
    """The legal value closest to the wanted one (the smaller of two equally close)."""
    return min(legal, key=lambda value: (abs(value - wanted), value))


def _divisors(number: int) -> list[int]:
    """In rising order; a number of ten digits takes a millisecond."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _data(config: RunConfig) -> list[str]:
    data, found = config.data, []
    if data.path is None and not data.mixture:
        found.append(
            "data.path (null): nothing to read; use a folder written by tools/prepare_data.py, or data.mixture"
        )
    if data.path is not None and data.mixture:
        found.append(f"data.path ({data.path}): given together with data.mixture; use one of the two")
    if data.stream_text and config.train.exact_resume:
        found.append(
            "data.stream_text (true): text tokenized on the fly cannot be resumed exactly; "
            "use tools/prepare_data.py first, or train.exact_resume=false"
        )
    if data.packing == "documents" and data.wrap_rows:
        found.append("data.wrap_rows (true): wraps rows of a stream; use false, or data.packing=stream")
    inside = [s.block_size for s in config.diffusion.block_size_schedule if config.document_block % s.block_size]
    if data.packing == "documents" and inside:
        found.append(
            f"data.packing (documents): documents begin at multiples of diffusion.block_size {config.document_block}, "
            f"inside blocks of {inside[0]} of the schedule; use sizes that divide it, or data.packing=stream"
        )
    if data.packing == "documents" and data.stream_text:
        found.append("data.packing (documents): text tokenized on the fly is a stream; use data.packing=stream")
    if data.stream_text and data.tokenizer is None:
        found.append("data.tokenizer (null): data.stream_text has no tokenizer beside it; use its folder or file")
    return found


def _diffusion(config: RunConfig) -> list[str]:
    diffusion, length, found = config.diffusion, config.data.context_length, []
    objective, size = diffusion.objective, diffusion.block_size
    if objective == "bd3lm" and length % size:
        nearest = _nearest(size, _divisors(length))
        found.append(f"diffusion.block_size ({size}): does not divide data.context_length {length}; use {nearest}")
    if length < 2 and (objective == "ar" or diffusion.ignore_bos):
        found.append(f"data.context_length ({length}): a row's first token is not predicted; use at least 2")
    found += _clip_interval(config)
    if objective == "sedd" and diffusion.time_conditioning is False:
        found.append("diffusion.time_conditioning (false): score entropy needs the noise level; use null or true")
    if objective == "sedd" and not config.model.adaln:
        found.append("model.adaln (false): score entropy feeds the noise level through adaptive norms; use true")
    elif diffusion.time_conditioning and not config.model.adaln:
        found.append(
            "diffusion.time_conditioning (true): reaches the network through model.adaln, which is false; "
            "use null or false"
        )
    if objective == "ar" and diffusion.time_conditioning:
        found.append("diffusion.time_conditioning (true): ar has no noise level; use null or false")
    found += _mask_counts(config)
    found += _block_sizes(config)
    if diffusion.shift_targets and objective in ("ar", "sedd"):
        found.append(f"diffusion.shift_targets (true): {objective} has one alignment only; use false, or bd3lm or mdlm")
    elif diffusion.shift_targets and not diffusion.ignore_bos:
        found.append(
            "diffusion.shift_targets (true): nothing stands before a row's first token to predict it; "
            "use diffusion.ignore_bos=true"
        )
    if diffusion.mdlm_loss_scale and objective not in ("mdlm", "sedd"):
        found.append(f"diffusion.mdlm_loss_scale (true): not a parameterization of {objective}; use false")
    elif diffusion.mdlm_loss_scale and diffusion.schedule != "loglinear":
        found.append(
            f"diffusion.mdlm_loss_scale (true): defined for the loglinear schedule, not {diffusion.schedule}; "
            "use false, or diffusion.schedule=loglinear"
        )
    return found


def _block_sizes(config: RunConfig) -> list[str]:
    """What the stages of a block-size schedule make impossible, beyond what is wrong without them."""
    if not config.diffusion.block_size_schedule:
        return []
    # its absence is found elsewhere, and would be an error of the stages' configurations
    *before, last = stages(replace(config, run_dir="unnamed") if config.run_dir == MISSING else config)
    name = "diffusion.block_size_schedule"
    if config.diffusion.objective != "bd3lm":
        return [f"{name} ({len(before)} stages): {config.diffusion.objective} has no block size; use []"]
    known, found = set(_diffusion(last.config)), []
    for stage in before:
        size = stage.config.diffusion.block_size
        for line in _diffusion(stage.config):
            if line not in known:
                found.append(f"{name} (stage {stage.index + 1}, blocks of {size}): there {line}")
    return found


def _mask_counts(config: RunConfig) -> list[str]:
    """What decides how many tokens of a block are masked: stratified counts, or the binomial with `resample`."""
    diffusion, size, found = config.diffusion, config.block_size, []
    name = f"diffusion.mask_counts ({diffusion.mask_counts})"
    if diffusion.mask_counts == "stratified":
        is_told = diffusion.time_conditioning or (diffusion.objective == "sedd" and diffusion.time_conditioning is None)
        if diffusion.objective == "ar":
            found.append(f"{name}: ar masks nothing; use binomial")
        elif is_told:
            found.append(f"{name}: a network that is told the time needs masks drawn at that time; use binomial")
        if diffusion.resample:
            found.append(f"{name}: leaves diffusion.resample nothing to redraw; use diffusion.resample=false")
        return found
    redraws = diffusion.objective == "bd3lm" and size > 1 if diffusion.resample is None else diffusion.resample
    if not redraws:
        return found
    if diffusion.objective == "ar":
        return ["diffusion.resample (true): redraws masks, and ar has none; use false"]
    name = f"diffusion.resample ({'null' if diffusion.resample is None else 'true'})"
    low, high = diffusion.clip_low, diffusion.clip_high
    least = low if low > diffusion.time_epsilon else 0.0
    # under other schedules the shares lie between the mask rates at these times; the first step checks those
    fewest, most = max(1, math.ceil(least * size - 1e-9)), math.floor(high * size + 1e-9)
    if diffusion.schedule == "loglinear" and fewest > most:
        found.append(
            f"{name}: no number of masked tokens above 0 in a block of {size} gives a share in "
            f"[{low}, {high}]; use resample=false or another clip interval"
        )
    return found


def _clip_interval(config: RunConfig) -> list[str]:
    diffusion, found = config.diffusion, []
    low, high, search = diffusion.clip_low, diffusion.clip_high, diffusion.clip_search
    if low > high:
        found.append(f"diffusion.clip_low ({low}): above diffusion.clip_high {high}; use at most {high}")
    elif low == high and not (low == 1 and config.block_size == 1):
        remedy = "use clip_low below it" + (" (1, 1 is for block_size 1)" if low == 1 else "")
        found.append(f"diffusion.clip_low ({low}): equal to diffusion.clip_high, which trains one time only; {remedy}")
    elif high <= diffusion.time_epsilon:
        found.append(
            f"diffusion.clip_high ({high}): not above diffusion.time_epsilon {diffusion.time_epsilon}; "
            "use for example 1"
        )
    if search.enabled and not search.widths:
        found.append("diffusion.clip_search.widths ([]): nothing to search; use diffusion.clip_search.enabled=false")
    return found


def _model(config: RunConfig) -> list[str]:
    model, found = config.model, []
    width, heads = model.hidden_size, model.num_heads
    head = model.head_dim or width // heads
    if model.head_dim is None and width % heads:
        nearest = _nearest(heads, _divisors(width))
        found.append(
            f"model.num_heads ({heads}): does not divide model.hidden_size {width}; "
            f"use {nearest}, or set model.head_dim"
        )
    elif head % 2 and model.head_dim is None:
        found.append(
            f"model.num_heads ({heads}): rotary positions need an even head width, not {head}; "
            f"use a hidden_size that is a multiple of {2 * heads}"
        )
    elif head % 2:
        found.append(f"model.head_dim ({head}): rotary positions need an even head width; use {head + 1}")
    elif model.attention == "flex" and head < MIN_FLEX_WIDTH:
        found.append(
            f"model.attention (flex): needs heads at least {MIN_FLEX_WIDTH} wide, not {head}; "
            "use auto or chunked, or fewer heads"
        )
    if model.num_kv_heads is not None and heads % model.num_kv_heads:
        nearest = _nearest(model.num_kv_heads, _divisors(heads))
        found.append(
            f"model.num_kv_heads ({model.num_kv_heads}): does not divide model.num_heads {heads}; use {nearest}"
        )
    if model.rope_scaling == "llama3" and model.rope_high_freq_factor <= model.rope_low_freq_factor:
        found.append(
            f"model.rope_high_freq_factor ({model.rope_high_freq_factor}): not above model.rope_low_freq_factor "
            f"{model.rope_low_freq_factor}; use for example {4 * model.rope_low_freq_factor}"
        )
    on_cpu = config.runtime.device == "cpu"
    if model.attention == "flex" and on_cpu:
        found.append("model.attention (flex): has no backward pass on the CPU; use auto or chunked")
    if config.train.compile and on_cpu:
        found.append("train.compile (true): is for GPUs; use false with runtime.device=cpu")
    return found


def _must_divide(model: ModelConfig) -> dict[str, int]:
    """What tensor parallelism cuts: its size has to divide every one of these."""
    vocab = VOCAB_MULTIPLE if model.vocab_size is None else padded_vocab_size(model.vocab_size)
    inner = {"model.hidden_size": model.hidden_size} if model.ffn_hidden_size is None else {}
    if model.ffn_hidden_size is not None:
        inner = {"model.ffn_hidden_size": model.ffn_hidden_size}
    vocabulary = "the padded vocabulary" if model.vocab_size else "the vocabulary's padding"
    return {"model.num_heads": model.num_heads, **inner, vocabulary: vocab}


def _cuts_groups(model: ModelConfig, size: int) -> bool:
    """Whether so many ranks can hold whole groups of heads each, or share one group's rows evenly."""
    groups = model.num_kv_heads or model.num_heads
    if groups % size == 0:
        return True
    rows = (model.num_heads + 2 * groups) * (model.head_dim or model.hidden_size // model.num_heads)
    return size % groups == 0 and rows % size == 0


def _tensor_sizes(model: ModelConfig) -> list[int]:
    """Every tensor-parallel size this network can be cut into."""
    return [size for size in _divisors(math.gcd(*_must_divide(model).values())) if _cuts_groups(model, size)]


def _tensor_parallel(config: RunConfig) -> list[str]:
    parallel, model, found = config.parallel, config.model, []
    size = parallel.tensor_parallel_size
    indivisible = [f"{what} {number}" for what, number in _must_divide(model).items() if number % size]
    if indivisible:
        found.append(
            f"parallel.tensor_parallel_size ({size}): does not divide {' and '.join(indivisible)}; "
            f"use {_nearest(size, _tensor_sizes(model))}"
        )
    elif not _cuts_groups(model, size):
        legal = ", ".join(map(str, _tensor_sizes(model)))
        found.append(
            f"parallel.tensor_parallel_size ({size}): cannot share model.num_kv_heads "
            f"{model.num_kv_heads or model.num_heads} heads of keys and values; use one of {legal}"
        )
    if parallel.sequence_parallel and size == 1:
        found.append(
            "parallel.sequence_parallel (true): splits over tensor-parallel ranks, and there is one; use false"
        )
    if parallel.sequence_parallel and config.sequence_length % size:
        found.append(
            f"parallel.sequence_parallel (true): the transformer reads {config.sequence_length} positions, not "
            f"a multiple of tensor_parallel_size {size}; "
            f"use data.context_length={_nearest_multiple(config.data.context_length, size)}"
        )
    return found


def _pipeline(config: RunConfig) -> list[str]:
    parallel, layers, found = config.parallel, config.model.num_layers, []
    stages, chunks = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    if chunks is not None and chunks > 1 and stages == 1:
        found.append(
            f"parallel.virtual_pipeline_parallel_size ({chunks}): interleaves pipeline stages, and there is one; "
            "use null, or pipeline_parallel_size of at least 2"
        )
    elif layers % (stages * (chunks or 1)):
        total = stages * (chunks or 1)
        nearest = _nearest(stages, [s for s in _divisors(layers) if layers % (s * (chunks or 1)) == 0] or [1])
        keep = "" if layers % (nearest * (chunks or 1)) == 0 else " with virtual_pipeline_parallel_size=null"
        found.append(
            f"parallel.pipeline_parallel_size ({stages}): {total} model chunks do not divide "
            f"model.num_layers {layers}; use pipeline_parallel_size={nearest}{keep}, "
            f"or num_layers={_nearest_multiple(layers, total)}"
        )
    if stages > 1 and config.uses_adaln and config.model.cond_dim > config.model.hidden_size:
        found.append(
            f"model.cond_dim ({config.model.cond_dim}): travels between pipeline stages as one row of width "
            f"hidden_size {config.model.hidden_size}; use at most that, or pipeline_parallel_size=1"
        )
    return found


def _zero(config: RunConfig) -> list[str]:
    stage, stages = config.optim.zero_stage, config.parallel.pipeline_parallel_size
    if stage == 0:
        return ["optim.zero_stage (0): keeps no fp32 masters that can be saved; use 1 (the same result, less memory)"]
    if stage not in (1, 2, 3):
        return [f"optim.zero_stage ({stage}): must be 1, 2 or 3; use {1 if stage < 0 else 3}"]
    if stages == 1 or stage == 1:
        return []
    nearest = "use zero_stage=1, or pipeline_parallel_size=1"
    if stage == 3:
        return [f"optim.zero_stage (3): cannot gather weights across {stages} pipeline stages (it hangs); {nearest}"]
    if config.model.tie_embeddings:
        return [f"optim.zero_stage (2): cannot share tied embeddings between pipeline stages; {nearest}"]
    if not config.parallel.experimental:
        return [
            f"optim.zero_stage (2): with {stages} pipeline stages it is experimental; {nearest}, "
            "or parallel.experimental=true"
        ]
    return []


def _training(config: RunConfig) -> list[str]:
    optim = config.optim
    found = []
    if optim.min_lr > optim.lr:
        found.append(f"optim.min_lr ({optim.min_lr}): above optim.lr {optim.lr}; use at most {optim.lr}")
    end = optim.decay_steps
    if end is not None and optim.schedule == "constant":
        found.append(f"optim.decay_steps ({end}): a constant rate has no end; use null, or optim.schedule=cosine")
    return found


def _sampling(config: RunConfig) -> list[str]:
    sampling, objective, found = config.sampling, config.diffusion.objective, []
    legal = ("auto", *samplers_for(objective))
    if sampling.sampler not in legal:
        found.append(
            f"sampling.sampler ({sampling.sampler}): does not fit diffusion.objective {objective}; "
            f"use {' or '.join(legal)}"
        )
    if sampling.sampler == "simplex" and (not sampling.kv_cache or sampling.recompute_window):
        found.append(
            "sampling.sampler (simplex): reads distributions, which only cached decoding can; "
            "use sampling.kv_cache=true sampling.recompute_window=false"
        )
    if sampling.sampler == "simplex" and config.parallel.tensor_parallel_size > 1:
        found.append("sampling.sampler (simplex): needs the whole model on a rank; use tensor_parallel_size=1")
    if sampling.sampler == "confidence" and not 0 < sampling.threshold <= 1:
        found.append(f"sampling.threshold ({sampling.threshold}): is a probability here; use a value in (0, 1]")
    size = config.block_size
    if sampling.window is not None and objective == "bd3lm" and sampling.window % size:
        nearest = _nearest_multiple(sampling.window, size)
        found.append(f"sampling.window ({sampling.window}): must hold whole blocks of {size} tokens; use {nearest}")
    return found


def _cadences(config: RunConfig) -> list[str]:
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep_every
    if keep is not None and keep % every:
        return [
            f"checkpoint.keep_every ({keep}): checkpoints are made every {every} steps; "
            f"use {_nearest_multiple(keep, every)}"
        ]
    return []


def _world(config: RunConfig, world_size: int) -> list[str]:
    """world = TP * PP * DP, and enough micro-batches for the interleaved schedule."""
    parallel = config.parallel
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    if world_size < 1 or world_size % (tensor * stages):
        nearest = _nearest_layout(config, world_size)
        sizes = _nearest_multiple(max(world_size, 1), tensor * stages)
        return [
            f"parallel.tensor_parallel_size ({tensor}): {world_size} processes cannot be cut into groups of tensor "
            f"{tensor} x pipeline {stages} = {tensor * stages}; use {sizes} processes, "
            f"or tensor_parallel_size={nearest[0]} pipeline_parallel_size={nearest[1]}"
        ]
    chunks = parallel.virtual_pipeline_parallel_size or 1
    replicas = world_size // (tensor * stages)
    count = num_micro_batches(config, replicas)
    if chunks == 1 or stages == 1 or count % stages == 0:
        return []
    wanted = config.train.micro_batch_size
    micro_batch_size = _nearest_micro_batch_size(config.train.global_batch_size, replicas, stages, wanted)
    remedy = f"use train.micro_batch_size={micro_batch_size}, or " if micro_batch_size else "use "
    rows = _nearest_multiple(count, stages).split(" or ")
    sizes = " or ".join(str(int(m) * replicas * wanted) for m in rows)
    return [
        f"parallel.virtual_pipeline_parallel_size ({chunks}): the interleaved schedule needs micro-batches in "
        f"multiples of {stages} stages, and there are {count}; {remedy}train.global_batch_size={sizes}"
    ]


def _nearest_micro_batch_size(rows: int, replicas: int, stages: int, wanted: int) -> int | None:
    """The size closest to the wanted one under which a replica's micro-batches come in a multiple of the stages."""
    per_replica = math.ceil(rows / replicas)
    # ceil(per_replica / size) = count for sizes from ceil(per_replica / count) to where one micro-batch fewer is enough
    root = math.isqrt(per_replica) + 1
    counts = {*range(1, root + 1), *(math.ceil(per_replica / size) for size in range(1, root + 1))}
    legal = []
    for count in counts:
        low = math.ceil(per_replica / count)
        high = math.ceil(per_replica / (count - 1)) - 1 if count > 1 else rows
        if count % stages == 0 and low <= high:
            legal.append(min(max(wanted, low), high))
    return _nearest(wanted, sorted(legal)) if legal else None


def _nearest_layout(config: RunConfig, world_size: int) -> tuple[int, int]:
    """(TP, PP) closest to the wanted one, in ratio, that this model and number of processes allow."""
    model, parallel = config.model, config.parallel
    chunks = parallel.virtual_pipeline_parallel_size or 1
    legal = [
        (tensor, stages)
        for tensor in _tensor_sizes(model)
        for stages in _divisors(model.num_layers)
        if max(world_size, 1) % (tensor * stages) == 0 and model.num_layers % (stages * chunks) == 0
        and not (stages > 1 and config.optim.zero_stage == 3)
    ]  # fmt: skip

    def distance(layout: tuple[int, int]) -> float:
        return abs(math.log(layout[0] / parallel.tensor_parallel_size)) + abs(
            math.log(layout[1] / parallel.pipeline_parallel_size)
        )

    return min(legal or [(1, 1)], key=distance)
