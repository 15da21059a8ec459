"""`lily recipes` and `lily schema`: the included recipes, and the JSON Schema of recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from lily.errors import LilyError
from lily.io.tables import terminal


def recipes_command(
    name: Annotated[
        str | None,
        Argument(help="Name of a recipe to print as YAML, with inherited keys; of a file, prints its recipes' names."),
    ] = None,
    copy: Annotated[str | None, Option("--copy", help="Write the recipe to this file, for editing.")] = None,
) -> None:
    """List the included recipes, or print one."""
    from lily.io.atomic import write_text
    from lily.recipes import loader

    if name is None:
        if copy is not None:
            raise LilyError("--copy needs the name of a recipe: lily recipes NAME --copy FILE")
        rows = []
        for known, path in loader.shipped().items():
            names = loader.names_of(known)
            several = "" if names == [known] else f" ({len(names)} recipes: {known}:NAME)"
            rows.append([known, loader.describe(path) + several])
        Console().print(terminal(["recipe", "what it does"], rows))
        return
    names = loader.names_of(name)
    if names != [name] and copy is None:
        print("\n".join(names))
        return
    # keys that the recipe leaves to their defaults stay out of the copy
    text = loader.dump_recipe(loader.load_any(name), complete=False) if names == [name] else loader.dump_file(name)
    if copy is None:
        print(text, end="")
        return
    if Path(copy).exists():
        raise LilyError(f"--copy {copy} already exists; name another file")
    if not Path(copy).parent.is_dir():
        raise LilyError(f"--copy {copy}: there is no folder {Path(copy).parent}; create it first")
    write_text(copy, text)


def schema_command(
    task: Annotated[str | None, Argument(help="Task: dreambooth; default: all other tasks.")] = None,
) -> None:
    """Print the JSON Schema of recipes, for completion and checks in editors."""
    from lily.recipes.spec.dreambooth import DreamBooth
    from lily.recipes.spec.schema import Recipe

    if task not in (None, "dreambooth"):
        raise LilyError(f"{task!r} has no separate schema; give dreambooth, or no task for all other recipes")
    print(json.dumps((Recipe if task is None else DreamBooth).model_json_schema(), indent=2))
