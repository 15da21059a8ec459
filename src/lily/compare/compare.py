"""`lily compare`: from a recipe and the names of methods to a finished comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lily.compare import doubling, tables
from lily.compare.contestants import ComparedMethod, Equal, resolve
from lily.compare.page import page
from lily.compare.result import Comparison, read
from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.progress.progress import current
from lily.recipes import preflight
from lily.recipes.scoring import metrics
from lily.recipes.spec.schema import Recipe
from lily.search import folder
from lily.search.engine import search
from lily.search.runner import Announce, Job, Outcome, run

# What a comparison writes into its folder.
WRITTEN = ("runs", "tuning", "recipes", "logs", "comparison.json", "comparison.md", "comparison.html")
COMMAND = "lily compare"
Trial = tuple[str, doubling.Powers]  # method's name, and what multiplies its learning rate and scale


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison."""

    methods: tuple[str, ...]  # from `contestants.parse`; the others are tested against the first
    seeds: int  # number of seeds, counted up from the recipe's
    equal: Equal  # `params` or `rank`
    tune: bool  # first choose learning rate and scale of each method on the validation rows
    jobs: int  # runs at the same time
    threads: int  # CPU threads per run
    overwrite: bool = False  # delete earlier runs


def resolved(recipe: Recipe, options: CompareOptions) -> list[ComparedMethod]:
    """The methods with their ranks, after all checks that need no weights.

    Raises:
        LilyError: if the recipe, its data, its model or a method is wrong.
    """
    prepared = preflight.prepare(recipe.model_copy(update={"method": "lily"}))
    return resolve(recipe, options.methods, options.equal, prepared.meta)


def check(recipe: Recipe, methods: Sequence[ComparedMethod], options: CompareOptions, out: Path) -> None:
    """Refuse a folder with runs of another recipe, or of no search where one is wanted, before anything is trained.

    Raises:
        LilyError: if the folder holds one.
    """
    if options.overwrite:
        return
    for method in methods:
        tuned = options.tune and method.trains
        for power in doubling.FIRST if tuned else ():
            _trial(method, (power, 0), recipe.seed, out).check()
        for job in _finals([method], _seeds(recipe, options), out):
            job.check(method.settings if tuned else ())
            if tuned and folder.is_begun(job.folder) and not (out / "tuning" / method.folder).is_dir():
                raise LilyError(
                    f"{job.folder} was trained without --tune, so at settings that the search may not choose. Name "
                    "another folder with --output, or start over with --overwrite"
                )


def compare(
    recipe: Recipe, methods: Sequence[ComparedMethod], options: CompareOptions, out: Path, announce: Announce
) -> Comparison:
    """Train what is not finished yet, and write `comparison.json`, `.md` and `.html`.

    Args:
        recipe: the experiment.
        methods: from `resolved`.
        options: of the comparison.
        out: its folder.
        announce: called with a line for each run that ends.

    Raises:
        LilyError: if the folder holds anything else, or all runs failed. Single failures are part of the result.
        KeyboardInterrupt: at Ctrl-C, and SystemExit at SIGTERM, when all runs have written their checkpoints.
    """
    with folder.opened(out, COMMAND, WRITTEN, options.overwrite) as lock:
        (out / "logs").mkdir(exist_ok=True)
        current().log_to(out / "logs" / "compare.log")
        folder.check_rows(out, recipe)
        setting: dict[str, Any] = {
            "methods": [method.name for method in methods], "equal": options.equal, "tune": options.tune,
            "seeds": _seeds(recipe, options), "jobs": options.jobs, "threads": options.threads,
        }  # fmt: skip
        failed: dict[str, str] = {}
        if options.tune:
            methods, setting["tuning"], failed = _tuned(recipe, methods, options, out, lock, announce)
        jobs = _finals(methods, setting["seeds"], out)
        outcomes = run(jobs, out, options.jobs, options.threads, lock, announce)
        failed |= {name: outcome.error for name, outcome in outcomes.items() if outcome.error is not None}
        if all(outcome.figures is None for outcome in outcomes.values()):
            raise LilyError(f"all runs of {recipe.name} failed: {next(iter(failed.values()))}")
        comparison = read(out, setting, failed)
        write(comparison, out)
        return comparison


