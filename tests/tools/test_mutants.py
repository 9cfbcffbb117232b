"""The list of mutants fits the code as it is, and the tool tells the noticed from the unnoticed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from mutants import BROKEN, KILLED, SURVIVED
from mutation.core import MUTANTS
from mutation.mutant import Mutant, StaleMutantError

ROOT = Path(__file__).parents[2]
AREAS = ("diffusion/", "data/order", "optim/", "checkpoint/", "model/attention", "model/layer", "training/")


def test_every_mutant_fits_the_code():
    """Its text is there once, what it makes is Python, its tests exist; all that is stale is said at once."""
    stale, functions = [], {}
    for mutant in MUTANTS:
        try:
            ast.parse(mutant.apply((ROOT / mutant.file).read_text()))
        except (StaleMutantError, SyntaxError) as problem:
            stale.append(f"{mutant.name}: {problem}")
        for test in mutant.tests:
            path, *names = test.split("::")
            if path not in functions:
                functions[path] = {
                    node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(node, "name")
                }
            if not set(names) <= functions[path]:
                stale.append(f"{mutant.name}: no test {test}")
    assert not stale, "\n".join(stale)


def test_the_list_covers_the_core():
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for area in AREAS:
        assert sum(area in mutant.file for mutant in MUTANTS) >= 3, area


def test_a_mutant_whose_line_is_gone_or_repeated_or_kept_is_refused():
    mutant = Mutant("half", "a.py", "x = 1", "x = 2", ("tests/t.py",))
    assert mutant.apply("y = 0\nx = 1\n") == "y = 0\nx = 2\n"
    for text in ("y = 0\n", "x = 1\nx = 1\n"):
        with pytest.raises(StaleMutantError, match=r"'half'.*a\.py"):
            mutant.apply(text)
    with pytest.raises(StaleMutantError):
        Mutant("nothing", "a.py", "x = 1", "x = 1", ()).apply("x = 1")


@pytest.fixture
def project(tmp_path):
    """A package of one line and a test of half of it, laid out as this repository."""
    (tmp_path / "bd3lm_scale").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "bd3lm_scale" / "sums.py").write_text(
        "def add(a, b):\n    return a + b\n\n\ndef end():\n    return 3\n"
    )
    (tmp_path / "bd3lm_scale" / "__init__.py").write_text("")
    (tmp_path / "tests" / "test_sums.py").write_text(
        "from bd3lm_scale.sums import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    return tmp_path


def fates_of(project: Path, *faults: tuple[str, str, str], timeout: float = 300) -> dict[str, str]:
    """What the tool says of each fault, and of the code as it is; in a process that knows no other bd3lm_scale."""
    mutants = [(name, "bd3lm_scale/sums.py", before, after, ["tests/test_sums.py"]) for name, before, after in faults]
    script = f"""
import json, pathlib, sys
sys.path.insert(0, {str(ROOT / "tools")!r})
from mutants import run
from mutation.mutant import Mutant
told = {{}}
fates = run([Mutant(*m) for m in {mutants!r}], pathlib.Path({str(project)!r}), 2, {timeout}, told.__setitem__)
assert told == {{"the code as it is": "passes", **fates}}
print(json.dumps(fates))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_tool_finds_the_mutant_that_no_test_notices(project):
    """Killed, surviving, or broken; the repository itself is never touched."""
    before = (project / "bd3lm_scale" / "sums.py").read_text()
    assert fates_of(
        project,
        ("minus", "a + b", "a - b"),
        ("end", "return 3", "return 4"),
        ("nonsense", "def add(a, b):", "def add(a, b:"),
    ) == {"minus": KILLED, "end": SURVIVED, "nonsense": BROKEN}
    assert (project / "bd3lm_scale" / "sums.py").read_text() == before


def test_a_mutant_that_never_ends_is_noticed(project):
    endless = ("endless", "    return a + b", "    import time\n\n    time.sleep(3600)")
    assert fates_of(project, endless, timeout=3) == {"endless": KILLED}


def test_tests_that_fail_anyway_and_stale_mutants_stop_the_tool(project):
    with pytest.raises(RuntimeError, match=r"StaleMutantError.*'gone'"):
        fates_of(project, ("gone", "a * b", "a"))
    (project / "bd3lm_scale" / "sums.py").write_text("def add(a, b):\n    return a - b\n")
    with pytest.raises(RuntimeError, match="fail on the code as it is"):
        fates_of(project, ("plus", "a - b", "a + b"))
