"""Which tiles of the P x P attention pattern are seen in part and which whole, without evaluating the pattern.

Neighbouring positions of one view and one segment, whose blocks rise by at most one at a time, form a piece. Of two
pieces the first and last block say whether some pair, or every pair, of theirs is seen; a tile is one piece or a few.
So the cost is that of the tiles, (P / tile)^2, and only tiles at the edge of what is seen are ever looked into.

Shapes: P positions, Q and K tiles of queries and of keys, J keys of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.values import CLEAN_VIEW, Visibility

_PAIRS_AT_ONCE = 1 << 18
_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class _Pieces:
    """Pieces of a run of positions, as (pieces,) arrays; tile_start is the first piece of each tile."""

    view: np.ndarray
    segment: np.ndarray
    first_block: np.ndarray
    last_block: np.ndarray
    tile_start: np.ndarray

    def of_tiles(self, first: int, stop: int) -> "_Pieces":
        """Those of tiles first ... stop - 1."""
        end = self.tile_start[stop] if stop < len(self.tile_start) else len(self.view)
        cut = slice(self.tile_start[first], end)
        return _Pieces(
            self.view[cut],
            self.segment[cut],
            self.first_block[cut],
            self.last_block[cut],
            self.tile_start[first:stop] - self.tile_start[first],
        )


def _pieces(visibility: Visibility, edges: Sequence[int]) -> _Pieces:
    """Pieces of the positions edges[0] ... edges[-1] - 1, cut at the edges."""
    begin, stop = edges[0], edges[-1]
    view, segment, block = (
        field[begin:stop].cpu().numpy() for field in (visibility.view_P, visibility.segment_P, visibility.block_P)
    )
    step = np.diff(block)
    is_start = np.ones(stop - begin, dtype=bool)
    is_start[1:] = (np.diff(view) != 0) | (np.diff(segment) != 0) | (step < 0) | (step > 1)
    tiles = np.asarray(edges[:-1]) - begin
    is_start[tiles] = True
    start = np.flatnonzero(is_start)
    last = np.append(start[1:], stop - begin) - 1
    return _Pieces(view[start], segment[start], block[start], block[last], np.searchsorted(start, tiles))


def seen_tiles(
    visibility: Visibility, query_edges: Sequence[int], key_edges: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(some pair is seen, every pair is seen), bool (Q, K): visibility.may_see summed up over tiles.

    Args:
        visibility: of all positions.
        query_edges: 0 or more positions that begin the tiles of queries, and the end of the last one.
        key_edges: the same for keys.
    """
    queries, keys = _pieces(visibility, query_edges), _pieces(visibility, key_edges)
    count = len(query_edges) - 1
    some, every = (np.zeros((count, len(key_edges) - 1), dtype=bool) for _ in range(2))
    tiles_at_once = max(1, _PAIRS_AT_ONCE * count // (len(queries.view) * len(keys.view)))
    for first in range(0, count, tiles_at_once):
        stop = min(count, first + tiles_at_once)
        part = queries.of_tiles(first, stop)
        for out, seen, reduce in zip(
            (some, every), _seen_pieces(part, keys), (np.logical_or, np.logical_and), strict=True
        ):
            by_query = reduce.reduceat(seen, part.tile_start, axis=0)
            out[first:stop] = reduce.reduceat(by_query, keys.tile_start, axis=1)
    return some, every


def _seen_pieces(queries: _Pieces, keys: _Pieces) -> tuple[np.ndarray, np.ndarray]:
    """(some, every) for each pair of pieces, by the rule of Visibility.may_see on ranges of blocks."""
    q_first, q_last = queries.first_block[:, None], queries.last_block[:, None]
    k_first, k_last = keys.first_block[None], keys.last_block[None]
    same_segment = queries.segment[:, None] == keys.segment[None]
    own_view = queries.view[:, None] == keys.view[None]
    is_clean = keys.view[None] == CLEAN_VIEW
    some = (own_view & (k_first <= q_last) & (q_first <= k_last)) | (is_clean & (k_first < q_last))
    one_block = (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
    every = np.where(is_clean, np.where(own_view, k_last <= q_first, k_last < q_first), own_view & one_block)
    return same_segment & some, same_segment & every


@torch.compiler.disable(recursive=True)
def flex_block_mask(rows: Sequence[Visibility], num_queries: int, tile: int, device: torch.device) -> Any:
    """FlexAttention's BlockMask of the first num_queries positions by all, from the lists of its tiles.

    Args:
        rows: visibility of all keys for each row, or of all rows alike.
        num_queries: queries; where they or the keys end inside a tile, that tile counts as seen in part.
        tile: edge of a tile.
        device: where the kernel runs.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_keys = rows[0].view_P.numel()
    seen = [_seen_in_part_and_whole(row, num_queries, num_keys, tile) for row in rows]
    partly, whole = [some for some, _ in seen], [every for _, every in seen]
    # the rows end to end: one rule for all of them
    view, segment, block = (
        torch.cat([getattr(row, name) for row in rows]).to(device) for name in ("view_P", "segment_P", "block_P")
    )
    there = Visibility(view, segment, block, rows[0].block_size)

    def seen_in_row(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return there.may_see(b * num_keys + q, b * num_keys + k)

    return BlockMask(
        (num_queries, num_keys),
        *_listed(partly, device),
        *_listed(whole, device),
        *_listed([tiles.T for tiles in partly], device),
        *_listed([tiles.T for tiles in whole], device),
        BLOCK_SIZE=(tile, tile),
        mask_mod=seen_in_row if len(rows) > 1 else lambda b, h, q, k: there.may_see(q, k),
    )


def _seen_in_part_and_whole(
    visibility: Visibility, num_queries: int, num_keys: int, tile: int
) -> tuple[np.ndarray, np.ndarray]:
    some, every = seen_tiles(
        visibility, [*range(0, num_queries, tile), num_queries], [*range(0, num_keys, tile), num_keys]
    )
    every[num_queries // tile :] = False
    every[:, num_keys // tile :] = False
    return some & ~every, every


def _listed(rows: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of tiles (Q, K) in each of B rows: how many are chosen (B, 1, Q), and which, those first (B, 1, Q, K)."""
    counts, orders = zip(*map(_chosen, rows), strict=True)
    return torch.from_numpy(np.stack(counts)).to(device)[:, None], torch.from_numpy(np.stack(orders)).to(device)[
        :, None
    ]


def _chosen(tiles_QK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many tiles of each row of tiles are chosen, and the row's tiles, chosen ones first."""
    order = np.empty(tiles_QK.shape, dtype=np.int32)
    for first in range(0, len(order), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        order[part] = np.argsort(~tiles_QK[part], axis=1, kind="stable")
    return tiles_QK.sum(axis=1, dtype=np.int32), order


@dataclass(frozen=True)
class Chunk:
    """Queries [start, stop) and the key ranges they may see.

    Attributes:
        start, stop: of the queries.
        keys: ranges (start, stop), in the order of the bias.
        bias: additive (stop - start, keys), a view of a buffer that chunks share; None: all is seen.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    bias: Tensor | None


@torch.compiler.disable(recursive=True)
def plan_chunks(
    visibility: Visibility, runs: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> list[Chunk]:
    """The chunks of all runs of queries; runs lie end to end and cover all positions.

    What is seen in part repeats from chunk to chunk; what is seen whole has a bias of zeros, and grows. So a bias is a
    view of a buffer [pattern, zeros, another pattern]: its keys are those seen in part, then those seen whole, or the
    other way round.
    """
    edges = [runs[0][0], *(stop for _, stop in runs)]
    some, every = seen_tiles(visibility, edges, edges)
    whole: list[list[tuple[int, int]]] = []
    partly: list[list[tuple[int, int]]] = []
    names: list[bytes] = []
    patterns: dict[bytes, Tensor] = {}
    for number, run in enumerate(runs):
        in_whole, in_part = (np.flatnonzero(t).tolist() for t in (every[number], some[number] & ~every[number]))
        whole.append(_joined([runs[k] for k in in_whole]))
        ranges, pattern = _partly_seen(visibility, run, [runs[k] for k in in_part])
        partly.append(ranges)
        name = b""
        if pattern is not None:
            name = f"{tuple(pattern.shape)}".encode() + np.packbits(pattern.numpy()).tobytes()
            patterns[name] = pattern
        names.append(name)
    widths = [_width(ranges) for ranges in whole]
    buffers = _buffers(patterns, max(widths), dtype, device)
    chunks = []
    for run, seen_whole, seen_partly, width, name in zip(runs, whole, partly, widths, names, strict=True):
        keys, bias = [*seen_partly, *seen_whole], None
        if name:
            buffer, is_first = buffers[name]
            width += _width(seen_partly)
            bias = buffer[:, :width] if is_first else buffer[:, buffer.shape[1] - width :]
            keys = keys if is_first else [*seen_whole, *seen_partly]
        chunks.append(Chunk(run[0], run[1], tuple(keys), bias))
    return chunks


def _buffers(
    patterns: dict[bytes, Tensor], zeros: int, dtype: torch.dtype, device: torch.device
) -> dict[bytes, tuple[Tensor, bool]]:
    """The additive buffer of each pattern, and whether the pattern stands at its beginning (else at its end)."""
    by_rows: dict[int, list[bytes]] = {}
    for name, pattern in patterns.items():
        by_rows.setdefault(len(pattern), []).append(name)
    out = {}
    for rows, names in by_rows.items():
        for first in range(0, len(names), 2):
            pair = names[first : first + 2]
            widths = [patterns[name].shape[1] for name in pair]
            buffer = torch.zeros(rows, zeros + sum(widths), dtype=dtype)
            buffer[:, : widths[0]].masked_fill_(~patterns[pair[0]], float("-inf"))
            if len(pair) == 2:
                buffer[:, widths[0] + zeros :].masked_fill_(~patterns[pair[1]], float("-inf"))
            buffer = buffer.to(device)
            out |= {name: (buffer, place == 0) for place, name in enumerate(pair)}
    return out


def _width(ranges: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def _partly_seen(
    visibility: Visibility, run: tuple[int, int], tiles: list[tuple[int, int]]
) -> tuple[list[tuple[int, int]], Tensor | None]:
    """Ranges of the keys inside these tiles that anyone sees, and the pattern (queries, keys); None: all is seen."""
    if not tiles:
        return [], None
    keys = torch.cat([torch.arange(a, b) for a, b in tiles])
    allowed = visibility.may_see(torch.arange(*run)[:, None], keys[None, :])
    used = allowed.any(0)
    keys, allowed = keys[used], allowed[:, used]
    border = torch.nonzero(keys[1:] - keys[:-1] != 1).flatten() + 1
    starts, stops = [0, *border.tolist()], [*border.tolist(), len(keys)]
    ranges = [(int(keys[a]), int(keys[b - 1]) + 1) for a, b in zip(starts, stops, strict=True)]
    return ranges, None if bool(allowed.all()) else allowed


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges in one."""
    out: list[tuple[int, int]] = []
    for start, stop in ranges:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out
