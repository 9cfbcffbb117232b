"""Who attends to whom in training, for every objective (paper, Section 3.2 and App. B.6).

Shapes: L tokens in a row, P positions the transformer reads.
"""

import torch

from bd3lm_scale.values import CLEAN_VIEW, Visibility

NOISY_VIEW = 1


def training_visibility(objective: str, context_length: int, block_size: int) -> Visibility:
    """Visibility of the positions read in training.

    * bd3lm: [noisy ; clean], 2L positions. Noisy tokens see their own noisy block (M_BD) and earlier clean blocks
      (M_OBC); clean tokens see clean blocks up to their own (M_BC).
    * mdlm, sedd: L noisy positions in one block: everybody sees everybody.
    * ar: L clean positions in blocks of one: plain causal attention.
    """
    position_L = torch.arange(context_length)
    if objective == "bd3lm":
        block_L = position_L // block_size
        view_P = torch.cat([torch.full_like(block_L, NOISY_VIEW), torch.full_like(block_L, CLEAN_VIEW)])
        block_P = torch.cat([block_L, block_L])
    elif objective in ("mdlm", "sedd"):
        view_P, block_P, block_size = (
            torch.full_like(position_L, NOISY_VIEW),
            torch.zeros_like(position_L),
            context_length,
        )
    elif objective == "ar":
        view_P, block_P, block_size = torch.full_like(position_L, CLEAN_VIEW), position_L, 1
    else:
        raise ValueError(f"diffusion.objective ({objective}): use bd3lm, mdlm, ar or sedd")
    return Visibility(view_P=view_P, segment_P=torch.zeros_like(view_P), block_P=block_P, block_size=block_size)
