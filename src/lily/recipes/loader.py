"""Read recipes: YAML with line numbers, inheritance, overrides, and the checks that need no data and no model."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lily.errors import LilyError
from lily.recipes import checks
from lily.recipes.spec import dreambooth, variants
from lily.recipes.spec import values as scalars
from lily.recipes.spec.base import Section
from lily.recipes.spec.data import SOURCES
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.locations import Key, KeyLocations
from lily.recipes.spec.schema import STANDIN, Recipe

LIBRARY = Path(__file__).parent / "library"
ENDINGS = (".yaml", ".yml")
BASE = "base/"  # the folder of what recipes for own data extend
MAX_BYTES = 1 << 20  # a recipe is a page of text; anything larger is a mistake or an attack
MAX_DEPTH = 20
MAX_VALUES = 100_000  # aliases of aliases make a short text expand without bound
MAX_PROBLEMS = 10
MAX_SHOWN = 200  # characters of a wrong value
ALIASES = {"lr": "learning_rate", "rank": "r", "lora_alpha": "alpha"}
SOURCE_DETAILS = ("revision", "format", "header", "delimiter", "encoding", "split", "config", "architecture")
PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass
class Document:
    """A recipe's raw values and the location of each key ("file:line" or the text of an override)."""

    values: dict[str, Any]
    locations: dict[Key, str] = field(default_factory=dict)
    overridden: set[Key] = field(default_factory=set)

    def location(self, path: Key) -> str:
        """The location of the key at `path`, or of the nearest key above it."""
        return KeyLocations(self.locations).of(path) or "recipe"


def shipped() -> dict[str, Path]:
    """The recipes of the package: name -> file."""
    return {name: path for name, path in _library().items() if not name.startswith(BASE)}


def _library() -> dict[str, Path]:
    """The recipes of the package, and the starts for own data that recipes extend."""
    files = (path for path in sorted(LIBRARY.rglob("*.yaml")) if not path.stem.startswith("_"))
    return {path.relative_to(LIBRARY).with_suffix("").as_posix(): path for path in files}


def names_of(name_or_path: str) -> list[str]:
    """The recipes in a file: the name or path itself, or one name for each variant.

    Raises:
        LilyError: if there is no such file, or it is not a recipe.
    """
    file, variant = _locate(name_or_path)
    document = read(str(file))
    names = variants.names_of(document.values, document.locations)
    return [f"{name_or_path}:{name}" for name in names] if names and variant is None else [name_or_path]


def from_anywhere(name_or_path: str) -> str:
    """A name for `extends` that does not depend on the folder of the file: a shipped recipe's, or an absolute path.

    Raises:
        LilyError: if there is no such file.
    """
    file, variant = _locate(name_or_path)
    end = "" if variant is None else f":{variant}"
    head = name_or_path.removesuffix(end)
    return name_or_path if head in shipped() else f"{file.resolve()}{end}"


def is_recipe(target: str) -> bool:
    """Whether `target` is a YAML file (by its ending) or a shipped recipe; `:` and a variant may follow."""
    known, head = shipped(), target.rpartition(":")[0]
    if any(name.lower().endswith(ENDINGS) for name in (target, head)):
        return True
    return not Path(target).expanduser().exists() and (target in known or head in known)


def describe(path: Path) -> str:
    """The first line of a recipe's description."""
    lines = str(read(str(path)).values.get("description", "")).strip().splitlines()
    return lines[0] if lines else ""


def find(name_or_path: str) -> Path:
    """The file of a recipe's name or path, with or without `:` and a variant.

    Raises:
        LilyError: if there is no such recipe, with near matches.
    """
    return _locate(name_or_path)[0]


