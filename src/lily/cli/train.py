"""`lily train`."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from lily.errors import LilyError

Recipe_ = Annotated[str, Argument(metavar="RECIPE", help="Name of a shipped recipe, or a YAML file.")]
Overrides = Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.epochs=1.")]


def train_command(
    recipe: Recipe_,
    overrides: Overrides = None,
    resume: Annotated[bool, Option("--resume", help="Continue from the last complete checkpoint.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    output: Annotated[str | None, Option(help="Folder to write; default: the recipe's output.")] = None,
    quiet: Annotated[bool, Option("--quiet", help="Show no progress bar.")] = False,
) -> None:
    """Train a recipe; ends with a table of results and an adapter folder that PEFT loads."""
    from lily.recipes import loader
    from lily.recipes.packages import check_packages
    from lily.recipes.trainer import processes

    changes = [*(overrides or []), *([f"output={output}"] if output else [])]
    chosen = processes.in_turn(lambda: loader.load_any(recipe, changes))
    if resume and overwrite:
        raise LilyError("--resume and --overwrite exclude each other; give one of them")
    check_packages(chosen)
    quieten()
    from lily.recipes.by_task import function_for
    from lily.recipes.results.result import output_folder
    from lily.recipes.results.run_files import newest_checkpoint

    try:
        result = function_for("train", chosen)(chosen, resume=resume, overwrite=overwrite, quiet=quiet)
    except (KeyboardInterrupt, SystemExit, OSError):
        run = output_folder(chosen)
        if processes.is_first() and (run / "recipe.yaml").is_file():
            checkpoint = newest_checkpoint(run / "checkpoints") or "the start"
            print(f"\nthe same command with --resume continues from {checkpoint}", file=sys.stderr)
        raise
    if processes.is_first():
        function_for("print_result", chosen)(result, chosen, output_folder(chosen), Console())


def quieten() -> None:
    """Silence warnings and progress bars that libraries address to their own developers."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    if hasattr(transformers.logging, "disable_progress_bar"):
        transformers.logging.disable_progress_bar()
