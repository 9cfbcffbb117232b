"""Perplexity over several corpora: the same figures as the evaluate command, wrapped rows for foreign text."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.evaluation.corpora import main, parse_corpora
from bd3lm_scale.evaluation.likelihood import main as evaluate
from tests.sample_runs import CONTEXT, STEP, make_run

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from prepare_data import main as prepare


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "block4")


@pytest.fixture(scope="module")
def corpora(run, tmp_path_factory):
    """Two corpora of different text, prepared as docs/evaluation.md says."""
    folder, prepared = tmp_path_factory.mktemp("text"), {}
    for name, text in (("ptb", "no , it was n't black monday .\n"), ("mine", "def f(x):\n    return x + 1\n")):
        (folder / f"{name}.txt").write_text(text * 40)
        options = ["--tokenizer", run / "tokenizer", "--validation-only", "--no-eos", "--workers", 0]
        assert prepare([str(a) for a in (folder / f"{name}.txt", "--output", folder / name, *options)]) == 0
        prepared[name] = folder / name
    return prepared


def test_each_corpus_is_scored_and_kept(run, corpora, capsys):
    arguments = [f"{name}={folder}" for name, folder in corpora.items()]
    settings = ["--set", f"data.path={corpora['mine']}", "runtime.device=cpu"]
    assert main([str(run), "heldout", *arguments, "--rows", "6", *settings]) == 0
    page = capsys.readouterr().out
    figures = {p.stem: json.loads(p.read_text()) for p in (run / "evaluation").glob("*.json")}
    assert set(figures) == {"heldout", "ptb", "mine"}
    for name, f in figures.items():
        assert f"| {name} | {f['ppl']:.2f} |" in page
        assert (f["step"], f["num_rows"], f["num_tokens"]) == (STEP, 6, 6 * (CONTEXT - 1))
        assert f["ppl"] == pytest.approx(np.exp(f["nelbo"]))
    assert figures["ptb"]["wrap_rows"]
    assert figures["mine"]["wrap_rows"]
    assert not figures["heldout"]["wrap_rows"]
    assert figures["mine"]["nelbo"] != figures["heldout"]["nelbo"], "wrapping has no effect"

    assert main([str(run), f"mine={corpora['mine']}", "--rows", "6", "--no-wrap", *settings]) == 0
    unwrapped = json.loads((run / "evaluation" / "mine.json").read_text())
    assert unwrapped["nelbo"] == figures["heldout"]["nelbo"]
    single = run / "single.json"
    path = f"data.path={corpora['mine']}"
    assert evaluate([str(run), path, "runtime.device=cpu", "--rows", "6", "--json", str(single)]) == 0
    assert json.loads(single.read_text())["nelbo"] == figures["heldout"]["nelbo"]


def test_wrapped_rows_begin_with_bos_and_end_with_eos(run, corpora):
    tokenizer = load_tokenizer(run / "tokenizer")
    data = DataConfig(path=str(corpora["ptb"]), context_length=CONTEXT)
    wrapped = open_stream(DataConfig(path=data.path, context_length=CONTEXT, wrap_rows=True), 1, "validation")
    plain = open_stream(data, 1, "validation").read(np.arange(3)).reshape(-1)
    rows = wrapped.read(np.arange(3))
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert (rows[:, -1] == tokenizer.eos_token_id).all()
    payload = rows[:, 1:-1].reshape(-1)
    assert (payload == plain[: payload.size]).all(), "the text goes on from row to row without a gap"


def test_bad_corpora_are_named(tmp_path):
    with pytest.raises(ValueError, match="data/ptb: not NAME=SHARDS; use for example"):
        parse_corpora(["data/ptb"])
    with pytest.raises(ValueError, match=r"holds no validation split; prepare it with: tools/prepare_data\.py"):
        parse_corpora([f"ptb={tmp_path}"])
    assert parse_corpora(["heldout"]) == {"heldout": None}


def test_a_mixture_gives_the_perplexity_of_each_of_its_sets(corpora, tmp_path, capsys):
    run = make_run(tmp_path / "ar", objective="ar")  # exact: no noise stands between one set alone and in the mixture

    def figures(*settings: str) -> dict:
        file = tmp_path / "figures.json"
        assert evaluate([str(run), *settings, "runtime.device=cpu", "--json", str(file)]) == 0
        return json.loads(file.read_text())

    sources = ", ".join(f"{{path: {corpora[name]}, weight: {weight}}}" for name, weight in (("ptb", 1), ("mine", 3)))
    mixed = figures("data.path=null", f"data.mixture=[{sources}]", "--rows", "12", "evaluation.micro_batch_size=5")
    sets = {name.split("/")[-1]: found for name, found in mixed["sets"].items()}
    assert {name: found["num_rows"] for name, found in sets.items()} == {"ptb": 3, "mine": 9}
    printed = capsys.readouterr().out
    for name, found in sets.items():
        alone = figures(f"data.path={corpora[name]}", "--rows", str(found["num_rows"]))
        assert "sets" not in alone
        for key in ("nelbo", "ppl", "stderr", "num_tokens"):
            assert found[key] == pytest.approx(alone[key], rel=1e-6), (name, key)
        assert f"PPL {found['ppl']:.3f} +- {found['ppl'] * found['stderr']:.3f}  " in printed
    nats = sum(found["nelbo"] * found["num_tokens"] for found in sets.values())
    assert mixed["nelbo"] == pytest.approx(nats / mixed["num_tokens"])
    only_one = figures("data.path=null", f"data.mixture=[{sources}]", "--rows", "1")
    assert [name.split("/")[-1] for name in only_one["sets"]] == ["mine"], "a set without rows has no figure"
