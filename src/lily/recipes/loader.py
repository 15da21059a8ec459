"""Read recipes: YAML with line numbers, inheritance, overrides, and the checks that need no data and no model."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lily.errors import LilyError
from lily.recipes import checks
from lily.recipes.document import Document, parse, parse_value
from lily.recipes.inherit import make_way, merged
from lily.recipes.spec import dreambooth, explain, variants
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.locations import Key, KeyLocations
from lily.recipes.spec.schema import Recipe

LIBRARY = Path(__file__).resolve().parent / "library"
ENDINGS = (".yaml", ".yml")
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".gz")
BASE = "base/"  # the folder of what recipes for own data extend
MAX_PROBLEMS = 10
NEAR = 3  # names that are suggested


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


@dataclass(frozen=True)
class Listed:
    """A shipped recipe in a list."""

    name: str
    task: str
    description: str  # its first line
    variants: int  # recipes in the file; 0 for a single one

    def matches(self, text: str) -> bool:
        """Whether every word of `text` is in its name, task or description, whatever the case."""
        where = f"{self.name} {self.task} {self.description}".casefold()
        return all(word in where for word in text.casefold().split())


def listed() -> list[Listed]:
    """The recipes of the package, in the order of their names."""
    entries = []
    for name, path in shipped().items():
        document = read(str(path))
        count = len(variants.names_of(document.values, document.locations))
        entries.append(Listed(name, str(document.values.get("task", "")), _first_line(document), count))
    return entries


def _first_line(document: Document) -> str:
    lines = str(document.values.get("description", "")).strip().splitlines()
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
    raise LilyError(_not_found(text, library if child is not None else shipped(), child))


def _not_found(text: str, known: Mapping[str, Path], child: Path | None) -> str:
    """The message about a name that is no recipe: the recipes, and files of the folder, that may be meant."""
    path = Path(text).expanduser()
    if child is None and path.is_dir():
        held = sorted(p.name for p in path.iterdir() if p.suffix in ENDINGS)
        fix = f"name one of its recipes: {', '.join(str(path / name) for name in held[:NEAR])}"
        return f"{text} is a folder; {fix if held else f'`lily new {text}` writes a recipe for images in it'}"
    folder = path.parent if child is None else child.parent / path.parent
    near = near_recipes(text, known, folder)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lily recipes` lists these, `lily new` writes one"
    return f"no recipe {text!r}: neither a file nor a shipped recipe; {hint}"


def near_recipes(text: str, known: Mapping[str, Path] | None = None, folder: Path | None = None) -> list[str]:
    """The recipes whose names are like `text`: YAML files of a folder (default: the one that it names), and shipped."""
    head = text.rpartition("/")[0]
    folder = Path(text).expanduser().parent if folder is None else folder
    files = [p.name for p in folder.iterdir() if p.suffix in ENDINGS] if os.path.isdir(folder) else []
    beside = {f"{head}/{name}" if head else name: name for name in sorted(files)}
    stems = {Path(name).stem: full for full, name in beside.items()}
    wanted = Path(text).name
    close = [stems[stem] for stem in difflib.get_close_matches(Path(wanted).stem, stems, n=NEAR)]
    more = difflib.get_close_matches(
        text.removesuffix(Path(wanted).suffix), shipped() if known is None else known, n=NEAR
    )
    return list(dict.fromkeys([*close, *more]))[:NEAR]


def _one(document: Document, text: str, variant: str | None) -> Document:
    """The whole file, or the variant that `text` ends with."""
    file = text if variant is None else text[: -len(variant) - 1]
    values, locations = variants.chosen(document.values, document.locations, variant, file, merged)
    return Document(values, locations, files=document.files)


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
    if file.suffix.lower() in TABLES:
        raise LilyError(f"{name_or_path} is data, not a recipe; `lily new {name_or_path}` writes a recipe for it")
    document = _one(read(str(file)), name_or_path, variant)
    for override in overrides:
        _override(document, override)
    kind: type[Recipe | DreamBooth] = DreamBooth if document.values.get("task") == "dreambooth" else Recipe
    try:
        recipe = kind.model_validate(document.values)
    except ValidationError as error:
        written = {key[:i] for key in document.locations for i in range(len(key) + 1)}
        raise LilyError(_join(document, explain.problems(error, written, kind, document.overridden))) from None
    problems = dreambooth.problems(recipe) if isinstance(recipe, DreamBooth) else checks.problems(recipe)
    if lines := _join(document, problems):
        raise LilyError(lines)
    return recipe.written_at(KeyLocations(document.locations, frozenset(document.overridden), document.files))


def origins(recipe: Recipe | DreamBooth) -> dict[Key, str]:
    """Where the keys of a recipe have their values from: a file, or the command line; defaults are left out.

    Inherited ones name the recipe that they come from, those of the recipe's own file its name and line.
    """
    own = recipe.locations.file
    return {key: _origin(location, own) for key, location in recipe.locations.written.items()}


def _origin(location: str, own: str) -> str:
    if location.startswith("override "):
        return "command line"
    path, _, line = location.rpartition(":")
    if path == own:
        return f"{Path(path).name}:{line}" if not _is_shipped(path) else _shown(path)
    return _shown(path)


def _is_shipped(path: str) -> bool:
    return Path(path).resolve().is_relative_to(LIBRARY)


def _shown(path: str) -> str:
    """A shipped file by the name that `extends` has for it, any other by its path from here, if that is shorter."""
    if _is_shipped(path):
        return Path(path).resolve().relative_to(LIBRARY).with_suffix("").as_posix()
    return min(path, os.path.relpath(path), key=len)


def overriding(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides as the values of a recipe that extends the one they change.

    Raises:
        LilyError: quotes one that is not `key=value`.
    """
    document = Document({})
    for override in overrides:
        _override(document, override)
    return document.values


