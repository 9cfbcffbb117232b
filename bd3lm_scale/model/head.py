"""The head, evaluated at the scored rows only: target logit and log-sum-exp, never all logits at once.

Shapes: R scored rows, T of them in a tile, D width, V padded vocabulary (this rank's part of it), C conditioning width.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor, nn

from bd3lm_scale.model.layer import WeightOnlyNorm, modulate
from bd3lm_scale.model.transformer_config import DenoiserConfig

TILE_BYTES = 2**28
"""Of the fp32 logits that stand in memory at a time."""
_ROW_MULTIPLE = 128


def linear_fp32(x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """x W^T + b in fp32 (R, V) from operands of any dtype: bf16 products are summed in fp32 and never rounded."""
    if weight_VD.device.type != "cpu" and weight_VD.dtype != torch.float32:
        product = torch.mm(x_RD, weight_VD.t(), out_dtype=torch.float32)
        return product if bias_V is None else product.add_(bias_V)
    return F.linear(x_RD.float(), weight_VD.float(), None if bias_V is None else bias_V.float())


def _score_tile(product_TV: Tensor, bias_V: Tensor, local_T: Tensor) -> Tensor:
    """(2, T): logit of the target, and log-sum-exp."""
    logits_TV = product_TV + bias_V
    return torch.stack([logits_TV.gather(1, local_T[:, None])[:, 0], logits_TV.logsumexp(1)])


def _gradient_tile(
    product_TV: Tensor,
    bias_V: Tensor,
    local_T: Tensor,
    logsumexp_T: Tensor,
    grad_target_T: Tensor,
    grad_logsumexp_T: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradient of the logits in the weights' dtype (T, V), and of the bias (V,)."""
    grad_TV = (product_TV + bias_V).sub_(logsumexp_T[:, None]).exp_().mul_(grad_logsumexp_T[:, None])
    if torch.compiler.is_compiling():  # a comparison is fused with the rest, a scatter is not
        is_target_TV = local_T[:, None] == torch.arange(len(bias_V), device=bias_V.device)
        grad_TV = torch.where(is_target_TV, grad_TV + grad_target_T[:, None], grad_TV)
    else:
        grad_TV.scatter_add_(1, local_T[:, None], grad_target_T[:, None])
    return grad_TV.to(dtype), grad_TV.sum(0)


@dataclass
class TileFunctions:
    """What is done to a tile of products, as it is or compiled."""

    score: Callable[..., Tensor] = _score_tile
    gradient: Callable[..., tuple[Tensor, Tensor]] = _gradient_tile

    def compile(self, backend: str | Callable[..., Any]) -> None:
        """Fuse each into few kernels; a tile's rows are as many as there are."""
        for name in ("score", "gradient"):
            compiled = torch.compile(getattr(self, name), backend=backend)

            def call(product_TV: Tensor, bias_V: Tensor, *rest: Any, compiled: Callable[..., Any] = compiled) -> Any:
                for tensor in (product_TV, *rest):
                    if isinstance(tensor, Tensor):
                        torch._dynamo.mark_dynamic(tensor, 0)
                return compiled(product_TV, bias_V, *rest)

            setattr(self, name, call)


