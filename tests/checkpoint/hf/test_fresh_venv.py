"""Exports used by others: the newest transformers here, 4.49 in an environment with only torch and transformers."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bd3lm_scale.checkpoint.hf.export import export_hf
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.hf.tokenizer_files import export_tokenizer
from bd3lm_scale.checkpoint.metadata import weights_meta
from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.config.checks import padded_vocab_size
from bd3lm_scale.config.sizes import parameters
from bd3lm_scale.data.chat import ChatFormat
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece
from tests.checkpoint.hf.test_decoders import check_round_trip
from tests.checkpoint.layouts import whole_state
from tests.checkpoint.test_conversion import configuration
from tests.data.templates import MARKED, turns

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("use_export.py")
OLDEST = "transformers==4.49.0"
LAWS = ("modeling", "generation", "generate_as_transformers", "fill", "score", "finetuning")
PEFT = ("peft==0.14.0", "accelerate==1.3.0")
"""Of the same months as OLDEST."""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports of the four objectives with a tokenizer, and what they should compute."""
    folder = tmp_path_factory.mktemp("exports")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in sources[:16]]
    train_sentencepiece(texts[:8], folder / "tokenizer", vocab_size=400)
    tokenizer = load_tokenizer(folder / "tokenizer")
    size, mask = tokenizer.vocab_size, tokenizer.mask_token_id
    tokens = torch.randint(5, size, (2, 64), generator=torch.Generator().manual_seed(0))
    noisy = tokens.clone()
    noisy[:, ::3] = mask
    expected = {
        "tokens": tokens, "pair": torch.cat([noisy, tokens], dim=1), "sigma": torch.tensor([0.5, 1.0]),
        "texts": texts[8:], "ids": [tokenizer.encode(text) for text in texts[8:]],
    }  # fmt: skip
    (folder / "chat.jinja").write_text(MARKED)
    chat = load_tokenizer(folder / "tokenizer", folder / "chat.jinja")
    export_tokenizer(chat, folder / "chat", size, mask)
    expected["messages"] = turns("def f(x):", "return x", "more", "x", system="short")
    expected["chat"] = ChatFormat(chat).encode(expected["messages"]).text
    for objective in ("bd3lm", "mdlm", "sedd", "ar"):
        config = configuration(objective)
        config = replace(config, data=replace(config.data, context_length=64))
        shapes = {name: p.shape for name, p in parameters(config, padded_vocab_size(size)).items()}
        weights = ((n, "master", 0.2 * t) for n, t in whole_state(shapes, kinds=("master",))["master"].items())
        write_weights(folder / "native" / objective, weights, weights_meta(config, size, mask, "a test"))
        reader = open_checkpoint(folder / "native" / objective)
        export_hf(reader, folder / objective, tokenizer=tokenizer, max_shard_size="100KB")
        model = BD3LM.from_pretrained(folder / objective).eval()
        with torch.no_grad():
            expected[f"{objective}.plain"] = model(tokens, expected["sigma"]).logits
            if objective == "bd3lm":
                expected["bd3lm.pair"] = model(expected["pair"]).logits
    torch.save(expected, folder / "expected.pt")
    return folder


def run(*command, folder=None):
    """Run with a cache of its own and no way to a hub; the output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if folder is not None:
        environment["HF_HOME"] = str(folder)
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=ROOT)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return found.stdout


def test_the_transformers_installed_here_uses_exports(exports, tmp_path):
    assert "all good" in run(sys.executable, SCRIPT, exports, folder=tmp_path)


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    """The interpreter of an environment with torch, transformers 4.49 and what these two need, nothing else."""
    python = tmp_path_factory.mktemp("venv") / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    install(python, f"torch=={torch.__version__.split('+')[0]}", OLDEST)
    return python


def install(python, *packages):
    arguments = [*shlex.split(os.environ.get("PIP_ARGS", "")), *packages]
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if re.search("Could not find a version|ConnectionError|Temporary failure", found.stderr):
        pytest.skip(f"no package index to install {' '.join(packages)} from")
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_transformers_4_49_and_torch_alone_use_exports(exports, oldest, tmp_path):
    installed = run(oldest, "-m", "pip", "list", "--format", "freeze")
    assert OLDEST in installed
    assert not re.search("sentencepiece|accelerate|bd3lm|einops", installed)
    assert "transformers 4.49.0: all good" in run(oldest, SCRIPT, exports, folder=tmp_path)


@pytest.mark.slow
def test_decoders_saved_by_transformers_4_49_are_imported(oldest, tmp_path):
    """Its configurations name their fields otherwise; it has no Qwen3 yet."""
    (tmp_path / "saved").mkdir()
    said = run(oldest, Path(__file__).with_name("make_decoders.py"), tmp_path / "saved", folder=tmp_path)
    assert "transformers 4.49.0: tokens llama llama3 linear qwen2" in said
    expected = torch.load(tmp_path / "saved" / "expected.pt", weights_only=True)
    for name in ("llama", "llama3", "linear", "qwen2"):
        check_round_trip(tmp_path / "saved", name, expected[name], expected["tokens"], tmp_path / name)


@pytest.mark.slow
def test_the_laws_of_the_exported_class_hold_on_transformers_4_49(oldest):
    install(oldest, "pytest", *PEFT)
    tests = [f"tests/checkpoint/hf/test_{name}.py" for name in LAWS]
    output = run(oldest, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *tests)
    assert re.search(r"\d\d passed", output)
    assert "failed" not in output
