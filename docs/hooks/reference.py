"""The reference pages that are generated from the code: the command line, and the keys of recipes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

WORDS = {"string": "text", "number": "number", "integer": "integer", "boolean": "`true`, `false`"}

BAR = re.compile(r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)")  # outside code, where it would end a cell


def command_line() -> str:
    """Every command with its arguments and options, from the typer app."""
    import typer
    from typer.cli import get_docs_for_click

    from lily.cli.main import app

    command = typer.main.get_command(app)
    with command.make_context("lily", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="lily")
    commands = text[text.index("\n## ") :]  # skip the list of commands, whose help is truncated
    return commands.replace("[required]", "(required)")


def recipe_keys() -> str:
    """Every key of a recipe, from the JSON Schema that `lily schema` prints."""
    from lily.recipes.spec.schema import Recipe

    return keys(Recipe.model_json_schema())


def dreambooth_keys() -> str:
    """Every key of a recipe of task dreambooth."""
    from lily.recipes.spec.dreambooth import DreamBooth

    return keys(DreamBooth.model_json_schema())


MADE: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "recipe-keys": recipe_keys,
    "dreambooth-keys": dreambooth_keys,
}


def filled(markdown: str) -> str:
    """A page with the generated parts in place of its marks, `<!-- made: NAME -->`."""
    return re.sub(r"<!-- made: (\S+) -->", lambda m: MADE[m[1]](), markdown)


# --- keys of recipes ------------------------------------------------------------------------------------------------


def keys(schema: Schema) -> str:
    """A table for each section of a JSON Schema: the outermost first, then each where it is first met.

    Args:
        schema: as pydantic makes it, with the sections under `$defs`.
    """
    sections = _sections(schema)
    paths = {name: path for path, name in sections if name}
    return "\n".join(_table(path, schema["$defs"][name] if name else schema, paths) for path, name in sections)


def _sections(schema: Schema) -> list[tuple[str, str]]:
    """Path and definition of every section, in reading order; the outermost has neither."""
    found = [("", "")]

    def walk(section: Schema, path: str) -> None:
        for key, value in section["properties"].items():
            where = f"{path}.{key}" if path else key
            for name in _references(value):
                inner = schema["$defs"][name]
                if "properties" in inner and name not in {known for _, known in found}:
                    found.append((where + (".NAME" if any(map(_named, _choices(value))) else ""), name))
                    walk(inner, where)

    walk(schema, "")
    return found


def _table(path: str, section: Schema, paths: dict[str, str]) -> str:
    head = f"\n## `{path}`\n\n{section.get('description', '')}\n" if path else ""
    lines = [f"{head}\n| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, value in section["properties"].items():
        required = key in section.get("required", [])
        cells = (f"`{key}`", _value(value, paths), _default(value, required), value.get("description", ""))
        lines.append("| " + " | ".join(BAR.sub(r"\|", cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _choices(value: Schema) -> list[Schema]:
    """What a value may be, null aside."""
    return [choice for choice in value.get("anyOf", value.get("oneOf", [value])) if choice.get("type") != "null"]


def _references(value: Schema) -> list[str]:
    """The definitions that a value refers to."""
    found = []
    for choice in _choices(value):
        if "$ref" in choice:
            found.append(choice["$ref"].rsplit("/", 1)[1])
        for inner in (choice.get("items"), _named(choice)):
            if inner:
                found += _references(inner)
    return found


def _named(value: Schema) -> Schema | None:
    """The schema of a mapping's values; None for anything else."""
    for inner in (value.get("additionalProperties"), *value.get("patternProperties", {}).values()):
        if isinstance(inner, dict):
            return inner
    return None


def _value(value: Schema, paths: dict[str, str]) -> str:
    """The accepted values, in words."""
    return " or ".join(dict.fromkeys(_one_value(choice, paths) for choice in _choices(value)))


def _one_value(value: Schema, paths: dict[str, str]) -> str:
    if "$ref" in value:
        path = paths[value["$ref"].rsplit("/", 1)[1]]
        return f"[`{path}`](#{re.sub(r'[^a-z_A-Z0-9-]', '', path).lower()})"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if value.get("type") == "array":
        return f"list of {_value(value['items'], paths)}" if value.get("items") else "list"
    if value.get("type") == "object":
        inner = _named(value)
        return f"by name, {_value(inner, paths)}" if inner else "any keys"
    return WORDS.get(value.get("type", ""), "anything")


def _default(value: Schema, required: bool) -> str:
    if required:
        return "required"
    default = value.get("default")
    if default in (None, "", [], {}) or isinstance(default, dict):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
