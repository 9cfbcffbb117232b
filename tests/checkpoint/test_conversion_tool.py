"""tools/convert_checkpoint.py from end to end, in one process: the native model against the exported class."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import torch

from tests.checkpoint.test_conversion import TINY, VOCAB, configuration, folder_bytes, native, rewrite, tiny_copy
from tests.checkpoint.test_conversion_lightning import checkpoint, saved
from tools import convert_checkpoint

ROOT = Path(__file__).parents[2]
OBJECTIVES = ("bd3lm", "mdlm", "sedd", "ar")
RUNNER = """
import json, sys
from tools.convert_checkpoint import main
for arguments in json.load(sys.stdin):
    print("$", *arguments, flush=True)
    code = main(arguments)
    print("exit", code, flush=True)
"""


def run(folder, *commands):
    """Output and exit code of each command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([list(map(str, command)) for command in commands]),
        capture_output=True, text=True, cwd=folder, env=environment, check=False,
    )  # fmt: skip
    parts = found.stdout.split("$ ")[1:]
    assert len(parts) == len(commands), found.stderr
    return [(part, int(part.rsplit("exit ", 1)[1])) for part in parts], found.stderr


def test_conversions_agree_with_the_native_model(tmp_path):
    """Every objective there and back, published weights, a Lightning file; each check compares two implementations."""
    for objective in OBJECTIVES:
        native(tmp_path / objective, configuration(objective, tied=objective == "mdlm"))
    saved(tmp_path / "last.ckpt", checkpoint())
    commands = [("from-hf", TINY, "published"), ("to-hf", "published", "published_hf", "--dtype", "bf16")]
    for objective in OBJECTIVES:
        commands += [("to-hf", objective, f"{objective}_hf", "--max-shard-size", "40KB")]
        commands += [("from-hf", f"{objective}_hf", f"{objective}_back")]
    commands += [
        ("from-lightning", "last.ckpt", "lightning"),
        ("to-hf", "lightning", "lightning_hf", "--weights", "raw"),
        ("reshard", "bd3lm", "few", "--files", "3", "--contents", "ema"),
        ("verify", "few"),
        ("verify", "bd3lm_hf"),
        ("to-hf", "few", "few_hf", "--no-check"),
    ]
    results, errors = run(tmp_path, *commands)
    for text, code in results:
        assert code == 0, text + errors
        if text.startswith(("to-hf", "from")) and "--no-check" not in text:
            found = re.findall(r"random input: (\S+) \(standard deviation of the logits (\S+)\)", text)
            assert found, text
            for difference, spread in found:
                assert float(difference) < (0.02 if "bf16" in text else 1e-5) * max(1.0, float(spread)), text
    assert sum("largest difference" in text for text, _ in results) == 12
    assert results[10][0].count("largest difference") == 2, "Lightning: weights and average"
    assert folder_bytes(tmp_path / "bd3lm_hf").keys() >= {
        "model.safetensors.index.json",
        "README.md",
        "modeling_bd3lm.py",
    }
    assert not list(tmp_path.glob(".converting*"))
    assert "exponential moving average" in (tmp_path / "bd3lm_hf" / "README.md").read_text()


def failing(capsys, *arguments):
    assert convert_checkpoint.main(list(map(str, arguments))) == 1
    return capsys.readouterr().err


