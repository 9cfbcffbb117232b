"""From a YAML file and `a.b=c` overrides to a typed, checked RunConfig, and back to plain values.

    defaults < YAML file < overrides  ->  one dict  ->  typed tree  ->  checks  ->  RunConfig, or one ConfigError

omegaconf parses and merges; pydantic converts and checks each field, so that every problem is found in one pass.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bd3lm_scale.config.checks import problems
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.validate import build
from bd3lm_scale.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=c` overrides and check everything that needs no world size.

    Raises:
        ConfigError: listing every problem of the file, the overrides and their combination.
    """
    bad_overrides = [text for text in overrides if "=" not in text.lstrip("=")]
    if bad_overrides:
        raise ConfigError(
            [f"{text}: not an override; use field=value, as in train.steps=100" for text in bad_overrides]
        )
    values = _merge(_read_yaml(Path(path)), overrides)
    return _build_checked(values, source=" ".join([str(path), *overrides]))


def from_dict(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The inverse of to_dict, for configurations kept in checkpoints, with `a.b=c` overrides; the same checks apply.

    Raises:
        ConfigError: as load_config.
    """
    merged = _merge(OmegaConf.create(dict(values)), overrides) if overrides else values
    return _build_checked(merged, source=" ".join(["the saved configuration", *overrides]))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested values (dict, list, str, int, float, bool, None), fit for JSON and YAML."""
    return _plain(asdict(config))


def to_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML text that load_config reads back to an equal RunConfig."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        remedy = f"use {path.parent / near[0]}" if near else "use an existing YAML file, as configs/demo.yaml"
        raise ConfigError([f"{path}: no such file; {remedy}"])
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            [f"{path}: not readable as YAML: {' '.join(str(error).split())}; correct the file"]
        ) from error


def _merge(base: Any, overrides: Sequence[str]) -> Any:
    try:
        merged = OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides))) if overrides else base
        return OmegaConf.to_container(merged, resolve=False, throw_on_missing=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError([f"{' '.join(overrides)}: cannot be applied: {error}; use field=value"]) from error


def _build_checked(values: Any, source: str) -> RunConfig:
    if not isinstance(values, Mapping):
        raise ConfigError([f"{source}: holds no sections; start from configs/demo.yaml"])
    config, found = build(values)
    # A field that could not be read stands at its default: what the checks say about it would mislead.
    named = [name.split("[")[0] for name in found]
    lines = [line for lines in found.values() for line in lines]
    lines += [line for line in problems(config) if not any(name in line for name in named)]
    if lines:
        raise ConfigError(lines, source)
    return config
