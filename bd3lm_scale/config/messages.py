"""The words for what is wrong with a field: `field (value): reason; use remedy`, on one line."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from pydantic_core import ErrorDetails

from bd3lm_scale.config.fields import ITEM, FieldRule, field_names, field_rules, item_names
from bd3lm_scale.config.schema import MISSING

_RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "%": 0.01}
_TRUTH = {"yes": "true", "on": "true", "1": "true", "true": "true"}
_TRUTH |= {"no": "false", "off": "false", "0": "false", "false": "false"}
_SHOWN = 80


def show(value: Any) -> str:
    """A value on one line, as YAML would write it, shortened."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**_SHOWN:
        return f"a whole number of more than {_SHOWN} digits"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = re.sub(r"[^\x20-\x7e\xa1-\u2027\u2030-\ud7ff\ue000-\U0010ffff]", lambda m: repr(m[0])[1:-1], text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def line(name: str, value: Any, reason: str, remedy: str) -> str:
    """One problem."""
    return f"{name} ({show(value)}): {reason}; use {remedy}"


def explain(detail: ErrorDetails, name: str, text: str | None) -> str:
    """One pydantic error as the line the user reads."""
    kind, value = detail["type"], detail["input"]
    rule = field_rules().get(re.sub(r"\[\d+\]", ITEM, name))
    shown = value if text is None else text
    if rule is None:
        return unknown_field(name, value)
    if isinstance(value, str) and "${" in value:
        return line(name, shown, "interpolation is not supported", "the value itself")
    if kind == "missing_value":
        return line(name, shown, "is required", f"{name}=...")
    if is_dataclass(rule.kind):
        return line(name, shown, "is a section, not a value", f"{name}.FIELD=...")
    if rule.kind is tuple:
        return line(name, shown, "must be a list", f"{name}=[...]")
    if rule.choices:
        return line(name, shown, f"must be one of {', '.join(rule.choices)}", _nearest_choice(shown, rule))
    if kind in _RANGE_ERRORS:
        # an item of a list of numbers is known by its value
        field = name.rpartition("[")[0] if name.endswith("]") else name
        return line(field, shown, f"must lie in {rule.interval}", _example(rule))
    if kind == "string_too_short":
        return line(name, shown, "is empty", _example(rule) if rule.is_optional else f"{name}=...")
    if kind == "control_characters":
        return line(name, shown, "must be one line without control characters", f"{name}=...")
    return _wrong_kind(name, shown, rule)


def _example(rule: FieldRule) -> str:
    if rule.default is not None and rule.default != MISSING:
        return f"for example {show(rule.default)}"
    if rule.is_optional:
        return "null"
    return "for example 0.5" if rule.kind is float else "another value"


def _nearest_choice(value: Any, rule: FieldRule) -> str:
    text = show(value).lower()
    off = [choice for choice in ("disabled", "none") if choice in rule.choices]
    if off and text in ("false", "no", "off", "null", "0"):
        return off[0]
    near = difflib.get_close_matches(text, rule.choices, 1, 0.5)
    return f"{near[0]} (did you mean that?)" if near else show(rule.default)


def _wrong_kind(name: str, value: Any, rule: FieldRule) -> str:
    if rule.kind is str:
        return line(name, value, "must be text", f"quotes: {name}='\"{show(value)}\"'")
    if rule.kind is bool:
        meant = _TRUTH.get(show(value).strip().lower())
        remedy = f"{name}={meant}" if meant else f"{name}=true or {name}=false"
        return line(name, value, "must be true or false", remedy)
    what = "a whole number" if rule.kind is int else "a number"
    legal = [show(number) for number in _meant(value, rule.kind) if _fits(number, rule)]
    if legal:
        remedy = " or ".join(f"{name}={number}" for number in legal)
    elif rule.default is None:
        remedy = "null, or a number such as 1" if rule.is_optional else "for example 0.5"
    else:
        remedy = f"for example {name}={show(rule.default)}"
    return line(name, value, f"must be {what}", remedy)


def _meant(value: Any, kind: type) -> list[float]:
    """The numbers that somebody who wrote this may have meant: "10k", "1,000", "08", "5%", 1.5 for a whole number."""
    if isinstance(value, bool) or value is None:
        return []
    number = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([-+]?[\d,_ ]*\.?\d+(?:[eE][-+]?\d{1,3})?)\s*([kKmMbBgG%]?)\s*", value)
        if match is None or len(value) > _SHOWN:
            return []
        number = float(re.sub(r"[,_ ]", "", match[1])) * _UNITS.get(match[2].lower(), 1)
    if not isinstance(number, int | float) or abs(number) > 1e15:  # also infinite ones
        return []
    if kind is float:
        return [number]
    return sorted({math.floor(number), math.ceil(number)}) if number == number else []


def _fits(number: float, rule: FieldRule) -> bool:
    if rule.interval is None:
        return True
    low, high = (float(end) for end in rule.interval[1:-1].split(","))
    above = number >= low if rule.interval[0] == "[" else number > low
    return above and (number <= high if rule.interval[-1] == "]" else number < high)


def unknown_field(name: str, value: Any) -> str:
    """The line for a name that the schema does not have, with the nearest one it has."""
    known = list(item_names() if "[" in name else field_names())
    sections = sorted({known_name.rsplit(".", 1)[0] for known_name in known if "." in known_name})
    leaf = name.rsplit(".", 1)[-1]
    by_leaf = [known_name for known_name in known if known_name.rsplit(".", 1)[-1] == leaf]
    near = by_leaf or difflib.get_close_matches(
        re.sub(r"\[\d+\]", ITEM, name[:_SHOWN]), sections if isinstance(value, Mapping) else known, 1, 0.6
    )
    start = f"{show(name)} ({show(value)}): unknown field"
    if near:
        return f"{start}; did you mean {near[0]}?"
    section = name.rpartition(".")[0]
    siblings = [n.removeprefix(f"{section}.") for n in known if n.startswith(f"{section}.")] if section else sections
    return f"{start}; use one of {', '.join(siblings or sections)}"
