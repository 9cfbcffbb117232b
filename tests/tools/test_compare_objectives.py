"""The comparison: real runs through the commands, figures kept, reports rewritten without training again."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import compare_conversions
from compare import noises
from compare import report as compare_report
from compare.data import Outcome
from compare_objectives import cases

from bd3lm_scale.config.checks import problems
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.stages import stages

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "compare_objectives.py"


def compare(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


def test_one_text_is_trained_on_scored_and_reported_once(tmp_path):
    text = tmp_path / "text.txt"
    sentences = [f"Number {i} is followed by number {i + 1}; then comes {i + 2}." for i in range(600)]
    text.write_text("\n\n".join("\n".join(sentences[i : i + 20]) for i in range(0, 600, 20)))
    report = tmp_path / "out" / "report.md"
    small = ["--vocab-size", "300", "--steps", "8", "--layers", "1", "--width", "32", "--context-length", "32"]
    small += ["--rows", "16", "--noise-draws", "2", "--validation-fraction", "0.3", "--document", "paragraph"]
    arguments = [
        "--text",
        str(text),
        "--output",
        str(tmp_path / "out"),
        "--report",
        str(report),
        "--only",
        "block4",
        *small,
    ]
    first = compare(*arguments)
    assert first.returncode == 0, first.stderr[-3000:]
    shown = report.read_text()
    figures = json.loads((tmp_path / "out" / "figures" / "block4.json").read_text())
    assert f"<= {figures['ppl']:.2f} +- " in shown
    assert "8 steps of 8 rows = **2,048 tokens**" in shown
    assert "| 0.45 to 0.95 |" in shown
    held_out = json.loads((tmp_path / "out" / "data" / "validation" / "manifest.json").read_text())
    bytes_per_token = held_out["num_text_bytes"] / held_out["num_tokens"]
    assert 1 < bytes_per_token == pytest.approx(figures["bits_per_token"] / figures["bits_per_byte"])
    assert (report.with_suffix("") / "variance.png").stat().st_size > 5000
    report.write_text(shown + "\nWritten by hand.\n")
    again = compare(*arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "step 1/8" not in again.stderr, "nothing is trained twice"
    assert report.read_text() == shown + "\nWritten by hand.\n"
    other = compare(*arguments, "--lr", "0.1")
    assert other.returncode == 1
    assert "other settings (lr: 0.002 -> 0.1); use another --output" in other.stderr


def outcome(name: str, nelbo: float, **changes) -> Outcome:
    probe = {"interval": "0.3-0.8", "loss": {"variance": 0.1}, "gradient": {
        "variance": 2.0, "mean_norm": 1.0, "variance_per_flop": 3e9, "count": 4}}  # fmt: skip
    table = {"loglinear": {"0.001-1": 5.0, "0.3-0.8": 2.0}, "cosine": {"0.001-1": 4.0, "0.3-0.8": 6.0}}
    figures = {"nelbo": nelbo, "ppl": math.exp(nelbo), "stderr": 0.05, "noise_stderr": 0.01, "num_rows": 9,
               "num_tokens": 99, "variance": {"tables": table, "probes": [probe], "probe_rows": 8}}  # fmt: skip
    labels = {case.name: case.label for case in cases()}
    return Outcome(name, labels[name], figures | changes, [], 1e6, (0.3, 0.8))


@pytest.mark.parametrize(
    ("nelbo", "verdict"), [(4.5, "| yes |"), (4.05, "| within error |"), (3.5, "| **no, the reverse** |")]
)
def test_the_order_is_judged_by_two_standard_errors(nelbo, verdict):
    lines = compare_report.order({"ar": outcome("ar", 4.0), "block4": outcome("block4", nelbo)}).splitlines()
    assert lines[-1].startswith(f"| AR < L'=4 | {nelbo - 4.0:+.4f} | 0.0707 ")
    assert lines[-1].endswith(verdict)


def test_equality_with_ar_is_judged_within_seeds():
    runs = {"ar": 4.0, "ar_again": 4.2, "block1_full": 4.12, "block1_full_again": 4.1}
    same = compare_report.exact({name: outcome(name, nelbo) for name, nelbo in runs.items()})
    assert "| +0.0100 | 0.1308 | within two standard errors |" in same, "0.11 over seeds, 0.05 over rows for each"
    apart = compare_report.exact({n: outcome(n, v - 2.0 * ("block1" in n)) for n, v in runs.items()})
    assert "| -1.9900 | 0.1308 | **no** |" in apart
    assert compare_report.exact({"ar": outcome("ar", 4.0)}) == ""


def figures_of(**nelbos: list[float]) -> dict:
    """Figures of block size 4: noise -> nats of seeds 1, 2, ..."""
    settings = {**noises.DEFAULTS, "rows_per_step": 8, "data": None, "document": "line", "validation_fraction": 0.3}
    runs = {
        f"block4/{kind}/{seed}": {"nelbo": value, "stderr": 0.1, "intervals": [[0.3, 0.8], [0.5, 1.0]]}
        for kind, values in nelbos.items()
        for seed, value in enumerate(values, 1)
    }
    return {"settings": settings, "runs": runs}


def test_noises_are_compared_within_seeds():
    shown = noises.section(figures_of(paper=[4.3, 5.1, 4.7], paper_resample=[4.1, 5.0], full=[4.6]))
    assert "| 4 | the paper's interval | U[0.5, 1] | 3 | 4.700 +- 0.231 | +0.150 +- 0.050 |" in shown
    assert "| 4 | the paper's interval, `resample` | U[0.5, 1] | 2 | 4.550 +- 0.450 |  |" in shown
    assert "| 4 | U[0, 1] | U[0.5, 1] | 1 | 4.600 | +0.500 |" in shown


def test_the_section_on_noises_is_replaced_and_the_rest_of_the_report_kept(tmp_path):
    report = tmp_path / "deep" / "report.md"
    noises.insert(report, "first")
    report.write_text(f"# Results\n\n{report.read_text()}\nafter\n")
    noises.insert(report, "second")
    begin, end = noises.marks("noises")
    assert report.read_text() == f"# Results\n\n{begin}\nsecond\n{end}\n\nafter\n"
    assert noises.kept(report.read_text()) == f"{begin}\nsecond\n{end}"
    noises.insert(report, "third", "conversions")
    other = "<!-- conversions: begin -->\nthird\n<!-- conversions: end -->"
    assert noises.kept(report.read_text()) == f"{begin}\nsecond\n{end}\n\n{other}"
    assert noises.kept("# Results") == ""


def test_only_the_missing_run_of_a_comparison_of_noises_is_made(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Number {i} is followed by number {i + 1}; then comes {i + 2}." for i in range(600)))
    report = tmp_path / "report.md"
    small = {"vocab_size": 300, "steps": 4, "layers": 1, "width": 32, "context_length": 32, "rows": 16}
    names = [f"block{size}/searched_resample/{seed}" for size in noises.BLOCK_SIZES for seed in (1, 2)]
    names.remove("block4/searched_resample/2")
    known = {"nelbo": 4.0, "stderr": 0.1, "intervals": [[0.45, 0.95]]}
    figures = figures_of() | {"runs": dict.fromkeys(names, known)}
    figures["settings"] |= small | {"text": [str(text)]}
    path = tmp_path / "report" / "noises.json"
    path.parent.mkdir()
    path.write_text(json.dumps(figures))
    options = [word for name, value in small.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["--text", str(text), "--output", str(tmp_path / "out"), "--report", str(report), "--seeds", "2"]
    arguments += ["--noises", "searched_resample", "--document", "line", "--validation-fraction", "0.3", *options]
    done = compare(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.read_text())["runs"]
    assert set(found) == {*names, "block4/searched_resample/2"}
    assert all(found[name] == known for name in names)
    made = found["block4/searched_resample/2"]
    assert len(made["intervals"]) == 4, "three searches and the end"
    rows = [json.loads(line) for line in (tmp_path / "out/noises/block4_searched_resample_2/metrics.jsonl").open()]
    assert made["nelbo"] == [row["nelbo"] for row in rows if row["kind"] == "validation"][-1]
    assert noises.section({"settings": figures["settings"], "runs": found}) in report.read_text()
    other = compare(*arguments, "--lr", "0.1")
    assert other.returncode == 1
    assert "other settings (lr: 0.003 -> 0.1); use another --report" in other.stderr


def test_every_way_to_convert_is_a_legal_run(tmp_path, monkeypatch):
    """Settings of all 22 runs: what they start from, how long they are, in which blocks; and what the report says."""
    args = compare_conversions._parser().parse_args(["--steps", "60"])
    seen = {}

    def train(path):
        config = load_config(path)
        seen[Path(config.run_dir).name] = config
        Path(config.run_dir).mkdir(parents=True)
        row = {"kind": "validation", "step": config.train.steps, "nelbo": 4.0 + len(seen) / 100, "stderr": 0.1}
        (Path(config.run_dir) / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(compare_conversions, "train", train)
    monkeypatch.setattr(compare_conversions, "prepare", lambda args, output: output / "data")
    figures = compare_conversions.run_all(args, tmp_path, tmp_path / "figures.json")
    assert len(seen) == len(figures["runs"]) == 22
    for name, config in seen.items():
        assert problems(config, 1) == [], name
        starts, seed = config.train.init_from, name[-1]
        is_conversion = "plain" in name or "shift" in name
        assert starts == (str(tmp_path / f"ar_{seed}") if is_conversion else None)
        assert config.train.steps == (60 if name.startswith("ar") else 6 if is_conversion else 66)
        assert config.diffusion.shift_targets == ("shift" in name)
    sizes = [s.config.block_size for s in stages(seen["block16_shift_schedule_1"])]
    assert sizes == [1, 4, 16]
    shown = compare_conversions.section(figures)
    assert "| 4 | converted, shifted | 2 | 4.115 +- 0.055 | -0.040 +- 0.000 |" in shown
    assert "Not run yet" not in shown
    del figures["runs"]["block4/scratch/2"]
    assert "* Not run yet: block4/scratch/2; " in compare_conversions.section(figures)
    again = compare_conversions.run_all(args, tmp_path, tmp_path / "figures.json")
    assert sorted(again["runs"]) == sorted([*figures["runs"], "block4/scratch/2"])
