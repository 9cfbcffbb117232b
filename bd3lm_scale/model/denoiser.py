"""The BD3-LM transformer as Megatron sees it: one pipeline chunk, with an embedding or a head where it has one.

Under pipeline parallelism the time conditioning (computed where the embedding is) rides along as one extra
sequence row, so no parameter is replicated over stages.

Shapes: B rows, P positions, L tokens, D width, C conditioning width, R scored rows.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from bd3lm_scale.model.attention import AttentionPattern
from bd3lm_scale.model.head import Head
from bd3lm_scale.model.initialize import allocate, compare, mark
from bd3lm_scale.model.layer import layer_spec
from bd3lm_scale.model.parameters import TIME_FEATURES, Parameter, parameters
from bd3lm_scale.model.rotary import rotary_angles
from bd3lm_scale.model.transformer_config import DenoiserConfig
from bd3lm_scale.parallel import pipeline
from bd3lm_scale.parallel.mesh import Mesh
from bd3lm_scale.values import Visibility


class Denoiser(MegatronModule):
    """One model chunk.

    Args:
        config: Megatron's and ours.
        has_embedding, has_head: whether this chunk starts or ends the model.
        pipeline_rank: this rank's stage.
        virtual_stage: number of this chunk under the interleaved schedule, else None.
    """

    config: DenoiserConfig

    def __init__(
        self,
        config: DenoiserConfig,
        has_embedding: bool = True,
        has_head: bool = True,
        pipeline_rank: int = 0,
        virtual_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = has_embedding, has_head, virtual_stage
        self.number = virtual_stage or 0  # among this rank's chunks
        self.share_embeddings_and_output_weights = config.tie_embeddings
        self.layer_offset = get_transformer_layer_offset(config, virtual_stage, pipeline_rank)
        self.has_conditioning = config.uses_adaln
        self.carries_conditioning = config.uses_adaln and config.pipeline_model_parallel_size > 1
        group = pipeline.tensor_group()
        if has_embedding:
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                config.padded_vocab_size,
                config.hidden_size,
                init_method=lambda weight: weight,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
                tp_group=group,
            )
            if config.uses_adaln:
                self.time_embedding = TimeEmbedding(config.cond_dim, config.params_dtype)
        num_layers = get_num_layers_to_build(config, virtual_stage, pipeline_rank)
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=[layer_spec(config.architecture)] * num_layers, layer_norm=None),
            pre_process=has_embedding,
            post_process=has_head,
            post_layer_norm=False,
            vp_stage=virtual_stage,
        )
        if has_head:
            self.head = Head(config, group)
        with torch.device("cpu"):  # only parameters are built on the meta device
            # both halves stand at the same places
            position = torch.arange(config.sequence_length) % config.context_length
            self.register_buffer("training_rotary", self.rotary(position), persistent=False)

    def set_visibility(self, visibility: Visibility) -> None:
        """Say who sees whom; one prepared pattern serves all layers."""
        config = self.config
        read_at_L = torch.arange(config.context_length)
        if config.shift_targets:
            has_clean = config.sequence_length > config.context_length
            read_at_L = previous_positions(config.context_length, visibility.block_size, has_clean)
        device = self.get_buffer("training_rotary").device
        self.register_buffer("read_at_L", read_at_L.to(device), persistent=False)
        pattern = AttentionPattern(visibility, config.attention_backend)
        for layer in self.decoder.layers:
            cast(Any, layer).self_attention.core_attention.pattern = pattern

    def prepare_attention(self) -> None:
        """Make the masks now: in a layer being compiled this would end its graph."""
        for layer in self.decoder.layers:
            attention = cast(Any, layer).self_attention.core_attention
            queries = attention.num_queries or self.config.sequence_length
            device, dtype = self.training_rotary.device, self.config.params_dtype
            attention.pattern.prepare(queries, self.config.head_width, device, dtype)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Called by the schedule with what the previous stage sent."""
        # None is legal: it takes back what was set before
        self.decoder.set_input_tensor(cast(Tensor, input_tensor[0] if isinstance(input_tensor, list) else input_tensor))

    def forward(
        self,
        input_BP: Tensor,
        sigma_B: Tensor,
        dropout_key: Tensor | None,
        index_R: Tensor,
        target_R: Tensor,
        document_BL: Tensor | None = None,
    ) -> Tensor:
        """What the next stage needs, or (2, R) target logits and log-sum-exps on the last chunk.

        Args:
            input_BP: token ids (used by the first chunk only, its shape by all); those beyond P, the last clean
                block, are seen by no scored position and not read.
            sigma_B: noise levels.
            dropout_key: int64 scalar; None when evaluating.
            index_R: flat index b * L + l of the scored rows (used by the last chunk only).
            target_R: their target ids.
            document_BL: documents of packed rows, on the CPU; None: each row is one.
        """
        batch, length = input_BP.shape[0], self.config.context_length
        hidden, conditioning = None, None
        if self.pre_process:
            hidden, conditioning = self.embed(input_BP[:, : self.config.sequence_length]), self.condition(sigma_B)
        elif self.carries_conditioning:
            conditioning = self._take_conditioning()
        rotary = self.training_rotary
        if document_BL is not None and self.config.restart_positions:
            rotary = self.restarted_rotary(document_BL)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=document_BL,
            context=conditioning,
            context_mask=dropout_key,
            rotary_pos_emb=rotary,
        )
        if not self.post_process:
            return self._leave(hidden, conditioning)
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        row, token = index_R // length, index_R % length
        place = self.get_buffer("read_at_L")[token]
        rows_RD = hidden.reshape(-1, hidden.shape[-1]).index_select(0, place * batch + row)
        rows_RC = None if conditioning is None else conditioning.index_select(0, row)
        return self.head(rows_RD, rows_RC, target_R, self.tied_weight())

    def rotary(self, position_P: Tensor) -> Tensor:
        """Rotary angles (P, 1, 1, K) at these positions."""
        return rotary_angles(position_P, self.config.head_width, self.config.architecture.rope)

    def restarted_rotary(self, document_BL: Tensor) -> Tensor:
        """Rotary angles (P, B, 1, K) that start anew with every document; of no meaning in padding."""
        position_L = torch.arange(self.config.context_length)
        is_first_BL = document_BL[:, 1:] != document_BL[:, :-1]
        start_BL = F.pad(is_first_BL, (1, 0)) * position_L
        position_BL = position_L - start_BL.cummax(dim=1).values
        views = position_BL.T[torch.arange(self.config.sequence_length) % self.config.context_length]
        angles = self.get_buffer("training_rotary")
        return angles[views.to(angles.device), 0]

    def holds(self, parameter: Parameter) -> bool:
        """Whether a parameter of the table belongs to this chunk."""
        if parameter.layer is not None:
            return self.layer_offset <= parameter.layer < self.layer_offset + len(self.decoder.layers)
        if parameter.is_at_head:
            return self.post_process
        is_tied = self.config.tie_embeddings and parameter.name == "embedding.weight"
        return self.pre_process or (is_tied and self.post_process)

    def tied_weight(self) -> Tensor | None:
        """The embedding, where the head shares it on this very rank."""
        return self.embedding.weight if self.share_embeddings_and_output_weights and self.pre_process else None

    def embed(self, input_BP: Tensor) -> Tensor:
        """(P, B, D) fp32 residual stream, a shard of P under sequence parallelism."""
        hidden = self.embedding(input_BP)
        if not self.config.sequence_parallel:
            hidden = hidden.transpose(0, 1).contiguous()
        return hidden.float()

    def condition(self, sigma_B: Tensor) -> Tensor | None:
        """(B, C) conditioning; a learned constant unless time conditioning is on; None without adaLN."""
        if not self.has_conditioning:
            return None
        return self.time_embedding(sigma_B if self.config.time_conditioning else torch.zeros_like(sigma_B))

    def _take_conditioning(self) -> Tensor:
        """Off the last row of what the previous stage sent."""
        received = cast(Tensor, self.decoder.input_tensor)
        self.decoder.set_input_tensor(received[:-1].contiguous())
        return received[-1, :, : self.config.cond_dim].to(self.config.params_dtype)

    def _leave(self, hidden: Tensor, conditioning: Tensor | None) -> Tensor:
        if conditioning is None:
            return hidden
        row = F.pad(conditioning.to(hidden.dtype), (0, self.config.hidden_size - self.config.cond_dim))
        return torch.cat([hidden, row[None]], dim=0)


