"""Reports: what they show comes from the last attempt at each step, and pages stand alone."""

import json
import math
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bd3lm_scale.config.load import load_config, to_yaml
from bd3lm_scale.runtime.metrics import MetricsWriter

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from report.data import read_run  # noqa: E402
from report.plots import MAX_POINTS, thinned  # noqa: E402

SCRIPT = ROOT / "tools" / "report_run.py"


def write_run(folder: Path, with_validation: bool = True) -> None:
    """Two attempts: the second repeats steps 6-8 with other losses."""
    for attempt, steps in (("0.0", range(1, 9)), ("0.1", range(6, 13))):
        writer = MetricsWriter(folder, attempt=attempt)
        for step in steps:
            time.sleep(0.002)  # lines are stamped in milliseconds
            loss = 9.0 if attempt == "0.0" and step > 5 else 4.0
            figures = {
                "loss": loss,
                "grad_norm": 0.5,
                "lr": 1e-3,
                "tokens": step * 100,
                "clip_low": 0.1,
                "clip_high": 0.9,
            }
            writer.write("train", step, **figures, event="loss is not finite" if step == 7 else None)
            if with_validation and step % 4 == 0:
                table = {"0.001-1": 5.0, "0.45-0.95": 2.0, "0.5-1": math.nan}
                writer.write("validation", step, nelbo=3.5, ppl=33.1, stderr=0.02, variance=table)
        writer.close()


def report(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_report_is_one_page_that_stands_alone(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    (run / "config.yaml").write_text(to_yaml(load_config(ROOT / "configs" / "demo.yaml")))
    (run / "samples").mkdir()
    (run / "samples" / "a.txt").write_text("def f(x):\n    return x < 1\n")
    done = report(run, "--gpu", "h100", "--gpus", 2)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip())
    assert page == run / "report" / "index.html"
    text = page.read_text()
    drawn = {"loss", "validation", "variance", "clip", "speed", "optimizer", "restarts"}
    assert {path.stem for path in page.parent.glob("*.png")} == drawn
    assert text.count("data:image/png;base64,") == len(drawn)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text), "nothing is loaded from elsewhere"
    assert "return x &lt; 1" in text
    for words in (
        "4.0000",
        "33.10",
        "3.5000 ± 0.0200",
        "1, 3 steps computed twice",
        "loss is not finite",
        "MFU on 2 h100",
        "blocks of 4",
    ):
        assert words in text, words
    assert "9.0000" not in text, "an attempt that was repeated does not count"


def test_report_of_a_run_without_validation_or_config(tmp_path):
    write_run(tmp_path / "run", with_validation=False)
    done = report(tmp_path / "run", "--output", tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere" / "index.html").is_file()
    assert not (tmp_path / "elsewhere" / "validation.png").exists()


@pytest.mark.parametrize("content", [None, "", "not json\n"])
def test_a_folder_without_figures_is_one_clear_error(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = report(tmp_path)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert "use " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "report").exists()


def test_a_step_of_a_long_run_is_a_few_numbers(tmp_path):
    """Lines are read one by one and kept as columns: a million steps fit beside the libraries."""
    line = {"kind": "train", "loss": 3.25, "grad_norm": 0.5, "lr": 1e-3, "clip_low": 0.1, "clip_high": 0.9}
    line |= {f"figure_{i}": 1.5 * i for i in range(20)} | {"attempt": "0.0", "time": 1.0}
    sizes = {}
    for count in (2_000, 42_000):
        with open(tmp_path / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps({**line, "step": i, "tokens": 10 * i}) + "\n" for i in range(count))
        tracemalloc.start()
        run = read_run(tmp_path)
        sizes[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert run.num_steps == count
        assert run.train["tokens"][-1] == 10 * (count - 1)
    assert (sizes[42_000] - sizes[2_000]) / 40_000 < 250, "bytes per step, of lines that are 700 as text"


def test_what_is_drawn_of_a_long_run_is_thinned_and_keeps_its_ends():
    steps = np.arange(1_000_000.0)
    few, same = thinned(steps, steps)
    assert len(few) == MAX_POINTS
    assert (few[0], few[-1]) == (0, 999_999)
    assert np.array_equal(few, same)
    assert np.array_equal(thinned(steps[:100])[0], steps[:100])
