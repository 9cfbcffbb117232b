"""One checkpoint, held by the optimizers of different layouts, exports the same folder byte for byte."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bd3lm_scale.checkpoint.hf.export import export_hf
from bd3lm_scale.checkpoint.metadata import weights_meta
from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.config.sizes import parameters
from tests.checkpoint.layouts import cut, whole_state
from tests.checkpoint.test_conversion import VOCAB, configuration, folder_bytes

ROOT = Path(__file__).parents[2]
CASES = {
    "tensor2_pipeline2_zero1": ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"],
    "data4_zero3": ["optim.zero_stage=3"],
    "tensor2_data2_zero2": ["parallel.tensor_parallel_size=2", "optim.zero_stage=2"],
}


@pytest.mark.slow
def test_real_layouts_export_the_same_bytes(tmp_path):
    config = replace(configuration(), precision="fp32")
    found = parameters(config, 128)
    shapes, dims = {n: p.shape for n, p in found.items()}, {n: p.shard_dim for n, p in found.items()}
    store = CheckpointStore(tmp_path / "whole" / "checkpoints", CheckpointConfig(asynchronous=False))
    meta = {**weights_meta(config, VOCAB, VOCAB - 1, ""), "contents": "full", "tokens": 640}
    del meta["source"]
    parts = [part for rank in cut(shapes, dims, 1, 1, 1, whole_state(shapes)) for part in rank]
    store.save(9, parts, meta)
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    script = ROOT / "tests" / "checkpoint" / "conversion_worker.py"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", script]
    found = subprocess.run(
        list(map(str, [sys.executable, *command, store.newest().path, tmp_path])),
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-4000:]
    exports = {}
    for name in ("whole", *CASES):
        reader = open_checkpoint(find_checkpoint(tmp_path / name))
        files = {file.name for file in reader.manifest.files}
        assert len(files) == (1 if name == "whole" else 4), "every rank wrote a part"
        for weights in ("ema", "raw"):
            export_hf(reader, tmp_path / f"{name}_{weights}", weights=weights, max_shard_size="50KB")
            exports[name, weights] = folder_bytes(tmp_path / f"{name}_{weights}")
    for (name, weights), export in exports.items():
        assert export == exports["whole", weights], name
    assert exports["whole", "ema"] != exports["whole", "raw"]
