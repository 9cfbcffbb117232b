"""The commands of docs/data.md, run as they are written on small files of the same kinds; and the benchmark."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers

from bd3lm_scale.data.index import open_split
from bd3lm_scale.data.tokenizer import load_tokenizer
from tests.data.conftest import TEXT
from tests.data.templates import MARKED, turns, write_tokenizer

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^python tools/(?:.*\\\n)*.*$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
BERT_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "."]


def run_tool(command: str) -> int:
    _, script, *arguments = shlex.split(command.replace("\\\n", " "), comments=True)
    spec = importlib.util.spec_from_file_location("tool", ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*arguments, "--workers", "0"] if script.endswith("prepare_data.py") else arguments)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder with what the document says one has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openwebtext").mkdir()
    table = pa.table({"text": [f"{i}" for i in range(100_003)]})
    for number, start in enumerate((0, 50_000)):
        pyarrow.parquet.write_table(table.slice(start, 60_000 if start else 50_000), f"openwebtext/{number}.parquet")
    (tmp_path / "gpt2").mkdir()
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    model.save_model("gpt2")
    for name in ("training", "heldout"):
        folder = tmp_path / f"{name}-monolingual.tokenized.shuffled"
        folder.mkdir()
        (folder / "news.en-00000-of-00100").write_text("The cat sat .\nthe cat .\n")
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("\n".join(BERT_PIECES))
    return tmp_path


def test_openwebtext_as_written(machine, capsys):
    commands = [c for c in COMMANDS if " openwebtext " in c]
    assert len(commands) == 2
    assert [run_tool(c) for c in commands] == [0, 0]
    out = capsys.readouterr().out
    assert "validation: 100,000 documents" in out
    assert "train: 3 documents" in out
    tokenizer = load_tokenizer(machine / "data" / "owt" / "tokenizer")
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1


def test_lm1b_as_written(machine):
    (command,) = [c for c in COMMANDS if "training-monolingual" in c]
    assert run_tool(command) == 0
    for split in ("train", "validation"):
        found = open_split(machine / "data" / "lm1b" / split)
        assert (found.num_documents, found.num_tokens) == (2, 9)
        assert found.num_text_bytes == len("The cat sat.the cat.")


def test_conversations_as_written(machine):
    commands = [c for c in COMMANDS if " talk.jsonl " in c]
    assert len(commands) == 2
    talk = turns("2 + 2?", "4")
    (machine / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 3)
    (machine / "mine.jinja").write_text(MARKED)
    write_tokenizer(machine / "qwen")
    assert [run_tool(c) for c in commands] == [0, 0]
    for name in ("talk", "mine"):
        assert open_split(machine / "data" / name / "train").num_targets == 2 * len(["4", "<|im_end|>"])
        assert load_tokenizer(machine / "data" / name / "tokenizer").chat_template


def test_every_option_of_the_document_exists():
    text = (ROOT / "docs" / "data.md").read_text()
    help_texts = "".join(
        subprocess.run([sys.executable, ROOT / "tools" / f"{tool}.py", "--help"], capture_output=True, text=True).stdout
        for tool in ("prepare_data", "train_tokenizer")
    )
    options = set(re.findall(r"--[a-z][a-z-]+", text))
    assert len(options) > 15
    assert {option for option in options if option not in help_texts} == set()


def test_benchmark_gives_its_figures(tmp_path):
    small = ["--shards", "3", "--shard-tokens", "140000", "--steps", "4", "--batch", "16", "--documents", "60"]
    command = [sys.executable, ROOT / "tools" / "benchmark.py", "data", *small, "--json", tmp_path / "figures.json"]
    subprocess.run(command, check=True, capture_output=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tokens"] == 420_000
    assert figures["steady_mtokens_per_cpu_s_L1024"] > 0
    assert 0 < figures["first_batch_s_after_seek"] < 60
