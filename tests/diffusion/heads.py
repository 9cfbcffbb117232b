"""The model's head in miniature: HeadRows from dense logits, as the last pipeline stage would return them."""

import torch
from torch import Tensor

from bd3lm_scale.values import HeadRows, NoisyRows


def head_of(logits_BLV: Tensor, noisy: NoisyRows, mask_token_id: int, pad_to: int = 8) -> HeadRows:
    """Target logit and log-sum-exp over non-mask ids at the scored positions; rows padded with garbage."""
    index_R = noisy.is_scored_BL.flatten().nonzero()[:, 0]
    count = len(index_R)
    padding = -count % pad_to or pad_to
    is_real_R = torch.arange(count + padding) < count
    index_R = torch.cat([index_R, index_R.new_zeros(padding)])
    logits_RV = logits_BLV.flatten(0, 1)[index_R].clone()
    logits_RV[:, mask_token_id] = -torch.inf
    target_R = noisy.target_BL.flatten()[index_R]
    target_logit_R = logits_RV.gather(1, target_R[:, None])[:, 0]
    return HeadRows(
        target_logit_R=torch.where(is_real_R, target_logit_R, torch.inf),
        logsumexp_R=logits_RV.logsumexp(1),
        index_R=index_R,
        is_real_R=is_real_R,
    )
