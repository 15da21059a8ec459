"""`lily recipes` and `lily schema`: the included recipes, and the JSON Schema of recipes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from lily.errors import LilyError
from lily.io.tables import terminal
from lily.recipes.by_task import BASES

if TYPE_CHECKING:
    from lily.recipes.loader import Listed

TASKS = (*BASES, "dreambooth")


def recipes_command(
    name: Annotated[
        str | None,
        Argument(
            metavar="[NAME or TEXT]",
            help="Name of a recipe to print as YAML, with inherited keys; of a file, prints its recipes' names. Any "
            "other text lists the recipes whose name, task or description has all of its words.",
        ),
    ] = None,
    task: Annotated[str | None, Option("--task", help=f"List the recipes of a task: {', '.join(TASKS)}.")] = None,
    copy: Annotated[str | None, Option("--copy", help="Write the recipe to this file, for editing.")] = None,
) -> None:
    """List the included recipes, or print one."""
    from lily.io.atomic import write_text
    from lily.recipes import loader

    if task is not None and task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(TASKS)}"
        raise LilyError(f"--task {task}: {hint}")
    if name is None and copy is not None:
        raise LilyError("--copy needs the name of a recipe: lily recipes NAME --copy FILE")
    if name is None or task is not None or (copy is None and not _is_known(name)):
        entries = [e for e in loader.listed() if e.matches(name or "") and task in (None, e.task)]
        if entries:
            _print(entries, Console())
            return
        if task is not None:
            raise LilyError(
                f"no recipe of task {task} has {name!r} in its name or description; `lily recipes --task {task}`"
            )
        assert name is not None  # without a text, every recipe is listed
    names = loader.names_of(name)
    if names != [name] and copy is None:
        print("\n".join(names))
        return
    # keys that the recipe leaves to their defaults stay out of the copy
    text = loader.dump_recipe(loader.load_any(name), complete=False) if names == [name] else loader.dump_file(name)
    if copy is None:
        print(text, end="")
        return
    target = Path(copy).expanduser()
    if target.exists():
        raise LilyError(f"--copy {copy} already exists; name another file")
    if not target.parent.is_dir():
        raise LilyError(f"--copy {copy}: there is no folder {target.parent}; create it first")
    write_text(target, text)


def _is_known(name: str) -> bool:
    from lily.recipes import loader

    try:
        loader.find(name)
    except LilyError:
        return False
    return True


def _print(entries: Sequence[Listed], console: Console) -> None:
    """The recipes by task, each with what it does."""
    for task in dict.fromkeys(entry.task for entry in sorted(entries, key=lambda entry: _position(entry.task))):
        rows = [
            [
                entry.name,
                entry.description + (f" ({entry.variants} recipes: {entry.name}:NAME)" if entry.variants else ""),
            ]
            for entry in entries
            if entry.task == task
        ]
        console.print(Text(task, style="bold"))
        console.print(terminal(["", ""], rows, no_wrap=True, box=None, show_header=False, padding=(0, 1, 0, 1)))


def _position(task: str) -> int:
    return TASKS.index(task) if task in TASKS else len(TASKS)


def schema_command(
    task: Annotated[str | None, Argument(help="Task: dreambooth; default: all other tasks.")] = None,
) -> None:
    """Print the JSON Schema of recipes, for completion and checks in editors."""
    from lily.recipes.spec.dreambooth import DreamBooth
    from lily.recipes.spec.schema import Recipe

    if task not in (None, "dreambooth"):
        raise LilyError(f"{task!r} has no separate schema; give dreambooth, or no task for all other recipes")
    print(json.dumps((Recipe if task is None else DreamBooth).model_json_schema(), indent=2))
