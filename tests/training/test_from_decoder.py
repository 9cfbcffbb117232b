"""From a decoder's folder to block diffusion by the users' commands: convert, evaluate, train in any layout."""

import json
import math
import re
import shlex
import subprocess
import sys

import pytest
import torch

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.stream import open_stream
from tests.checkpoint.hf.make_decoders import byte_level
from tests.training_runs import ROOT, clean_environment, prepare_tiny_data, rows_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MODEL = [
    "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16", "model.qk_norm=true",
    "model.ffn_hidden_size=64", "model.norm=rmsnorm", "model.norm_eps=1.0e-6", "model.mlp=swiglu",
    "model.mlp_bias=false", "model.head_bias=false", "model.adaln=false", "model.tie_embeddings=true",
]  # fmt: skip


pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "conversion.md"


def command(*arguments):
    found = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=clean_environment()
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """FOLDER/qwen3 with its tokenizer, FOLDER/native made of it, FOLDER/set/data of that; and transformers' model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=301, intermediate_size=64, max_position_embeddings=32, tie_word_embeddings=True, eos_token_id=300,
        **SIZES,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "qwen3")
    byte_level(folder / "qwen3")
    said = command("tools/convert_checkpoint.py", "from-hf", folder / "qwen3", folder / "native")
    assert "<|mask|> (301): a new row" in said
    prepare_tiny_data(folder / "set", tokenizer=folder / "native" / "tokenizer")
    return folder, model


EVALUATIONS = """
import json, sys
from bd3lm_scale.evaluate import main
for arguments in json.load(sys.stdin):
    assert main(arguments) == 0, arguments
"""


@pytest.fixture(scope="module")
def likelihoods(decoder):
    """What the evaluate command says of the import as it is, and as block diffusion of one token in both alignments."""
    folder, _ = decoder
    one = ["diffusion.objective=bd3lm", "diffusion.block_size=1"]
    cases = {"ar": [], "shifted": [*one, "diffusion.shift_targets=true"], "plain": one}
    cases["four"] = ["diffusion.objective=bd3lm", "diffusion.block_size=4", "diffusion.shift_targets=true"]
    place = [str(folder / "native"), "--data", str(folder / "set" / "data"), "--json"]
    arguments = [[*place, str(folder / f"{name}.json"), *overrides] for name, overrides in cases.items()]
    found = subprocess.run(
        [sys.executable, "-c", EVALUATIONS], input=json.dumps(arguments), capture_output=True, text=True, cwd=ROOT,
        env=clean_environment(),
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


def test_its_perplexity_is_that_of_transformers(decoder, likelihoods):
    folder, model = decoder
    rows = open_stream(DataConfig(path=str(folder / "set" / "data"), context_length=32), 1, "validation")
    tokens = torch.from_numpy(rows.read_held_out(range(rows.num_rows)))
    with torch.no_grad():
        expected = float(model(tokens, labels=tokens).loss)
    said = likelihoods["ar"]
    assert said["nelbo"] == pytest.approx(expected, abs=1e-5)
    assert said["ppl"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert said["num_tokens"] == tokens.numel() - len(tokens)


def test_shifted_blocks_of_one_token_have_the_likelihood_of_the_autoregressive_model(likelihoods):
    """Before any training. Not so at the tokens' own positions, which the model was never trained to read, nor where a
    block has several tokens, which see each other."""
    ar = likelihoods["ar"]
    assert likelihoods["shifted"]["nelbo"] == pytest.approx(ar["nelbo"], abs=1e-5)
    assert likelihoods["shifted"]["num_tokens"] == ar["num_tokens"]
    assert abs(likelihoods["plain"]["nelbo"] - ar["nelbo"]) > 1e-2
    assert abs(likelihoods["four"]["nelbo"] - ar["nelbo"]) > 1e-2


def test_block_diffusion_starts_from_it_in_any_layout(decoder, trainer, tmp_path):
    """Two steps in one process and over tensor and pipeline ranks: the same losses, in either alignment."""
    folder, _ = decoder
    start = [
        *MODEL, f"data.path={folder / 'set' / 'data'}", f"train.init_from={folder / 'native'}", "train.steps=2",
        "optim.warmup_steps=0", "evaluation.every_steps=2",
    ]  # fmt: skip
    cut = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "parallel.sequence_parallel=true"]
    shifted = "diffusion.shift_targets=true"
    losses = {}
    for name, world, overrides in (("plain", 1, []), ("shifted", 1, [shifted]), ("cut", 4, [shifted, *cut])):
        trainer.train(tmp_path / name, *start, *overrides, world=world)
        losses[name] = [rows_of(tmp_path / name)[step]["loss"] for step in (1, 2)]
        losses[name].append(rows_of(tmp_path / name, "validation")[2]["nelbo"])
    assert losses["cut"] == pytest.approx(losses["shifted"], rel=1e-5)
    assert abs(losses["plain"][0] - losses["shifted"][0]) > 1e-2


def test_the_commands_of_the_page_run_as_written(decoder, tmp_path):
    """docs/conversion.md, from a downloaded folder to an export that generates and scores; training is made smaller."""
    folder, _ = decoder
    section = PAGE.read_text().partition("## Turn an autoregressive model into block diffusion")[2]
    lines = re.search(r"```bash\n(.*?)```", section, re.DOTALL).group(1).strip().splitlines()
    assert [shlex.split(line)[0] for line in lines] == [
        "tools/convert_checkpoint.py", "tools/prepare_data.py", "python", "python", "tools/convert_checkpoint.py",
    ]  # fmt: skip
    (tmp_path / "Qwen3-0.6B").symlink_to(folder / "qwen3")
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "corpus").mkdir()
    texts = (json.dumps({"text": f"Row {i} has {i} masks and {i + 1} tokens. " * 8}) for i in range(2000))
    (tmp_path / "corpus" / "rows.jsonl").write_text("\n".join(texts) + "\n")
    small = [
        "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16",
        "model.ffn_hidden_size=64", "model.rope_theta=10000.0", "model.vocab_size=null", "data.context_length=32",
        "data.workers=0", "precision=fp32", "runtime.device=cpu", "train.steps=2", "train.global_batch_size=4",
        "evaluation.rows=4", "sampling.length=16",
    ]  # fmt: skip
    said = {}
    for line in lines:
        words = [*shlex.split(line), *(small if ".train" in line else [])]
        words = words[1:] if words[0] == "python" else words
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=tmp_path,
            env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, line + done.stdout + done.stderr
        said[line] = done.stdout
    assert "NLL" in said[lines[2]]
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", 301)
    for kind in (AutoModelForMaskedLM, AutoModelForCausalLM):
        model = kind.from_pretrained(tmp_path / "exported", trust_remote_code=True).eval()
        ids = tokenizer("Row 7 has", return_tensors="pt")["input_ids"]
        assert model.config.shift_targets
        assert model.generate(ids, max_new_tokens=20, stop_at_eos=False).shape == (1, ids.shape[1] + 20)
        assert float(model.score(ids).nats) > 0
