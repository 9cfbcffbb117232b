import json
import math
import resource
import time

import numpy as np
import pytest
import torch

from bd3lm_scale.config.schema import LoggingConfig
from bd3lm_scale.runtime.metrics import MetricsWriter, read_metrics, run_id


def write_steps(run_dir, attempt, steps, offset=0.0):
    writer = MetricsWriter(run_dir, attempt=attempt)
    for step in steps:
        writer.write("train", step, loss=step / 3 + offset)
    writer.close()


def test_figures_come_back_exactly(tmp_path):
    writer = MetricsWriter(tmp_path, attempt="0.0")
    figures = {"loss": 1 / 3, "stream_hash": 2**64 - 1, "nan": math.nan, "inf": -math.inf, "low": np.float64(0.1)}
    writer.write("train", 1, **figures, vector=torch.tensor([1.5, math.inf]))
    writer.close()
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    (row,) = read_metrics(tmp_path)
    assert row["loss"] == 1 / 3
    assert row["stream_hash"] == 2**64 - 1
    assert math.isnan(row["nan"])
    assert row["inf"] == -math.inf
    assert row["low"] == 0.1
    assert row["vector"] == [1.5, "Infinity"]
    assert row["attempt"] == "0.0"


def test_last_line_per_kind_and_step_wins(tmp_path):
    write_steps(tmp_path, "0.0", range(1, 8))
    write_steps(tmp_path, "0.1", range(5, 10), offset=100)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["attempt"] for row in rows] == ["0.0"] * 4 + ["0.1"] * 5


@pytest.mark.parametrize("torn", ['{"kind": "train", "step": 4, "lo', "x" * 10_000])
def test_torn_last_line_is_cut_and_costs_no_other(tmp_path, torn):
    write_steps(tmp_path, "0.0", [1, 2, 3])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    write_steps(tmp_path, "0.1", [4])
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path):
    writer = MetricsWriter(tmp_path, attempt="0.0")
    writer.write("train", 1, loss=1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # in the middle of the next line: what a full disk took of it stays
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, before[1]))
    try:
        for step in (2, 3):
            writer.write("train", step, loss=float(step))
        writer.sync()
        during = [row["step"] for row in read_metrics(tmp_path)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.write("train", 4, loss=4.0)
    writer.close()
    assert during == [1]
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "run", enabled=False)
    writer.write("train", 1, loss=0.0)
    writer.sync()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_wandb_outage_never_stops_a_run(tmp_path, monkeypatch):
    import wandb

    def fail(**_):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    writer = MetricsWriter(tmp_path, logging=LoggingConfig(wandb="online"))
    deadline = time.monotonic() + 20
    while not writer._mirror._is_down and time.monotonic() < deadline:
        time.sleep(0.01)
    assert writer._mirror._is_down
    writer.write("train", 1, loss=0.0)
    writer.close()
    assert len(read_metrics(tmp_path)) == 1


def test_wandb_gets_a_copy(tmp_path, monkeypatch):
    import wandb

    class Run:
        rows, finished = [], False

        def log(self, row):
            self.rows.append(row)

        def finish(self):
            Run.finished = True

    arguments = {}
    monkeypatch.setattr(wandb, "init", lambda **given: arguments.update(given) or Run())
    ids = []
    for step in (1, 2):  # a resumed run goes on under the same id
        writer = MetricsWriter(tmp_path, logging=LoggingConfig(wandb="offline"), run_config={"seed": 1})
        writer.write("train", step, loss=0.5)
        writer.close()
        ids.append(arguments["id"])
    assert Run.finished
    assert [(row["train/loss"], row["step"]) for row in Run.rows] == [(0.5, 1), (0.5, 2)]
    assert ids[0] == ids[1]
    assert arguments["config"] == {"seed": 1}


@pytest.mark.parametrize("spoilt", ["", "\n", "a/b", "x" * 200, "\x00", "\udcff"])
def test_a_spoilt_wandb_id_is_made_anew_and_kept(tmp_path, spoilt):
    kept = run_id(tmp_path)
    assert run_id(tmp_path) == kept
    (tmp_path / "wandb_id").write_text(spoilt, errors="surrogateescape")
    new = run_id(tmp_path)
    assert new != kept
    assert run_id(tmp_path) == new
