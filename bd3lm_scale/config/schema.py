"""RunConfig: everything a run is, in one typed, frozen tree.

Defaults < YAML file < `a.b=c` on the command line. No interpolation, no code in YAML. A room receives its own
section, never the whole tree.
"""

import warnings
from dataclasses import dataclass, field

# Megatron says these when it is imported, about libraries that are off here on purpose. Every entry point imports the
# configuration before it, so this is the place to filter them.
warnings.filterwarnings("ignore", message=".*(Apex|apex|Transformer Engine|full scope is deprecated).*")


@dataclass(frozen=True)
class MixtureSource:
    """One dataset of a mixture."""

    path: str = "???"
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """Which tokens are read, and how."""

    path: str | None = None
    """Folder written by tools/prepare_data.py (train/, validation/, tokenizer/); local or a URL."""
    mixture: tuple[MixtureSource, ...] = ()
    """Several such folders with weights, in place of `path`."""
    context_length: int = 1024
    """L, tokens per row."""
    shuffle_window: int = 16
    """Shards whose rows are permuted together."""
    workers: int = 2
    """Background reader processes per rank; 0 reads in the training process."""
    prefetch_steps: int = 2
    """Global batches read ahead."""
    cache_dir: str | None = None
    """Where remote shards are cached, shared by the ranks of a node; default: a folder in the system's cache."""
    cache_size_gb: float = 100.0
    on_bad_shard: str = "stop"
    """stop | skip: what to do with a shard that stays unreadable after all retries."""
    retries: int = 5
    timeout_seconds: float = 60.0
    wrap_rows: bool = False
    """Put BOS before and EOS after each row (L - 2 tokens of text), as the paper's zero-shot evaluations do."""
    stream_text: bool = False
    """Tokenize third-party text shards on the fly (quick trials; not exactly resumable)."""
    tokenizer: str | None = None
    """Tokenizer folder or file for stream_text; otherwise the one beside the shards is used."""


@dataclass(frozen=True)
class ClipSearchConfig:
    """The data-driven clipped schedule (paper, Section 5.2)."""

    enabled: bool = True
    """Measure the variance of every candidate interval at validation."""
    apply: bool = True
    """Train on the best interval found; false only logs the table (diffusion.clip_low/high stay in force)."""
    widths: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    step: float = 0.05
    every_validations: int = 1


