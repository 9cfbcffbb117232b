"""Attention in packed rows, whose documents never see each other: who sees whom differs from row to row.

The same three implementations as in model/attention.py, prepared once per micro-batch and shared by its layers. What is
seen follows from the row's documents alone, so every pipeline stage and tensor peer prepares it for itself.

Shapes: B rows, L tokens in a row, H query heads, G heads of keys and values, P positions, K head width.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bd3lm_scale.model.tiles import Chunk, flex_block_mask, plan_chunks
from bd3lm_scale.values import PADDING, Visibility

_PADDING_RUN = 128


def of_documents(visibility: Visibility, document_L: Tensor) -> Visibility:
    """The visibility of a row that is several documents (L,), in each of its views.

    Padding sees at most padding close by, so that no position sees nothing.
    """
    length, positions = len(document_L), len(visibility.view_P)
    beside = PADDING - torch.arange(length) // _PADDING_RUN
    segment_L = torch.where(document_L >= 0, document_L.to(beside), beside)
    return replace(visibility, segment_P=segment_L[torch.arange(positions) % length])


class DocumentPattern:
    """The visibility of one micro-batch.

    Args:
        visibility: of a row that is one document.
        document_BL: the documents of its rows, on the CPU.
        sdpa: attention of (B, H, Q, K) queries with keys and values; grouped heads are its business.
    """

    def __init__(self, visibility: Visibility, document_BL: Tensor, sdpa: Callable[..., Tensor]) -> None:
        self.rows = [of_documents(visibility, document_L) for document_L in document_BL]
        self._sdpa = sdpa
        self._prepared: dict[Any, Any] = {}

    def dense(self, query: Tensor, key: Tensor, value: Tensor, num_queries: int) -> Tensor:
        """With the whole boolean masks: the oracle."""
        name = ("dense", query.device)
        if name not in self._prepared:
            index = torch.arange(key.shape[2])
            masks = [row.may_see(index[:, None], index[None, :]) for row in self.rows]
            self._prepared[name] = torch.stack(masks)[:, None].to(query.device)
        return self._sdpa(query, key, value, attn_mask=self._prepared[name][:, :, :num_queries])

    def chunked(self, query: Tensor, key: Tensor, value: Tensor, num_queries: int, length: int) -> Tensor:
        """Row by row, run by run: a long document in runs of `length` queries, short ones together."""
        name = ("chunks", query.device, query.dtype)
        if name not in self._prepared:
            self._prepared[name] = [
                plan_chunks(row, document_runs(row, length), query.dtype, query.device) for row in self.rows
            ]
        rows = []
        for b, chunks in enumerate(self._prepared[name]):
            one = slice(b, b + 1)
            pieces = [
                self._run(query[one], key[one], value[one], chunk) for chunk in chunks if chunk.start < num_queries
            ]
            rows.append(torch.cat(pieces, dim=2))
        return torch.cat(rows)

    def _run(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> Tensor:
        parts = [[t[:, :, start:stop] for start, stop in chunk.keys] for t in (key, value)]
        keys, values = (torch.cat(part, dim=2) if len(part) > 1 else part[0] for part in parts)
        return self._sdpa(query[:, :, chunk.start : chunk.stop], keys, values, attn_mask=chunk.bias)

    def flex(
        self, query: Tensor, key: Tensor, value: Tensor, num_queries: int, tile: int, kernel: Callable[..., Tensor]
    ) -> Tensor:
        """FlexAttention with the rows' own block masks; the kernel is compiled once, for masks are its arguments."""
        name = ("flex", query.device, num_queries)
        if name not in self._prepared:
            self._prepared[name] = flex_block_mask(self.rows, num_queries, tile, query.device)
        grouped = query.shape[1] != key.shape[1]
        return kernel(query, key, value, block_mask=self._prepared[name], enable_gqa=grouped)


def document_runs(visibility: Visibility, length: int) -> list[tuple[int, int]]:
    """Runs of queries that cover all positions and never cross from one view, or one long document, into the next.

    Args:
        visibility: of one row.
        length: documents longer than this are cut into runs of whole blocks of about this many positions, shorter ones
            that fit into so many positions share a run.
    """
    view, segment = visibility.view_P, visibility.segment_P
    # padding inside a block belongs to the run of the document before it
    is_border = (view[1:] != view[:-1]) | ((segment[1:] != segment[:-1]) & (segment[1:] >= 0))
    borders = [0, *(torch.nonzero(is_border).flatten() + 1).tolist(), len(view)]
    size = visibility.block_size
    step = max(size, length // size * size)
    runs: list[tuple[int, int]] = []
    for start, stop in itertools.pairwise(borders):
        is_new_view = start > 0 and bool(view[start] != view[start - 1])
        if runs and not is_new_view and stop - runs[-1][0] <= length:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs += [(first, min(first + step, stop)) for first in range(start, stop, step)]
    return runs
