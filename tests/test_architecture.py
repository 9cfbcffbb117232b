"""The rules of the architecture as tests: who may import whom, and which libraries enter through which door."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bd3lm_scale"

# Lower number = lower floor. A module may import only from floors below its own (or from its own package).
FLOORS = {
    "train": 9, "launch": 9, "sample": 9,
    "evaluate": 9, "evaluate_harness": 9, "evaluate_corpora": 9, "evaluate_generations": 9, "evaluate_variance": 9,
    "training": 8, "evaluation": 8, "launcher": 8,
    "validation": 7, "inference": 7,
    "engine": 6,
    "data": 5, "diffusion": 5, "model": 5, "optim": 5, "checkpoint": 5,
    "runtime": 4,
    "parallel": 3,
    "config": 2,
    "values": 1, "rng": 1, "errors": 1,
}  # fmt: skip

# Files that stand lower than their package: the network's description is read by every floor.
LOWER = {"diffusion/registry.py": 1, "model/parameters.py": 1, "model/rotary.py": 1.5}

DOORS = {
    "megatron": {"model", "parallel"},
    "deepspeed": {"optim"},
    "webdataset": {"data"},
    "sentencepiece": {"data", "checkpoint/hf"},
    "tokenizers": {"data"},
    "transformers": {"checkpoint/hf", "evaluation"},
    "lm_eval": {"evaluation"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def package_of(path: Path) -> str:
    """The package, or the module at the top, that the file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(name: str) -> float:
    """Of an imported name."""
    parts = name.split(".")[1:]
    return next((LOWER[file] for file in LOWER if file.removesuffix(".py").split("/") == parts[:2]), FLOORS[parts[0]])


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.ImportFrom):
            found.add("relative import")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path.name == "__init__.py" and path.parent.name != "config":
        assert path.read_text() == "", "a name has one address: __init__.py files are empty"
        return
    if "hf" in path.parts and path.stem.endswith("_bd3lm"):
        return  # shipped inside exports: stands alone, see test_exported_code_stands_alone
    package = package_of(path)
    assert package in FLOORS, f"{path}: on no floor; see the table in tests/test_architecture.py"
    lowered = LOWER.get(path.relative_to(PACKAGE).as_posix())
    for name in imports_of(path):
        assert name != "relative import", f"{path}: use absolute imports"
        if not name.startswith("bd3lm_scale."):
            continue
        is_below = floor_of(name) < (FLOORS[package] if lowered is None else lowered)
        is_own = name.split(".")[1] == package and lowered is None
        assert is_own or is_below, f"{path.name} ({package}) may not import {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_libraries_use_their_doors(path):
    file = path.relative_to(PACKAGE).as_posix()
    for name in imports_of(path):
        library = name.split(".")[0]
        allowed = DOORS.get(library)
        assert allowed is None or any(file.startswith(door) for door in allowed), f"{file} imports {library}"


def test_light_packages_load_no_engine():
    """config, diffusion and data are readable and testable without Megatron or DeepSpeed."""
    code = (
        "import sys, pkgutil, importlib, bd3lm_scale.config, bd3lm_scale.diffusion, bd3lm_scale.data\n"
        "for part in (bd3lm_scale.diffusion, bd3lm_scale.data):\n"
        "    for m in pkgutil.walk_packages(part.__path__, part.__name__ + '.'): importlib.import_module(m.name)\n"
        "heavy = {'megatron', 'deepspeed'} & {m.split('.')[0] for m in sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_the_commands_import_without_a_word():
    """Libraries that are off on purpose are not the user's business; wandb costs a tenth of a rank's start."""
    code = (
        "import sys, bd3lm_scale.train, bd3lm_scale.sample, bd3lm_scale.evaluate\n"
        "assert 'wandb' not in sys.modules\n"
        "import wandb\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_and_functions_stay_small():
    for path in modules():
        text = path.read_text()
        lines = text.count("\n")
        budget = {"train.py": 200, "training/step.py": 150}.get(path.relative_to(PACKAGE).as_posix(), 500)
        assert lines <= budget, f"{path.name}: {lines} lines, budget {budget}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 64, f"{path.name}: {node.name} has {length} lines, budget 64"


def test_exported_code_stands_alone():
    """The files shipped in HF folders import nothing of ours: torch and transformers only."""
    for path in (PACKAGE / "checkpoint" / "hf").glob("*_bd3lm.py"):
        outside = {n.split(".")[0] for n in imports_of(path)} - {"torch", "transformers", "relative import"}
        assert outside <= set(sys.stdlib_module_names), f"{path.name} imports {outside}"


def test_the_exported_model_imports_every_file_it_comes_with():
    """transformers 4.49 copies the files that modeling_bd3lm.py imports, not those that they import."""
    folder = PACKAGE / "checkpoint" / "hf"
    named = set(re.findall(r"^from \.(\w+) import", (folder / "modeling_bd3lm.py").read_text(), flags=re.MULTILINE))
    assert named == {path.stem for path in folder.glob("*_bd3lm.py")} - {"modeling_bd3lm"}


def test_no_two_classes_have_one_name():
    """Who reads a name, or looks for it, finds one thing."""
    places: dict[str, set[str]] = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), set()).add(path.relative_to(PACKAGE).as_posix())
    assert {name: sorted(found) for name, found in places.items() if len(found) > 1} == {}


def test_frozen_dataclasses_hold_no_caches():
    """Frozen says: equal fields, equal object. A cache that fills later belongs to a plain class."""
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            decorators = [ast.unparse(d) for d in node.decorator_list] if isinstance(node, ast.ClassDef) else []
            if any("dataclass(" in d and "frozen=True" in d for d in decorators):
                for part in map(ast.unparse, node.body):
                    private_store = part.startswith("_") and "default_factory" in part.split("\n")[0]
                    if private_store or part.startswith(("@cached_property", "@lru_cache", "@cache\n")):
                        found.append((path.relative_to(PACKAGE).as_posix(), node.name, part.split("\n")[0]))
    assert found == []


def drawing(document: str, heading: str) -> list[str]:
    """The lines of the first block after a heading."""
    text = (PACKAGE.parent / document).read_text().split(f"## {heading}\n")[1]
    return text.split("```")[1].splitlines()[1:]


def test_the_architecture_page_shows_the_tree():
    drawn: dict[str, set[str]] = {}
    folder, width = "", 22
    for line in drawing("docs/architecture.md", "The tree"):
        folder = line[:width].strip().rstrip("/") or folder
        drawn.setdefault(folder, set()).update(line[width:].split())
    found: dict[str, set[str]] = {}
    for path in modules():
        if path.name != "__init__.py":
            found.setdefault(path.parent.relative_to(PACKAGE).as_posix(), set()).add(path.stem)
    found[PACKAGE.name] = found.pop(".")
    assert drawn == found, "docs/architecture.md, The tree: a line per package with the names of its modules"


@pytest.mark.parametrize(
    ("document", "heading"), [("CONTRIBUTING.md", "The floors"), ("docs/architecture.md", "The floors")]
)
def test_documents_draw_the_floors_of_this_test(document, heading):
    drawn = [set(line.split("   ")[0].split()) for line in drawing(document, heading)]
    levels = sorted(set(FLOORS.values()), reverse=True)
    assert drawn == [{name for name, floor in FLOORS.items() if floor == level} for level in levels]
