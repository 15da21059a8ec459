"""`lily vtab`: the VTAB-1K protocol on any images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def vtab_command(
    source: Annotated[
        str, typer.Argument(help="Images: a folder with one folder per class, an archive of one, or a list of files.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    test: Annotated[
        str | None, typer.Option(help="Images to test on, likewise. Default: what is left of the others.")
    ] = None,
    train: Annotated[int, typer.Option(min=1, help="Images to train on.")] = 800,
    validation: Annotated[int, typer.Option(min=0, help="Images to validate on.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
) -> None:
    """Choose few training images of a data set as VTAB-1K does, and write them as its public folders are.

    Each class keeps its proportion and is trained on at least once. The same images and seed give the same choice.
    """
    from lily.recipes.data.sources import local_path
    from lily.recipes.offline import vtab

    chosen = vtab.build(
        local_path(source),
        out.expanduser(),
        test=None if test is None else local_path(test),
        train=train,
        validation=validation,
        seed=seed,
    )
    table = Table("list", "images", "classes", title=escape(str(out)), title_justify="left")
    for name, images in vtab.lists_of(chosen).items():
        table.add_row(escape(name), f"{len(images):,}", str(len({label for _, label in images})))
    console = Console()
    console.print(table)
    console.print("classes.txt names the classes by their numbers. In a recipe: data.train.path=", end="")
    console.print(f"{out}/{next(iter(vtab.lists_of(chosen)))}", soft_wrap=True, highlight=False, markup=False)
