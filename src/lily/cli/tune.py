"""`lily tune` and `lily sweep`: choosing what a recipe leaves to choose."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lily.cli.train import Overrides, Recipe_, quieten
from lily.errors import LilyError

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}

Budget = Annotated[str | None, typer.Option("--params", help="Parameters of a shape, such as 1.2M. Default: its own.")]
Grid = Annotated[bool, typer.Option("--grid", help="Every num_A with every num_B, not only equal ones.")]
Output = Annotated[str | None, typer.Option(help="The folder to write. Default: below runs/.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Progress bars of the runs.")]


def tune_command(
    recipe: Recipe_,
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(help="In all; a finished search goes on with a larger number.")] = 20,
    timeout: Annotated[str | None, typer.Option(help="Begin no trial after this time, such as 90m or 8h.")] = None,
    method: Annotated[
        str | None, typer.Option(help="lily, lora, rslora, dora or stock-lily. Default: the recipe's.")
    ] = None,
    knobs: Annotated[str | None, typer.Option(help="Some of them only, such as learning_rate,scaling.")] = None,
    ranges: Annotated[
        list[str] | None, typer.Option("--range", help="Bounds of a knob, such as scaling=0.1:10.")
    ] = None,
    params: Budget = None,
    grid: Grid = False,
    max_forgetting: Annotated[
        float | None, typer.Option(help="The best may not increase the loss on general text by more.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the trials' adapters.")] = False,
    output: Output = None,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Search learning rate, scaling and shape on the validation rows; writes the best recipe.

    Killed and started again, it goes on.
    """
    from lily.recipes import loader

    changes = [*(overrides or []), *([f"method={method}"] if method else [])]
    chosen = loader.load_recipe(recipe, changes)
    seconds = None if timeout is None else parse_time(timeout)
    quieten()
    from lily.tune import report, run
    from lily.tune.space import parse_ranges

    wish = run.Wish(
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
        found = run.tune(
            chosen,
            folder,
            wish,
            source=recipe,
            overrides=changes,
            overwrite=overwrite,
            quiet=not verbose,
            announce=_announce,
        )
    except (KeyboardInterrupt, SystemExit, OSError):
        print("\nthe same command goes on", file=sys.stderr)
        raise
    report.print_tuned(found, folder, Console())


def sweep_command(
    recipe: Recipe_,
    overrides: Overrides = None,
    params: Budget = None,
    grid: Grid = False,
    points: Annotated[int, typer.Option(help="At most so many shapes, evenly spread over the ranks.")] = 8,
    seeds: Annotated[int, typer.Option(help="Of each shape, from the recipe's own on.")] = 1,
    halving: Annotated[
        bool, typer.Option("--halving", help="Give up the worse half at every rung, by the validation rows.")
    ] = False,
    lora: Annotated[bool, typer.Option("--lora", help="Also train LoRA of as many parameters.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at the same time. Default: one for two cores; one on a GPU.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each run. Default: OMP_NUM_THREADS, or an even share of the cores.")
    ] = None,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Train the shapes (r, num_A, num_B) that one budget buys: quality against granularity, as a table and a plot.

    Killed and started again, it goes on.
    """
    from lily.recipes import loader

    chosen = loader.load_recipe(recipe, overrides or [])
    quieten()
    from lily.compare.runner import side_by_side
    from lily.tune import sweep, sweep_report

    count, share = side_by_side(jobs)
    wish = sweep.Wish(params, grid, points, seeds, halving, lora, count, threads or share)
    folder = Path(output).expanduser() if output else sweep.output_folder(chosen)
    try:
        found = sweep.sweep(chosen, folder, wish, overwrite=overwrite, announce=_announce)
    except (KeyboardInterrupt, SystemExit):
        print("\nthe same command goes on", file=sys.stderr)
        raise
    console = Console()
    sweep_report.print_sweep(found, folder, console)
    if find_spec("matplotlib") is None:
        console.print(escape('no plot: matplotlib is not installed; pip install "lily-peft[plots]"'))
        return
    picture = sweep_report.picture(found)
    for name in sweep.PICTURES:
        picture.save(folder / name, overwrite=True)
    console.print(escape(f"plot: {folder / sweep.PICTURES[0]}"), soft_wrap=True)


def parse_time(text: str) -> float:
    """Seconds of a time such as 90m, 8h or 3600.

    Raises:
        LilyError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if match is None:
        raise LilyError(f"--timeout {text!r}: expected a time such as 90m, 8h or 3600 (seconds)")
    return float(match[1]) * UNITS[match[2]]


def _announce(said: str) -> None:
    print(said, file=sys.stderr, flush=True)