def _locate(text: str, child: Path | None = None) -> tuple[Path, str | None]:
    """The file and variant of `text`: a file beside `child`, a shipped recipe's name, or a path."""
    library = _library()
    if child is None and text in library and text.startswith(BASE):
        raise LilyError(f"{text} is a start for own data, without any; `lily new FILE` writes a recipe that extends it")

    def file(name: str) -> Path | None:
        beside = [] if child is None else [child.parent / name, child.parent / f"{name}.yaml"]
        # A file may have the name of the shipped recipe that it extends.
        match = next((p for p in beside if os.path.isfile(p) and p.resolve() != child), None) or library.get(name)
        path = Path(name).expanduser()
        # Path.is_file raises for a name that the system does not accept
        return match or (path if os.path.isfile(path) else None)

    if (whole := file(text)) is not None:
        return whole, None
    head, colon, variant = text.rpartition(":")
    if colon and (of := file(head)) is not None:
        return of, variant
    known = library if child is not None else shipped()
    near = difflib.get_close_matches(text, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"shipped recipes: {', '.join(known)}"
    raise LilyError(f"no recipe {text!r}: neither a file nor a shipped recipe; {hint}")


def _one(document: Document, text: str, variant: str | None) -> Document:
    """The whole file, or the variant that `text` ends with."""
    file = text if variant is None else text[: -len(variant) - 1]
    return Document(*variants.chosen(document.values, document.locations, variant, file, _merge))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check everything that needs neither data nor model.

    Args:
        name_or_path: a shipped recipe's name or a YAML file; with `variants`, followed by `:` and a variant.
        overrides: `key=value` with dotted keys, values in YAML: `train.epochs=1`.

    Returns:
        The effective recipe.

    Raises:
        LilyError: lists every problem, one per line, each with its file and line.
    """
    recipe = load_any(name_or_path, overrides)
    if isinstance(recipe, DreamBooth):
        raise LilyError(f"{name_or_path} is a recipe of task dreambooth; this command supports the other tasks only")
    return recipe


def load_any(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe | DreamBooth:
    """`load_recipe` for a recipe of any task, dreambooth included."""
    file, variant = _locate(name_or_path)
    document = _one(read(str(file)), name_or_path, variant)
    for override in overrides:
        _override(document, override)
    kind: type[Recipe | DreamBooth] = DreamBooth if document.values.get("task") == "dreambooth" else Recipe
    try:
        recipe = kind.model_validate(document.values)
    except ValidationError as error:
        raise LilyError(_join(_explain(error, document, kind))) from None
    problems = dreambooth.problems(recipe) if isinstance(recipe, DreamBooth) else checks.problems(recipe)
    if lines := [f"{document.location(path)}: {'.'.join(path)}: {text}" for path, text in problems]:
        raise LilyError(_join(lines))
    return recipe.written_at(KeyLocations(document.locations, frozenset(document.overridden)))


def overriding(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides as the values of a recipe that extends the one they change.

    Raises:
        LilyError: quotes one that is not `key=value`.
    """
    document = Document({})
    for override in overrides:
        _override(document, override)
    return document.values


def dump_recipe(recipe: Recipe | DreamBooth, *, complete: bool = True) -> str:
    """The effective recipe as YAML that loads back to an equal recipe.

    Args:
        recipe: what to write.
        complete: write every value, so that new defaults of a later version do not change the recipe; otherwise only
            those that are set.
    """
    return _yaml(recipe.model_dump(mode="json", exclude_unset=not complete))


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def dump_file(name_or_path: str) -> str:
    """A file as YAML, with inherited keys and all variants.

    Raises:
        LilyError: if there is no such file, or one of its variants is not a recipe.
    """
    for name in names_of(name_or_path):
        load_any(name)
    return _yaml(read(str(find(name_or_path))).values)


def read(path: str, seen: tuple[Path, ...] = ()) -> Document:
    """Parse a recipe file and merge it over the file, or variant of a file, that it `extends`.

    Raises:
        LilyError: if it is not a YAML mapping of plain values.
    """
    file = Path(path).resolve()
    if file in seen:
        raise LilyError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}; remove one of the links")
    document = _parse(path, file)
    parent = document.values.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise LilyError(f"{document.location(('extends',))}: extends: expected a recipe's name or path, got {parent!r}")
    base_path, variant = _locate(parent, file)
    base = read(str(base_path), (*seen, file))
    if variant is not None:
        base = _one(base, parent, variant)
    return Document(_merge(base.values, document.values), {**base.locations, **document.locations})