def change_of(key: str, text: str) -> str:
    """`key=text`, as the command line has it, in quotes where YAML would read another value (`#` and what follows)."""
    plain = f"{key}={text}"
    try:
        same = overriding([plain]) == {key: text}
    except LilyError:
        same = False
    return plain if same else f"{key}={json.dumps(text, ensure_ascii=False)}"


def without_placeholders(folder: Path | str) -> str:
    """The `output` of a run in this folder: braces of its name are not those of placeholders."""
    return str(folder).replace("{", "{{").replace("}", "}}")


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
    document = parse(path, file)
    document.files = (path,)
    parent = document.values.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise LilyError(f"{document.location(('extends',))}: extends: expected a recipe's name or path, got {parent!r}")
    base_path, variant = _locate(parent, file)
    base = read(str(base_path), (*seen, file))
    if variant is not None:
        base = _one(base, parent, variant)
    locations = {**base.locations, **document.locations}
    return Document(merged(base.values, document.values), locations, files=(path, *base.files))


def _override(document: Document, text: str) -> None:
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise LilyError(f"override {text!r}: expected key=value, such as train.epochs=1")
    parsed = parse_value(value, path, text, document.locations)
    section = document.values
    for part in path[:-1]:
        make_way(section, part, parsed)
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise LilyError(f"override {text!r}: {part} is a value, not a section with keys")
        section = inner
    # What the command line sets too does not give way: two contradicting overrides are an error.
    make_way(section, path[-1], parsed, [at[-1] for at in document.overridden if at[:-1] == path[:-1]])
    section[path[-1]] = parsed
    document.locations[path] = f"override {text!r}"
    document.overridden.add(path)


def _join(document: Document, problems: Iterable[tuple[Key, str]]) -> str:
    """Problems as lines, each with its location; empty if there are none."""
    lines = [f"{document.location(path)}: {'.'.join(path) or 'recipe'}: {text}" for path, text in problems]
    listed = list(dict.fromkeys(lines))
    more = len(listed) - MAX_PROBLEMS
    return "\n".join(listed[:MAX_PROBLEMS] + ([f"... and {more} more"] if more > 0 else []))
