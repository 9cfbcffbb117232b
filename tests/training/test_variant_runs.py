"""A decoder with RMS norms, SwiGLU, grouped heads and normed queries and keys lives a whole life in real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm_scale.checkpoint.verify import verify
from tests.training_runs import losses_of, state_of, stream_of
from tests.variants import overrides

ROOT = Path(__file__).parents[2]
TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
VPP2, SP = "parallel.virtual_pipeline_parallel_size=2", "parallel.sequence_parallel=true"
DECAY = ["optim.weight_decay=0.1", "optim.weight_decay_on=matrices"]
DECODER = [*overrides("decoder"), *DECAY, "checkpoint.every_steps=4", "sampling.length=24"]
USE = """
import sys
import torch
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert model.config.n_kv_heads == 2 and model.config.norm == "rmsnorm" and not model.config.adaln
ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, seed=1)
assert ids.shape == (1, 15) and torch.isfinite(model.score(ids).nats).all()
print("loads")
"""


def run(*command: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_decoder_goes_through_five_layouts_samples_exports_and_loads(trainer, tmp_path):
    """TP2 PP2, four replicas under ZeRO-3, TP4 (more ranks than heads of keys and values), interleaved, one process."""
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    trainer.train(whole, *DECODER, "train.steps=16")
    trainer.train(legs, *DECODER, "train.steps=4", TP2, PP2, world=4)
    trainer.train(legs, *DECODER, "train.steps=8", "optim.zero_stage=3", world=4)
    trainer.train(legs, *DECODER, "train.steps=10", "parallel.tensor_parallel_size=4", SP, world=4)
    trainer.train(legs, *DECODER, "train.steps=12", PP2, VPP2, "optim.zero_stage=1", world=2)
    trainer.train(legs, *DECODER, "train.steps=16")
    assert stream_of(legs) == stream_of(whole)
    assert losses_of(legs) == pytest.approx(losses_of(whole), rel=1e-5)
    here, there = state_of(legs), state_of(whole)
    for key, tensor in there.items():
        assert (here[key] - tensor).abs().max() <= 1e-3 * tensor.abs().max() + 1e-7, key
    assert all(report.is_valid and not report.notes for report in verify(legs))
    sampled = run("-m", "bd3lm_scale.sample", legs, "--num-samples", 1)
    assert sampled.strip()
    converted = run(ROOT / "tools" / "convert_checkpoint.py", "to-hf", legs, tmp_path / "hf")
    assert "check " in converted
    assert "loads" in run("-c", USE, tmp_path / "hf")
