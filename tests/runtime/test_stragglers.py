import os
import subprocess
import sys
import time

import pytest

from bd3lm_scale.runtime.stragglers import OwnWork, find_stragglers

NODES = ["a", "a", "b", "b", "c", "c"]


def test_slow_rank_is_named():
    spread = find_stragglers([1.0, 1.1, 1.0, 2.0, 0.9, 1.0], NODES, factor=1.5)
    assert (spread.slow_ranks, spread.slow_nodes) == ((3,), ())
    assert (spread.slowest_rank, spread.slowest_node) == (3, "b")
    assert "rank 3 (b)" in spread.message()
    assert "2.0 times" in spread.message()


def test_slow_node_is_told_from_a_slow_rank():
    spread = find_stragglers([1.0, 1.1, 1.0, 1.0, 2.0, 2.1], NODES, factor=1.5)
    assert spread.slow_ranks == (5, 4)
    assert spread.slow_nodes == ("c",)
    assert "node c" in spread.message()


def test_even_work_names_nobody():
    spread = find_stragglers([1.0, 1.2, 1.1], ["a", "b", "c"], factor=1.5)
    assert spread.slow_ranks == spread.slow_nodes == ()


def test_single_rank_is_no_straggler():
    assert find_stragglers([3.0], ["a"], factor=1.5).slow_ranks == ()


def test_waiting_is_not_work():
    clock = OwnWork(window=3)
    assert clock.seconds == 0.0
    for _ in range(3):
        clock.start()
        time.sleep(0.01)
        clock.waiting()
        time.sleep(0.05)
    assert clock.seconds == pytest.approx(0.01, abs=0.02)


def test_noise_in_tiny_steps_is_no_straggler():
    assert find_stragglers([0.001, 0.001, 0.004], ["a", "b", "c"], factor=1.5).slow_ranks == ()


RANK = """
import os, time, torch.distributed as dist
from bd3lm_scale.config.schema import RuntimeConfig
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.runtime.log import set_up_logging
from bd3lm_scale.runtime.stragglers import StragglerWatch
rank = int(os.environ["RANK"])
set_up_logging(None)
dist.init_process_group("gloo")
watch = StragglerWatch(RuntimeConfig(), Agreement(rank, 3, dist.group.WORLD), every_steps=5)
for step in range(1, 11):
    watch.start()
    time.sleep(0.1 if rank == 2 else 0.01)
    watch.waiting()
    dist.barrier()
    spread = watch.look(step)
    assert (spread is None) == (step % 5 > 0)
print(rank, spread.slowest_rank, spread.slow_nodes)
dist.destroy_process_group()
"""


def test_ranks_agree_on_who_is_slow():
    processes = []
    for rank in range(3):
        place = {"RANK": str(rank), "WORLD_SIZE": "3", "SLURMD_NODENAME": f"n{rank}", "OMP_NUM_THREADS": "1"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(30000 + os.getpid() % 900)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([sys.executable, "-c", RANK], env=os.environ | place, **pipes))
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in outputs] == [f"{rank} 2 ('n2',)\n" for rank in range(3)], outputs
    assert outputs[0][1].count("straggler: node n2") == 2
    assert "straggler" not in outputs[1][1]
