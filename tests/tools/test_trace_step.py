"""The size of one training step, counted, so that it cannot grow unseen."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def counts(label: str, text: str) -> tuple[int, int]:
    files, functions = re.search(rf"^{label}: (\d+) files, (\d+) functions", text, re.M).groups()
    return int(files), int(functions)


def test_one_step_stays_readable(tiny_data):
    """Noise, schedule, reduction and update; the loop around it is held too. The aim is 22 files and 70 functions."""
    command = [sys.executable, "tools/trace_step.py", "--loop", str(tiny_data), "--list"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    files, functions = counts("step", done.stdout)
    assert files <= 22, done.stdout
    assert functions <= 70, done.stdout
    assert "training/step.py: given_step, noise_step, train_step" in done.stdout
    files, functions = counts("loop", done.stdout)
    assert files <= 38, done.stdout
    assert functions <= 114, done.stdout
