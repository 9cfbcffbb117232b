"""Revealing masked positions in an order that is known before the network runs.

In absorbing diffusion each token stays masked until its own random moment, and with mask rate p(t) that moment is
where p(t) falls below a uniform number u of the position. So drawing u for every position first and walking down
in u is the reverse process itself, not an approximation:

* first hitting (Zheng et al. 2024): one position at a time, in falling order of u; the limit of infinitely many steps;
* ancestral with T steps: all positions whose u lies in the same of T cells at once. Steps in which nothing is revealed
  need no network, and rows of a batch need not be at the same step, since the network is not told the time.

Shapes: B rows, S positions of a block, I positions revealed at once (padded to the widest row).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bd3lm_scale.diffusion.samplers.filtering import draw_tokens, log_probabilities
from bd3lm_scale.diffusion.samplers.protocols import BlockDenoiser
from bd3lm_scale.diffusion.samplers.request import BlockTask, FilledBlock


@dataclass(frozen=True)
class Reveal:
    """Positions revealed by one call of the network.

    Attributes:
        index_BI: int64 positions in the block; 0 where a row has fewer.
        is_real_BI: bool, False where the index is padding.
    """

    index_BI: np.ndarray
    is_real_BI: np.ndarray


def reveal_steps(cell_BS: np.ndarray, is_masked_BS: np.ndarray) -> Iterator[Reveal]:
    """The n-th step reveals each row's positions of its n-th highest non-empty cell.

    Args:
        cell_BS: comparable numbers; equal ones of a row are revealed together, higher ones earlier.
        is_masked_BS: bool, which positions take part.
    """
    order_BS = np.full(cell_BS.shape, -1)
    for row, is_masked in enumerate(is_masked_BS):
        if is_masked.any():
            _, place = np.unique(-cell_BS[row, is_masked], return_inverse=True)
            order_BS[row, is_masked] = place
    for step in range(order_BS.max(initial=-1) + 1):
        yield pack_positions(order_BS == step)


def pack_positions(chosen_BS: np.ndarray) -> Reveal:
    """Chosen positions of each row, left-aligned."""
    count_B = chosen_BS.sum(axis=1)
    width = int(count_B.max(initial=0))
    index_BI = np.argsort(~chosen_BS, axis=1, kind="stable")[:, :width]
    is_real_BI = np.arange(width)[None, :] < count_B[:, None]
    return Reveal(np.where(is_real_BI, index_BI, 0), is_real_BI)


def fill_in_order(denoiser: BlockDenoiser, task: BlockTask, cell_BS: np.ndarray) -> FilledBlock:
    """Fill a block cell by cell; each call of the network sees all tokens revealed before."""
    block_BS = task.tokens_BS.clone()
    updates_B = np.zeros(len(task.is_masked_BS), dtype=np.int64)
    step_BS = np.full(task.is_masked_BS.shape, -1)
    calls = 0
    for reveal in reveal_steps(cell_BS, task.is_masked_BS):
        index_BI = torch.as_tensor(reveal.index_BI, device=block_BS.device)
        logits_BIV = denoiser.denoise(block_BS, index_BI)
        rows, columns = np.nonzero(reveal.is_real_BI)
        step_BS[rows, reveal.index_BI[rows, columns]] = calls
        calls += 1
        write_tokens(block_BS, logits_BIV, reveal, task)
        updates_B += reveal.is_real_BI.any(axis=1)
    return FilledBlock(block_BS, updates_B, calls, step_BS)


def write_tokens(block_BS: torch.Tensor, logits_BIV: torch.Tensor, reveal: Reveal, task: BlockTask) -> None:
    """Draw tokens at the revealed positions, in place."""
    rows, columns = np.nonzero(reveal.is_real_BI)
    places = reveal.index_BI[rows, columns]
    device = block_BS.device
    logits_RV = logits_BIV[torch.as_tensor(rows, device=device), torch.as_tensor(columns, device=device)]
    tokens_R = draw_tokens(logits_RV, task.which_BS[rows, places], task.token_filter)
    if task.log_prob_BS is not None:
        task.log_prob_BS[rows, places] = log_probabilities(logits_RV, tokens_R)
    block_BS[torch.as_tensor(rows, device=device), torch.as_tensor(places, device=device)] = tokens_R
