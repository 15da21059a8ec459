"""`lily new`: from a file of own data to a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer import Argument, Option

from lily.errors import LilyError
from lily.recipes.by_task import BASES


def new_command(
    file: Annotated[
        str, Argument(metavar="FILE", help="A csv, tsv, json, jsonl or parquet file, or a folder of images by class.")
    ],
    out: Annotated[str | None, Option("--out", help="Recipe to write. Default: named as the file, here.")] = None,
    task: Annotated[str | None, Option(help=f"Task: {', '.join(BASES)}. Default: by the data.")] = None,
    text: Annotated[str | None, Option(help="Column of the texts, where the guess is wrong.")] = None,
    text_pair: Annotated[
        str | None, Option(help="Column of second texts, for pairs, where the guess is wrong.")
    ] = None,
    label: Annotated[str | None, Option(help="Column of classes or numbers, where the guess is wrong.")] = None,
    image: Annotated[str | None, Option(help="Column of paths of images, where the guess is wrong.")] = None,
    prompt: Annotated[str | None, Option(help="Column of prompts, where the guess is wrong.")] = None,
    completion: Annotated[
        str | None, Option(help="Column of the answers to prompts, where the guess is wrong.")
    ] = None,
    messages: Annotated[str | None, Option(help="Column of chats, where the guess is wrong.")] = None,
    delimiter: Annotated[
        str | None, Option(help="Separator of a csv, where two would fit: ',', ';', '|' or tab.")
    ] = None,
) -> None:
    """Look at a file of your own and write a short recipe for it."""
    from lily.io.atomic import write_text
    from lily.recipes import loader
    from lily.recipes.data.guess import guess
    from lily.recipes.new import name_for, recipe_text

    if task is not None and task not in BASES:
        raise LilyError(f"--task {task}: choose one of {', '.join(BASES)}")
    given = {"text": text, "text_pair": text_pair, "label": label, "image": image, "prompt": prompt,
             "completion": completion, "messages": messages}  # fmt: skip
    path = Path(file).expanduser()
    target = Path(out).expanduser() if out is not None else Path(f"{name_for(path)}.yaml")
    if target.suffix.lower() not in (".yaml", ".yml"):
        raise LilyError(f"--out {out}: a recipe's name ends with .yaml; write --out {target.with_suffix('.yaml')}")
    if target.exists():
        raise LilyError(f"{target} exists; name another file with --out")
    if not target.parent.is_dir():
        raise LilyError(f"--out {out}: there is no folder {target.parent}; create it first")
    separator = {"tab": "\t", "\\t": "\t"}.get(delimiter or "", delimiter)
    named = {key: name for key, name in given.items() if name is not None}
    found = guess(path, task=task, columns=named, delimiter=separator)
    written = recipe_text(found, name_for(target))
    write_text(target, written)
    loader.load_recipe(str(target))
    console = Console()
    console.print(Text(written.rstrip()), soft_wrap=True)
    shown = shlex.quote(str(target))
    console.print(escape(f"\nwritten: {target}; next:\n  lily plan {shown}\n  lily train {shown}"), soft_wrap=True)
