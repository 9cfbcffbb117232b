"""The clip search and the variance probes see one model, however it is cut over ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import free_port

WORKER = Path(__file__).parent / "parallel" / "clip_search_worker.py"
TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
SP, VPP2 = "parallel.sequence_parallel=true", "parallel.virtual_pipeline_parallel_size=2"
MDLM, TIED = "diffusion.objective=mdlm", "model.tie_embeddings=true"


def case(search: list[str] | None, probe: str | None, *layout: str) -> dict:
    return {"search": search, "probe": probe, "layout": list(layout)}


SERIAL = {
    "plain": case([], "plain"),
    "whole_row": case([MDLM], "whole_row"),
    "shared": case([TIED], "shared"),
    "fixed": case(["diffusion.clip_search.apply=false"], None),
}
PARALLEL = {
    "tp2": ("plain", case([], "plain", TP2)),
    "pp2": ("plain", case([], "plain", PP2)),
    "dp2": ("plain", case([], "plain")),
    "pp2_vpp2": ("plain", case(None, "plain", PP2, VPP2)),
    "pp2_whole_row": ("whole_row", case([MDLM], "whole_row", PP2)),
    "tp2_sp_shared": ("shared", case(None, "shared", TP2, SP)),
    "pp2_shared": ("shared", case(None, "shared", PP2)),
}


def launch(world: int, folder: Path, cases: dict[str, dict]) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(free_port())]
    root = str(WORKER.parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, *torchrun, str(WORKER), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    causes = [part for part in done.stderr.split("Traceback") if "ChildFailedError" not in part]
    assert done.returncode == 0, "\n".join(causes)[-6000:]


@pytest.fixture(scope="module")
def records(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("clip_search")
    (folder / "data").symlink_to(tiny_data)
    launch(1, folder, SERIAL)
    launch(2, folder, {name: case for name, (_, case) in PARALLEL.items()})
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in (*SERIAL, *PARALLEL)}


@pytest.mark.parametrize("name", [name for name, (_, case) in PARALLEL.items() if case["search"] is not None])
def test_every_layout_chooses_the_same_interval_from_the_same_table(records, name):
    here, serial = records[name]["search"], records[PARALLEL[name][0]]["search"]
    assert here["intervals"] == serial["intervals"]
    for table, want in zip(here["tables"], serial["tables"], strict=True):
        assert table == pytest.approx(want, rel=1e-3)  # the weights have trained for four steps under another layout
    for a, b in zip(here["after"], serial["after"], strict=True):
        assert (a["stream_hash"], a["clip_low"], a["clip_high"]) == (b["stream_hash"], b["clip_low"], b["clip_high"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("name", [*SERIAL, "tp2", "pp2", "dp2"])
def test_the_search_keeps_its_cadence_and_the_checkpoint_keeps_the_interval(records, name):
    found = records[name]["search"]
    first, second = found["tables"]
    assert first == {}, "every second validation searches"
    assert len(second) == 36
    assert found["intervals"][0] == [0.001, 1.0]
    assert found["resumed_interval"] == found["intervals"][1]
    assert found["resumed_validations"] == 2
    assert found["step"] == 5
    low, high = found["intervals"][1]
    if name == "fixed":
        assert (low, high) == (0.001, 1.0), "measured, not applied"
    else:
        assert (low, high) != (0.001, 1.0)
        assert second[f"{low:g}-{high:g}"] == min(second.values())
    assert found["after"][0]["clip_low"] == low


@pytest.mark.parametrize("name", PARALLEL)
def test_every_layout_measures_the_same_gradient_variance(records, name):
    """Sharded parameters, replicated ones and shared embeddings are each counted once; same weights, same noise."""
    here, serial = records[name]["probe"], records[PARALLEL[name][0]]["probe"]
    assert here["tables"]["cosine"] == pytest.approx(serial["tables"]["cosine"], rel=1e-4)
    assert len(serial["probes"]) == 3
    for a, b in zip(here["probes"], serial["probes"], strict=True):
        assert a["interval"] == b["interval"]
        assert a["gradient"]["variance"] > 0
        assert a["gradient"] == pytest.approx(b["gradient"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_full_range_times_give_the_noisiest_gradient(records):
    probes = {p["interval"]: p["gradient"]["variance"] for p in records["plain"]["probe"]["probes"]}
    assert probes["0.001-1"] == max(probes.values())
