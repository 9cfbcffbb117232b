"""What the ranks tell each other about a checkpoint: JSON over a gloo group (no pickled objects)."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bd3lm_scale.errors import CheckpointError, ConfigError

T = TypeVar("T")


class Agreement:
    """Rank 0 collects what every rank says, and tells every rank what it decided. Trivial when alone."""

    def __init__(self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        if world_size > 1 and group is None:
            raise ValueError("world_size > 1 needs a gloo group of its own (torch.distributed.new_group)")
        self.rank = rank
        self.world_size = world_size
        self.group = group

    def leave(self) -> None:
        """After a lost peer: close the connections, so that nobody waits for this rank. No agreement follows."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def share(self, value: Any) -> Any:
        """Rank 0's value on every rank (JSON types)."""
        if self.world_size == 1:
            return value
        self._check()
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
        self._check()
        data = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        received = [torch.empty_like(padded) for _ in range(self.world_size)] if self.rank == 0 else None
        dist.gather(padded, received, group=self.group, group_dst=0)
        return [_decode(d[: int(n)]) for d, n in zip(received or [], sizes, strict=False)]

    def _check(self) -> None:
        if self.group is None:
            raise RuntimeError("another rank was lost before")

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value on every rank, in rank order."""
        return self.share(self.collect(value))

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once it went well everywhere; it must not communicate itself.

        Raises:
            ConfigError, CheckpointError: the first unlucky rank's, on every rank, so that none waits for the others.
        """
        result, problem = None, None
        try:
            result = work()
        except ConfigError as error:
            problem = {"problems": error.problems, "source": error.source}
        except (CheckpointError, OSError) as error:
            problem = {"text": str(error)}
        reports = self.exchange(problem)
        rank = next((rank for rank, report in enumerate(reports) if report is not None), None)
        if rank is None:
            return result  # pyright: ignore[reportReturnType]
        where = "" if all(report == reports[rank] for report in reports) else f"rank {rank}: "
        if "problems" in reports[rank]:
            raise ConfigError(reports[rank]["problems"], where + reports[rank]["source"])
        raise CheckpointError(where + reports[rank]["text"])

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
