"""docs/extending.md, followed step by step: a file and a line, and the new schedule and sampler work everywhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd3lm_scale.config.load import from_dict
from bd3lm_scale.diffusion import registry
from bd3lm_scale.diffusion.samplers.sampler import get_sampler
from bd3lm_scale.diffusion.schedule import get_schedule
from bd3lm_scale.errors import ConfigError
from tests.training_runs import CONFIG, ROOT, prepare_tiny_data

PAGE = (ROOT / "docs" / "extending.md").read_text()
TABLES = {"sine": "SCHEDULES", "left_to_right": "SAMPLERS"}

COMMANDS = """
import sys
from bd3lm_scale import train
from bd3lm_scale.inference import sampling
from tools import convert_checkpoint

run, hf = sys.argv[1:]
assert train.main([f"{run}.yaml", f"run_dir={run}"]) == 0
assert sampling.main([run, "--sampler", "left_to_right", "--length", "24", "--output", f"{run}.jsonl", "--quiet"]) == 0
assert sampling.main([run, "--sampler", "right_to_left", "--quiet"]) != 0
print("EXPORT", convert_checkpoint.main(["to-hf", run, hf, "--no-check"]))
print("EXPORT", convert_checkpoint.main(["to-hf", run, hf, "--no-check", "--sampler", "ancestral"]))
print("EXPORT", convert_checkpoint.main(["to-hf", run, hf, "--no-check", "--sampler", "first_hitting"]))
"""


def follow_the_page(copy: Path) -> None:
    """A copy of the package with the page's files written and its lines added to the registry."""
    for name in ("bd3lm_scale", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    lines = [block for block in blocks if not block.startswith("# ")]
    assert len(blocks) == 4
    assert len(lines) == 2
    for block in blocks:
        if block not in lines:
            path, _, text = block.removeprefix("# ").partition("\n")
            assert not (copy / path).exists()
            (copy / path).write_text(text)
    entries = copy / "bd3lm_scale" / "diffusion" / "registry.py"
    text = entries.read_text()
    for line in lines:
        table = TABLES[re.match(r' *"(\w+)"', line)[1]]
        assert f"Add the line to `{table}`" in PAGE
        end = text.index("\n}", text.index(f"{table} = {{")) + 1
        text = text[:end] + line + text[end:]
    entries.write_text(text)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The page followed in a copy of the package, and a run trained, sampled and exported there."""
    folder = tmp_path_factory.mktemp("extending")
    data = prepare_tiny_data(folder / "text")
    follow_the_page(folder / "copy")
    changes = {
        'path: "???"': f"path: {data}",
        "block_size: 8": "block_size: 8, schedule: sine",
        "steps: 20": "steps: 4",
    }
    config = CONFIG + "sampling: {sampler: left_to_right}\n"
    for old, new in changes.items():
        assert old in config
        config = config.replace(old, new)
    (folder / "run.yaml").write_text(config)
    return folder, subprocess.run(
        [sys.executable, "-c", COMMANDS, str(folder / "run"), str(folder / "hf")],
        cwd=folder / "copy", env={"PYTHONPATH": str(folder / "copy"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_new_schedule_trains_and_the_new_sampler_samples(done):
    folder, result = done
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["kind"] == "train" for row in rows) == 4
    (sample,) = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    assert (sample["sampler"], sample["num_tokens"]) == ("left_to_right", 24)
    assert sample["nfe"] == 23, "one position per call"
    assert re.search(r"sampling.sampler \(right_to_left\): must be one of .*left_to_right", result.stderr)


def test_the_export_refuses_what_its_class_cannot_do_and_names_what_it_can(done):
    folder, result = done
    assert re.findall(r"^EXPORT (\d)", result.stdout, re.M) == ["1", "1", "0"], result.stderr[-3000:]
    assert re.search(r"sampling.sampler \(left_to_right\): .*--sampler first_hitting", result.stderr)
    assert re.search(r"diffusion.schedule \(sine\): .*loglinear.*--sampler first_hitting", result.stderr)
    assert json.loads((folder / "hf" / "generation_config.json").read_text())["sampler"] == "first_hitting"


def test_a_line_in_the_registry_is_all_the_configuration_needs(tmp_path, monkeypatch):
    (tmp_path / "toy_choices.py").write_text(
        "from bd3lm_scale.diffusion.schedule import Schedule\n"
        "TOY = Schedule('toy', lambda t: t, lambda t: t * 0 + 1, lambda p: p)\n"
        "WRONG = 5\n"
        "def sample(network, request, settings, on_progress=None): return settings\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    values = {"run_dir": "x", "data": {"path": "d"}, "diffusion": {"schedule": "toy"}, "sampling": {"sampler": "toy"}}
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    for line, names in zip(caught.value.problems, (registry.SCHEDULES, registry.SAMPLERS), strict=True):
        assert f"must be one of {'auto, ' if names is registry.SAMPLERS else ''}{', '.join(names)}" in line
    monkeypatch.setitem(registry.SCHEDULES, "toy", "toy_choices:TOY")
    monkeypatch.setitem(registry.SAMPLERS, "toy", registry.SamplerEntry("toy_choices:sample", ("bd3lm",)))
    assert from_dict(values).diffusion.schedule == "toy"
    assert get_schedule("toy").loss_weight(torch.ones(1)) == 1
    assert get_sampler("toy")(None, None, "settings", None) == "settings"
    assert "toy" in registry.samplers_for("bd3lm")
    with pytest.raises(ConfigError, match=r"does not fit diffusion\.objective ar; use auto or ar"):
        from_dict({**values, "diffusion": {"objective": "ar"}})
    for address in ("toy_choices:WRONG", "toy_choices:NONE", "no_such_module:X"):
        monkeypatch.setitem(registry.SCHEDULES, "toy", address)
        with pytest.raises(ValueError, match=address):
            get_schedule("toy")
    monkeypatch.setitem(registry.SCHEDULES, "other", "toy_choices:TOY")
    with pytest.raises(ValueError, match="named toy"):
        get_schedule("other")


@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "sedd", "ar"])
def test_every_objective_has_a_default_sampler_and_every_entry_is_there(objective):
    default = {"bd3lm": "first_hitting", "mdlm": "first_hitting", "sedd": "analytic", "ar": "ar"}[objective]
    assert registry.samplers_for(objective)[0] == default
    assert all(callable(get_sampler(name)) for name in registry.samplers_for(objective))
