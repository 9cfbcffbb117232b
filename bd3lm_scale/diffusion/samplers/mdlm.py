"""Full-sequence diffusion models as block denoisers, which gives them length beyond their context.

The first block is a whole context; every later one is half a context, seen after the half before it (the windows of the
published MDLM baseline: L tokens, moved by L/2). There is no cache: a call runs over the whole window.

Shapes: B rows, S tokens in the block, C tokens of context, L positions of the network.
"""

import torch
from torch import Tensor

from bd3lm_scale.diffusion.samplers.blocks import BlockPlan
from bd3lm_scale.diffusion.samplers.protocols import FullSequenceDenoiser


def window_plan(length: int, context_length: int) -> BlockPlan:
    """One block where the sample fits the context, otherwise a context and then half contexts.

    A sample shorter than the context is denoised at its own length: positions beyond it never enter.
    """
    return BlockPlan(
        first=min(length, context_length), following=max(1, context_length // 2), commit_runs_network=False
    )


class WindowDenoiser:
    """A `BlockDenoiser` over a full-sequence model."""

    def __init__(self, full: FullSequenceDenoiser, context_length: int) -> None:
        self.full = full
        self.context_length = context_length
        self._context_BC: Tensor | None = None

    def denoise(self, block_BS: Tensor, scored_BI: Tensor | None = None) -> Tensor:
        """Logits at the block (or at `scored_BI` of it) after as much committed text as the context leaves room for."""
        if self._context_BC is None:
            return self.full.denoise(block_BS, None, scored_BI)
        room = self.context_length - block_BS.shape[1]
        context_BC = self._context_BC[:, max(0, self._context_BC.shape[1] - room) :]
        start = context_BC.shape[1]
        tokens_BL = torch.cat([context_BC, block_BS], dim=1)
        if scored_BI is None:
            return self.full.denoise(tokens_BL, None, None)[:, start:]
        return self.full.denoise(tokens_BL, None, scored_BI + start)

    def commit(self, tokens_BT: Tensor) -> None:
        """Remember clean text; what no window can reach any more is forgotten."""
        parts = [tokens_BT] if self._context_BC is None else [self._context_BC, tokens_BT]
        self._context_BC = torch.cat(parts, dim=1)[:, -self.context_length :]

    def keep_rows(self, index: Tensor) -> None:
        """Go on with these rows only."""
        if self._context_BC is not None:
            self._context_BC = self._context_BC[index]
