"""What a search says in the end: a table of its trials, what mattered, and what to do next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lily.recipes.scoring.metrics import shown
from lily.tune.ranking import ranked
from lily.tune.run import Tuned
from lily.tune.study import Tried

MOST = 12  # trials in the table; tune.json has them all


def print_tuned(found: Tuned, output: Path, console: Console) -> None:
    """The closing table, best trial first."""
    measured = any(trial.forgetting is not None for trial in found.tried)
    knobs = found.space.knobs
    title = f"{found.name}, {found.method}: {len(found.tried)} trials on {found.rows:,} validation rows"
    more = ["forgetting"] if measured else []
    table = Table("trial", *knobs, found.metric, *more, "steps", "", title=escape(title))
    for trial in ranked(found.tried, found.metric)[:MOST]:
        cells = [
            str(trial.number + 1),
            *(_value(trial.values.get(name)) for name in knobs),
            shown(found.metric, trial.value),
            *([shown("forgetting", trial.forgetting)] if measured else []),
            str(trial.steps),
            _state(trial, found),
        ]
        table.add_row(*map(escape, cells))
    console.print(table)
    if failed := sum(trial.state == "failed" for trial in found.tried):
        console.print(escape(f"{failed} trials failed; {output / 'tune.json'} says why"), soft_wrap=True)
    console.print("own: the recipe's own values", highlight=False)
    if found.importance:
        said = ", ".join(f"{name} {share:.0%}" for name, share in found.importance.items())
        console.print(f"What mattered, of the differences between complete trials: {said}", highlight=False)
    if found.best is None:
        console.print("No trial is complete (and within --max-forgetting): give more --trials")
        return
    console.print(escape(f"best recipe: {found.recipe}    figures: {output / 'tune.json'}"), soft_wrap=True)
    there = "on the test rows, which no trial has seen" if found.tested else "on the rows that it was chosen by"
    console.print(escape(f"lily train {found.recipe}    trains it, and reports {there}"), soft_wrap=True)
    if not found.tested:
        console.print(
            "The recipe has no test rows: expect less of rows that had no part in the choice.", soft_wrap=True
        )


def _state(trial: Tried, found: Tuned) -> str:
    own = "own" if trial.number == 0 else ""
    best = "best" if found.best is not None and trial.number == found.best.number else ""
    state = {"complete": "", "failed": f"failed: {trial.reason}"}.get(trial.state, trial.state)
    return ", ".join(part for part in (best, own, state) if part)


def _value(value: float | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value or "")
