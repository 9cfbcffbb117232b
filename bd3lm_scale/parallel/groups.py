"""How many process groups, sockets and file descriptors a layout costs, and what keeps them few.

Megatron makes every group of every kind on every rank, 11 W + 9 calls for W ranks, each of which all ranks attend. Here
a rank attends the groups it belongs to, and groups of the same ranks are one. Gloo connects two ranks when they first
talk to each other; what the host exchanges runs along trees and rings, so a rank's sockets grow with log W.
"""

import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

_LAZY_GLOO = "TORCH_GLOO_LAZY_INIT"
_OWN_DESCRIPTORS = 256  # libraries, log, shards, checkpoint files being written


_made: dict[tuple[int, ...], Any] = {}
_made_under: Any = None
"""Groups by their ranks, and the world they belong to: within it each is made once and kept."""


@contextmanager
def few_groups() -> Iterator[None]:
    """While Megatron initializes: each set of ranks gets one group, made by its members alone.

    All ranks make their groups in Megatron's order, which is the same everywhere, so members meet in the same order.
    """
    from megatron.core import parallel_state

    original = parallel_state.create_group

    def create_group(ranks: Any = None, timeout: Any = None, **options: Any) -> Any:
        members = tuple(range(dist.get_world_size())) if ranks is None else tuple(sorted(ranks))
        if dist.get_rank() not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        if members not in _made:
            _made[members] = original(list(members), timeout, **{**options, "use_local_synchronization": True})
        return _made[members]

    def name(ranks: list[int]) -> str:
        # torch puts the number of this rank's groups into the name, which differs between members where some belong to
        # one more (first and last stage share the embedding's), and they wait for each other under different names
        return hashlib.sha1(f"ranks {ranks}".encode(), usedforsecurity=False).hexdigest()

    global _made_under
    if _made_under is not dist.group.WORLD:
        _made.clear()
        _made_under = dist.group.WORLD
    with (
        replaced(parallel_state, "create_group", create_group),
        replaced(distributed_c10d, "_hash_ranks_to_str", name),
    ):
        yield


@contextmanager
def replaced(module: ModuleType, name: str, function: Callable) -> Iterator[None]:
    """While the context lasts, `module.name` is `function`; a name that the module does not have is an error."""
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def connect_when_needed() -> None:
    """Gloo groups open a connection when two ranks first exchange something, instead of all to all at once."""
    os.environ.setdefault(_LAZY_GLOO, "1")


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one; returns the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


def descriptors_needed(world_size: int) -> int:
    """Open files a rank may need: rank 0 serves the store, one connection per rank; all else grows with log W."""
    return _OWN_DESCRIPTORS + world_size + 16 * max(1, world_size - 1).bit_length()