def write(comparison: Comparison, out: Path) -> None:
    """Write a comparison's figures, table and page."""
    write_text(out / "comparison.json", json.dumps(comparison.to_dict(), indent=2))
    write_text(out / "comparison.md", tables.markdown(comparison))
    write_text(out / "comparison.html", page(comparison))


def _seeds(recipe: Recipe, options: CompareOptions) -> list[int]:
    return [recipe.seed + i for i in range(options.seeds)]


def _finals(methods: Sequence[ComparedMethod], seeds: Sequence[int], out: Path) -> list[Job]:
    """The runs that are compared."""
    return [
        Job(f"{method.folder}/{seed}", method.with_seed(seed), out / "runs" / method.folder / str(seed))
        for seed in seeds
        for method in methods
    ]


def _tuned(
    recipe: Recipe, methods: Sequence[ComparedMethod], options: CompareOptions, out: Path, lock: Any, announce: Announce
) -> tuple[list[ComparedMethod], dict[str, Any], dict[str, str]]:
    """The methods at their best settings, a record of their trials, and why the methods failed that have none."""
    metric = metrics.metrics_of(recipe)[0]
    by_name = {method.name: method for method in methods}
    errors: dict[str, str] = {}

    def of_method(name: str, values: Mapping[Trial, float | None]) -> dict[doubling.Powers, float | None]:
        return {powers: value for (of, powers), value in values.items() if of == name}

    def propose(values: Mapping[Trial, float | None]) -> list[Trial]:
        return [
            (method.name, powers)
            for method in methods
            if method.trains
            for powers in doubling.next_powers(of_method(method.name, values), metric, method.scale is not None)
        ]

    def run_trials(trials: Sequence[Trial]) -> dict[Trial, float | None]:
        jobs = [_trial(by_name[name], powers, recipe.seed, out) for name, powers in trials]
        outcomes: dict[str, Outcome] = run(jobs, out, options.jobs, options.threads, lock, announce)
        ended = {trial: outcomes[job.name] for trial, job in zip(trials, jobs, strict=True)}
        errors.update({name: outcome.error for (name, _), outcome in ended.items() if outcome.error is not None})
        return {trial: outcome.validation for trial, outcome in ended.items()}

    values = search(propose, run_trials)
    tuned, record, failed = [], {}, {}
    for method in methods:
        trials = of_method(method.name, values)
        best = doubling.best_powers(trials, metric)
        chosen = method if best is None else _at(method, best)
        if lost := method.trains and best is None:
            why = errors.get(method.name, "no value of its metric is finite")
            failed[method.name] = f"at every learning rate that was tried, the last time because: {why}"
            announce(f"{method.name} failed: {failed[method.name]}")
        else:
            tuned.append(chosen)
        record[method.name] = {
            **({"learning_rate": None, "scale": None} if lost else _settings(chosen)),
            "trials": [{**_settings(_at(method, powers)), metric: value} for powers, value in sorted(trials.items())],
        }
    return tuned, record, failed


def _settings(method: ComparedMethod) -> dict[str, float | None]:
    return {"learning_rate": method.learning_rate, "scale": method.scale and method.scale[1]}


def _at(method: ComparedMethod, powers: doubling.Powers) -> ComparedMethod:
    rate, scale = powers
    return method.with_settings(
        method.learning_rate * doubling.FACTOR**rate if rate else None,
        method.scale[1] * doubling.FACTOR**scale if scale and method.scale else None,
    )


def _trial(method: ComparedMethod, powers: doubling.Powers, seed: int, out: Path) -> Job:
    tried = _at(method, powers)
    name = f"rate{tried.learning_rate:g}" + (f"-scale{tried.scale[1]:g}" if tried.scale is not None else "")
    where = f"tuning/{method.folder}/{name}"
    return Job(where, tried.with_seed(seed), out / where, trial=True)