def previous_positions(context_length: int, block_size: int, has_clean: bool) -> Tensor:
    """Where the predictions of shifted targets are read: int64 (L,), a position of [noisy ; clean] or noisy alone.

    The one before the token, in the same noisy block; for the first token of a block the clean token before it, which
    the noisy block follows. So blocks of one token are predicted as an autoregressive model predicts them. The row's
    first token has none before it; it is never scored, and gets some position.
    """
    previous_L = torch.arange(context_length) - 1
    is_first_L = (previous_L + 1) % block_size == 0
    return torch.where(is_first_L, previous_L + has_clean * context_length, previous_L).clamp(min=0)


class TimeEmbedding(nn.Module):
    """SiLU(MLP([cos(sigma f), sin(sigma f)])), f_i = 10000^(-i/128): the conditioning of adaptive layer norm."""

    def __init__(self, cond_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear1 = nn.Linear(TIME_FEATURES, cond_dim, dtype=dtype)
        self.linear2 = nn.Linear(cond_dim, cond_dim, dtype=dtype)

    def forward(self, sigma_B: Tensor) -> Tensor:
        """(B,) noise levels -> (B, C)."""
        half = TIME_FEATURES // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=sigma_B.device) / half)
        angles = sigma_B.float()[:, None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(features))))


