"""The training and evaluation losses of all objectives, from the head's two numbers per scored token.

With z the logit of the target and lse the log-sum-exp over real ids, both float32 and differentiable:

* SUBS (bd3lm, mdlm) and AR:  nll = lse - z
* SEDD (score entropy, absorbing):  exp(lse - ln n) - (z - ln n) - 1, n = V - 1 real ids

The SEDD form is the published one with sigma cancelled: its score is s_y = logit_y - ln(expm1 sigma) - ln(V-1), its
entropy  sum_y exp(s_y) - r s_x + r (ln r - 1)  with r = 1/expm1(sigma), and its rate sigma' = weight * expm1(sigma),
so that rate * entropy = weight * the expression above. It is at least weight * nll, with equality where lse = ln n.

Shapes: B rows, L tokens in a row, N blocks in a row, R rows of the head.
"""

import math

import torch
from torch import Tensor

from bd3lm_scale.diffusion.process import Process
from bd3lm_scale.values import HeadRows, LossSum, NoisyRows, Targets


def token_losses(head: HeadRows, noisy: NoisyRows, process: Process) -> Tensor:
    """Weighted loss in nats of each row of the head, float32 (R,), differentiable; 0 for rows that pad R."""
    if process.objective == "sedd":
        log_n = math.log(process.vocab_size - 1)
        loss_R = (head.logsumexp_R - log_n).exp() - (head.target_logit_R - log_n) - 1.0
    else:
        loss_R = head.logsumexp_R - head.target_logit_R
    weight_R = noisy.weight_BL.flatten()[head.index_R]
    # where, not a product: a padding row may hold inf or nan
    return torch.where(head.is_real_R, loss_R * weight_R, 0.0)


def score_rows(head: HeadRows, noisy: NoisyRows, process: Process) -> LossSum:
    """Loss sums of one micro-batch; summed in float64, so that splitting the batch hardly matters.

    block_loss_BN is each block's sum over its scored positions divided by its number of positions (L - 1 for AR).
    """
    loss_R = token_losses(head, noisy, process).double()
    batch, length = noisy.target_BL.shape
    per_token = torch.zeros(batch * length, dtype=torch.float64, device=loss_R.device)
    per_token.index_add_(0, head.index_R, loss_R.detach())
    block_sum_BN = per_token.reshape(batch, process.num_blocks, process.block_size).sum(dim=2)
    return LossSum(loss_R.sum(), block_sum_BN / tokens_per_block(process), per_token.reshape(batch, length))


def tokens_per_block(process: Process) -> int:
    """Positions that a block's loss is the mean over: S, or L - 1 for AR, whose first token is only context."""
    return process.context_length - 1 if process.objective == "ar" else process.block_size


def num_loss_tokens(process: Process, global_batch_size: int, targets: Targets | None = None) -> int:
    """Targets of the global batch, the denominator of the training loss: every token, or what `targets` says.

    Counts first tokens even when ignore_bos keeps them clean; AR predicts none of them. At least 1, so that a batch
    without targets has the loss 0.
    """
    if targets is None:
        targets = Targets(global_batch_size * process.context_length, global_batch_size)
    return max(1, targets.tokens - (targets.first if process.objective == "ar" else 0))


def row_losses(loss: LossSum, process: Process) -> Tensor:
    """Loss in nats of each whole row, float64 (B,): what likelihood estimates are made of."""
    return loss.block_loss_BN.sum(dim=1) * tokens_per_block(process)
