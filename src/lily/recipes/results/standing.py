"""Where a finished run stands among its baselines, in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lily.io.words import joined
from lily.recipes import work
from lily.recipes.scoring.metrics import LOWER_IS_BETTER, OF_NUMBERS, better, noise, shown

if TYPE_CHECKING:
    from lily.recipes.results.run_files import RunFigures

TITLES = {**work.BASELINES, "lily": "Lily", "lora": "LoRA", "none": "head alone", "rslora": "rsLoRA", "dora": "DoRA"}
DESCRIBED = ("majority", "frozen")  # baselines that have no proper name
GUESS = "majority"  # a baseline that learned nothing


def title_of(name: str, metric: str = "") -> str:
    """A method's or a baseline's name for people, beside a metric."""
    return (work.OF_NUMBERS if metric in OF_NUMBERS else {}).get(name) or TITLES.get(name, name)


def spoken(name: str, metric: str = "") -> str:
    """The same within a sentence."""
    return f"the {title_of(name, metric)}" if name in DESCRIBED else title_of(name, metric)


@dataclass(frozen=True)
class Rival:
    """A baseline beside a run, by the run's main metric.

    Attributes:
        ahead: how much better the run is; negative if it is worse.
        apart: whether the difference exceeds two standard errors of it on this number of rows; for metrics that are no
            share of rows, whether it is not zero as shown.
    """

    name: str
    value: float
    ahead: float
    apart: bool


def rivals(run: RunFigures) -> list[Rival]:
    """The baselines that learned something, best first; none where the run or they have no such metric."""
    own, metric = run.final.get(run.metric), run.metric
    if own is None:
        return []
    found = [
        _rival(title_of(name), own, values[metric], metric, run.rows.get(run.split, 0))
        for name, values in run.baselines.items()
        if metric in values and name != GUESS
    ]
    return sorted(found, key=lambda rival: rival.ahead)


def standing(run: RunFigures) -> str:
    """Every contestant's main metric, and against which of them the run wins; empty if it has none."""
    metric, own = run.metric, run.final.get(run.metric)
    if own is None:
        return ""
    against, count = rivals(run), run.rows.get(run.split)
    rows = f"{count:,.0f} {run.split} rows" if count else f"the {run.split} rows"
    unit = metric if metric in LOWER_IS_BETTER else f"{metric} in percent"
    listed = ", ".join(f"{name} {shown(metric, value)}" for name, value in (
        (title_of(run.method), own), *((rival.name, rival.value) for rival in against)))  # fmt: skip
    return f"{listed} ({unit}, on {rows}): {_judged(run, own, against)}."


def _judged(run: RunFigures, own: float, against: list[Rival]) -> str:
    this = "this head" if run.method == "none" else "this adapter"
    guess, before = run.baselines.get(GUESS, {}).get(run.metric), run.before.get(run.metric)
    if guess is not None and not better(run.metric, own, guess):
        return f"{this} is no better than guessing ({shown(run.metric, guess)})"
    if not against:
        start = "" if before is None else f", from {shown(run.metric, before)} before training"
        return f"no baseline beside {this}{start}"
    lost, won = ([rival for rival in against if rival.apart and (rival.ahead > 0) == wins] for wins in (False, True))
    level = [_spoken(rival) for rival in against if not rival.apart]
    parts = [
        *_named("loses to {}", [f"{_spoken(rival)} by {_size(run.metric, rival)}" for rival in lost]),
        *_named("is level with {} (no difference that these rows can show)", level),
        *_named("beats {}", [f"{_spoken(rival)} by {_size(run.metric, rival)}" for rival in won]),
    ]
    return f"{this} {joined(parts)}"


def _spoken(rival: Rival) -> str:
    return spoken("frozen") if rival.name == title_of("frozen") else rival.name


def _named(form: str, names: list[str]) -> list[str]:
    return [form.format(joined(names))] if names else []


def _size(metric: str, rival: Rival) -> str:
    return shown(metric, abs(rival.ahead))


def _rival(name: str, own: float, value: float, metric: str, rows: float) -> Rival:
    ahead = value - own if metric in LOWER_IS_BETTER else own - value
    seen = abs(ahead) > noise(metric, own, value, rows)
    return Rival(name, value, ahead, seen and shown(metric, abs(ahead)) != shown(metric, 0.0))
