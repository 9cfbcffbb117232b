"""What a layout costs in groups and sockets, counted in real worlds of 2, 4, 8 and 16 ranks forked from one process."""

import json
import os
import subprocess
import sys

WORLDS = (2, 4, 8, 16)

SCRIPT = """
import os, sys, json, multiprocessing, torch
torch.set_num_threads(1)
import torch.distributed as dist
import megatron.core.parallel_state
from bd3lm_scale.config.schema import ParallelConfig
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.parallel.mesh import init_mesh, new_host_group, shutdown
from bd3lm_scale.parallel.sums import sum_on_host

def sockets():
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and os.readlink(link).startswith("socket") for link in links)

def rank(rank, world, port, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    before = sockets()
    made, new_group = [], dist.new_group
    dist.new_group = lambda *args, **kwargs: made.append(1) or new_group(*args, **kwargs)
    layout = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2 if world > 2 else 1)
    mesh = init_mesh(layout, "cpu")
    groups = len(made)
    agreement, saves = Agreement(rank, world, new_host_group()), Agreement(rank, world, new_host_group())
    for talk in (agreement, saves):
        assert talk.exchange({"rank": rank}) == [{"rank": other} for other in range(world)]
        assert talk.run_on_all_ranks(lambda: rank) == rank
        assert talk.share(rank) == 0
        dist.all_reduce(torch.ones(3), group=talk.group)
    host = sockets() - before
    large = 2**64 - 1 - rank  # hashes: the sum wraps around
    floats, integers = sum_on_host([0.1, float(rank)], [large, rank, 2**63], agreement.group)
    assert abs(floats[0] - 0.1 * world) < 1e-12 and floats[1] == world * (world - 1) / 2
    assert integers == [sum(2**64 - 1 - r for r in range(world)) % 2**64, sum(range(world)), world * 2**63 % 2**64]
    parallel_state = megatron.core.parallel_state
    for name, group in (("tensor", parallel_state.get_tensor_model_parallel_group()),
                        ("data", parallel_state.get_data_parallel_group(with_context_parallel=True)),
                        ("pipeline", parallel_state.get_pipeline_model_parallel_group())):
        total = torch.tensor([rank])
        dist.all_reduce(total, group=group)
        assert int(total) == sum(dist.get_process_group_ranks(group)), name
    results.put((rank, groups, host))
    megatron.core.parallel_state.destroy_model_parallel()  # another layout in the same world, as in one process's tests
    again = init_mesh(ParallelConfig(), "cpu")
    total = torch.ones(1)
    dist.all_reduce(total, group=megatron.core.parallel_state.get_data_parallel_group(with_context_parallel=True))
    assert int(total) == again.data_size == world
    megatron.core.parallel_state.destroy_model_parallel()
    if world >= 4:  # stages in the middle are in no embedding group, and must find the others all the same
        deep = init_mesh(ParallelConfig(pipeline_parallel_size=4), "cpu")
        everyone = torch.ones(1)
        dist.all_reduce(everyone, group=megatron.core.parallel_state.get_pipeline_model_parallel_group())
        assert int(everyone) == 4
        megatron.core.parallel_state.destroy_model_parallel()
    init_mesh(layout, "cpu")
    dist.all_reduce(total, group=megatron.core.parallel_state.get_tensor_model_parallel_group())
    assert int(total) == 2 * world
    dist.barrier(group=agreement.group)
    shutdown()

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    found = {}
    for number, world in enumerate(map(int, sys.argv[2:])):
        results = fork.SimpleQueue()
        port = str(int(sys.argv[1]) + number)
        children = [fork.Process(target=rank, args=(r, world, port, results)) for r in range(world)]
        for child in children: child.start()
        found[world] = sorted(results.get() for _ in children)
        for child in children: child.join()
        assert all(child.exitcode == 0 for child in children)
    print(json.dumps(found))
"""


def test_groups_are_constant_and_host_sockets_grow_with_the_logarithm():
    port = str(21000 + os.getpid() % 900)
    command = [sys.executable, "-c", SCRIPT, port, *map(str, WORLDS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {int(world): ranks for world, ranks in json.loads(done.stdout.splitlines()[-1]).items()}
    for world, ranks in found.items():
        # tensor, pipeline, data, model, single and embedding groups: none is made by a rank outside it
        assert max(groups for _, groups, _ in ranks) <= 10, f"{world} ranks: {ranks}"
        depth = (world - 1).bit_length()
        for rank, _, sockets in ranks:
            store = world if rank == 0 else 0  # rank 0 serves the store, a connection for each rank
            assert sockets - store <= 16 + 6 * depth, f"{world} ranks, rank {rank}: {sockets} sockets"
