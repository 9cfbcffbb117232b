"""docs/network.md, "Add a variant": its edits to a copy of the package give a variant that every path knows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
import torch
from bd3lm_scale.checkpoint.hf.export import export_hf
from bd3lm_scale.checkpoint.hf.importing import import_hf
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.metadata import weights_meta
from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.inference.loading import load_model
from bd3lm_scale.model.fast_decoder import FastDecoder, FastWeights
from bd3lm_scale.model.inference import CachedDecoder
from bd3lm_scale.config.sizes import parameters

folder = sys.argv[1]
sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "cond_dim": 8, "mlp": "relu2"}
config = from_dict({"run_dir": "x", "precision": "fp32", "data": {"path": "x", "context_length": 16},
                    "diffusion": {"block_size": 4}, "model": sizes, "runtime": {"device": "cpu"}})
draw = torch.Generator().manual_seed(0)
weights = [(n, "master", 0.3 * torch.randn(p.shape, generator=draw)) for n, p in parameters(config, 128).items()]
write_weights(folder + "/native", weights, weights_meta(config, 100, 99, "a test"))
export_hf(open_checkpoint(folder + "/native"), folder + "/hf")
assert import_hf(folder + "/hf")[1]["config"]["model"]["mlp"] == "relu2"
model = load_model(folder + "/native").engine.chunks[0].eval()
taken = []
model.decoder.layers[0].mlp.linear_fc2.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
text = torch.randint(0, 99, (2, 12), generator=draw)
cached, fast = CachedDecoder(model, 4, 2), FastDecoder(FastWeights(model), 4, 2)
for decoder in (cached, fast):
    decoder.commit(text[:, :8])
want = cached.denoise(text[:, 8:])[..., :99]
assert (taken[-1] >= 0).all() and (taken[-1] == 0).any(), "a squared ReLU"
with torch.no_grad():
    exported = BD3LM.from_pretrained(folder + "/hf").eval()(text, sample_mode=True).logits[:, 8:, :99]
for found in (fast.denoise(text[:, 8:])[..., :99], exported):
    assert (found - want).abs().max() < 1e-4 * want.abs().max()
print("every path agrees")
"""


def steps() -> list[tuple[str, list[tuple[str, str]]]]:
    """(file, replacements) of each numbered step."""
    recipe = (ROOT / "docs" / "network.md").read_text().split("## Add a variant")[1]
    found = []
    for file, block in re.findall(r"^\d\. `([\w/.]+)`.*?```text\n(.*?)```", recipe, flags=re.M | re.S):
        lines = [line.removeprefix("   ") for line in block.splitlines()]
        edits: list[tuple[str, str]] = []
        for line in lines:
            if line.startswith("- "):
                edits.append((line[2:], ""))
            elif line.startswith("+"):
                old, new = edits[-1]
                edits[-1] = (old, f"{new}{line[2:]}\n")
        found.append((file, edits))
    return found


def follow(folder: Path, chosen: list[tuple[str, list[tuple[str, str]]]]) -> None:
    """The package with these steps done."""
    shutil.copytree(ROOT / "bd3lm_scale", folder / "bd3lm_scale", ignore=shutil.ignore_patterns("__pycache__"))
    for file, edits in chosen:
        path = folder / "bd3lm_scale" / file
        text = path.read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"docs/network.md: {file} has no {old!r}"
            text = text.replace(old, new.rstrip("\n"))
        path.write_text(text)


def run(folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", CHECK, str(folder)], capture_output=True, text=True, env=environment, cwd=folder
    )


def test_a_variant_takes_at_most_four_files_and_every_path_knows_it(tmp_path):
    recipe = steps()
    assert 1 <= len(recipe) <= 4
    follow(tmp_path, recipe)
    done = run(tmp_path)
    assert "every path agrees" in done.stdout, done.stderr[-3000:]


def test_a_step_left_out_is_refused(tmp_path):
    """The exported class would otherwise compute another function."""
    follow(tmp_path, steps()[:-1])
    done = run(tmp_path)
    assert done.returncode != 0
    assert "mlp (relu2): unknown to this code; use gelu or swiglu" in done.stderr
