"""Small exchanges between all ranks on the host: JSON over a gloo group (object collectives would unpickle).

Values travel along binomial trees, so a rank talks to at most log2 W others however many there are.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bd3lm_scale.errors import CheckpointError, ConfigError

T = TypeVar("T")


class Agreement:
    """Rank 0 collects a value from every rank and sends every rank its own. Does nothing in a world of one."""

    def __init__(self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        if world_size > 1 and group is None:
            raise ValueError("world_size > 1 needs a gloo group of its own (torch.distributed.new_group)")
        self.rank = rank
        self.world_size = world_size
        self.group = group

    def leave(self) -> None:
        """After a lost rank: close the connections, so that no rank waits for this one. No exchange can follow."""
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
        values, stride = [value], 1  # of ranks rank, rank + 1, ..., rank + stride - 1
        while stride < self.world_size:
            if self.rank & stride:
                self._send(values, self.rank - stride)
                return []
            if self.rank + stride < self.world_size:
                values += self._receive(self.rank + stride)
            stride *= 2
        return values

    def _send(self, value: Any, to_rank: int) -> None:
        data = _encode(value)
        dist.send(torch.tensor([data.numel()]), group=self.group, group_dst=to_rank)
        dist.send(data, group=self.group, group_dst=to_rank)

    def _receive(self, from_rank: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, group=self.group, group_src=from_rank)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, group=self.group, group_src=from_rank)
        return _decode(data)

    def _check(self) -> None:
        if self.group is None:
            raise RuntimeError("another rank was lost before")

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value on every rank, in rank order."""
        return self.share(self.collect(value))

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Run `work` here and return its result if it succeeded on all ranks; `work` must not communicate.

        Raises:
            ConfigError, CheckpointError: raised on all ranks when one rank met it (the lowest such rank's message); an
                OSError becomes a CheckpointError. Any other exception is local to its rank.
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
        """Call `decision` on rank 0 alone and return its result on all ranks (JSON types).

        Raises:
            CheckpointError: raised on all ranks when rank 0 met one, or an OSError.
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
