"""`lily train`."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from lily.errors import LilyError

Recipe_ = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.epochs=1 method=lora.")
]


def train_command(
    recipe: Recipe_,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    output: Annotated[str | None, typer.Option(help="The folder to write.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a recipe; ends with a table of results and an adapter folder that PEFT loads."""
    from lily.recipes import loader, ranks

    changes = [*(overrides or []), *([f"output={output}"] if output else [])]
    chosen = ranks.in_turn(lambda: loader.load_recipe(recipe, changes))
    if resume and overwrite:
        raise LilyError("--resume and --overwrite exclude each other; give one of them")
    quieten()
    from lily.recipes import checkpoints, report
    from lily.recipes.train import output_folder, train

    try:
        result = train(chosen, resume=resume, overwrite=overwrite, quiet=quiet)
    except (KeyboardInterrupt, SystemExit, OSError):
        run = output_folder(chosen)
        if ranks.is_first() and (run / "recipe.yaml").is_file():
            kept = checkpoints.last(run) or "the start"
            print(f"\nthe same command with --resume goes on from {kept}", file=sys.stderr)
        raise
    if ranks.is_first():
        report.print_result(result, chosen, output_folder(chosen), Console())


def quieten() -> None:
    """Silence what libraries say to their own developers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    if hasattr(transformers.logging, "disable_progress_bar"):
        transformers.logging.disable_progress_bar()