class ChunkList(nn.Module):
    """This rank's chunks behind one module, for the DeepSpeed engine to wrap."""

    def __init__(self, chunks: list[Denoiser]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def forward(self, number: int, *args: Tensor | None) -> Tensor:
        """Run chunk `number`."""
        return self.chunks[number](*args)


def build_chunks(config: DenoiserConfig, mesh: Mesh, visibility: Visibility, with_memory: bool) -> list[Denoiser]:
    """This rank's part of the model, its weights without values and, unless `with_memory`, without memory."""
    virtual = config.virtual_pipeline_model_parallel_size
    table = {parameter.name: parameter for parameter in parameters(config.architecture)}
    chunks = []
    for virtual_stage in range(virtual) if virtual else [None]:
        has_embedding, has_head = pipeline.stage_ends(virtual_stage)
        with torch.device("meta"):
            chunk = Denoiser(config, has_embedding, has_head, mesh.pipeline_rank, virtual_stage)
        here = {name: parameter for name, parameter in table.items() if chunk.holds(parameter)}
        compare(named_parameters([chunk]), here, mesh.tensor_size)
        allocate(chunk, mesh.device, with_memory)
        mark(named_parameters([chunk]), here, mesh.tensor_size, config.sequence_parallel)
        chunk.set_visibility(visibility)
        chunks.append(chunk)
    return chunks


def named_parameters(chunks: list[Denoiser]) -> Iterator[tuple[str, nn.Parameter]]:
    """(global name, parameter) of this rank, each parameter once; layer numbers count over all stages.

    A tied head on a stage of its own has the embedding's name.
    """
    seen = set()
    for chunk in chunks:
        for local_name, parameter in chunk.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            parts = local_name.split(".")
            if parts[0] == "decoder":
                parts[2] = str(int(parts[2]) + chunk.layer_offset)
            name = ".".join(parts)
            yield (
                ("embedding.weight" if chunk.config.tie_embeddings and name == "head.output.weight" else name),
                parameter,
            )


def pipeline_sequence_length(config: DenoiserConfig) -> int:
    """Rows that travel between stages, the conditioning row included (one per tensor peer under SP)."""
    if not (config.uses_adaln and config.pipeline_model_parallel_size > 1):
        return config.sequence_length
    return config.sequence_length + (config.tensor_model_parallel_size if config.sequence_parallel else 1)
