"""Which tokens of a shard are targets, as runs: what is learnt of a conversation is the assistant's answers.

Runs are int64 (r, 2), [start, stop) in tokens, in order and with a gap between any two. A shard's stand in its
index, so that how many targets a row has is known before a token is read; its tar holds the same, chunk by chunk.
"""

import io
from typing import NamedTuple

import numpy as np


class RowLayout(NamedTuple):
    """What the positions of rows are.

    Attributes:
        is_target: bool (n, L), tokens to be predicted.
        document: int32 (n, L), number of the position's document in its row, -1 for padding; None: each row is one.
    """

    is_target: np.ndarray
    document: np.ndarray | None = None


def runs_of(is_target: np.ndarray) -> np.ndarray:
    """The runs (r, 2) of a bool array (n,)."""
    edges = np.flatnonzero(np.diff(is_target.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).astype(np.int64)


def cut_runs(runs: np.ndarray, start: int, stop: int) -> np.ndarray:
    """What lies in [start, stop), counted from `start`."""
    low = np.searchsorted(runs[:, 1], start, side="right")
    high = np.searchsorted(runs[:, 0], stop)
    return np.clip(runs[low:high], start, stop) - start


def check_runs(runs: np.ndarray, num_tokens: int, name: str) -> None:
    """ValueError, naming the shard, unless runs are ones of so many tokens."""
    edges = runs.reshape(-1)
    is_right = runs.dtype == np.int64 and runs.ndim == 2 and runs.shape[1] == 2
    if not is_right or (len(edges) and (edges[0] < 0 or edges[-1] > num_tokens or (edges[1:] <= edges[:-1]).any())):
        raise ValueError(f"{name}: its target_runs are no runs of its tokens")


def runs_member(runs: np.ndarray, start: int, stop: int) -> bytes:
    """The member of a tar that says which tokens of the chunk [start, stop) are targets."""
    return npy_bytes(cut_runs(runs, start, stop).astype("<u4"))


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class TargetIndex:
    """Counts and marks by position, for one shard.

    Args:
        runs: (r, 2).
    """

    def __init__(self, runs: np.ndarray):
        self._edges = runs.reshape(-1)
        # targets before each edge: they grow inside a run, from an even edge to an odd one
        inside = np.diff(self._edges, prepend=0)
        inside[0::2] = 0
        self._before = np.cumsum(inside)

    def count(self, start: np.ndarray, length: int) -> np.ndarray:
        """Targets in the rows [start, start + length), int64 (n,) like `start`."""
        return self._count_before(start + length) - self._count_before(start)

    def mark(self, start: np.ndarray, length: int) -> np.ndarray:
        """Which tokens of the rows [start, start + length) are targets, bool (n, length)."""
        position = start[:, None] + np.arange(length)
        return np.searchsorted(self._edges, position, side="right") % 2 == 1

    def _count_before(self, position: np.ndarray) -> np.ndarray:
        passed = np.searchsorted(self._edges, position, side="right")
        if not len(self._edges):
            return np.zeros_like(position)
        last = np.maximum(passed - 1, 0)
        into_run = np.where(passed % 2 == 1, position - self._edges[last], 0)
        return np.where(passed == 0, 0, self._before[last]) + into_run
