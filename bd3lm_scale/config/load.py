"""From a YAML file and `a.b=c` overrides to a typed, checked RunConfig, and back to plain values.

    defaults < YAML file < overrides  ->  one dict  ->  typed tree  ->  checks  ->  RunConfig, or one ConfigError

yaml_text reads, omegaconf merges, pydantic converts and checks each field: every problem is found in one pass.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bd3lm_scale.config.checks import problems
from bd3lm_scale.config.messages import line, show
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.config.validate import Problems, build, check_tree
from bd3lm_scale.config.yaml_text import MAX_BYTES, Document, YamlTextError, parse
from bd3lm_scale.errors import ConfigError

_FIELD = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d{1,6}\])*")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `a.b=c` overrides and check everything that needs no world size.

    Raises:
        ConfigError: listing every problem of the file, the overrides and their combination.
    """
    document = _read_yaml(Path(path))
    return _build_checked(document, overrides, source=" ".join([str(path), *map(show, overrides)]))


def from_dict(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The inverse of to_dict, for configurations kept in checkpoints, with `a.b=c` overrides; the same checks apply.

    Raises:
        ConfigError: as load_config.
    """
    source = " ".join(["the saved configuration", *map(show, overrides)])
    return _build_checked(Document(values), overrides, source)


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


def _read_yaml(path: Path) -> Document:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        remedy = f"use {path.parent / near[0]}" if near else "use an existing YAML file, as configs/demo.yaml"
        raise ConfigError([f"{path}: no such file; {remedy}"])
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_BYTES + 1).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path}: not readable as YAML: byte {error.start} is not UTF-8; correct the file"]
        ) from error
    except (YamlTextError, OSError) as error:
        raise ConfigError([f"{path}: not readable as YAML: {error}"]) from error


def _build_checked(document: Document, overrides: Sequence[str], source: str) -> RunConfig:
    found = check_tree(document.values)
    if found:
        raise ConfigError(found, source)
    if document.values is None:
        document = Document({}, document.written, document.refused)
    if not isinstance(document.values, Mapping):
        raise ConfigError([f"{source}: holds no sections; use those of configs/demo.yaml"])
    refused: Problems = {}
    document = _apply(document, overrides, refused)
    for name, (reason, remedy) in document.refused.items():
        refused.setdefault(name, []).append(line(name, document.written.get(name, "..."), reason, remedy))
    config, found = build(document.values, document.written, refused)
    # A field that could not be read stands at its default: what the checks say about it would mislead.
    named = [name.split("[")[0] for name in found]
    lines = [text for texts in found.values() for text in texts]
    lines += [text for text in problems(config) if not any(name in text for name in named)]
    if lines:
        raise ConfigError(lines, source)
    return config


def _apply(base: Document, overrides: Sequence[str], refused: Problems) -> Document:
    """The base with each `a.b=c` on top; what is no override is added to `refused`."""
    changes = OmegaConf.create()
    written, unused = dict(base.written), dict(base.refused)
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or _FIELD.fullmatch(name) is None:
            refused[text] = [f"{show(text)}: not an override; use field=value, as in train.steps=100"]
            continue
        try:
            document = parse(value)
            if "" not in document.refused:
                OmegaConf.update(changes, name, document.values, force_add=True)
        except (YamlTextError, OmegaConfBaseException, ValueError, TypeError, KeyError, IndexError) as error:
            refused[name] = [f"{name} ({show(value)}): cannot be applied: {show(error)}; use field=value"]
            continue
        _replace_under(name, written, document.written)
        _replace_under(name, unused, document.refused)
    return Document(_merge(base.values, changes) if overrides else base.values, written, unused)


def _replace_under(name: str, known: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Put what is known of a new value and its parts in place of what was known of the old one."""
    for old in [old for old in known if old == name or old.startswith((f"{name}.", f"{name}["))]:
        del known[old]
    for part, what in new.items():
        known[f"{name}.{part}" if part and not part.startswith("[") else f"{name}{part}"] = what


def _merge(values: Any, changes: Any) -> Any:
    try:
        merged = OmegaConf.merge(OmegaConf.create(dict(values)), changes)
        return OmegaConf.to_container(merged, resolve=False, throw_on_missing=False)
    except (OmegaConfBaseException, ValueError, TypeError, KeyError, IndexError) as error:
        raise ConfigError([f"the overrides cannot be applied: {show(error)}; use field=value"]) from error
