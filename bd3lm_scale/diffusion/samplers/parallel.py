"""Confidence- or entropy-threshold decoding: all positions that the network is sure of are revealed together.

Each step takes every masked position whose most likely token has at least probability `threshold` (rule confidence), or
whose distribution has at most `threshold` nats of entropy (rule entropy), and at least the surest one of each row.
Sureness is of the network's own distribution, before any filter, and does not depend on the token that is then drawn.

Shapes: B rows, S positions of a block, I masked positions (padded to the widest row), V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.diffusion.samplers.protocols import BlockDenoiser
from bd3lm_scale.diffusion.samplers.request import BlockTask, FilledBlock
from bd3lm_scale.diffusion.samplers.reveal import Reveal, pack_positions, write_tokens
from bd3lm_scale.diffusion.samplers.sampler import by_blocks


@dataclass(frozen=True)
class Parallel:
    """The samplers `confidence` and `entropy`.

    Attributes:
        rule: confidence | entropy.
        threshold: least probability, or greatest entropy in nats.
    """

    rule: Literal["confidence", "entropy"]
    threshold: float

    def __call__(self, denoiser: BlockDenoiser, task: BlockTask) -> FilledBlock:
        """Fill a block, several positions per call where the network is sure."""
        block_BS = task.tokens_BS.clone()
        is_masked_BS = task.is_masked_BS.copy()
        updates_B = np.zeros(len(is_masked_BS), dtype=np.int64)
        step_BS = np.full(is_masked_BS.shape, -1)
        calls = 0
        while is_masked_BS.any():
            masked = pack_positions(is_masked_BS)
            logits_BIV = denoiser.denoise(block_BS, torch.as_tensor(masked.index_BI, device=block_BS.device))
            calls += 1
            accepted_BI = self._accept(logits_BIV, masked.is_real_BI)
            write_tokens(block_BS, logits_BIV, Reveal(masked.index_BI, accepted_BI), task)
            rows, columns = np.nonzero(accepted_BI)
            step_BS[rows, masked.index_BI[rows, columns]] = calls
            is_masked_BS[rows, masked.index_BI[rows, columns]] = False
            updates_B += accepted_BI.any(axis=1)
        return FilledBlock(block_BS, updates_B, calls, step_BS)

    def _accept(self, logits_BIV: Tensor, is_real_BI: np.ndarray) -> np.ndarray:
        log_p_BIV = logits_BIV.log_softmax(dim=-1)
        if self.rule == "confidence":
            sureness, least = log_p_BIV.amax(dim=-1).exp(), self.threshold
        else:
            sureness, least = -entropy(log_p_BIV), -self.threshold
        sure_BI = np.where(is_real_BI, sureness.double().cpu().numpy(), -np.inf)
        surest_BI = np.arange(sure_BI.shape[1])[None, :] == sure_BI.argmax(axis=1)[:, None]
        return is_real_BI & ((sure_BI >= least) | surest_BI)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; impossible tokens (-inf) count nothing."""
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)


CONFIDENCE = by_blocks(lambda settings: Parallel("confidence", settings.threshold))
ENTROPY = by_blocks(lambda settings: Parallel("entropy", settings.threshold))
