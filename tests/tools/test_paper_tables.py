"""The paper's tables from run folders as the evaluation commands leave them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm_scale.config.load import from_dict, to_yaml

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from report.paper_tables import main, model_name, read_run, write_tables  # noqa: E402


def make_run(folder: Path, objective: str = "bd3lm", data: str = "data/owt", **diffusion) -> Path:
    folder.mkdir(parents=True)
    config = from_dict(
        {
            "run_dir": str(folder),
            "data": {"path": data, "context_length": 1024},
            "diffusion": {"objective": objective, **diffusion},
        }
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def put(path: Path, **figures) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(figures))


@pytest.fixture
def runs(tmp_path):
    block4 = make_run(tmp_path / "b4", block_size=4)
    put(block4 / "evaluation" / "heldout.json", ppl=20.5, stderr=0.002, num_tokens=1_000_000)
    put(block4 / "evaluation" / "ptb.json", ppl=97.125, stderr=0.1, num_tokens=5)
    put(block4 / "evaluation" / "my_corpus.json", ppl=33.25, stderr=0.1, num_tokens=5)
    put(
        block4 / "samples" / "a.evaluation.json", num_samples=300, sampler="first_hitting", length=1024,
        gen_ppl=26.75, gen_ppl_stderr=0.5, nfe=1023.0, forward_calls=1278.0, entropy=5.5, judge="gpt2-large",
        stop_at_eos=False,
    )  # fmt: skip
    put(
        block4 / "samples" / "b.evaluation.json", num_samples=500, length=131000, length_median=798.5,
        length_max=9982, stop_at_eos=True,
    )  # fmt: skip
    line = {
        "kind": "validation", "step": 10, "nelbo": 3.0, "ppl": 21.0, "stderr": 0.01, "clip_low": 0.45,
        "clip_high": 0.95, "variance": {"0.45-0.95": 6.25, "0.001-1": 23.5},
    }  # fmt: skip
    (block4 / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    ar = make_run(tmp_path / "ar", "ar")
    other = make_run(tmp_path / "other", data="data/lm1b", block_size=16, schedule="cosine")
    return [block4, ar, other]


def row_of(page: str, heading: str, label: str) -> list[str]:
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_figure_lands_in_its_table(runs, tmp_path):
    page = write_tables(runs, tmp_path / "out").read_text()
    b4 = "BD3-LM 4 (b4)"
    assert row_of(page, "Table 4", b4) == [b4, "≤", "20.50", "0.04", "1,000,000", "heldout", "20.73"]
    assert row_of(page, "Table 4", "AR (ar)")[2] == "–"
    assert row_of(page, "Table 3", "BD3-LM 16 (other)")[-1] == "30.60"
    assert row_of(page, "Table 5", b4) == [b4, "97.12", "33.25"]
    assert row_of(page, "Table 5", "BD3-LM 4, published (OWT)") == ["BD3-LM 4, published (OWT)", "96.81", "–"]
    assert row_of(page, "Table 6", b4)[1:5] == ["500", "798.50", "9,982", "131,000"]
    generation = row_of(page, "Table 7", b4)
    assert generation[1:4] == ["300", "26.75", "0.50"]
    assert generation[-2:] == ["gpt2-large", "25.70"]
    assert row_of(page, "Table 8", b4)[1:] == ["loglinear, U[0.45, 0.95]", "20.50", "6.25", "23.50"]
    assert row_of(page, "Table 8", "BD3-LM 16 (other)")[1] == "cosine"
    for name in ("table_3", "table_4", "table_5", "table_6", "table_7", "table_8"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in page


def test_runs_without_evaluations_give_a_page_that_says_so(tmp_path):
    run = make_run(tmp_path / "mdlm", "mdlm")
    page = write_tables([run], tmp_path / "out").read_text()
    assert page.count("Nothing measured yet: see docs/evaluation.md") == 3
    assert model_name(read_run(run).config) == "MDLM"


def test_report_run_hands_over(runs, tmp_path):
    command = [sys.executable, TOOLS / "report_run.py", "--paper-tables", *runs, "--output", tmp_path / "tables"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tables" / "tables.md").is_file()


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: holds no config.yaml" in capsys.readouterr().err
