"""`lily train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from typer import Argument, Option

from lily.cli.progress import Verbose, progress
from lily.errors import LilyError

if TYPE_CHECKING:
    from lily.recipes.results.result import Result
    from lily.recipes.spec.dreambooth import DreamBooth
    from lily.recipes.spec.schema import Recipe

Recipe_ = Annotated[str, Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")]
Overrides = Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.epochs=1.")]


def train_command(
    recipe: Recipe_,
    overrides: Overrides = None,
    resume: Annotated[bool, Option("--resume", help="Continue from the last complete checkpoint.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    output: Annotated[str | None, Option(help="Folder to write; default: the recipe's output.")] = None,
    quiet: Annotated[bool, Option("--quiet", help="Show warnings, errors and the results alone.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train a recipe; ends with a table of results, what they mean, and an adapter folder that PEFT loads."""
    from lily.recipes import loader
    from lily.recipes.packages import check_packages
    from lily.recipes.trainer import processes

    changes = [*(overrides or []), *([loader.change_of("output", output)] if output else [])]
    chosen = processes.in_turn(lambda: loader.load_any(recipe, changes))
    if resume and overwrite:
        raise LilyError("--resume and --overwrite exclude each other; give one of them")
    check_packages(chosen)
    imports = ("datasets", "trl") if chosen.task == "sft" else ()
    with progress(*imports, verbose=verbose, quiet=quiet) as told:
        from lily.recipes.by_task import function_for
        from lily.recipes.results.result import output_folder

        try:
            result = function_for("train", chosen)(chosen, resume=resume, overwrite=overwrite, told=told)
        except (KeyboardInterrupt, SystemExit, OSError):
            _say_how_to_resume(output_folder(chosen))
            raise
    if processes.is_first():
        function_for("print_result", chosen)(result, chosen, output_folder(chosen), Console())
        _say_what_next(result, chosen, recipe, changes)


def _say_how_to_resume(run: Path) -> None:
    from lily.recipes.results.run_files import newest_checkpoint
    from lily.recipes.trainer import processes

    if processes.is_first() and (run / "recipe.yaml").is_file():
        checkpoint = newest_checkpoint(run / "checkpoints") or "the start"
        print(f"\nthe same command with --resume continues from {checkpoint}", file=sys.stderr)


def _say_what_next(result: Result, chosen: Recipe | DreamBooth, typed: str, changes: list[str]) -> None:
    """What the figures mean, and commands to paste."""
    from lily.recipes.results.verdict import advice, next_commands, verdict

    if chosen.task != "dreambooth":
        print(f"\n{verdict(result)}")
        for sentence in advice(result, chosen, typed, changes):
            print(sentence)
    print("\nnext:")
    for command, why in next_commands(result, chosen, typed, changes):
        print(f"  {command}\n      {why}")
