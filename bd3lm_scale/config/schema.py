"""RunConfig: everything a run is, in one typed, frozen tree.

Defaults < YAML file < `a.b=c` on the command line. No interpolation, no code in YAML. A part receives its own
section, never the whole tree.

A field's type says what it may hold on its own: pydantic checks it whenever a section is made, and config/fields.py
reads it for the messages. What fields demand of each other stands in config/checks.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from bd3lm_scale.diffusion.registry import SAMPLERS, SCHEDULES

MISSING = "???"
"""Stands for a value that has to be given."""

MOST = 1_000_000_000
"""Upper end of whole numbers without a smaller one: keeps products of three of them inside a float's exact range."""


def _integral(value: Any) -> Any:
    """1e6 is a float in YAML and a fine number of steps."""
    is_integral = isinstance(value, float) and math.isfinite(value) and value == int(value)
    return int(value) if is_integral else value


def _usable_text(text: str) -> str:
    """Paths and names: given, without interpolation, and on one line."""
    if text == MISSING:
        raise PydanticCustomError("missing_value", "is required")
    if "${" in text:
        raise PydanticCustomError("interpolation", "interpolation is not supported")
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text):
        raise PydanticCustomError("control_characters", "must be one line without control characters")
    return text


class NameIn:
    """A name that a registry holds when the value is checked, or one of a few others."""

    def __init__(self, registry: Mapping[str, object], *others: str):
        self.registry, self.others = registry, others

    @property
    def choices(self) -> tuple[str, ...]:
        """All names, as of now."""
        return (*self.others, *self.registry)

    def __call__(self, name: str) -> str:
        """The name, where it is one of them."""
        if name not in self.choices:
            raise PydanticCustomError("not_registered", "must be one of those registered")
        return name


# Strict: nothing is converted silently, except whole floats to whole numbers and whole numbers to floats.
Whole = Annotated[int, BeforeValidator(_integral), Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1), AfterValidator(_usable_text)]

