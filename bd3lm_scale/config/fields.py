"""What the schema says about a field: its dotted name, what it may hold, its default."""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache, reduce
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from bd3lm_scale.config.schema import BlockSizeStage, MixtureSource, NameIn, RunConfig
from bd3lm_scale.diffusion.registry import SAMPLERS, SCHEDULES

ITEM = "[]"
"""Stands for the number of a list's item in a field's name: data.mixture[].weight."""


@dataclass(frozen=True)
class FieldRule:
    """What a field, or one item of a list, may hold on its own.

    Attributes:
        kind: int | float | bool | str | tuple, or the class of a section.
        interval: for numbers, as "[0, 1)": a round bracket leaves its end out; None where the type has no ends.
        choices: for names; () for free text.
        is_optional: whether null is allowed.
        default: of the field; None for items of lists.
    """

    kind: type
    interval: str | None
    choices: tuple[str, ...]
    is_optional: bool
    default: Any = None


def value_of(config: RunConfig, name: str) -> object:
    """The value of a dotted field."""
    return reduce(getattr, name.split("."), config)


def field_rules() -> dict[str, FieldRule]:
    """Every dotted field of the schema, in order, sections and items of lists included."""
    return _field_rules((*SCHEDULES, *SAMPLERS))


@cache
def _field_rules(registered: tuple[str, ...]) -> dict[str, FieldRule]:
    """The rules while these names are registered."""
    return dict(_rules(RunConfig, ""))


def field_names() -> tuple[str, ...]:
    """Every dotted field that holds a value, in order: run_dir, seed, ..., data.path, ..."""
    return tuple(name for name, rule in field_rules().items() if not is_dataclass(rule.kind) and ITEM not in name)


def item_names() -> tuple[str, ...]:
    """The fields of one item of a list: a source of a mixture, a stage of a schedule."""
    lists = {"data.mixture": MixtureSource, "diffusion.block_size_schedule": BlockSizeStage}
    return tuple(f"{name}{ITEM}.{field}" for name, item in lists.items() for field in typing.get_type_hints(item))


def _rules(section: type, prefix: str) -> Iterator[tuple[str, FieldRule]]:
    defaults = section()
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        yield from _rules_of(hint, f"{prefix}{name}", getattr(defaults, name))


def _rules_of(hint: Any, name: str, default: Any) -> Iterator[tuple[str, FieldRule]]:
    rule = _rule(hint, default)
    yield name, rule
    if is_dataclass(rule.kind):
        yield from _rules(rule.kind, f"{name}.")
    elif rule.kind is tuple:
        (item, _) = typing.get_args(hint)
        yield from _rules_of(item, f"{name}{ITEM}", None)


def _rule(hint: Any, default: Any) -> FieldRule:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if is_union else (hint,)
    (kind,) = (option for option in options if option is not type(None))
    is_optional = type(None) in options
    if typing.get_origin(kind) is Literal:
        return FieldRule(str, None, typing.get_args(kind), is_optional, default)
    constraints: dict[str, float] = {}
    if typing.get_origin(kind) is Annotated:
        base, *extras = typing.get_args(kind)
        for extra in extras:
            if isinstance(extra, AfterValidator) and isinstance(extra.func, NameIn):
                return FieldRule(str, None, extra.func.choices, is_optional, default)
            for item in extra.metadata if isinstance(extra, FieldInfo) else ():
                constraints |= {end: getattr(item, end) for end in ("ge", "gt", "le", "lt") if hasattr(item, end)}
        kind = base
    kind = typing.get_origin(kind) or kind
    return FieldRule(kind, _interval(constraints), (), is_optional, default)


def _interval(ends: dict[str, float]) -> str | None:
    if not ends:
        return None
    low = f"[{ends['ge']}" if "ge" in ends else f"({ends['gt']}" if "gt" in ends else "(-inf"
    high = f"{ends['le']}]" if "le" in ends else f"{ends['lt']})" if "lt" in ends else "inf)"
    return f"{low}, {high}"
