"""Boxes: how any cut of a parameter (TP x PP x ZeRO 1/2/3) is described without naming the cut.

A StateSlice is a flat run of a tensor-parallel shard. In the coordinates of the whole parameter such a run is a few
axis-aligned boxes (for a matrix at most three: the rest of a row, whole rows, the beginning of a row; whole rows may
be one box for each part that is cut for itself). Checkpoints
store boxes; a reader under another layout intersects its own boxes with the stored ones. In the order of the run
each box is a contiguous range, so a file is the plain concatenation of the runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from bd3lm_scale.values import StateSlice

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a parameter.

    Attributes:
        offset: where it begins in the whole parameter, one number per dimension.
        shape: its extent.
        start: where its first element lies in the flat run it was cut from (elements).
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int = 0

    @property
    def volume(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def shard_shape(part: StateSlice) -> tuple[int, ...]:
    """Shape of the tensor-parallel shard the slice lies in; ValueError where the cut is impossible."""
    shape = list(part.global_shape)
    if part.shard_dim is None:
        if part.shard_count != 1:
            raise ValueError(f"{part.name}: shard_count ({part.shard_count}) needs a shard_dim")
        return tuple(shape)
    if not 0 <= part.shard_dim < len(shape) or not 0 <= part.shard_index < part.shard_count:
        raise ValueError(f"{part.name}: shard {part.shard_index} of {part.shard_count} along {part.shard_dim}")
    size = shape[part.shard_dim]
    parts = part.parts or (size,)
    if sum(parts) != size or (len(parts) > 1 and part.shard_dim != 0):
        raise ValueError(f"{part.name}: parts {parts} are not the rows of {tuple(shape)}, which alone are cut in parts")
    if any(rows % part.shard_count for rows in parts):
        cut = f" in parts of {parts}" if part.parts else ""
        raise ValueError(
            f"{part.name}: {tuple(shape)}{cut} is not divisible by {part.shard_count} along {part.shard_dim}"
        )
    shape[part.shard_dim] = size // part.shard_count
    return tuple(shape)


def boxes_of(part: StateSlice) -> list[Box]:
    """The boxes of the whole parameter that the slice covers, in the order of its run."""
    shape = shard_shape(part)
    if not 0 <= part.start <= part.stop <= prod(shape):
        raise ValueError(f"{part.name}: run [{part.start}, {part.stop}) outside a shard of {prod(shape)} elements")
    found = []
    start = 0
    for offset, extent in _cut(shape, part.start, part.stop):
        for placed, size in _placed(part, offset, extent):
            found.append(Box(placed, size, start))
            start += found[-1].volume
    return found


def _placed(
    part: StateSlice, offset: tuple[int, ...], extent: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Where a box of the shard lies in the whole parameter: one box for each of its parts that it meets."""
    dim = part.shard_dim
    if dim is None:
        yield offset, extent
        return
    here = first = 0  # where the part begins in the shard, and in the whole
    for rows in part.parts or (part.global_shape[dim],):
        share = rows // part.shard_count
        low, high = max(offset[dim], here), min(offset[dim] + extent[dim], here + share)
        if low < high:
            place = first + part.shard_index * share + low - here
            yield (*offset[:dim], place, *offset[dim + 1 :]), (*extent[:dim], high - low, *extent[dim + 1 :])
        here, first = here + share, first + rows


def _cut(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, extent) of the boxes of the flat range [start, stop) of a tensor of this shape."""
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    inner = prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        return _one_row(first, shape, head, tail)
    pieces = []
    if head:
        pieces += _one_row(first, shape, head, inner)
        first += 1
    if first < last:
        pieces.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    if tail:
        pieces += _one_row(last, shape, 0, tail)
    return pieces


def _one_row(row: int, shape: tuple[int, ...], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [((row, *offset), (1, *extent)) for offset, extent in _cut(shape[1:], start, stop)]


class BoxIndex:
    """The stored boxes of one tensor, as arrays, so that overlaps are found without a loop over all of them."""

    def __init__(self, shape: tuple[int, ...], boxes: list[Box]) -> None:
        self.shape = shape
        self.boxes = boxes
        self.low = np.array([b.offset for b in boxes], dtype=np.int64).reshape(len(boxes), len(shape))
        self.high = self.low + np.array([b.shape for b in boxes], dtype=np.int64).reshape(len(boxes), len(shape))

    def problem(self) -> str | None:
        """Why the boxes are not exactly the tensor, each element once; None when they are."""
        if (self.low < 0).any() or (self.high > np.array(self.shape, dtype=np.int64)).any():
            return f"a box lies outside the shape {self.shape}"
        for i in range(len(self.boxes)):
            if len(self.overlapping(self.boxes[i])) > 1:
                return f"box {self.boxes[i].offset} of {self.boxes[i].shape} is stored twice"
        stored, wanted = sum(b.volume for b in self.boxes), prod(self.shape)
        return None if stored == wanted else f"{stored:,} of {wanted:,} elements are stored"

    def overlapping(self, box: Box) -> list[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """(index of a stored box, region inside it, region inside `box`) for each stored box that meets `box`."""
        low = np.maximum(self.low, np.array(box.offset, dtype=np.int64))
        high = np.minimum(self.high, np.array(box.offset, dtype=np.int64) + np.array(box.shape, dtype=np.int64))
        found = []
        for i in np.flatnonzero((low < high).all(axis=1)):
            pairs = list(zip(low[i].tolist(), high[i].tolist(), strict=True))
            stored = tuple(slice(a - o, b - o) for (a, b), o in zip(pairs, self.low[i].tolist(), strict=True))
            wanted = tuple(slice(a - o, b - o) for (a, b), o in zip(pairs, box.offset, strict=True))
            found.append((int(i), stored, wanted))
        return found
