"""A toy of what optim/ hands over: any parameters cut by TP x PP x DP, like ZeRO 1/2 or 3 would."""

import torch

from bd3lm_scale.values import StateSlice

FULL = ("master", "exp_avg", "exp_avg_sq", "ema")


def whole_state(shapes: dict[str, tuple[int, ...]], seed: int = 0, kinds=FULL) -> dict[str, dict[str, torch.Tensor]]:
    """{kind: {name: tensor}} of random bits, every element distinct from its neighbours."""
    generator = torch.Generator().manual_seed(seed)
    return {k: {n: torch.randn(s, generator=generator) for n, s in shapes.items()} for k in kinds}


def shard(tensor: torch.Tensor, dim: int | None, index: int, count: int, parts: tuple[int, ...] = ()) -> torch.Tensor:
    """Of each part along `dim` the same share, end to end; one part unless some are given."""
    if dim is None:
        return tensor
    pieces = tensor.split(parts or tensor.shape[dim], dim)
    return torch.cat([piece.chunk(count, dim)[index] for piece in pieces], dim).contiguous()


def cut(shapes, dims, tp, pp, dp, state=None, kinds=FULL, parts=None) -> list[list[StateSlice]]:
    """StateSlices of every rank. With state the tensors hold it, without they are NaN, to be filled.

    Parameters are dealt to pipeline stages in order; each stage's shards are laid end to end and the flat buffer is
    cut in `dp` nearly equal runs, as ZeRO's partitions are (their padding is never part of a slice).
    """
    names = list(shapes)
    ranks = []
    for stage in range(pp):
        mine = names[stage::pp]
        for t in range(tp):
            sizes = []
            for name in mine:
                numel = torch.Size(shapes[name]).numel()
                sizes.append(numel if dims[name] is None else numel // tp)
            per_rank = -(-sum(sizes) // dp)
            for d in range(dp):
                low, high, begin, slices = d * per_rank, (d + 1) * per_rank, 0, []
                for name, size in zip(mine, sizes, strict=True):
                    start, stop = max(low, begin) - begin, min(high, begin + size) - begin
                    if start < stop:
                        count = 1 if dims[name] is None else tp
                        index = t if count > 1 else 0
                        dim = dims[name] if count > 1 else None
                        pieces = (parts or {}).get(name, ()) if count > 1 else ()
                        tensors = {}
                        for kind in kinds:
                            if state is None:
                                tensors[kind] = torch.full((stop - start,), float("nan"))
                            else:
                                flat = shard(state[kind][name], dim, index, count, pieces).reshape(-1)
                                tensors[kind] = flat[start:stop].clone()
                        owner = count > 1 or t == 0
                        slices.append(
                            StateSlice(
                                name, tuple(shapes[name]), dim, index, count, start, stop, owner, tensors, pieces
                            )
                        )
                    begin += size
                ranks.append(slices)
    return ranks
