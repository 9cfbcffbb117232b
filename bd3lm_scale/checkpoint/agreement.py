"""What the ranks tell each other about a checkpoint: JSON over a gloo group (no pickled objects)."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bd3lm_scale.checkpoint.state import CheckpointError


class Agreement:
    """Rank 0 collects what every rank says, and tells every rank what it decided. Trivial when alone."""

    def __init__(self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        if world_size > 1 and group is None:
            raise ValueError("world_size > 1 needs a gloo group of its own (torch.distributed.new_group)")
        self.rank = rank
        self.world_size = world_size
        self.group = group

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank (JSON types)."""
        if self.world_size == 1:
            return value
        data = _encode(value) if self.rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        dist.broadcast(size, group=self.group, group_src=0)
        if self.rank != 0:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, group=self.group, group_src=0)
        return _decode(data)

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value on rank 0, in rank order (an empty list elsewhere)."""
        if self.world_size == 1:
            return [value]
        data = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        received = [torch.empty_like(padded) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(padded, received, group=self.group, group_dst=0)
        return [_decode(d[: int(n)]) for d, n in zip(received or [], sizes, strict=False)]

    def decide(self, decision: Callable[[], Any]) -> Any:
        """What `decision` returns on rank 0, the only rank that calls it; JSON types.

        Raises:
            CheckpointError: on every rank, when rank 0 met one, or an OSError.
        """
        answer: dict[str, Any] = {}
        if self.rank == 0:
            try:
                answer = {"value": decision()}
            except (CheckpointError, OSError) as error:
                answer = {"error": str(error)}
        answer = self.share(answer)
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return answer["value"]


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.numpy()))
