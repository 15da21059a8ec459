"""`lily tune` and `lily sweep`: searching the settings of a recipe."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.markup import escape
from typer import Option

from lily.cli.progress import Verbose, progress
from lily.cli.train import Overrides, Recipe_
from lily.errors import LilyError

if TYPE_CHECKING:
    from lily.progress.progress import Progress
    from lily.recipes.spec.schema import Recipe
    from lily.tune.run import TuneResult

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}

Budget = Annotated[str | None, Option("--params", help="Parameters of a shape, such as 1.2M. Default: the recipe's.")]
Grid = Annotated[bool, Option("--grid", help="Combine every num_A with every num_B. Default: num_A = num_B.")]
Output = Annotated[str | None, Option(help="Folder to write. Default: a folder in runs/.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Delete earlier runs and start over.")]
Jobs = Annotated[int | None, Option(min=1, help="Runs at the same time. Default: one per two cores, or one on a GPU.")]
Threads = Annotated[int | None, Option(min=1, help="CPU threads per run. Default: OMP_NUM_THREADS, or an equal share.")]


def tune_command(
    recipe: Recipe_,
    overrides: Overrides = None,
    trials: Annotated[int, Option(help="Total number of trials. A larger number continues a finished search.")] = 20,
    timeout: Annotated[str | None, Option(help="Start no trial after this time, such as 90m or 8h.")] = None,
    method: Annotated[str | None, Option(help="lily, lora, rslora, dora or stock-lily. Default: the recipe's.")] = None,
    knobs: Annotated[str | None, Option(help="Knobs to search, such as learning_rate,scaling. Default: all.")] = None,
    ranges: Annotated[list[str] | None, Option("--range", help="Bounds of a knob, such as scaling=0.1:10.")] = None,
    params: Budget = None,
    grid: Grid = False,
    max_forgetting: Annotated[
        float | None, Option(help="Largest increase of the loss on general text that the best trial may have.")
    ] = None,
    keep: Annotated[bool, Option("--keep", help="Keep the adapters of all trials.")] = False,
    output: Output = None,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Search learning rate, scaling and shape on the validation rows, and write the best recipe.

    The same command continues an interrupted search.
    """
    from lily.recipes import loader

    changes = [*(overrides or []), *([f"method={method}"] if method else [])]
    chosen = loader.load_recipe(recipe, changes)
    seconds = None if timeout is None else parse_time(timeout)
    with progress("optuna", verbose=verbose) as told:
        result, folder = _tune(
            chosen, recipe, changes, seconds, trials, knobs, ranges, params, grid, max_forgetting, keep, output,
            overwrite, told,
        )  # fmt: skip
    from lily.tune import report

    report.print_tuned(result, folder, Console())


def _tune(
    chosen: Recipe, recipe: str, changes: list[str], seconds: float | None, trials: int, knobs: str | None,
    ranges: list[str] | None, params: str | None, grid: bool, max_forgetting: float | None, keep: bool,
    output: str | None, overwrite: bool, told: Progress,
) -> tuple[TuneResult, Path]:  # fmt: skip
    from lily.tune import run
    from lily.tune.space import parse_ranges

    options = run.TuneOptions(
        trials=trials,
        timeout=seconds,
        knobs=None if knobs is None else [name.strip() for name in knobs.split(",")],
        ranges=parse_ranges(ranges or []),
        budget=params,
        grid=grid,
        max_forgetting=max_forgetting,
        keep=keep,
    )
    folder = Path(output).expanduser() if output else run.output_folder(chosen)
    try:
        result = run.tune(
            chosen,
            folder,
            options,
            source=recipe,
            overrides=changes,
            overwrite=overwrite,
            announce=told.tell,
        )
    except (KeyboardInterrupt, SystemExit, OSError):
        told.warn("\nrepeat the same command to continue")
        raise
    return result, folder


def sweep_command(
    recipe: Recipe_,
    overrides: Overrides = None,
    params: Budget = None,
    grid: Grid = False,
    points: Annotated[int, Option(help="Largest number of shapes; they are spread evenly over the ranks.")] = 8,
    seeds: Annotated[int, Option(help="Number of seeds per shape, counted up from the recipe's seed.")] = 1,
    halving: Annotated[
        bool, Option("--halving", help="Stop the worse half of the shapes at every rung, by the validation rows.")
    ] = False,
    lora: Annotated[bool, Option("--lora", help="Also train LoRA with as many parameters.")] = False,
    jobs: Jobs = None,
    threads: Threads = None,
    output: Output = None,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Train the shapes (r, num_A, num_B) within one budget, and show quality against granularity as a table and a plot.

    The same command continues an interrupted sweep.
    """
    from lily.recipes import loader

    chosen = loader.load_recipe(recipe, overrides or [])
    with progress(verbose=verbose) as told:
        from lily.search.runner import side_by_side
        from lily.tune import sweep, sweep_report

        count, share = side_by_side(jobs)
        options = sweep.SweepOptions(params, grid, points, seeds, halving, lora, count, threads or share)
        folder = Path(output).expanduser() if output else sweep.output_folder(chosen)
        try:
            result = sweep.sweep(chosen, folder, options, overwrite=overwrite, announce=told.tell)
        except (KeyboardInterrupt, SystemExit):
            told.warn("\nrepeat the same command to continue")
            raise
    console = Console()
    sweep_report.print_sweep(result, folder, console)
    if find_spec("matplotlib") is None:
        console.print(escape('no plot, because matplotlib is not installed; pip install "lily-peft[plots]"'))
        return
    picture = sweep_report.picture(result)
    for name in sweep.PICTURES:
        picture.save(folder / name, overwrite=True)
    console.print(escape(f"plot: {folder / sweep.PICTURES[0]}"), soft_wrap=True)


def parse_time(text: str) -> float:
    """Seconds of a time such as 90m, 8h or 3600.

    Raises:
        LilyError: quotes a text of another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if match is None:
        raise LilyError(f"--timeout {text!r}: expected a time such as 90m, 8h or 3600 (seconds)")
    return float(match[1]) * UNITS[match[2]]
