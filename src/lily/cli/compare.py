"""`lily compare`: methods on the same recipe, at equal budgets, over several seeds."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lily.cli.train import quieten
from lily.errors import LilyError

if TYPE_CHECKING:
    from lily.compare.result import Comparison

BUDGETS = ("params", "rank")


def compare_command(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            help="Recipes, and changes to all of them. With --summary: folders that `lily compare` wrote.",
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            help="With commas: lily, lily:batch (or another routing), stock-lily, lora, rslora, dora, none (the head "
            "alone), peft (the recipe's block), or a type of PEFT's such as vera, loha, ia3. All but the first are "
            "tested against it."
        ),
    ] = "lily,lora",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the recipe's own on.")] = 3,
    equal: Annotated[
        str, typer.Option(help="params: for each the largest rank with no more parameters than Lily; rank: Lily's.")
    ] = "params",
    tune: Annotated[
        bool, typer.Option("--tune", help="First choose each one's learning rate and scale on the validation rows.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at the same time. Default: one for two cores; one on a GPU.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each run. Default: OMP_NUM_THREADS, or an even share of the cores.")
    ] = None,
    output: Annotated[
        str, typer.Option(help="Folder; each recipe has one inside. The same command goes on where it stopped.")
    ] = "runs/compare",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew.")] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print one Markdown table of finished comparisons; train nothing.")
    ] = False,
) -> None:
    """Compare methods on the same rows, in the same order, at equal budgets, with paired tests."""
    console = Console()
    if summary:
        print(_summary([Path(folder) for folder in recipes]))
        return
    if equal not in BUDGETS:
        raise LilyError(f"--equal {equal} is not known; choose one of {', '.join(BUDGETS)}")
    quieten()
    from lily.compare import compare as comparing
    from lily.compare import runner
    from lily.compare.contestants import parse
    from lily.recipes import loader

    count, share = runner.side_by_side(jobs)
    wish = comparing.Wish(tuple(parse(methods)), seeds, equal, tune, count, threads or share, overwrite)  # type: ignore[arg-type]
    changes = [text for text in recipes if "=" in text]
    chosen = [loader.load_recipe(name, changes) for name in recipes if "=" not in name]
    if not chosen:
        raise LilyError("name a recipe to compare on; `lily recipes` lists those that ship")
    if twice := [r.name for r in chosen if [s.name for s in chosen].count(r.name) > 1]:
        raise LilyError(f"two recipes are named {twice[0]}; give one of them another `name`")
    out = Path(output).expanduser()
    for recipe in chosen:  # all of them before the first is trained
        runner.check_folder(out / recipe.name)
    entered = [(recipe, comparing.contestants(recipe, wish)) for recipe in chosen]
    for recipe, found in entered:
        comparing.check(recipe, found, wish, out / recipe.name)
    for recipe, found in entered:
        listed = ", ".join(f"{c.name} {c.parameters:,}" + (f" (r={c.rank})" if c.rank else "") for c in found)
        console.print(escape(f"{recipe.name}: parameters {listed}"), highlight=False, soft_wrap=True)
    errors, failed = [], False
    try:
        for recipe, found in entered:
            tell = partial(_tell, console, recipe.name)
            try:
                told = comparing.compare(recipe, found, wish, out / recipe.name, tell)
            except LilyError as error:  # the other recipes are not held up
                errors.append(f"{recipe.name}: {error}")
                tell(f"failed: {error}")
                continue
            _print(told, console)
            console.print(escape(f"written to {out / recipe.name}"), soft_wrap=True, highlight=False)
            failed |= bool(told.failed)
    except (KeyboardInterrupt, SystemExit):
        console.print("\nthe same command goes on where this one stopped")
        raise
    for said in errors:
        print(f"error: {said}", file=sys.stderr)
    if errors or failed:
        raise typer.Exit(1)


def _tell(console: Console, name: str, line: str) -> None:
    console.print(escape(f"{name} {line}"), highlight=False, soft_wrap=True)


def _summary(folders: list[Path]) -> str:
    """One table of the comparisons in these folders, or one level below them."""
    from lily.compare.result import is_comparison, read
    from lily.compare.tables import summary

    found = []
    for folder in folders:
        inner = [path for path in (folder, *sorted(folder.glob("*"))) if is_comparison(path)]
        if not inner:
            raise LilyError(f"{folder} holds no comparison; name a folder that `lily compare` wrote")
        found += [read(path) for path in inner]
    return summary(found)


def _print(found: Comparison, console: Console) -> None:
    from lily.compare import tables

    said = tables.words(found)
    console.print(escape(said[0]), soft_wrap=True, highlight=False)
    for lines in (tables.quality(found), tables.costs(found)):
        table = Table()
        for i, name in enumerate(lines[0]):
            table.add_column(escape(name), justify="right" if i else "left", no_wrap=not i)
        for row in lines[1:]:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    for line in said[1:]:
        console.print(escape(line), soft_wrap=True, highlight=False)
