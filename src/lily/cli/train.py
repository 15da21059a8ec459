"""`lily train`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lily.errors import LilyError

if TYPE_CHECKING:
    from lily.recipes.results.result import Result
    from lily.recipes.spec.dreambooth import DreamBooth
    from lily.recipes.spec.schema import Recipe

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
    from lily.recipes import loader
    from lily.recipes.trainer import processes

    changes = [*(overrides or []), *([f"output={output}"] if output else [])]
    chosen = processes.in_turn(lambda: loader.load_any(recipe, changes))
    if resume and overwrite:
        raise LilyError("--resume and --overwrite exclude each other; give one of them")
    quieten()
    from lily.recipes.results.result import output_folder
    from lily.recipes.trainer import checkpoints

    try:
        result, show = _train(chosen, resume=resume, overwrite=overwrite, quiet=quiet)
    except (KeyboardInterrupt, SystemExit, OSError):
        run = output_folder(chosen)
        if processes.is_first() and (run / "recipe.yaml").is_file():
            drawn = chosen.task == "dreambooth"
            kept = "the last complete checkpoint" if drawn else checkpoints.last(run) or "the start"
            print(f"\nthe same command with --resume goes on from {kept}", file=sys.stderr)
        raise
    if processes.is_first():
        show(result, chosen, output_folder(chosen), Console())


def _train(recipe: Recipe | DreamBooth, **how: Any) -> tuple[Result, Callable[..., None]]:
    """Train a recipe by its task; with what prints the result."""
    if recipe.task == "dreambooth":
        from lily.recipes.dreambooth import report as drawn
        from lily.recipes.dreambooth import run

        return run.train(recipe, **how), drawn.print_result
    from lily.recipes.results import card
    from lily.recipes.train import train

    return train(recipe, **how), card.print_result


def quieten() -> None:
    """Silence what libraries say to their own developers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    if hasattr(transformers.logging, "disable_progress_bar"):
        transformers.logging.disable_progress_bar()
