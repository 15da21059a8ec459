"""YAML with line numbers: a recipe's text as plain values, bounded, and the line of each key."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lily.errors import LilyError
from lily.recipes.spec import values as scalars
from lily.recipes.spec.locations import Key, KeyLocations

MAX_BYTES = 1 << 20  # a recipe is a page of text; anything larger is a mistake or an attack
MAX_DEPTH = 20
MAX_VALUES = 100_000  # aliases of aliases make a short text expand without bound
PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass
class Document:
    """A recipe's raw values, the location of each key ("file:line" or the text of an override), and the files."""

    values: dict[str, Any]
    locations: dict[Key, str] = field(default_factory=dict)
    overridden: set[Key] = field(default_factory=set)
    files: tuple[str, ...] = ()  # the nearest first

    def location(self, path: Key) -> str:
        """The location of the key at `path`, or of the nearest key above it, or below: `a.b=1` writes a too.

        Of a section in a file, what the command line changes in it is named too.
        """
        below = {key: where for key, where in self.locations.items() if key[: len(path)] == path and key != path}
        found = KeyLocations(self.locations).of(path)
        if found is None:
            return next(iter(below.values()), "recipe")
        changes = [where for key, where in below.items() if key in self.overridden] if path else []
        return f"{found} with {' and '.join(changes)}" if changes and not found.startswith("override") else found


def parse(path: str, file: Path) -> Document:
    """The values of a recipe's file, as written; `path` names it in messages.

    Raises:
        LilyError: if it is not a YAML mapping of plain values.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise LilyError(f"{path}: {size} bytes; a recipe has at most {MAX_BYTES}. Is it the right file?")
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise LilyError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise LilyError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
    try:
        node = _composed(text)
        document = Document({})
        if not isinstance(node, yaml.MappingNode):
            raise LilyError(f"{path}:1: expected a mapping of keys such as `name:` and `task:`")
        location = path.replace("{", "{{").replace("}", "}}") + ":{}"
        _check_size(node, location)
        values = _construct(node, (), location, document.locations)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise LilyError(f"{path}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise LilyError(f"{path}: nested too deeply; a recipe has at most {MAX_DEPTH} levels") from None
    document.values = values
    return document


def parse_value(text: str, at: Key, written: str, locations: dict[Key, str]) -> Any:
    """The value of a key on the command line.

    Args:
        text: YAML.
        at: the key.
        written: the whole argument, which becomes the location of the value's keys in `locations`.
        locations: of the recipe's keys.

    Raises:
        LilyError: quotes the argument.
    """
    location = f"override {written!r}".replace("{", "{{").replace("}", "}}")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _check_size(node, location)
        return _construct(node, at, location, locations)
    except RecursionError:
        key = written.partition("=")[0]
        raise LilyError(f"override {key}=...: nested too deeply; a recipe has at most {MAX_DEPTH} levels") from None
    except yaml.YAMLError:
        raise LilyError(f"override {written!r}: the value is not valid YAML; quote it") from None


@functools.lru_cache(maxsize=64)
def _composed(text: str) -> yaml.Node | None:
    """The nodes of a recipe's text, which are only read: many recipes extend the same few files."""
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _check_size(node: yaml.Node, location: str) -> None:
    """Reject a node whose aliases expand to too many values, without expanding it."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # set while the children are counted, so that an alias to a parent ends the recursion
            children = (
                [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
            )
            sizes[id(node)] = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(map(size, children))
        return sizes[id(node)]

    if size(node) > MAX_VALUES:
        raise LilyError(f"{location.format(1)}: its aliases expand to over {MAX_VALUES} values; write them out")


def _construct(node: yaml.Node, at: Key, location: str, locations: dict[Key, str]) -> Any:
    """The values of a node; `location` has {} for the line."""
    where = location.format(node.start_mark.line + 1)
    if len(at) > MAX_DEPTH:
        raise LilyError(f"{where}: nested too deeply; a recipe has at most {MAX_DEPTH} levels")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in PLAIN_TAGS:
        raise LilyError(f"{where}: the tag {node.tag!r} is not allowed; write plain values")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            key_location = location.format(key_node.start_mark.line + 1)
            if key is None:
                raise LilyError(f"{key_location}: a key must be plain text")
            if key in values:
                raise LilyError(f"{key_location}: {'.'.join((*at, key))}: duplicate key; keep one of them")
            here = (*at, key)
            locations[here] = key_location
            values[key] = _construct(value_node, here, location, locations)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*at, str(i)), location, locations) for i, child in enumerate(node.value)]
    if scalars.SURROGATE.search(node.value):
        raise LilyError(f"{where}: {'.'.join(at)}: holds half of a surrogate pair, a character cut in two; remove it")
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node, deep=True)
    # 2020-13-45 is a YAML date without such a day; text with a tag (!!timestamp x) may raise any of the others.
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise LilyError(f"{where}: {'.'.join(at)}: not a value of its YAML type ({error}); quote it") from None
    finally:
        loader.dispose()
    if isinstance(value, bytes):
        raise LilyError(f"{where}: {'.'.join(at)}: holds bytes (!!binary); write text")
    return node.value if not getattr(node, "style", None) and scalars.is_text(node.tag, node.value) else value
