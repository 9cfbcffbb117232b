"""The checks before the first step: verdicts as a table of cases, and one real group of processes."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.preflight import NodeReport, judge, table
from bd3lm_scale.runtime.run_folder import read_json

FIT = [NodeReport(r, f"n{r // 2}", "gpu", 70.0, 500.0, 1000.0, 2.0, "torch 2", "c0de", "c0f1", 4096) for r in range(6)]


@pytest.mark.parametrize(
    ("change", "word", "is_fatal"),
    [
        ({"versions": "torch 1"}, "versions differ", True),
        ({"code": "beef"}, "code differ", True),
        ({"config": "beef"}, "config differ", True),
        ({"free_disk_gib": 0.5}, "disk", True),
        ({"descriptors": 100}, "ulimit -n", True),
        ({"clock": 1060.0}, "clock is +60 s off", False),
        ({"free_memory_gib": 30.0}, "memory", False),
        ({"matmul_ms": 4.0}, "slow", False),
    ],
)
def test_unfit_node_is_named(change, word, is_fatal):
    entries = [replace(e, **change) if e.node == "n1" else e for e in FIT]
    (problem,) = judge(entries, min_disk_gib=1.0)
    assert problem.node == "n1"
    assert word in problem.text
    assert problem.is_fatal == is_fatal


def test_fit_nodes_pass_and_fill_one_line_each():
    assert judge(FIT, 1.0) == []
    lines = table(FIT, bandwidth=12.5).splitlines()
    assert [line.split()[0] for line in lines] == ["node", "n0", "n1", "n2", "all-reduce"]


RANK = """
import os, sys, torch, torch.distributed as dist
from bd3lm_scale.errors import PreflightError
from bd3lm_scale.parallel.agreement import Agreement
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import set_up_logging
from bd3lm_scale.runtime.preflight import run_preflight
rank = int(os.environ["RANK"])
set_up_logging(sys.argv[1])
dist.init_process_group("gloo")
config = {"seed": 2 if os.environ["SLURMD_NODENAME"] == os.environ.get("ODD") else 1}
try:
    run_preflight(sys.argv[1], config, torch.device("cpu"), Agreement(rank, 3, dist.group.WORLD))
    code = 0
except PreflightError as error:
    code = ExitCode.PREFLIGHT
dist.destroy_process_group()
sys.exit(code)
"""


@pytest.mark.parametrize("odd", [None, "n2"])
def test_every_rank_comes_to_the_same_verdict(tmp_path, odd):
    processes = []
    for rank in range(3):
        environment = {"RANK": str(rank), "WORLD_SIZE": "3", "SLURMD_NODENAME": f"n{rank}", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 900)}
        environment |= {"ODD": odd} if odd else {}
        command = [sys.executable, "-c", RANK, str(tmp_path)]
        processes.append(subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True))
    texts = [process.communicate(timeout=120)[1] for process in processes]
    expected = ExitCode.PREFLIGHT if odd else 0
    assert [process.returncode for process in processes] == [expected] * 3, texts
    record = read_json(tmp_path / "runtime" / "preflight.json")
    assert record["bad_nodes"] == ([odd] if odd else [])
    assert record["all_reduce_gb_per_second"] > 0
    assert len(record["ranks"]) == 3
    assert ("node n2: config differ" in (tmp_path / "log.txt").read_text()) == bool(odd)
