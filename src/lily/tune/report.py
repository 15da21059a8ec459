"""What `lily tune` prints at its end: a table of trials, the importance of the knobs, and the next command."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lily.io.tables import fitting
from lily.io.words import counted
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, shown
from lily.tune.run import TuneResult, ranked_trials
from lily.tune.study import TrialResult

MOST = 12  # trials in the table; tune.json has all


def print_tuned(result: TuneResult, output: Path, console: Console) -> None:
    """The closing table, best trial first."""
    measured = any(trial.forgetting is not None for trial in result.trials)
    knobs = result.space.knobs
    title = f"{result.name}, {result.method}: {counted(len(result.trials), 'trial')} on {result.rows:,} validation rows"
    more = ["forgetting"] if measured else []
    rows = [
        [
            str(trial.number + 1),
            *(_value(trial.values.get(name)) for name in knobs),
            shown(result.metric, trial.value),
            *([shown("forgetting", trial.forgetting)] if measured else []),
            str(trial.steps),
            _state(trial, result),
        ]
        for trial in ranked_trials(result.trials, result.metric)[:MOST]
    ]
    heads = ("trial", *knobs, result.metric, *more, "steps", "")
    for table in fitting(heads, rows, console.width, title=escape(title), numbers=False):
        console.print(table)
    if failed := sum(trial.state == "failed" for trial in result.trials):
        console.print(
            escape(f"{counted(failed, 'trial')} failed; see the reasons in {output / 'tune.json'}"), soft_wrap=True
        )
    if _own(result) is not None:
        console.print("own: the recipe's own values", highlight=False)
    if result.importance:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result.importance.items())
        console.print(
            f"Share of the differences between complete trials that a knob explains: {shares}", highlight=False
        )
    if result.best is None:
        console.print("No trial is complete (and within --max-forgetting): increase --trials")
        return
    console.print(escape(verdict(result)), soft_wrap=True, highlight=False)
    console.print(escape(f"best recipe: {result.recipe}    figures: {output / 'tune.json'}"), soft_wrap=True)
    which = "the test rows, which no trial has seen" if result.tested else "the validation rows, which chose it"
    command = f"lily train {shlex.quote(str(result.recipe))}"
    console.print(escape(f"{command}    trains it and evaluates it on {which}"), soft_wrap=True)
    if not result.tested:
        console.print("The recipe has no test rows: expect a worse result on rows that were not used to choose.")


def verdict(result: TuneResult) -> str:
    """How the best trial does against the recipe's own values, in a sentence."""
    best, own = result.best, _own(result)
    assert best is not None
    said = f"Trial {best.number + 1} is the best: {result.metric} {shown(result.metric, best.value)}"
    if own is None or own.value is None or best.value is None or own is best:
        return f"{said}, the recipe's own values." if own is best else f"{said}."
    lower = result.metric in LOWER_IS_BETTER
    gained = own.value - best.value if lower else best.value - own.value
    by = f"{abs(gained):.4f}" if lower else f"{100 * abs(gained):.1f} points"
    if gained < 0:
        return f"{said}, {by} worse than the recipe's own values, which forget more than --max-forgetting allows."
    if gained == 0:
        return f"{said}, the same as the recipe's own values, which forget more."
    return (
        f"{said}, {by} better than the recipe's own values on these {result.rows:,} rows. The best of many trials on "
        "few rows scores too high: other rows and seeds decide."
    )


def _own(result: TuneResult) -> TrialResult | None:
    """The trial with the recipe's own values; None: they are not searched, or not tried yet."""
    return None if result.space.without else next((trial for trial in result.trials if trial.number == 0), None)


def _state(trial: TrialResult, result: TuneResult) -> str:
    own = "own" if trial is _own(result) else ""
    best = "best" if result.best is not None and trial.number == result.best.number else ""
    state = {"complete": "", "failed": f"failed: {trial.reason}"}.get(trial.state, trial.state)
    return ", ".join(part for part in (best, own, state) if part)


def _value(value: float | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value or "")
