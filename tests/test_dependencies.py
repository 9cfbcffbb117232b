"""The two files of exact versions fit the ranges of pyproject.toml, each for its Python."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = {"constraints.txt": ["3.11"], "constraints-py312.txt": ["3.12", "3.13"]}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


@pytest.mark.parametrize("name", PYTHONS)
def test_every_direct_dependency_is_pinned_inside_its_range(name):
    pinned = pins(name)
    for python in PYTHONS[name]:
        wanted = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]
        place = {"python_version": python, "sys_platform": "linux"}
        for requirement in wanted:
            if requirement.marker is None or requirement.marker.evaluate(place):
                assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_each_python_has_its_megatron():
    """Megatron-core 0.17 and later need Python 3.12."""
    assert pins("constraints.txt")["megatron-core"].startswith("0.16.")
    assert pins("constraints-py312.txt")["megatron-core"].startswith("0.19.")
    makefile = (ROOT / "Makefile").read_text()
    assert makefile.count("constraints-py312.txt") == 2, "a change of either file makes the environment anew"