NonNegativeWhole = Annotated[Whole, Field(ge=0, le=MOST)]
PositiveWhole = Annotated[Whole, Field(ge=1, le=MOST)]
Width = Annotated[Whole, Field(ge=1, le=1_000_000)]
Ranks = Annotated[Whole, Field(ge=1, le=100_000)]
Stages = Annotated[Whole, Field(ge=1, le=1_000)]
Seed = Annotated[Whole, Field(ge=0, le=2**63 - 1)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Factor = Annotated[Number, Field(gt=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Share = Annotated[Number, Field(gt=0, le=1)]
Time = Annotated[Number, Field(ge=0, le=1)]
Amount = Annotated[Number, Field(gt=0, le=MOST)]
Weights = Literal["ema", "raw"]

_SECTION = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_SECTION)
class MixtureSource:
    """One dataset of a mixture."""

    path: Text = MISSING
    weight: Positive = 1.0


@dataclass(frozen=True, config=_SECTION)
class DataConfig:
    """Which tokens are read, and how."""

    path: Text | None = None
    """Folder written by tools/prepare_data.py (train/, validation/, tokenizer/); local or a URL."""
    mixture: tuple[MixtureSource, ...] = ()
    """Several such folders with weights, in place of `path`."""
    context_length: PositiveWhole = 1024
    """L, tokens per row."""
    shuffle_window: PositiveWhole = 16
    """Shards whose rows are permuted together."""
    workers: Annotated[Whole, Field(ge=0, le=4096)] = 2
    """Background reader processes per rank; 0 reads in the training process."""
    prefetch_steps: PositiveWhole = 2
    """Global batches read ahead."""
    cache_dir: Text | None = None
    """Where remote shards are cached, shared by the ranks of a node; default: in $SLURM_TMPDIR, $TMPDIR or /tmp."""
    cache_size_gb: Amount = 100.0
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """What to do with a shard that stays unreadable after all retries."""
    retries: NonNegativeWhole = 5
    timeout_seconds: Amount = 60.0
    packing: Literal["stream", "documents"] = "stream"
    """stream: rows are cut from one endless text; documents: whole documents (or pieces of one longer than L) share a
    row without seeing each other (docs/data.md)."""
    restart_positions: Flag = True
    """Count rotary positions from each document's start; with data.packing=documents only."""
    wrap_rows: Flag = False
    """Put BOS before and EOS after each row (L - 2 tokens of text), as the paper's zero-shot evaluations do."""
    stream_text: Flag = False
    """Tokenize third-party text shards on the fly (quick trials; not exactly resumable)."""
    tokenizer: Text | None = None
    """Tokenizer folder or file for stream_text; otherwise the one beside the shards is used."""


@dataclass(frozen=True, config=_SECTION)
class ClipSearchConfig:
    """The data-driven clipped schedule (paper, Section 5.2)."""

    enabled: Flag = True
    """Measure the variance of every candidate interval at validation."""
    apply: Flag = True
    """Train on the best interval found; false only logs the table (diffusion.clip_low/high stay in force)."""
    widths: tuple[Share, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    step: Share = 0.05
    every_validations: PositiveWhole = 1


@dataclass(frozen=True, config=_SECTION)
class BlockSizeStage:
    """A stretch of training with blocks of another size."""

    block_size: PositiveWhole = 1
    steps: PositiveWhole = 1000
    clip_low: Time | None = None
    """Default: diffusion.clip_low. 1 and 1 train blocks of one token as an exact likelihood."""
    clip_high: Share | None = None
    """Default: diffusion.clip_high."""


@dataclass(frozen=True, config=_SECTION)
class DiffusionConfig:
    """The objective."""

    objective: Literal["bd3lm", "mdlm", "ar", "sedd"] = "bd3lm"
    block_size: PositiveWhole = 16
    """L', tokens per block; bd3lm only (mdlm and sedd use the whole row, ar is causal)."""
    block_size_schedule: tuple[BlockSizeStage, ...] = ()
    """Sizes that training goes through before block_size (bd3lm), as [{block_size: 1, steps: 500}, ...]; each begins
    with its clip interval. Evaluation outside training, sampling and exports use block_size."""
    schedule: Annotated[Text, AfterValidator(NameIn(SCHEDULES))] = "loglinear"
    clip_low: Time = 0.0
    """beta: training times are drawn from U[max(clip_low, time_epsilon), clip_high]."""
    clip_high: Share = 1.0
    """omega; clip_low = clip_high = 1 trains L'=1 as an exact likelihood."""
    time_epsilon: Annotated[Number, Field(gt=0, le=0.5)] = 1e-3
    """Smallest time, also in evaluation."""
    time_conditioning: Flag | None = None
    """Feed the noise level to adaLN; default: true for sedd, false otherwise."""
    ignore_bos: Flag = True
    """Keep each row's first token clean and leave it out of evaluation (always false for ar)."""
    resample: Flag | None = False
    """Redraw blocks whose masked share leaves the clip interval, as the published recipe does (docs/method.md); null:
    where blocks of bd3lm have more than one token and mask_counts is binomial."""
    mask_counts: Literal["binomial", "stratified"] = "binomial"
    """binomial: each token by itself at the mask rate; stratified: the number of masked tokens first, all equally often
    over the global batch, then their places (docs/method.md)."""
    shift_targets: Flag = False
    """Read a token's prediction one position before it, as autoregressive models do, not at its own (bd3lm, mdlm;
    for weights converted from such models, docs/conversion.md)."""
    mdlm_loss_scale: Flag = False
    """Use the sigma parameterization of the loss weight (SEDD and MDLM baselines of Sahoo et al.)."""
    clip_search: ClipSearchConfig = field(default_factory=ClipSearchConfig)


@dataclass(frozen=True, config=_SECTION)
class ModelConfig:
    """The network; its defaults are the paper's DiT."""

    num_layers: Annotated[Whole, Field(ge=1, le=10_000)] = 12
    hidden_size: Width = 768
    num_heads: Width = 12
    cond_dim: Width = 128
    mlp_ratio: Annotated[Whole, Field(ge=1, le=1_000)] = 4
    dropout: Decay = 0.1
    tie_embeddings: Flag = False
    adaln: Flag = True
    """Adaptive layer norm driven by the time embedding (ar never has it)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Before attention, MLP and head; in fp32, with a weight and no bias."""
    norm_eps: Positive = 1e-5
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """SwiGLU multiplies by a gate of the same width."""
    ffn_hidden_size: Width | None = None
    """Inner width of the MLP; default: mlp_ratio * hidden_size."""
    num_kv_heads: Width | None = None
    """Heads of keys and values, shared by groups of query heads; default: num_heads."""
    head_dim: Width | None = None
    """Width of a head; default: hidden_size / num_heads."""
    qk_norm: Flag = False
    """Norm of every head's queries and keys, before they are rotated."""
    qkv_bias: Flag = False
    mlp_bias: Flag = True
    head_bias: Flag = True
    """Of the output projection onto the vocabulary."""
    rope_theta: Positive = 10000.0
    rope_scaling: Literal["none", "llama3", "linear"] = "none"
    """How rotary frequencies are slowed down for contexts longer than the original one."""
    rope_factor: Annotated[Number, Field(ge=1)] = 8.0
    """How many times slower (linear: all frequencies, llama3: the slow ones)."""
    rope_low_freq_factor: Positive = 1.0
    """llama3: frequencies of fewer turns than this in the original context are slowed down fully."""
    rope_high_freq_factor: Positive = 4.0
    """llama3: frequencies of more turns than this stay."""
    rope_original_context_length: PositiveWhole = 8192
    """llama3: the context the frequencies were trained with."""
    vocab_size: Annotated[Whole, Field(ge=2, le=MOST)] | None = None
    """Ids including the mask; default: what the tokenizer beside the shards has."""
    attention: Literal["auto", "flex", "chunked", "dense"] = "auto"
    """auto is flex on CUDA, chunked on CPU."""


@dataclass(frozen=True, config=_SECTION)
class ParallelConfig:
    """How the model is cut over ranks; the data-parallel size is what the world leaves."""

    tensor_parallel_size: Ranks = 1
    pipeline_parallel_size: Stages = 1
    virtual_pipeline_parallel_size: Stages | None = None
    """Model chunks per pipeline stage (interleaved schedule); 1 is the same as null."""
    sequence_parallel: Flag = False
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation."""
    experimental: Flag = False
    """Allow combinations that work but are not proven in every detail (ZeRO-2 with pipeline stages)."""

    @property
    def interleaved_chunks(self) -> int | None:
        """Model chunks per stage where the schedule is interleaved, else None."""
        chunks = self.virtual_pipeline_parallel_size
        return None if chunks == 1 else chunks


@dataclass(frozen=True, config=_SECTION)
class OptimConfig:
    """AdamW under DeepSpeed ZeRO."""

    zero_stage: Whole = 1
    lr: Positive = 3e-4
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    weight_decay_on: Literal["all", "matrices"] = "all"
    """What decays: every parameter, or all but the weights of norms and biases."""
    grad_clip: Positive = 1.0
    warmup_steps: NonNegativeWhole = 2500
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    decay_steps: PositiveWhole | None = None
    """The step at which the cosine reaches min_lr; default: train.steps at the run's first start, kept from then on."""
    min_lr: NonNegative = 0.0
    """Where the cosine ends."""
    ema_decay: Decay = 0.9999
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """How gradients are summed over data-parallel ranks; bf16 halves the traffic and rounds every sum."""


@dataclass(frozen=True, config=_SECTION)
class TrainConfig:
    """The training loop."""

    steps: PositiveWhole = 1_000_000
    global_batch_size: PositiveWhole = 512
    """Rows per optimizer step, over all ranks."""
    micro_batch_size: PositiveWhole = 8
    """Rows per rank and micro-step."""
    init_from: Text | None = None
    """Checkpoint (native) whose weights start a new run."""
    init_weights: Weights = "ema"
    """Which weights of init_from."""
    exact_resume: Flag = True
    """Refuse settings under which a resumed run could differ from an uninterrupted one."""
    deterministic: Flag = False
    """Deterministic GPU kernels (slower)."""
    compile: Flag = False
    """torch.compile the layers (GPU); off by default until it has been measured on one."""
    threads: Annotated[Whole, Field(ge=0, le=4096)] = 1
    """CPU threads per rank when training on the CPU; 0 leaves torch's default."""
    time_limit_minutes: Amount | None = None
    """Save and stop after this long."""


@dataclass(frozen=True, config=_SECTION)
class EvaluationConfig:
    """Validation during training and the evaluate command."""

    every_steps: PositiveWhole = 2500
    rows: PositiveWhole | None = 1024
    """Validation rows per evaluation during training; null uses all."""
    micro_batch_size: PositiveWhole | None = None
    """Default: train.micro_batch_size."""
    draws: PositiveWhole = 1
    """Noise draws per row."""
    weights: Weights = "ema"


@dataclass(frozen=True, config=_SECTION)
class SamplingConfig:
    """The sample command."""

    sampler: Annotated[Text, AfterValidator(NameIn(SAMPLERS, "auto"))] = "auto"
    """auto fits the objective."""
    length: PositiveWhole = 256
    num_samples: PositiveWhole = 1
    batch_size: PositiveWhole = 8
    steps: PositiveWhole = 5000
    """T, denoising steps per block (ancestral) or per sequence (mdlm, sedd)."""
    nucleus_p: Share = 0.9
    top_k: PositiveWhole | None = None
    temperature: NonNegative = 1.0
    """0 is greedy."""
    threshold: NonNegative = 0.9
    """confidence / entropy samplers: tokens above (below) it are accepted together."""
    kv_cache: Flag = True
    cache_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    window: PositiveWhole | None = None
    """Tokens of context attended to; default: data.context_length."""
    recompute_window: Flag = False
    """Recompute the sliding window from its tokens instead of keeping cached states."""
    stop_at_eos: Flag = False
    min_entropy: NonNegative | None = None
    """Stop when the unigram entropy (nats) of the last 256 tokens falls below it."""
    max_redraws: NonNegativeWhole = 0
    """Draw a sample that was stopped for low entropy again, at most this often (the paper's fixed lengths: 10)."""
    seed: Seed = 1
    weights: Weights = "ema"


@dataclass(frozen=True, config=_SECTION)
class CheckpointConfig:
    """What is saved, when, and what is kept."""

    every_steps: PositiveWhole = 1000
    keep_last: PositiveWhole = 3
    keep_every: PositiveWhole | None = None
    """Keep also every checkpoint whose step is a multiple of this."""
    asynchronous: Flag = True


@dataclass(frozen=True, config=_SECTION)
class RuntimeConfig:
    """Watching over the run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    on_nan: Literal["skip", "rollback", "stop"] = "skip"
    """What to do with a non-finite loss or gradient."""
    max_skips: PositiveWhole = 10
    """Skipped updates in a row before the run stops."""
    max_rollbacks: NonNegativeWhole = 3
    """Rollbacks without a good step beyond the bad one before the run stops."""
    spike_factor: Factor | None = None
    """Treat a loss above this multiple of its running median as on_nan; null: off."""
    dump_bad_batches: Flag = False
    """Keep the rows of every bad step in run_dir/bad_batches."""
    collective_timeout_seconds: Amount = 1800.0
    hang_factor: Factor = 20.0
    """A step longer than this multiple of the median step is a hang ..."""
    hang_min_seconds: Amount = 300.0
    """... but never before this many seconds."""
    heartbeat_seconds: Amount = 5.0
    silent_seconds: Amount = 120.0
    """A rank whose heartbeat stands still this long while others' go on is taken for dead by the launcher."""
    straggler_factor: Factor = 1.5


@dataclass(frozen=True, config=_SECTION)
class LoggingConfig:
    """Where figures go; metrics.jsonl in the run folder is always written and is the truth."""

    every_steps: PositiveWhole = 1
    progress: Flag = True
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: Text = "bd3lm_scale"
    wandb_name: Text | None = None


@dataclass(frozen=True, config=_SECTION)
class RunConfig:
    """One run."""

    run_dir: Text = MISSING
    seed: Seed = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: weights and matmuls; masters, residual stream, softmax, norms and loss stay fp32."""
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def block_size(self) -> int:
        """S in force: L' for bd3lm, 1 for ar, the whole row for mdlm and sedd."""
        if self.diffusion.objective == "bd3lm":
            return self.diffusion.block_size
        return 1 if self.diffusion.objective == "ar" else self.data.context_length

    @property
    def document_block(self) -> int:
        """Documents of packed rows begin at multiples of this: L' for bd3lm, anywhere for the others."""
        return self.diffusion.block_size if self.diffusion.objective == "bd3lm" else 1

    @property
    def sequence_length(self) -> int:
        """P, positions the transformer reads per row: L, and for bd3lm the clean tokens behind the noisy ones.

        No noisy block sees the last clean one, so it is left out: P = 2L - S, with the smallest S that training goes
        through. Sequence parallelism cuts P evenly, and leaves out the largest part of that block that allows it.
        """
        if self.diffusion.objective != "bd3lm":
            return self.data.context_length
        ranks = self.parallel.tensor_parallel_size if self.parallel.sequence_parallel else 1
        smallest = min([self.block_size, *(stage.block_size for stage in self.diffusion.block_size_schedule)])
        return 2 * self.data.context_length - smallest // ranks * ranks

    @property
    def scores_noisy_half_only(self) -> bool:
        """The last layer's clean rows serve as keys and values only: true of bd3lm, where L can be cut evenly too.

        Not where targets are shifted: then the clean token before a block predicts its first one.
        """
        ranks = self.parallel.tensor_parallel_size if self.parallel.sequence_parallel else 1
        spares = self.diffusion.objective == "bd3lm" and not self.diffusion.shift_targets
        return spares and self.data.context_length % ranks == 0

    @property
    def uses_adaln(self) -> bool:
        """AR has no time embedding and no adaptive layer norm."""
        return self.diffusion.objective != "ar" and self.model.adaln

    @property
    def time_conditioning(self) -> bool:
        """Whether the noise level reaches the network."""
        if self.diffusion.time_conditioning is None:
            return self.diffusion.objective == "sedd"
        return self.diffusion.time_conditioning and self.uses_adaln