class _TiledScores(torch.autograd.Function):
    """Vocabulary-parallel (target logit, log-sum-exp) of hidden W^T + b, tile by tile of the rows.

    One tile of fp32 logits lives at a time, in the backward pass too, which computes the products again; where one
    tile holds all rows its products are kept. Gradients meet the weights in their dtype, and add up in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        target_R: Tensor,
        first_id: int,
        tile_rows: int,
        functions: TileFunctions,
        group: dist.ProcessGroup | None,
    ) -> Any:
        local_R = target_R - first_id
        is_here_R = (local_R >= 0) & (local_R < len(weight_VD))
        local_R = torch.where(is_here_R, local_R, 0)
        operand_VD = weight_VD.float() if weight_VD.device.type == "cpu" else weight_VD  # once, and not for every tile
        scores, product_TV = [], None
        for hidden_TD, local_T in zip(hidden_RD.split(tile_rows), local_R.split(tile_rows), strict=True):
            product_TV = linear_fp32(hidden_TD, operand_VD, None)
            scores.append(functions.score(product_TV, bias_V, local_T))
        target_R, logsumexp_R = torch.cat(scores, dim=1)
        target_R = torch.where(is_here_R, target_R, 0.0)
        if group is not None:
            target_R, logsumexp_R = _over_ranks(target_R, logsumexp_R, group)
        kept = product_TV if len(scores) == 1 else None
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, local_R, is_here_R, logsumexp_R, kept)
        ctx.tile_rows, ctx.functions, ctx.group = tile_rows, functions, group
        return torch.stack([target_R, logsumexp_R])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden_RD, weight_VD, bias_V, local_R, is_here_R, logsumexp_R, kept = ctx.saved_tensors
        rows = (hidden_RD, local_R, logsumexp_R, torch.where(is_here_R, grads[0][0], 0.0), grads[0][1].contiguous())
        is_widened = kept is None and weight_VD.device.type == "cpu"
        operand_VD = weight_VD.float() if is_widened else weight_VD
        grad_hidden, grad_weight_VD, grad_bias_V = [], None, torch.zeros_like(bias_V)
        for hidden_TD, *numbers in zip(*(t.split(ctx.tile_rows) for t in rows), strict=True):
            product_TV = linear_fp32(hidden_TD, operand_VD, None) if kept is None else kept
            grad_TV, grad_tile_V = ctx.functions.gradient(product_TV, bias_V, *numbers, weight_VD.dtype)
            del product_TV
            grad_hidden.append(grad_TV @ weight_VD)
            grad_bias_V += grad_tile_V
            grad_tile_VD = linear_fp32(grad_TV.t(), hidden_TD.t(), None)
            grad_weight_VD = grad_tile_VD if grad_weight_VD is None else grad_weight_VD.add_(grad_tile_VD)
        grad_hidden_RD = torch.cat(grad_hidden)
        if ctx.group is not None:
            dist.all_reduce(grad_hidden_RD, group=ctx.group)
        assert grad_weight_VD is not None, "the head always has rows"
        return grad_hidden_RD, grad_weight_VD.to(weight_VD.dtype), grad_bias_V, *[None] * 5


def _over_ranks(target_R: Tensor, logsumexp_R: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Of the whole vocabulary, from each rank's part of it."""
    peak_R = logsumexp_R.clone()
    dist.all_reduce(peak_R, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([target_R, (logsumexp_R - peak_R).exp()])
    dist.all_reduce(sums, group=group)
    return sums[0], sums[1].log() + peak_R


class _Projection(tensor_parallel.ColumnParallelLinear):
    """Megatron's layer as far as its parameters go. Its logits would be rounded to bf16, each by up to 2^-9 of itself,
    and stand in memory for all rows.
    """

    functions: TileFunctions

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor | None,
        is_excluded_V: Tensor,
        target_R: Tensor | None = None,
        first_id: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """fp32: (2, R) target logits and log-sum-exps, or without targets this rank's logits (R, V)."""
        weight_VD = cast(Tensor, self.weight) if weight_VD is None else weight_VD
        bias = torch.zeros((), device=hidden_RD.device) if self.bias is None else self.bias.float()
        bias_V = torch.where(is_excluded_V, float("-inf"), bias)
        if target_R is None:
            return linear_fp32(hidden_RD, weight_VD, bias_V)
        tile_rows = max(1, TILE_BYTES // (4 * len(weight_VD)) // _ROW_MULTIPLE) * _ROW_MULTIPLE
        return _TiledScores.apply(hidden_RD, weight_VD, bias_V, target_R, first_id, tile_rows, self.functions, group)


class Head(nn.Module):
    """Norm, modulation, and the output projection onto the padded vocabulary."""

    def __init__(self, config: DenoiserConfig, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.config = config
        self.group = group if group.size() > 1 else None
        self.norm = WeightOnlyNorm(config, config.hidden_size)
        if config.uses_adaln:
            self.modulation = nn.Linear(config.cond_dim, 2 * config.hidden_size, dtype=config.params_dtype)
        self.output = _Projection(
            config.hidden_size,
            config.padded_vocab_size,
            config=dataclasses.replace(config, sequence_parallel=False),
            init_method=lambda weight: weight,
            bias=config.architecture.head_bias,
            gather_output=False,
            skip_weight_param_allocation=config.tie_embeddings and config.pipeline_model_parallel_size == 1,
            tp_group=group,
        )
        self.output.functions = TileFunctions()
        local = self.output.output_size_per_partition
        self.first_id = local * group.rank()
        ids = torch.arange(self.first_id, self.first_id + local, device="cpu")
        self.register_buffer(
            "is_excluded", (ids >= config.vocab_size) | (ids == config.mask_token_id), persistent=False
        )

    def forward(
        self, hidden_RD: Tensor, conditioning_RC: Tensor | None, target_R: Tensor | None, tied_weight: Tensor | None
    ) -> Tensor:
        """(2, R): the target's logit and the log-sum-exp over real ids, fp32, equal on all tensor peers.

        Without targets this rank's fp32 logits (R, V); mask and padding ids are -inf.
        """
        normed = self.norm(hidden_RD)
        if conditioning_RC is not None:
            shift, scale = self.modulation(conditioning_RC).float().chunk(2, dim=-1)
            normed = modulate(normed, shift, scale)
        normed = normed.to(self.config.params_dtype)
        return self.output(normed, tied_weight, self.is_excluded, target_R, self.first_id, self.group)

    def full_logits(self, hidden_RD: Tensor, conditioning_RC: Tensor | None, tied_weight: Tensor | None) -> Tensor:
        """(R, vocab_size) fp32 logits, gathered over tensor peers (inference)."""
        logits = self.forward(hidden_RD, conditioning_RC, None, tied_weight)
        if self.group is not None:
            parts = [torch.empty_like(logits) for _ in range(self.group.size())]
            dist.all_gather(parts, logits.contiguous(), group=self.group)
            logits = torch.cat(parts, dim=-1)
        return logits[:, : self.config.vocab_size]
