"""A run on packed documents lives a whole life in real processes: other layouts, a resume, figures of each document."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.shard_source import read_manifest
from tests.training_runs import losses_of, stream_of

ROOT = Path(__file__).parents[2]
TP2, PP2, VPP2 = (
    "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_parallel_size=2"
)  # fmt: skip
PACKED = ["data.packing=documents", "checkpoint.every_steps=4", "evaluation.rows=8", "data.context_length=64"]


def evaluate(run_dir, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bd3lm_scale.evaluate", str(run_dir), *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_packed_rows_train_on_tp2_pp2_resume_alone_and_are_scored_by_document(trainer, tmp_path):
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    trainer.train(whole, *PACKED, "train.steps=8")
    trainer.train(legs, *PACKED, "train.steps=4", TP2, PP2, VPP2, "parallel.recompute=full", world=4)
    trainer.train(legs, *PACKED, "train.steps=8", "data.workers=1", "train.micro_batch_size=3")
    assert stream_of(legs) == stream_of(whole)
    assert losses_of(legs) == pytest.approx(losses_of(whole), rel=1e-5)
    refused = trainer.train(legs, "train.steps=9", expect=86).output
    assert "data.packing (stream): the checkpoint was trained with documents" in refused

    file = tmp_path / "documents.jsonl"
    done = evaluate(whole, "--per-document", file, "--json", tmp_path / "all.json", "evaluation.draws=2")
    assert done.returncode == 0, done.stderr
    records, figures = (
        list(map(json.loads, file.read_text().splitlines())),
        json.loads((tmp_path / "all.json").read_text()),
    )
    manifest = read_manifest(DataConfig(), str(trainer.data), "validation")
    assert [r["document"] for r in records] == list(range(manifest.num_documents)) == list(range(figures["num_rows"]))
    assert sum(r["tokens"] for r in records) == figures["num_tokens"]
    assert sum(r["nats"] for r in records) / figures["num_tokens"] == pytest.approx(figures["nelbo"])
    nats, tokens = (np.array([r[key] for r in records]) for key in ("nats", "tokens"))
    assert figures["bootstrap_low"] < figures["nelbo"] < figures["bootstrap_high"]
    spread = (nats - figures["nelbo"] * tokens).std(ddof=1) * math.sqrt(len(nats)) / tokens.sum()
    assert figures["bootstrap_stderr"] == pytest.approx(spread, rel=0.3)
    assert figures["stderr"] == pytest.approx(spread, rel=0.1)
    refused = evaluate(whole, "data.packing=stream", "--per-document", file)
    assert refused.returncode == 86
    assert "--per-document: rows of a stream have no documents" in refused.stderr
