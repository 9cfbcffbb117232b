"""The head, evaluated at the scored rows only: target logit and log-sum-exp, never the logits of clean rows.

Shapes: R scored rows, D width, V padded vocabulary (this rank's part of it), C conditioning width, B rows.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor, nn

from bd3lm_scale.model.layer import WeightOnlyNorm, modulate
from bd3lm_scale.model.transformer_config import DenoiserConfig


def linear_fp32(x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """x W^T + b in fp32 (R, V) from operands of any dtype: bf16 products are summed in fp32 and never rounded."""
    if weight_VD.is_cuda and weight_VD.dtype != torch.float32:
        product = torch.mm(x_RD, weight_VD.t(), out_dtype=torch.float32)
        return product if bias_V is None else product.add_(bias_V)
    return F.linear(x_RD.float(), weight_VD.float(), None if bias_V is None else bias_V.float())


class _Fp32Projection(torch.autograd.Function):
    """hidden W^T + b in fp32 for weights of any dtype; the gradient meets the weights in their dtype, as elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, group: dist.ProcessGroup | None
    ) -> Any:
        ctx.save_for_backward(hidden_RD, weight_VD)
        ctx.group, ctx.bias_dtype = group, None if bias_V is None else bias_V.dtype
        return linear_fp32(hidden_RD, weight_VD, bias_V)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden_RD, weight_VD = ctx.saved_tensors
        grad_RV = grads[0].to(weight_VD.dtype)
        grad_hidden_RD = grad_RV @ weight_VD
        if ctx.group is not None:
            dist.all_reduce(grad_hidden_RD, group=ctx.group)
        grad_bias_V = None if ctx.bias_dtype is None else grads[0].sum(0).to(ctx.bias_dtype)
        return grad_hidden_RD, grad_RV.t() @ hidden_RD, grad_bias_V, None


class _Projection(tensor_parallel.ColumnParallelLinear):
    """Megatron's layer with fp32 logits; its own would be rounded to bf16, each by up to 2^-9 of itself."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *, bias: Tensor | None, tp_group: Any, **_: Any) -> Tensor:
        return _Fp32Projection.apply(input, weight, bias, tp_group if tp_group.size() > 1 else None)


class _TargetAndNormalizer(torch.autograd.Function):
    """Vocabulary-parallel (target logit, log-sum-exp) from this rank's logits, both differentiable.

    The softmax overwrites the logits, so the forward keeps one (R, V) buffer.
    """

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, target_R: Tensor, first_id: int, group: dist.ProcessGroup | None) -> Any:
        local = target_R - first_id
        is_here = (local >= 0) & (local < logits_RV.shape[1])
        local = torch.where(is_here, local, 0)
        target = torch.where(is_here, logits_RV.gather(1, local[:, None])[:, 0], 0.0)
        peak = logits_RV.amax(1)
        if group is not None:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        softmax = logits_RV.sub_(peak[:, None]).exp_()
        sums = torch.stack([target, softmax.sum(1)])
        if group is not None:
            dist.all_reduce(sums, group=group)
        target, total = sums[0], sums[1]
        softmax.div_(total[:, None])
        ctx.save_for_backward(softmax, local, is_here)
        return torch.stack([target, total.log() + peak])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        softmax, local, is_here = ctx.saved_tensors
        grad_target, grad_normalizer = grads[0][0], grads[0][1]
        grad = softmax * grad_normalizer[:, None]
        grad.scatter_add_(1, local[:, None], torch.where(is_here, grad_target, 0.0)[:, None])
        return grad, None, None, None


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
        local = self.output.output_size_per_partition
        self.first_id = local * group.rank()
        ids = torch.arange(self.first_id, self.first_id + local, device="cpu")
        self.register_buffer(
            "is_excluded", (ids >= config.vocab_size) | (ids == config.mask_token_id), persistent=False
        )

    def logits(self, hidden_RD: Tensor, conditioning_RC: Tensor | None, tied_weight: Tensor | None) -> Tensor:
        """This rank's fp32 logits (R, V); mask and padding ids are -inf."""
        normed = self.norm(hidden_RD)
        if conditioning_RC is not None:
            shift, scale = self.modulation(conditioning_RC).float().chunk(2, dim=-1)
            normed = modulate(normed, shift, scale)
        logits, _ = self.output(normed.to(self.config.params_dtype), weight=tied_weight)
        return logits.masked_fill_(self.is_excluded, float("-inf"))

    def forward(
        self, hidden_RD: Tensor, conditioning_RC: Tensor | None, target_R: Tensor, tied_weight: Tensor | None
    ) -> Tensor:
        """(2, R): the target's logit and the log-sum-exp over real ids, fp32, equal on all tensor peers."""
        logits = self.logits(hidden_RD, conditioning_RC, tied_weight)
        return _TargetAndNormalizer.apply(logits, target_R, self.first_id, self.group)

    def full_logits(self, hidden_RD: Tensor, conditioning_RC: Tensor | None, tied_weight: Tensor | None) -> Tensor:
        """(R, vocab_size) fp32 logits, gathered over tensor peers (inference)."""
        logits = self.logits(hidden_RD, conditioning_RC, tied_weight)
        if self.group is not None:
            parts = [torch.empty_like(logits) for _ in range(self.group.size())]
            dist.all_gather(parts, logits.contiguous(), group=self.group)
            logits = torch.cat(parts, dim=-1)
        return logits[:, : self.config.vocab_size]
