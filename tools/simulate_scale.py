#!/usr/bin/env python3
"""What a run costs at a size nobody has at hand: sockets, groups, traffic, checkpoint and start-up reads.

Ranks are virtual: for each of some ranks the program's own code makes the process groups (counted, not connected),
cuts the model and describes the checkpoint; nothing is started, sent or written. Each line is marked
S: simulated with the real code, or C: calculated. What was measured at small sizes is in docs/scale.md.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from bd3lm_scale.config.checks import problems
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.sizes import count_on_rank, parameters
from bd3lm_scale.config.summary import GPT2_VOCAB_SIZE
from bd3lm_scale.config.traffic import traffic
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.model.parameters import padded_vocab_size
from bd3lm_scale.parallel.groups import descriptors_needed, few_groups

MB = 1e6
STATE_KINDS = 4
"""Masters, two moments and the average."""


def groups_of(config: RunConfig, world_size: int, rank: int) -> list[tuple[int, ...]]:
    """The process groups that a rank attends, as Megatron's own initialization makes them under `few_groups`."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    made: list[tuple[int, ...]] = []
    with _virtual_rank(rank, world_size), mock.patch.object(parallel_state, "create_group", _recorder(made)):
        parallel_state.destroy_model_parallel()
        with few_groups():
            parallel_state.initialize_model_parallel(
                config.parallel.tensor_parallel_size,
                config.parallel.pipeline_parallel_size,
                config.parallel.interleaved_chunks,
                create_gloo_process_groups=False,
            )
        assert dist.get_world_size() == world_size
        parallel_state.destroy_model_parallel()
    return made


def _recorder(made: list[tuple[int, ...]]) -> Any:
    import torch.distributed as dist

    def create_group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        made.append(tuple(ranks))
        return dist.group.WORLD  # a group that answers; nobody sends through it

    return create_group


@contextmanager
def _virtual_rank(rank: int, world_size: int) -> Iterator[None]:
    """A process group of torch's own kind in which the other ranks do not exist."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def checkpoint_of(config: RunConfig, world_size: int, vocab_size: int, stage: int = 0) -> dict[str, float]:
    """Bytes of a checkpoint, of one rank's file, and what a rank reads to resume in the same layout.

    On resume the ranks share the verification of all bytes; then each reads the runs it owns.
    """
    parallel = config.parallel
    replicas = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    state = 4 * STATE_KINDS
    total = state * sum(p.size for p in parameters(config, padded_vocab_size(vocab_size)).values())
    own = state * count_on_rank(config, vocab_size, stage) / replicas
    return {"total": total, "own": own, "verified": total / world_size, "filled": own}


def drawn_of(config: RunConfig, world_size: int, vocab_size: int, stage: int = 0) -> float:
    """Initial values that a rank computes at the first start: what it keeps (columns of matrices: whole rows)."""
    parallel = config.parallel
    replicas = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    return count_on_rank(config, vocab_size, stage) / replicas


def simulate(config: RunConfig, world_size: int, vocab_size: int) -> list[tuple[str, str, str]]:
    """The table: (what, figure, mark)."""
    last = world_size - 1
    attended = {rank: groups_of(config, world_size, rank) for rank in sorted({0, world_size // 2, last})}
    most = max(attended.values(), key=len)
    sent = traffic(config, world_size, vocab_size)
    saved = checkpoint_of(config, world_size, vocab_size)
    bits = max(1, (world_size - 1).bit_length())
    return [
        ("process groups that a rank attends, the world left out", f"{len(most)}", "S"),
        ("ranks in the largest of them", f"{max(map(len, most), default=1):,}", "S"),
        ("host sockets per rank (trees and rings of 2 host groups)", f"at most {16 * bits}", "C"),
        ("host sockets of rank 0, the store's included", f"at most {world_size + 16 * bits:,}", "C"),
        ("open files to allow", f"{descriptors_needed(world_size):,}", "S"),
        *[
            (f"{kind}-parallel traffic per rank and step, {link}", f"{getattr(sent, kind) / MB:,.0f} MB", "C")
            for kind, link in sent.links.items()
        ],
        ("checkpoint", f"{saved['total'] / MB:,.0f} MB in {world_size:,} files", "C"),
        ("written per rank and save, copies by one of the peers", f"at most {saved['own'] / MB:,.1f} MB", "C"),
        ("read per rank at a resume to verify", f"{saved['verified'] / MB:,.1f} MB", "C"),
        ("read per rank at a resume to fill", f"{saved['filled'] / MB:,.1f} MB", "C"),
        ("initial values drawn per rank at a first start", f"{drawn_of(config, world_size, vocab_size):,.0f}", "C"),
        ("heartbeats read at a hang, by one rank", f"{2 * world_size:,}", "C"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the table of a configuration at a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/owt_7b_tp4_pp4.yaml", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides")
    parser.add_argument("--ranks", type=int, required=True, help="size of the world")
    parser.add_argument("--json", metavar="FILE", help="also write the table here")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        config = replace(config, runtime=replace(config.runtime, device="cpu"))
        vocab_size = config.model.vocab_size or GPT2_VOCAB_SIZE
        if found := problems(config, args.ranks, vocab_size):
            raise ConfigError(found, f"{args.config} on {args.ranks} ranks")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    table = simulate(config, args.ranks, vocab_size)
    width = max(len(what) for what, _, _ in table)
    print(f"{args.ranks:,} ranks of {args.config} (S: simulated with the program's code, C: calculated)")
    for what, figure, mark in table:
        print(f"{what:<{width}}  {mark}  {figure}")
    if args.json:
        Path(args.json).write_text(json.dumps([list(row) for row in table], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
