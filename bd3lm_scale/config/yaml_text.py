"""YAML as a configuration needs it: text to plain values, with limits, and without the readings nobody means.

The full language has tags that build objects, aliases that unfold to any size, octal and sexagesimal numbers. Here a
document is mappings with text keys, lists and scalars; a number with a leading zero or with colons is refused, and so
is what is too large, too deep, or refers to itself.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_VALUES = 5_000
MAX_ALIASES = 100

_KINDS = ("null", "bool", "int", "float", "str", "seq", "map", "merge")
_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in _KINDS)
_LEADING_ZERO = re.compile(r"[-+]?0[0-7_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)  # with "1e-3" for a number, which YAML 1.1 reads as text


class YamlTextError(ValueError):
    """A document that cannot be read; one line with reason and remedy."""


@dataclass(frozen=True)
class Document:
    """What a text says.

    Attributes:
        values: nested dicts, lists and scalars.
        written: each plain scalar as it was written, by dotted name ("data.mixture[0].weight").
        refused: for each scalar that is not used, by dotted name, (reason, remedy); its value is left out.
    """

    values: Any
    written: dict[str, str] = field(default_factory=dict)
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits on depth, size and aliases while the tree is composed."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = self._aliases = self._nodes = 0
        self._sizes: dict[int, int] = {}  # values in a finished node, aliases unfolded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1  # keys and values
        if self._nodes > 2 * MAX_VALUES:
            raise YamlTextError(f"more than {MAX_VALUES:,} values; use fewer")
        if self._depth > MAX_DEPTH:
            raise YamlTextError(
                f"nested deeper than {MAX_DEPTH} levels; use sections and values as in configs/demo.yaml"
            )
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias:
            self._aliases += 1
            if id(node) not in self._sizes:
                raise YamlTextError("an alias refers to what it stands in; write the value out")
            if self._aliases > MAX_ALIASES:
                raise YamlTextError(f"more than {MAX_ALIASES} aliases; write the values out")
        else:
            self._sizes[id(node)] = self._size(node)
        if self._sizes[id(node)] > MAX_VALUES:
            raise YamlTextError(f"more than {MAX_VALUES:,} values; use fewer")
        return node

    def _size(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.MappingNode):
            return 1 + sum(self._sizes[id(value)] for _, value in node.value)
        if isinstance(node, yaml.SequenceNode):
            return 1 + sum(self._sizes[id(item)] for item in node.value)
        return 1


# dates stay text, and floats may lack the point
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern})$"), list("-+0123456789."))


def parse(text: str) -> Document:
    """The one document of a text.

    Raises:
        YamlTextError: not YAML, or not what a configuration may hold.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlTextError(f"larger than {MAX_BYTES // 1024} KiB; use a configuration file")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(None)
        document = Document({})
        values = _construct(loader, node, "", document)
        return Document(None if values is _REFUSED else values, document.written, document.refused)
    except yaml.YAMLError as error:
        raise YamlTextError(f"{' '.join(str(error).split())}; correct it") from error


def _construct(loader: _Loader, node: yaml.Node, name: str, document: Document) -> Any:
    """The value of a node; _REFUSED where it must not be used."""
    where = f"line {node.start_mark.line + 1}"
    if node.tag not in _PLAIN_TAGS:
        raise YamlTextError(f"{where}: the tag {node.tag} is not supported; use plain values")
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, name, document)
    if isinstance(node, yaml.SequenceNode):
        items = [_construct(loader, item, f"{name}[{i}]", document) for i, item in enumerate(node.value)]
        return _REFUSED if any(item is _REFUSED for item in items) else items
    assert isinstance(node, yaml.ScalarNode)
    if node.style is None:
        document.written[name] = node.value
    refusal = _refusal(node)
    if refusal is not None:
        document.refused[name] = refusal
        return _REFUSED
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError, TypeError, IndexError) as error:  # !!int x, !!bool 3, numbers of 5,000 digits
        kind = node.tag.rpartition(":")[2]
        raise YamlTextError(f"{where}: {node.value[:80]!r} is no {kind}; use a plain value") from error


def _mapping(loader: _Loader, node: yaml.MappingNode, name: str, document: Document) -> Any:
    values: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, value in node.value:
        where = f"line {key.start_mark.line + 1}"
        if key.tag.endswith(":merge"):
            for part in _merged_parts(value):
                merged = {**_construct(loader, part, name, document), **merged}
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _PLAIN_TAGS:
            raise YamlTextError(f"{where}: a key must be a name; use field: value")
        if key.value in values:
            raise YamlTextError(f"{where}: {key.value[:80]} is given twice; use it once")
        values[key.value] = _construct(loader, value, f"{name}.{key.value}" if name else key.value, document)
    return {key: value for key, value in {**merged, **values}.items() if value is not _REFUSED}


def _merged_parts(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """The mappings that `<<: *name` or `<<: [*a, *b]` brings in, first come first served."""
    for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        if not isinstance(part, yaml.MappingNode):
            raise YamlTextError(f"line {node.start_mark.line + 1}: << takes mappings; use <<: *name")
        yield part


_REFUSED: Any = object()


def _refusal(node: yaml.ScalarNode) -> tuple[str, str] | None:
    """(reason, remedy) for a scalar that YAML reads as another number than it seems, or that stands for another."""
    text = node.value
    if "${" in text:
        return "interpolation is not supported", "the value itself"
    if node.style is not None:
        return None
    if _LEADING_ZERO.fullmatch(text) is not None:
        decimal = re.sub(r"^([-+]?)0[0_]*", r"\1", text).replace("_", "") or "0"
        return "a number with a leading zero is octal in YAML", f"{decimal}, or quotes where text is meant"
    if _SEXAGESIMAL.fullmatch(text) is not None:
        return "numbers with colons count in sixties in YAML", "a plain number, or quotes where text is meant"
    return None
