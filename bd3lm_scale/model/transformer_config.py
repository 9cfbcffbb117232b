"""From our configuration to Megatron's: the one place that decides which of its options are on.

Fast paths that need Apex, Transformer Engine or `main_grad` stay off: the DeepSpeed engine owns the gradients.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.model.functions import ACTIVATIONS
from bd3lm_scale.model.parameters import Architecture, padded_vocab_size

_CUDA_GRAPHS = next(
    name for name in ("cuda_graph_modules", "cuda_graph_scope") if name in TransformerConfig.__dataclass_fields__
)
"""Which layers are captured as graphs: none, but the field's own default warns. Megatron-core 0.19 renamed it."""


@dataclass
class DenoiserConfig(TransformerConfig):
    """Megatron's TransformerConfig with what our DiT layers need besides."""

    architecture: Architecture = field(default_factory=lambda: Architecture(1, 1, 1, 1, 4, 1))
    time_conditioning: bool = False
    context_length: int = 1024
    sequence_length: int = 2048
    mask_token_id: int = 0
    attention_backend: str = "auto"
    restart_positions: bool = True
    scores_noisy_half_only: bool = False
    """The last layer's clean rows serve as keys and values only; skip the rest of their work (exact)."""
    shift_targets: bool = False
    """Predictions are read one position before their token."""

    @property
    def cond_dim(self) -> int:
        """C, the width of the conditioning."""
        return self.architecture.cond_dim

    @property
    def uses_adaln(self) -> bool:
        """Whether the layers are conditioned."""
        return self.architecture.uses_adaln

    @property
    def tie_embeddings(self) -> bool:
        """Whether the head shares the embedding."""
        return self.architecture.tied_head

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.architecture.head_width

    @property
    def vocab_size(self) -> int:
        """Real ids, the mask's included."""
        return self.architecture.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """V rounded up to a multiple of 128, whatever the layout, so checkpoints fit every layout."""
        return padded_vocab_size(self.vocab_size)


def make_transformer_config(
    config: RunConfig, vocab_size: int, mask_token_id: int, device: torch.device
) -> DenoiserConfig:
    """Megatron's view of a run.

    Args:
        config: the checked run configuration.
        vocab_size: real ids including the mask, before padding.
        mask_token_id: the id excluded from predictions.
        device: decides the options that only exist on CUDA.
    """
    model, parallel = config.model, config.parallel
    architecture = Architecture.of(config, vocab_size)
    on_gpu = device.type == "cuda"
    is_bf16 = config.precision == "bf16"
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[parallel.recompute]
    no_graphs: dict[str, Any] = {_CUDA_GRAPHS: []}
    return DenoiserConfig(
        **_network_options(architecture),
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.interleaved_chunks,
        sequence_parallel=parallel.sequence_parallel,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        pipeline_dtype=torch.float32,
        fp32_residual_connection=is_bf16,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        attention_softmax_in_fp32=True,
        deterministic_mode=config.train.deterministic,
        # gloo has no batched send-receive; Megatron's default on GPUs where messages do not overlap computation
        batch_p2p_comm=on_gpu and parallel.interleaved_chunks is None,
        batch_p2p_sync=False,  # a device-wide wait after every message, for a fault of older versions of torch
        overlap_p2p_comm=parallel.interleaved_chunks is not None,
        # With gloo, freeing a stage's output early gave silent NaN under interleaving.
        deallocate_pipeline_outputs=on_gpu,
        architecture=architecture,
        time_conditioning=config.time_conditioning,
        context_length=config.data.context_length,
        sequence_length=config.sequence_length,
        mask_token_id=mask_token_id,
        attention_backend=model.attention,
        restart_positions=config.data.restart_positions,
        scores_noisy_half_only=config.scores_noisy_half_only,
        shift_targets=config.diffusion.shift_targets,
        **recompute,
        **no_graphs,
    )


def _network_options(arch: Architecture) -> dict[str, Any]:
    """Megatron's names for what the network is made of."""
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.inner,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.kv_heads,
        "kv_channels": arch.head_width,
        "activation_func": ACTIVATIONS[arch.mlp],
        "gated_linear_unit": arch.gates,
        "add_bias_linear": arch.mlp_bias,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "normalization": "RMSNorm" if arch.norm == "rmsnorm" else "LayerNorm",
        "layernorm_epsilon": arch.norm_eps,
    }
