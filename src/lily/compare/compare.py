"""From a recipe and names of methods to a finished comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lily.compare import search, tables
from lily.compare.contestants import Contestant, Equal, resolve
from lily.compare.page import page
from lily.compare.result import Comparison, read
from lily.compare.runner import Job, Outcome, opened, run
from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.recipes import preflight
from lily.recipes.scoring import metrics
from lily.recipes.spec.schema import Recipe

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What a comparison is to be.

    Attributes:
        methods: from `contestants.parse`; the others are tested against the first.
        seeds: how many, from the recipe's own on.
        equal: `params` or `rank`.
        tune: choose learning rate and scale of each method on the validation rows first.
        jobs: runs at the same time.
        threads: of each.
        overwrite: begin anew.
    """

    methods: tuple[str, ...]
    seeds: int
    equal: Equal
    tune: bool
    jobs: int
    threads: int
    overwrite: bool = False


def contestants(recipe: Recipe, wish: Wish) -> list[Contestant]:
    """Everything that can be checked without weights, checked; and the methods with their ranks.

    Raises:
        LilyError: for whatever is wrong with the recipe, its data, its model or a method.
    """
    prepared = preflight.prepare(recipe.model_copy(update={"method": "lily"}))
    return resolve(recipe, wish.methods, wish.equal, prepared.meta)


def check(recipe: Recipe, found: Sequence[Contestant], wish: Wish, out: Path) -> None:
    """Refuse to go on with runs of another recipe, before anything is trained.

    Args:
        recipe: the experiment.
        found: its contestants.
        wish: what is asked.
        out: the comparison's folder.

    Raises:
        LilyError: if the folder holds one.
    """
    if wish.overwrite:
        return
    for c in found:
        tuned = wish.tune and c.trains
        for power in search.FIRST if tuned else ():
            _trial(c, (power, 0), recipe.seed, out).check()
        for job in _finals([c], _seeds(recipe, wish), out):
            job.check(c.settings if tuned else ())


def compare(recipe: Recipe, found: Sequence[Contestant], wish: Wish, out: Path, tell: Tell) -> Comparison:
    """Train what is not trained yet, and write `comparison.json`, `.md` and `.html`.

    Args:
        recipe: the experiment.
        found: its contestants.
        wish: what is asked.
        out: the comparison's folder.
        tell: called with a line for each run that ends.

    Raises:
        LilyError: if the folder holds anything else, or no run gave anything. One that fails is told in the result.
        KeyboardInterrupt: at Ctrl-C, and SystemExit at SIGTERM, when all runs have written their checkpoints.
    """
    with opened(out, wish.overwrite) as lock:
        setting: dict[str, Any] = {
            "methods": [c.name for c in found], "equal": wish.equal, "tune": wish.tune,
            "seeds": _seeds(recipe, wish), "jobs": wish.jobs, "threads": wish.threads,
        }  # fmt: skip
        failed: dict[str, str] = {}
        if wish.tune:
            found, setting["tuning"], failed = _tuned(recipe, found, wish, out, lock, tell)
        jobs = _finals(found, setting["seeds"], out)
        outcomes = run(jobs, out, wish.jobs, wish.threads, lock, _teller(jobs, tell))
        failed |= {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None}
        if all(outcome.figures is None for outcome in outcomes.values()):
            raise LilyError(f"no run of {recipe.name} ended well: {next(iter(failed.values()))}")
        told = read(out, setting, failed)
        write(told, out)
        return told


def write(found: Comparison, out: Path) -> None:
    """Write a comparison's table and pages."""
    write_text(out / "comparison.json", json.dumps(found.to_dict(), indent=2))
    write_text(out / "comparison.md", tables.markdown(found))
    write_text(out / "comparison.html", page(found))


def _seeds(recipe: Recipe, wish: Wish) -> list[int]:
    return [recipe.seed + i for i in range(wish.seeds)]


def _finals(found: Sequence[Contestant], seeds: Sequence[int], out: Path) -> list[Job]:
    """The runs that are compared."""
    return [
        Job(f"{c.folder}/{seed}", c.with_seed(seed), out / "runs" / c.folder / str(seed))
        for seed in seeds
        for c in found
    ]


def _tuned(
    recipe: Recipe, found: Sequence[Contestant], wish: Wish, out: Path, lock: Any, tell: Tell
) -> tuple[list[Contestant], dict[str, Any], dict[str, str]]:
    """The contestants at the settings that the search chose, what it found, and those for which it found nothing."""
    name = metrics.metrics_of(recipe)[0]

    def better(a: float, b: float) -> bool:
        return metrics.better(name, a, b)

    tried: dict[str, dict[search.Point, float | None]] = {c.name: {} for c in found}
    errors: dict[str, str] = {}
    while True:
        jobs: dict[str, tuple[Contestant, search.Point]] = {}
        listed: list[Job] = []
        for c in found:
            points = search.next_points(tried[c.name], better, c.scale is not None) if c.trains else []
            for point in points:
                job = _trial(c, point, recipe.seed, out)
                jobs[job.name] = c, point
                listed.append(job)
        if not listed:
            break
        outcomes = run(listed, out, wish.jobs, wish.threads, lock, _teller(listed, tell))
        for key, (c, point) in jobs.items():
            figures, error = outcomes[key].figures, outcomes[key].error
            tried[c.name][point] = None if figures is None or not figures["best"] else figures["best"]["value"]
            errors |= {c.name: error} if error is not None else {}
    record: dict[str, Any] = {}
    made, failed = [], {}
    for c in found:
        best = search.chosen(tried[c.name], better)
        lost = c.trains and best is None
        final = c if best is None else _at(c, best)
        if lost:
            why = errors.get(c.name, "nothing was evaluated")
            failed[c.name] = f"at every learning rate that was tried, the last time because: {why}"
            tell(f"{c.name} failed: {failed[c.name]}")
        else:
            made.append(final)
        trials = [
            {"learning_rate": (at := _at(c, p)).learning_rate, "scale": at.scale and at.scale[1], name: value}
            for p, value in sorted(tried[c.name].items())
        ]
        record[c.name] = {
            "learning_rate": None if lost else final.learning_rate,
            "scale": None if lost else final.scale and final.scale[1],
            "trials": trials,
        }
    return made, record, failed


def _at(contestant: Contestant, point: search.Point) -> Contestant:
    rate, scale = point
    return contestant.with_settings(
        contestant.learning_rate * search.FACTOR**rate if rate else None,
        contestant.scale[1] * search.FACTOR**scale if scale and contestant.scale else None,
    )


def _trial(contestant: Contestant, point: search.Point, seed: int, out: Path) -> Job:
    made = _at(contestant, point)
    said = f"rate{made.learning_rate:g}" + (f"-scale{made.scale[1]:g}" if made.scale is not None else "")
    return Job(f"tuning/{made.folder}/{said}", made.with_seed(seed), out / "tuning" / made.folder / said, True)


def _teller(jobs: Sequence[Job], tell: Tell) -> Callable[[Job, Outcome], None]:
    ended: list[str] = []

    def told(job: Job, outcome: Outcome) -> None:
        ended.append(job.name)
        place = f"[{len(ended)}/{len(jobs)}] {job.name}"
        if outcome.figures is None:
            tell(f"{place} failed: {outcome.error}")
            return
        figures = outcome.figures
        metric = figures["metric"]
        split = "validation" if job.trial else figures["split"]
        said = f"{metric} {metrics.shown(metric, figures['final'][metric])} on the {split} rows"
        tell(f"{place}: {said}, {figures['seconds'].get('train', 0.0):.0f} s")

    return told