@dataclass(frozen=True)
class DiffusionConfig:
    """The objective."""

    objective: str = "bd3lm"
    """bd3lm | mdlm | ar | sedd."""
    block_size: int = 16
    """L', tokens per block; bd3lm only (mdlm and sedd use the whole row, ar is causal)."""
    schedule: str = "loglinear"
    """loglinear | cosine | square | square_root | log."""
    clip_low: float = 0.0
    """beta: training times are drawn from U[max(clip_low, time_epsilon), clip_high]."""
    clip_high: float = 1.0
    """omega; clip_low = clip_high = 1 trains L'=1 as an exact likelihood."""
    time_epsilon: float = 1e-3
    """Smallest time, also in evaluation."""
    time_conditioning: bool | None = None
    """Feed the noise level to adaLN; default: true for sedd, false otherwise."""
    ignore_bos: bool = True
    """Keep each row's first token clean and leave it out of evaluation (always false for ar)."""
    resample: bool = False
    """Redraw blocks whose masked share leaves the clip interval (the reference's trick; docs/method.md)."""
    mdlm_loss_scale: bool = False
    """Use the sigma parameterization of the loss weight (SEDD and MDLM baselines of Sahoo et al.)."""
    clip_search: ClipSearchConfig = field(default_factory=ClipSearchConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The paper's DiT."""

    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    cond_dim: int = 128
    mlp_ratio: int = 4
    dropout: float = 0.1
    tie_embeddings: bool = False
    vocab_size: int | None = None
    """Ids including the mask; default: what the tokenizer beside the shards has."""
    attention: str = "auto"
    """auto | flex | chunked | dense: auto is flex on CUDA, chunked on CPU."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is cut over ranks; the data-parallel size is what the world leaves."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); 1 is the same as null."""
    sequence_parallel: bool = False
    recompute: str = "none"
    """none | selective | full activation recomputation."""
    experimental: bool = False
    """Allow combinations that work but are not proven in every detail (ZeRO-2 with pipeline stages)."""

    @property
    def interleaved_chunks(self) -> int | None:
        """Model chunks per stage where the schedule is interleaved, else None."""
        chunks = self.virtual_pipeline_parallel_size
        return None if chunks == 1 else chunks


@dataclass(frozen=True)
class OptimConfig:
    """AdamW under DeepSpeed ZeRO."""

    zero_stage: int = 1
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup_steps: int = 2500
    schedule: str = "constant"
    """constant | cosine, after the warm-up."""
    min_lr: float = 0.0
    """Where the cosine ends."""
    ema_decay: float = 0.9999
    reduce_dtype: str = "fp32"
    """fp32 | bf16: how gradients are summed over data-parallel ranks; bf16 halves the traffic and rounds every sum."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 1_000_000
    global_batch_size: int = 512
    """Rows per optimizer step, over all ranks."""
    micro_batch_size: int = 8
    """Rows per rank and micro-step."""
    init_from: str | None = None
    """Checkpoint (native) whose weights start a new run."""
    init_weights: str = "ema"
    """ema | raw: which weights of init_from."""
    exact_resume: bool = True
    """Refuse settings under which a resumed run could differ from an uninterrupted one."""
    deterministic: bool = False
    """Deterministic GPU kernels (slower)."""
    compile: bool = False
    """torch.compile the layers (GPU)."""
    threads: int = 1
    """CPU threads per rank when training on the CPU; 0 leaves torch's default."""
    time_limit_minutes: float | None = None
    """Save and stop after this long."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation during training and the evaluate command."""

    every_steps: int = 2500
    rows: int | None = 1024
    """Validation rows per evaluation during training; null uses all."""
    micro_batch_size: int | None = None
    """Default: train.micro_batch_size."""
    draws: int = 1
    """Noise draws per row."""
    weights: str = "ema"
    """ema | raw."""


@dataclass(frozen=True)
class SamplingConfig:
    """The sample command."""

    sampler: str = "auto"
    """auto | first_hitting | ancestral | confidence | entropy | ar | analytic; auto fits the objective."""
    length: int = 256
    num_samples: int = 1
    batch_size: int = 8
    steps: int = 5000
    """T, denoising steps per block (ancestral) or per sequence (mdlm, sedd)."""
    nucleus_p: float = 0.9
    top_k: int | None = None
    temperature: float = 1.0
    """0 is greedy."""
    threshold: float = 0.9
    """confidence / entropy samplers: tokens above (below) it are accepted together."""
    kv_cache: bool = True
    cache_dtype: str = "auto"
    """auto | fp32 | bf16."""
    window: int | None = None
    """Tokens of context attended to; default: data.context_length."""
    recompute_window: bool = False
    """Recompute the sliding window from its tokens instead of keeping cached states."""
    stop_at_eos: bool = False
    min_entropy: float | None = None
    """Stop when the unigram entropy (nats) of the last 256 tokens falls below it."""
    max_redraws: int = 0
    """Draw a sample that was stopped for low entropy again, at most this often (the paper's fixed lengths: 10)."""
    seed: int = 1
    weights: str = "ema"


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, when, and what is kept."""

    every_steps: int = 1000
    keep_last: int = 3
    keep_every: int | None = None
    """Keep also every checkpoint whose step is a multiple of this."""
    asynchronous: bool = True


@dataclass(frozen=True)
class RuntimeConfig:
    """Watching over the run."""

    device: str = "auto"
    """auto | cpu | cuda."""
    on_nan: str = "skip"
    """skip | rollback | stop: what to do with a non-finite loss or gradient."""
    max_skips: int = 10
    """Skipped updates in a row before the run stops."""
    max_rollbacks: int = 3
    """Rollbacks without a good step beyond the bad one before the run stops."""
    spike_factor: float | None = None
    """Treat a loss above this multiple of its running median as on_nan; null: off."""
    dump_bad_batches: bool = False
    """Keep the rows of every bad step in run_dir/bad_batches."""
    collective_timeout_seconds: float = 1800.0
    hang_factor: float = 20.0
    """A step longer than this multiple of the median step is a hang ..."""
    hang_min_seconds: float = 300.0
    """... but never before this many seconds."""
    heartbeat_seconds: float = 5.0
    silent_seconds: float = 120.0
    """A rank whose heartbeat stands still this long while others' go on is taken for dead by the launcher."""
    straggler_factor: float = 1.5


@dataclass(frozen=True)
class LoggingConfig:
    """Where figures go; metrics.jsonl in the run folder is always written and is the truth."""

    every_steps: int = 1
    progress: bool = True
    wandb: str = "disabled"
    """disabled | offline | online."""
    wandb_project: str = "bd3lm_scale"
    wandb_name: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """One run."""

    run_dir: str = "???"
    seed: int = 1
    precision: str = "bf16"
    """fp32 | bf16 (bf16 weights and matmuls; fp32 masters, residual stream, softmax, norms and loss)."""
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
    def sequence_length(self) -> int:
        """P, positions the transformer reads per row: 2L for bd3lm ([noisy ; clean]), L otherwise."""
        return self.data.context_length * (2 if self.diffusion.objective == "bd3lm" else 1)

    @property
    def uses_adaln(self) -> bool:
        """AR has no time embedding and no adaptive layer norm."""
        return self.diffusion.objective != "ar"

    @property
    def time_conditioning(self) -> bool:
        """Whether the noise level reaches the network."""
        if self.diffusion.time_conditioning is None:
            return self.diffusion.objective == "sedd"
        return self.diffusion.time_conditioning and self.uses_adaln
