"""`lily compare`: methods on the same recipe, at equal budgets, over several seeds."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer import Argument, Option

from lily.cli.progress import quieten
from lily.cli.tune import Jobs, Threads
from lily.errors import LilyError
from lily.io.tables import terminal

if TYPE_CHECKING:
    from lily.compare.result import Comparison

BUDGETS = ("params", "rank")


def compare_command(
    recipes: Annotated[
        list[str],
        Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            help="Recipes, and changes that apply to all of them. With --summary: folders that `lily compare` wrote.",
        ),
    ],
    methods: Annotated[
        str,
        Option(
            help="Comma-separated methods: lily, lily:batch (or another routing), stock-lily, lora, rslora, dora, none "
            "(trains the head alone), peft (the recipe's section peft), or another PEFT type such as vera, loha, ia3; "
            "lily/4 has a quarter of the parameters. "
            "The others are tested against the first."
        ),
    ] = "lily,lora",
    seeds: Annotated[int, Option(min=1, help="Number of seeds per method, counted up from the recipe's seed.")] = 3,
    equal: Annotated[
        str,
        Option(help="params: each method has the largest rank with no more parameters than Lily; rank: Lily's rank."),
    ] = "params",
    tune: Annotated[
        bool, Option("--tune", help="First choose the learning rate and scale of each method on the validation rows.")
    ] = False,
    jobs: Jobs = None,
    threads: Threads = None,
    output: Annotated[
        str,
        Option(help="Folder to write; it has a subfolder per recipe. The same command continues an interrupted one."),
    ] = "runs/compare",
    overwrite: Annotated[bool, Option("--overwrite", help="Delete earlier runs and start over.")] = False,
    summary: Annotated[
        bool, Option("--summary", help="Print one Markdown table of finished comparisons without training anything.")
    ] = False,
) -> None:
    """Compare methods on the same rows, in the same order, at equal budgets, with paired tests."""
    console = Console()
    if summary:
        print(_summary([Path(folder) for folder in recipes]))
        return
    if equal not in BUDGETS:
        raise LilyError(f"--equal {equal} is not known; choose one of {', '.join(BUDGETS)}")
    from lily.recipes import loader

    changes = [text for text in recipes if "=" in text]
    chosen = [loader.load_recipe(name, changes) for name in recipes if "=" not in name]
    if not chosen:
        raise LilyError("lily compare: no recipe is given; `lily recipes` lists the shipped ones")
    if twice := [r.name for r in chosen if [s.name for s in chosen].count(r.name) > 1]:
        raise LilyError(f"two recipes have the name {twice[0]}; give one of them another `name`")
    quieten()
    from lily.compare import compare as comparing
    from lily.compare.contestants import parse
    from lily.recipes.begun import as_begun
    from lily.search import folder
    from lily.search.runner import side_by_side

    count, share = side_by_side(jobs)
    names = tuple(parse(methods))
    options = comparing.CompareOptions(names, seeds, equal, tune, count, threads or share, overwrite)  # type: ignore[arg-type]
    out = Path(output).expanduser()
    for recipe in chosen:  # all of them before the first is trained
        folder.check(out / recipe.name, comparing.COMMAND, comparing.WRITTEN)
    if not overwrite:
        chosen = [as_begun(recipe, out / recipe.name) for recipe in chosen]
    resolved = [(recipe, comparing.resolved(recipe, options)) for recipe in chosen]
    for recipe, compared in resolved:
        comparing.check(recipe, compared, options, out / recipe.name)
    for recipe, compared in resolved:
        listed = ", ".join(f"{c.name} {c.parameters:,}" + (f" (r={c.rank})" if c.rank else "") for c in compared)
        console.print(escape(f"{recipe.name}: parameters {listed}"), highlight=False, soft_wrap=True)
    errors, failed = [], False
    try:
        for recipe, compared in resolved:
            announce = partial(_announce, console, recipe.name)
            try:
                comparison = comparing.compare(recipe, compared, options, out / recipe.name, announce)
            except LilyError as error:  # continue with the other recipes
                errors.append(f"{recipe.name}: {error}")
                announce(f"failed: {error}")
                continue
            _print(comparison, console)
            console.print(escape(f"written to {out / recipe.name}"), soft_wrap=True, highlight=False)
            failed |= bool(comparison.failed)
    except (KeyboardInterrupt, SystemExit):
        console.print("\nrepeat the same command to continue")
        raise
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    if errors or failed:
        raise typer.Exit(1)


def _announce(console: Console, name: str, line: str) -> None:
    console.print(escape(f"{name} {line}"), highlight=False, soft_wrap=True)


def _summary(folders: list[Path]) -> str:
    """One table of the comparisons in these folders, or one level below them."""
    from lily.compare.result import is_comparison, read
    from lily.compare.tables import summary

    comparisons = []
    for folder in folders:
        inner = [path for path in (folder, *sorted(folder.glob("*"))) if is_comparison(path)]
        if not inner:
            raise LilyError(f"{folder} holds no comparison; name a folder that `lily compare` wrote")
        comparisons += [read(path) for path in inner]
    return summary(comparisons)


def _print(comparison: Comparison, console: Console) -> None:
    from lily.compare import tables

    first, *others = tables.words(comparison)
    console.print(escape(first), soft_wrap=True, highlight=False)
    for header, *rows in (tables.quality(comparison), tables.costs(comparison)):
        console.print(terminal(header, rows, numbers=True, no_wrap=True))
    for line in others:
        console.print(escape(line), soft_wrap=True, highlight=False)
