"""From plain nested values to a RunConfig, and for each field that cannot be used the reasons."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bd3lm_scale.config.messages import explain, line, show
from bd3lm_scale.config.schema import MISSING, RunConfig
from bd3lm_scale.config.yaml_text import MAX_DEPTH, MAX_VALUES

Problems = dict[str, list[str]]
"""For each field that cannot be used, by dotted name, the lines that say why."""


def check_tree(values: Any) -> list[str]:
    """What is wrong with nested values as such: too deep, too many, names that are no text."""
    count, level = 0, [values]
    for _ in range(MAX_DEPTH + 1):
        below = []
        for value in level:
            if isinstance(value, Mapping):
                bad = [key for key in value if not isinstance(key, str)]
                if bad:
                    return [f"{show(bad[0])}: a field's name must be text; use field: value"]
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
        count += len(level)
        if count > MAX_VALUES:
            return [f"more than {MAX_VALUES:,} values; use fewer"]
        level = below
    return [f"nested deeper than {MAX_DEPTH} levels; use sections and values as in configs/demo.yaml"] if level else []


def build(
    values: Mapping[str, Any], written: Mapping[str, str], refused: Problems | None = None
) -> tuple[RunConfig, Problems]:
    """The configuration that the values describe, with defaults in place of what cannot be used.

    Args:
        values: nested dicts, lists and scalars.
        written: how fields were written where they came from text ("1_000"), by dotted name.
        refused: fields that are known to be wrong already.

    Returns:
        The configuration, and for each field that cannot be used the lines that say why.
    """
    found: Problems = dict(refused or {})
    config = _validated(values, written, found)
    for name, value in _required_texts(config):
        if value == MISSING and name not in found:
            found[name] = [line(name, value, "is required", f"{name}=...")]
    return config, found


def _validated(values: Any, written: Mapping[str, str], found: Problems) -> RunConfig:
    adapter = TypeAdapter(RunConfig)
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
    for detail in details:
        name = dotted(detail["loc"])
        found.setdefault(name, []).append(explain(detail, name, written.get(name)))
    return adapter.validate_python(_without(values, [detail["loc"] for detail in details]))


def _required_texts(config: RunConfig) -> Iterable[tuple[str, str]]:
    yield "run_dir", config.run_dir
    for i, source in enumerate(config.data.mixture):
        yield f"data.mixture[{i}].path", source.path


def _without(values: Any, places: Sequence[tuple[int | str, ...]]) -> Any:
    """A copy of nested dicts without the values at these places; a list with such a place goes as a whole."""
    here = {place[0] for place in places if len(place) == 1 or isinstance(place[1], int)}
    kept = {key: value for key, value in values.items() if key not in here}
    for section in {place[0] for place in places} & set(kept):
        kept[section] = _without(kept[section], [place[1:] for place in places if place[0] == section])
    return kept


def dotted(place: Iterable[int | str]) -> str:
    """("data", "mixture", 0, "path") as "data.mixture[0].path"."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).lstrip(".")
