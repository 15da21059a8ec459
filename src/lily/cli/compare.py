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

from lily.cli.progress import Verbose, progress
from lily.cli.tune import Jobs, Threads
from lily.errors import LilyError
from lily.io.tables import fitting

if TYPE_CHECKING:
    from lily.compare.result import Comparison
    from lily.progress.progress import Progress
    from lily.recipes.spec.schema import Recipe

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
    verbose: Verbose = False,
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
    with progress(verbose=verbose) as told:
        errors, finished = _compare(chosen, methods, seeds, equal, tune, jobs, threads, output, overwrite, told)
    for comparison, folder in finished:
        _print(comparison, console)
        console.print(escape(f"written to {folder}"), soft_wrap=True, highlight=False)
        console.print(escape(f"the page: {folder / 'comparison.html'}"), soft_wrap=True, highlight=False)
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    if errors or any(comparison.failed for comparison, _ in finished):
        raise typer.Exit(1)


def _compare(
    chosen: list[Recipe], methods: str, seeds: int, equal: str, tune: bool, jobs: int | None, threads: int | None,
    output: str, overwrite: bool, told: Progress,
) -> tuple[list[str], list[tuple[Comparison, Path]]]:  # fmt: skip
    """Train and compare; returns the errors, and the comparisons with their folders."""
    from lily.compare import compare as comparing
    from lily.compare.contestants import parse
    from lily.recipes.begun import as_begun
    from lily.recipes.methods.terms import unchosen
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
    with told.stage("", "reading the data"):
        resolved = [(recipe, comparing.resolved(recipe, options)) for recipe in chosen]
    for recipe, compared in resolved:
        comparing.check(recipe, compared, options, out / recipe.name)
    for recipe, compared in resolved:
        last = recipe.seed + seeds - 1
        which = f"seeds {recipe.seed} to {last}" if seeds > 1 else f"seed {last}"
        many = f"{len(compared)} methods" if len(compared) > 1 else "one method"
        told.tell(f"{recipe.name}  {recipe.task}, {many}, {which}")
        for c in compared:
            size = f"  {c.name:<12}  {c.parameters:,} parameters" + (f", r {c.rank}" if c.rank else "")
            told.tell(f"{size}, {c.terms.settings}" if c.trains else size)
        told.tell(
            f"  into {out / recipe.name}; " + (f"{count} runs at the same time" if count > 1 else "one run at a time")
        )
        for warning in () if tune else unchosen(recipe, [method.terms for method in compared if method.trains]):
            told.warn(f"warning: {recipe.name}: {warning}")
    errors: list[str] = []
    finished: list[tuple[Comparison, Path]] = []
    try:
        for recipe, compared in resolved:
            announce = partial(_announce, told, recipe.name)
            try:
                comparison = comparing.compare(recipe, compared, options, out / recipe.name, announce)
            except LilyError as error:  # continue with the other recipes
                errors.append(f"{recipe.name}: {error}")
                if len(resolved) > 1:  # the end may be hours away
                    announce(f"failed: {error}")
                continue
            finished.append((comparison, out / recipe.name))
    except (KeyboardInterrupt, SystemExit):
        told.warn("\nrepeat the same command to continue")
        raise
    return errors, finished


def _announce(told: Progress, name: str, line: str) -> None:
    told.tell(f"{name} {line}")


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

    console.print(escape(tables.about(comparison)), soft_wrap=True, highlight=False)
    for header, *rows in (tables.quality(comparison), tables.costs(comparison)):
        for table in fitting(header, rows, console.width):
            console.print(table)
    failed = (f"{run} failed: {why}" for run, why in comparison.failed.items())
    for line in (*tables.reading(comparison), *failed, "", *tables.verdicts(comparison)):
        console.print(escape(line), soft_wrap=True, highlight=False)