def _parse(path: str, file: Path) -> Document:
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


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        _replace_source(merged, key, value)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _replace_source(section: dict[str, Any], key: str, value: Any) -> None:
    """A source of another kind replaces the inherited one and the keys that describe it."""
    kinds = (*SOURCES, STANDIN)
    if key in kinds and value is not None and section.get(key) is None:
        for inherited in (*kinds, *SOURCE_DETAILS):
            section.pop(inherited, None)


def _override(document: Document, text: str) -> None:
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise LilyError(f"override {text!r}: expected key=value, such as train.epochs=1")
    location = f"override {text!r}".replace("{", "{{").replace("}", "}}")
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
        if node is not None:
            _check_size(node, location)
        parsed = None if node is None else _construct(node, path, location, document.locations)
    except RecursionError:
        raise LilyError(f"override {key}=...: nested too deeply; a recipe has at most {MAX_DEPTH} levels") from None
    except yaml.YAMLError:
        raise LilyError(f"override {text!r}: the value is not valid YAML; quote it") from None
    section = document.values
    for part in path[:-1]:
        _replace_source(section, part, parsed)
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise LilyError(f"override {text!r}: {part} is a value, not a section with keys")
        section = inner
    _replace_source(section, path[-1], parsed)
    section[path[-1]] = parsed
    document.locations[path] = f"override {text!r}"
    document.overridden.add(path)


def _explain(error: ValidationError, document: Document, kind: type[Section]) -> Iterator[str]:
    written = {key[:i] for key in document.locations for i in range(len(key) + 1)}
    for problem in error.errors():
        path: Key = ()
        for part in map(str, problem["loc"]):
            # pydantic adds the alternatives of a union to the location; these are not keys of the recipe.
            if (*path, part) in written:
                path = (*path, part)
        name, wrong = ".".join(path) or "recipe", problem["type"]
        if wrong == "extra_forbidden":
            text = f"unknown key; {_near(path, kind)}"
        elif wrong == "missing":
            name, text = ".".join((*path, str(problem["loc"][-1]))), "is required, but missing"
        elif wrong == "value_error":
            text = problem["msg"].removeprefix("Value error, ")
        else:
            text = f"{problem['msg'][0].lower()}{problem['msg'][1:]}, got {_short(problem.get('input'))}"
            if wrong == "string_type" and isinstance(problem.get("input"), (bool, int, float)):
                text += "; put text that looks like a number or a boolean in quotes"
        yield f"{document.location(path)}: {name}: {text}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _near(path: Key, kind: type[Section]) -> str:
    allowed, key = list(_fields(path[:-1], kind)), ALIASES.get(path[-1], path[-1])
    elsewhere = [f"{name}.{key}" for name in kind.model_fields if key in _fields((name,), kind) and key not in allowed]
    if key in allowed or elsewhere:
        return f"did you mean {' or '.join(elsewhere or [key])}?"
    near = difflib.get_close_matches(path[-1], allowed, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"keys of this section: {', '.join(allowed)}"


def _fields(path: Key, section: type[Section]) -> Mapping[str, FieldInfo]:
    parts = iter(path)
    for part in parts:
        info = section.model_fields.get(part)
        inner, named = (None, False) if info is None else _section(info.annotation)
        if inner is None or (named and next(parts, None) is None):
            return {}
        section = inner
    return section.model_fields


def _section(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The section type of a key, and whether the key maps names to such sections."""
    for candidate in (annotation, *get_args(annotation)):
        named = get_origin(candidate) is dict
        kind = get_args(candidate)[1] if named else candidate
        if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Section):
            return kind, named
    return None, False


def _join(problems: Iterator[str] | list[str]) -> str:
    listed = list(dict.fromkeys(problems))
    more = len(listed) - MAX_PROBLEMS
    return "\n".join(listed[:MAX_PROBLEMS] + ([f"... and {more} more"] if more > 0 else []))
