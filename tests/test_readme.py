"""Every command the README shows in a ```bash block works: each is run, made small, in the order of the page.

A command no rule below knows fails the test: add the rule that makes it cheap.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm_scale.config.load import load_config

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

TINY = [
    *("model.num_layers=4", "model.hidden_size=32", "model.num_heads=4", "model.cond_dim=8", "optim.warmup_steps=1"),
    *("data.context_length=32", "diffusion.block_size=8", "data.workers=0", "runtime.device=cpu", "precision=fp32"),
    *("train.steps=4", "train.global_batch_size=4", "train.micro_batch_size=1"),
    *("evaluation.every_steps=2", "evaluation.rows=4", "checkpoint.every_steps=2"),
]

# what a command looks like -> arguments that make it cheap (later ones win); None: see SHOWN
CHEAP: dict[str, list[str]] = {
    r"python -m bd3lm_scale\.train ": TINY,
    r"torchrun .*-m bd3lm_scale\.train ": TINY,
    r"python -m bd3lm_scale\.launch ": TINY,
    r"python -m bd3lm_scale\.evaluate ": ["evaluation.micro_batch_size=4"],
    r"python -m bd3lm_scale\.sample ": ["--length", "32", "--num-samples", "1"],
    r"(python )?tools/convert_checkpoint\.py ": [],
    r"(python )?tools/(plan|report)_run\.py ": [],
    r"(python )?tools/(prepare_data|train_tokenizer)\.py --help": [],
}
# commands that are not run: only what they name is checked
SHOWN = (r"make( |$)", r"sbatch ", r"(git clone|cd|source|export|pip install|tail|less|squeue|ls|touch) ?")


def commands_of(document: Path) -> list[str]:
    """The command lines of a document's bash blocks, continuation lines joined, comments left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        " ".join(shlex.split(line, comments=True)) and line.split(" #")[0].strip() for line in lines if line.strip()
    ]


def extra_of(command: str) -> list[str] | None:
    """What makes this command cheap; None if it is only shown."""
    if any(re.match(pattern, command) for pattern in SHOWN):
        return None
    for pattern, extra in CHEAP.items():
        if re.match(pattern, command):
            return extra
    pytest.fail(f"README command without a rule that tests it: {command}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder that looks like a clone with its demo data, small: a corpus, its tokenizer and shards."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "tools", "slurm", "docs", "bd3lm_scale"):
        (folder / name).symlink_to(ROOT / name)
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(path.read_text() for path in sorted((ROOT / "bd3lm_scale").glob("*.py"))))
    run(folder, f"python tools/train_tokenizer.py {corpus} --vocab-size 400 --output {folder}/tokenizer")
    model = next((folder / "tokenizer").glob("*.model"))
    shards = "--output data/demo --workers 0 --document paragraph"
    run(folder, f"python tools/prepare_data.py {corpus} --tokenizer {model} {shards}")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder: Path, command: str, extra: list[str] | tuple[str, ...] = ()) -> str:
    words = [*shlex.split(command), *extra]
    if words[0] == "python":
        words[0] = sys.executable
    elif words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    elif words[0].startswith("tools/"):
        words = [sys.executable, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(free_port())}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_readme_commands_run_in_their_order(workspace):
    ran = 0
    for command in commands_of(README):
        extra = extra_of(command)
        if extra is not None:
            run(workspace, command, extra)
            ran += 1
    assert ran >= 4, "the README shows training, evaluation, sampling and export"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_documents_name_targets_scripts_and_configs_that_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands_of(document):
        if command.startswith("make"):
            named = {word for word in shlex.split(command)[1:] if "=" not in word}
            assert named <= targets, command
    for name in re.findall(
        r"(?<![\w./-])(?:tools|slurm|configs|docs|tests|\.ci)/[\w./]*\w\.(?:py|sh|yaml|md|env)", document.read_text()
    ):
        assert (ROOT / name).exists(), f"{document.name} names {name}"
    for name in re.findall(r"python -m (bd3lm_scale[\w.]*)", document.read_text()):
        assert (ROOT / (name.replace(".", "/") + ".py")).exists(), f"{document.name} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_overrides_in_documents_are_fields_that_exist(document):
    """`train configs/x.yaml a.b=c` in any code block: the file and the overrides load together."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines:
        found = re.search(
            r"(?:bd3lm_scale\.train|train_owt\.sh|train_lm1b\.sh|plan_run\.py) +(configs/\S+\.yaml)(.*)", line
        )
        if found:
            overrides = re.findall(r"(?<!\S)([a-z_]+(?:\.[a-z_0-9]+)*=[^\s\]]+)", found[2].split(" #")[0])
            load_config(ROOT / found[1], [o for o in overrides if "..." not in o])


def test_readme_is_short():
    assert len(README.read_text().splitlines()) < 150
