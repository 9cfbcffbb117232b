"""From a YAML file and `a.b=c` overrides to a typed, checked RunConfig, and back to plain values.

    defaults < YAML file < overrides  ->  one dict  ->  typed tree  ->  checks  ->  RunConfig, or one ConfigError

omegaconf parses and merges; the conversion to types is done here, so that every problem is found in one pass.
"""

import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bd3lm_scale.config.checks import problems
from bd3lm_scale.config.schema import MixtureSource, RunConfig
from bd3lm_scale.errors import ConfigError

MISSING_VALUE = "???"


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
    builder = _Builder()
    config = builder.section(RunConfig, values, "")
    # A field that could not be read stands at its default: what the checks say about it would mislead.
    named = builder.bad_fields
    more = [line for line in problems(config) if not any(field in line for field in named)]
    if builder.problems or more:
        raise ConfigError([*builder.problems, *more], source)
    return config


class _Builder:
    """Converts nested values to the dataclass tree and collects what does not fit."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.bad_fields: list[str] = []

    def section(self, cls: type, values: Mapping[str, Any], prefix: str) -> Any:
        hints = typing.get_type_hints(cls)
        arguments = {}
        for key, value in values.items():
            if key not in hints:
                self.problems.append(_unknown_field(f"{prefix}{key}", value))
                continue
            converted = self.value(hints[key], value, f"{prefix}{key}")
            if converted is not MISSING:
                arguments[key] = converted
        for item in fields(cls):
            if item.default == MISSING_VALUE and arguments.get(item.name, MISSING_VALUE) == MISSING_VALUE:
                self.report(f"{prefix}{item.name}", MISSING_VALUE, "is required", f"{prefix}{item.name}=...")
        return cls(**arguments)

    def value(self, hint: Any, value: Any, name: str) -> Any:
        """The typed value, or MISSING after reporting why there is none."""
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if value is None and type(None) in options:
            return None
        kind = next(option for option in options if option is not type(None))
        if isinstance(value, str) and "${" in value:
            return self.report(name, value, "interpolation is not supported", "the value itself")
        if is_dataclass(kind):
            if isinstance(value, Mapping):
                return self.section(typing.cast(type, kind), value, f"{name}.")
            return self.report(name, value, "is a section, not a value", f"{name}.FIELD=...")
        if typing.get_origin(kind) is tuple:
            return self.sequence(typing.get_args(kind)[0], value, name)
        return self.scalar(kind, value, name)

    def sequence(self, kind: Any, value: Any, name: str) -> Any:
        if not isinstance(value, list | tuple):
            return self.report(name, value, "must be a list", f"{name}=[...]")
        items = [self.value(kind, item, f"{name}[{i}]") for i, item in enumerate(value)]
        return MISSING if MISSING in items else tuple(items)

    def scalar(self, kind: type, value: Any, name: str) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is float and is_number:
            return float(value)
        if kind is int and is_number and math.isfinite(value) and value == int(value):
            return int(value)  # 1e6 is a float in YAML and a fine number of steps
        if kind in (bool, str) and isinstance(value, kind):
            return value
        what, remedy = {
            int: ("a whole number", f"{name}=1"),
            float: ("a number", f"{name}=0.5"),
            bool: ("true or false", f"{name}=true or {name}=false"),
            str: ("text", f"quotes: {name}='\"{value}\"'"),
        }[kind]
        return self.report(name, value, f"must be {what}", remedy)

    def report(self, name: str, value: Any, reason: str, remedy: str) -> Any:
        self.problems.append(f"{name} ({_show(value)}): {reason}; use {remedy}")
        self.bad_fields.append(name.split("[")[0])
        return MISSING


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def field_names(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted field of the schema, in order: run_dir, seed, ..., data.path, ..."""
    for name, hint in typing.get_type_hints(cls).items():
        if is_dataclass(hint):
            yield from field_names(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _unknown_field(name: str, value: Any) -> str:
    known = list(field_names(MixtureSource, "data.mixture[].") if "[" in name else field_names())
    sections = sorted({known_name.rsplit(".", 1)[0] for known_name in known if "." in known_name})
    leaf = name.rsplit(".", 1)[-1]
    by_leaf = [known_name for known_name in known if known_name.rsplit(".", 1)[-1] == leaf]
    near = by_leaf or difflib.get_close_matches(
        re.sub(r"\[\d+\]", "[]", name), sections if isinstance(value, Mapping) else known, 1, 0.6
    )
    if near:
        return f"{name} ({_show(value)}): unknown field; did you mean {near[0]}?"
    section = name.rpartition(".")[0]
    siblings = [n.removeprefix(f"{section}.") for n in known if n.startswith(f"{section}.")] if section else sections
    return f"{name} ({_show(value)}): unknown field; use one of {', '.join(siblings)}"