def test_failed_conversions_leave_nothing(tmp_path, capsys):
    broken = tiny_copy(tmp_path / "broken")
    rewrite(broken, lambda tensors: {n: t for n, t in tensors.items() if "norm2" not in n})
    assert "missing: backbone.blocks.0.norm2.weight (64,)" in failing(capsys, "from-hf", broken, tmp_path / "out")
    text = tmp_path / "text.ckpt"
    text.write_text("hello")
    assert "not a checkpoint" in failing(capsys, "from-lightning", text, tmp_path / "out")
    assert "no checkpoint in" in failing(capsys, "to-hf", tmp_path / "broken", tmp_path / "out")
    good = native(tmp_path / "good", configuration()).path
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    message = failing(capsys, "to-hf", good, tmp_path / "out", "--tokenizer", tmp_path / "vocab.txt")
    assert "the tokenizer has 5 ids with mask 4, the model 100 with mask 99" in message
    message = failing(capsys, "from-hf", TINY, tmp_path / "out", "--no-check", "--tokenizer", tmp_path)
    assert "the tokenizer has 5 ids" in message
    assert "max_shard_size (huge)" in failing(capsys, "to-hf", good, tmp_path / "out", "--max-shard-size", "huge")
    assert "model.dropout (high)" in failing(capsys, "from-hf", TINY, tmp_path / "out", "model.dropout=high")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"broken", "text.ckpt", "good", "vocab.txt"}


def test_existing_destinations_are_refused_and_kept(tmp_path, capsys):
    good = native(tmp_path / "good", configuration()).path
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("x")
    for command in (("to-hf", good), ("from-hf", TINY), ("reshard", good)):
        assert "there exists; choose another destination" in failing(capsys, *command, tmp_path / "there")
    assert folder_bytes(tmp_path / "there") == {"precious": b"x"}


def test_a_wrong_conversion_is_caught_by_the_check(tmp_path, monkeypatch, capsys):
    """The comparison at the end is a real one: a permutation left out does not get through."""
    code = (
        "import sys\n"
        "from bd3lm_scale.checkpoint.hf import importing\n"
        "importing.to_ours = lambda entry, tensor, arch: (\n"
        "    tensor if entry.kind == 'qkv' else real(entry, tensor, arch))\n"
        "from bd3lm_scale.checkpoint.names import to_ours as real\n"
        "from tools.convert_checkpoint import main\n"
        f"sys.exit(main(['from-hf', {str(TINY)!r}, 'out']))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert found.returncode == 1
    assert "the converted model is not the same model" in found.stderr
    assert not list(tmp_path.iterdir())


def test_model_cards_hold_the_runs_figures_up_to_the_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    reader = native(run_dir / "checkpoints" / "step_00000000", configuration())
    rows = [
        {"kind": "train", "step": 0, "loss": 4.5},
        {"kind": "validation", "step": 0, "nelbo": 2.0, "ppl": 7.389},
        {"kind": "train", "step": 5, "loss": 1.0},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = convert_checkpoint.training_figures(reader.path, reader)
    assert sorted(figures.values()) == [2.0, 4.5, 7.389]


def test_push_uploads_a_private_repository_and_keeps_the_export_when_it_fails(tmp_path, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            if repo_id == "someone/closed":
                raise huggingface_hub.errors.LocalTokenNotFoundError("no login")
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    good = native(tmp_path / "good", configuration()).path
    command = ["to-hf", str(good), str(tmp_path / "hf"), "--no-check", "--push", "someone/model"]
    assert convert_checkpoint.main(command) == 0
    assert calls[0] == ("someone/model", True, True)
    assert {"config.json", "model.safetensors", "README.md"} <= set(calls[1][1])
    message = failing(capsys, "to-hf", good, tmp_path / "kept", "--no-check", "--push", "someone/closed")
    assert "no login; the export in" in message
    assert (tmp_path / "kept" / "model.safetensors").is_file()


def test_damage_is_reported_by_verify(tmp_path, capsys):
    good = native(tmp_path / "good", configuration()).path
    file = next(good.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert convert_checkpoint.main(["verify", str(good), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["is_valid"] is False
    assert file.name in failing(capsys, "to-hf", good, tmp_path / "out", "--no-check"), "damage is not exported"
    assert not list(tmp_path.glob("*out*"))
    folder = tiny_copy(tmp_path / "hf")
    rewrite(folder, lambda tensors: {**tensors, "backbone.output_layer.linear.bias": torch.full((VOCAB,), torch.nan)})
    assert convert_checkpoint.main(["verify", str(folder)]) == 1
    assert "head.output.bias: holds numbers that are not finite" in capsys.readouterr().out
