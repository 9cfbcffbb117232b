"""Semi-autoregressive sampling: block after block, each filled by a diffusion sampler given the committed text.

Rows of a batch advance in lockstep over blocks. Where a prompt reaches into a block its tokens are pinned there; blocks
that every prompt covers are committed at once, without denoising. Rows that end early leave the batch.

Shapes: B rows, S tokens in a block, T tokens of all blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bd3lm_scale.diffusion.samplers.protocols import Context
from bd3lm_scale.diffusion.samplers.request import (
    BlockTask,
    FilledBlock,
    SampleRequest,
    SampleResult,
    position_uniforms,
    sample_key,
)

FillBlock = Callable[[Any, BlockTask], FilledBlock]
"""What fills one block with the denoiser it was written for (first argument)."""


@dataclass(frozen=True)
class BlockPlan:
    """Where the blocks of a sample lie.

    Attributes:
        first: tokens of the first block.
        following: tokens of every later one.
        commit_runs_network: whether committing a block costs a forward call (it does with a KV cache).
    """

    first: int
    following: int
    commit_runs_network: bool = True

    def edges(self, length: int) -> list[int]:
        """0, end of block 0, end of block 1, ...: whole blocks that cover `length` tokens."""
        edges = [0, self.first]
        while edges[-1] < length:
            edges.append(edges[-1] + self.following)
        return edges


class Batch:
    """The growing samples of one request and their counters; finished rows are set aside."""

    def __init__(self, request: SampleRequest, padded_length: int) -> None:
        self.request = request
        self.tokens_BT = request.start_tokens(padded_length)
        self.prompt_length_B = request.prompt_length()
        self.is_open_BT = request.open_places(self.tokens_BT)
        self.log_prob_BT = np.zeros(self.tokens_BT.shape) if request.infill else None
        size = len(request.prompts)
        self.rows = np.arange(size)  # rows of the request that are still in the batch, in the network's order
        self.nfe_B = np.zeros(size, dtype=np.int64)
        self.calls_B = np.zeros(size, dtype=np.int64)
        self.final_length_B = np.full(size, request.length)
        self.finish = ["length"] * size

    def count_calls(self, calls: int) -> None:
        """Book forward calls on the rows in the batch."""
        self.calls_B[self.rows] += calls

    @property
    def num_given(self) -> int:
        """Tokens before the first open place of any row."""
        open_T = np.flatnonzero(self.is_open_BT.any(axis=0))
        return int(open_T[0]) if open_T.size else self.is_open_BT.shape[1]

    def count_updates(self, rows: np.ndarray, filled: FilledBlock, start: int) -> None:
        """Book a block's updates as NFE, once it is known where its rows end."""
        for place, row in enumerate(rows.tolist()):
            end = self.final_length_B[row] if self.finish[row] == "eos" else self.request.length
            self.nfe_B[row] += filled.updates_of(place, int(end) - start)

    def drop_finished(self, num_checked: int, num_done: int) -> np.ndarray | None:
        """Apply the stop rule to the first num_done tokens; places of the rows that go on, None if all do."""
        num_done = min(num_done, self.request.length)
        goes_on = np.ones(len(self.rows), dtype=bool)
        for place, row in enumerate(self.rows):
            end = self.request.stop.check(self.tokens_BT[row, :num_done], self.prompt_length_B[row], num_checked)
            if end is not None:
                self.finish[row], self.final_length_B[row] = end
                goes_on[place] = False
        if self.request.on_text is not None and len(self.rows) and self.rows[0] == 0:
            end = min(num_done, int(self.final_length_B[0]))
            self.request.on_text(tuple(self.tokens_BT[0, self.prompt_length_B[0] : end].tolist()))
        if goes_on.all():
            return None
        self.rows = self.rows[goes_on]
        return np.flatnonzero(goes_on)

    def result(self) -> SampleResult:
        """All samples in the order of the request."""
        lengths = self.final_length_B.tolist()
        return SampleResult(
            tokens=tuple(tuple(row[:n].tolist()) for row, n in zip(self.tokens_BT, lengths, strict=True)),
            finish=tuple(self.finish),
            nfe=tuple(self.nfe_B.tolist()),
            forward_calls=tuple(self.calls_B.tolist()),
            log_probs=None
            if self.log_prob_BT is None
            else tuple(map(tuple, self.log_prob_BT[:, : lengths[0]].tolist())),
        )


def sample_blocks(
    denoiser: Context,
    fill: FillBlock,
    request: SampleRequest,
    plan: BlockPlan,
    on_progress: Callable[[int], object] | None = None,
) -> SampleResult:
    """Sample a batch.

    A length that is no multiple of the block size is rounded up and cut, so that a shorter sample is a prefix of a
    longer one with the same seed.

    Args:
        denoiser: the network with an empty context.
        fill: fills one block: `first_hitting`, `Ancestral(...)`, `Parallel(...)`, `SimplexDiffusion(...)`.
        request: what to sample.
        plan: the blocks.
        on_progress: called after each block with the number of new tokens, over all rows.
    """
    edges = plan.edges(request.length)
    batch = Batch(request, edges[-1])
    num_covered = sum(edge <= batch.num_given for edge in edges[1:])
    if num_covered:
        _commit(denoiser, batch, plan, 0, edges[num_covered])
    for block in range(num_covered, len(edges) - 1):
        start, end = edges[block], edges[block + 1]
        rows, task = batch.rows, _task(batch, start, end)
        filled = fill(denoiser, task)
        batch.tokens_BT[rows, start:end] = filled.tokens_BS.cpu().numpy()
        if batch.log_prob_BT is not None and task.log_prob_BS is not None:
            batch.log_prob_BT[rows, start:end] = task.log_prob_BS
        batch.count_calls(filled.forward_calls)
        if on_progress is not None:
            on_progress(int(task.is_masked_BS[:, : request.length - start].sum()))
        going_on = batch.drop_finished(start, end)
        batch.count_updates(rows, filled, start)
        if going_on is not None:
            if not going_on.size:
                break
            denoiser.keep_rows(torch.as_tensor(going_on, device=request.device))
        if end < edges[-1]:
            _commit(denoiser, batch, plan, start, end)
    return batch.result()


def _task(batch: Batch, start: int, end: int) -> BlockTask:
    rows, request = batch.rows, batch.request
    when_BS, which_BS = position_uniforms(request, rows, start, end - start)
    return BlockTask(
        tokens_BS=torch.as_tensor(batch.tokens_BT[rows, start:end], device=request.device),
        is_masked_BS=batch.is_open_BT[rows, start:end],
        when_BS=when_BS,
        which_BS=which_BS,
        keys=tuple(sample_key(request, row, start) for row in rows.tolist()),
        token_filter=request.token_filter,
        log_prob_BS=np.zeros((len(rows), end - start)) if request.infill else None,
    )


def _commit(denoiser: Context, batch: Batch, plan: BlockPlan, start: int, end: int) -> None:
    tokens_BS = torch.as_tensor(batch.tokens_BT[batch.rows, start:end], device=batch.request.device)
    denoiser.commit(tokens_BS)
    batch.count_calls(int(plan.commit_runs_network))
