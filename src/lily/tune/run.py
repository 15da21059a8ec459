"""`lily tune`: a search over a recipe's knobs, on its validation rows alone."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lily.distributed import world_size
from lily.errors import DivergedError, LilyError
from lily.io.atomic import disk_error, write_text
from lily.progress.progress import Progress, current
from lily.recipes import loader, methods, preflight, train
from lily.recipes.begun import as_begun
from lily.recipes.scoring import metrics as metric_tools
from lily.recipes.scoring.metrics import shown
from lily.recipes.spec.schema import Recipe
from lily.recipes.work import evaluations_of, judged, steps_of
from lily.search import folder
from lily.search.engine import ranked, search
from lily.tune.space import Space, Values, cadence, changed, changes, space_of
from lily.tune.study import JOURNAL, RunningTrial, Study, TrialResult

RESULT, BEST, TRIALS = "tune.json", "best.yaml", "trials"
IN_A_ROW = 3  # failures after which the cause is hardly the trials' values
LOG = "tune.log"
WRITTEN = (RESULT, BEST, TRIALS, LOG, JOURNAL, f"{JOURNAL}.lock")


@dataclass(frozen=True)
class TuneOptions:
    """Options of a search.

    Attributes:
        trials: total number, including those of earlier commands.
        timeout: seconds after which no new trial begins.
        knobs: to search; None: all that the method has.
        ranges: knob -> bounds, where they are not the default ones.
        budget: parameters that a shape may cost; None: what the recipe's own shape costs.
        grid: combine every num_A with every num_B.
        max_forgetting: largest increase of the loss on general text that the best trial may have.
        keep: keep the trials' adapters.
    """

    trials: int = 20
    timeout: float | None = None
    knobs: Sequence[str] | None = None
    ranges: dict[str, tuple[float, float]] | None = None
    budget: str | int | None = None
    grid: bool = False
    max_forgetting: float | None = None
    keep: bool = False


@dataclass(frozen=True)
class TuneResult:
    """The result of a search; `tune.json` is this.

    Attributes:
        name: of the recipe.
        method: of the recipe.
        metric: main metric, on the validation rows.
        rows: number of validation rows.
        tested: whether the recipe has test rows, which no trial has seen.
        space: that was searched.
        trials: all trials, by number.
        best: the best one; None: no trial is complete yet.
        importance: knob -> share of the differences that it explains; empty: too few trials.
        recipe: file of a recipe with the best values; None: there is no best.
    """

    name: str
    method: str
    metric: str
    rows: int
    tested: bool
    space: Space
    trials: tuple[TrialResult, ...] = ()
    best: TrialResult | None = None
    importance: dict[str, float] = field(default_factory=dict)
    recipe: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "name": self.name,
            "method": self.method,
            "metric": self.metric,
            "rows": self.rows,
            "tested": self.tested,
            "space": self.space.to_dict(),
            "best": None if self.best is None else asdict(self.best),
            "importance": self.importance,
            "trials": [asdict(trial) for trial in self.trials],
        }


@dataclass(frozen=True)
class Prepared:
    """A recipe after all checks, and what the result says before the first trial."""

    recipe: Recipe
    result: TuneResult
    every: int | str  # how often a trial is evaluated
    steps: int

    def sections(self, values: Values) -> dict[str, dict[str, Any]]:
        """What a trial changes of the recipe."""
        more = {} if self.every == self.recipe.train.evaluate_every else {"train": {"evaluate_every": self.every}}
        return {**changes(self.result.space, values), **more}


def output_folder(recipe: Recipe) -> Path:
    """The default folder of a search."""
    return Path("runs") / f"{recipe.name}-{recipe.method}-tune"


def ranked_trials(trials: Sequence[TrialResult], metric: str) -> list[TrialResult]:
    """From best to worst: complete trials by their value, then those that were stopped, then those without a value.

    Of equal values the one comes first that forgets less, if that was measured, then the earlier one.
    """
    ties = sorted(trials, key=lambda trial: (trial.forgetting or 0.0, trial.number))
    order = ranked({trial.number: trial.value for trial in ties}, metric)
    places = {number: place for place, number in enumerate(order)}
    return sorted(ties, key=lambda trial: (trial.state != "complete", places.get(trial.number, len(places))))


def best_trial(trials: Sequence[TrialResult], metric: str, max_forgetting: float | None = None) -> TrialResult | None:
    """The best complete trial that forgets no more than a limit; None if there is none."""
    for trial in ranked_trials(trials, metric):
        forgets = max_forgetting is not None and (trial.forgetting is None or trial.forgetting > max_forgetting)
        if trial.state == "complete" and trial.value is not None and not forgets:
            return trial
    return None


def prepare(recipe: Recipe, options: TuneOptions) -> Prepared:
    """Check everything that can be checked before the first trial.

    Raises:
        LilyError: if the recipe, its data or the options are wrong.
    """
    if world_size() > 1:
        raise LilyError("a search runs in one process; start it without torchrun or accelerate launch")
    if options.trials < 1:
        raise LilyError(f"--trials {options.trials}: give at least 1")
    if options.max_forgetting is not None and recipe.forgetting is None:
        raise LilyError("--max-forgetting needs a recipe that measures forgetting; add a section forgetting to it")
    prepared = preflight.prepare(recipe)
    space = space_of(
        recipe,
        methods.decide(recipe, prepared.meta),
        prepared.config,
        knobs=options.knobs,
        ranges=options.ranges,
        budget=options.budget,
        grid=options.grid,
    )
    rows, splits, metric = len(prepared.train), prepared.splits, metric_tools.metrics_of(recipe)[0]
    result = TuneResult(recipe.name, recipe.method, metric, len(splits.validation), bool(splits.test), space)
    return Prepared(recipe, result, cadence(recipe, rows), steps_of(recipe, rows))


def tune(
    recipe: Recipe,
    output: Path,
    options: TuneOptions,
    *,
    source: str | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> TuneResult:
    """Search a recipe's knobs; called again after an interruption, it continues.

    Args:
        recipe: the values to start from, and all that is not searched.
        output: the folder of the search.
        options: of the search.
        source: name or path of the recipe's file, which the best recipe extends; None: it is written in full.
        overrides: changes to it, such as `train.epochs=1`.
        overwrite: delete an earlier search first.
        announce: called with each line of progress; the evaluations of the trials are shown by the command's progress.

    Returns:
        The result, also written to `tune.json` and `best.yaml` after every trial.

    Raises:
        LilyError: if anything is wrong, before the first trial where that can be checked; or if three trials in a row
            fail. Single failures are part of the result.
        OSError: names a path, when the disk is full; the next call repeats the trial.
    """
    recipe = recipe if overwrite else as_begun(recipe, output)
    prepared = prepare(recipe, options)
    space, metric = prepared.result.space, prepared.result.metric
    for note in space.notes:
        announce(f"note: {note}")
    settings = {"recipe": recipe.model_dump(mode="json"), "space": space.to_dict(), "every": prepared.every}
    started, failures = time.monotonic(), 0
    with folder.opened(output, "lily tune", WRITTEN, overwrite, settings):
        told = current()
        told.log_to(output / LOG)
        folder.check_rows(output, recipe)
        study = Study(output, space, metric, recipe.seed)
        names = [_named(number) for number in range(study.finished, options.trials)]
        told.announce(names)
        schedule = changed(recipe, {"train": {"evaluate_every": prepared.every}})
        times = evaluations_of(schedule, prepared.steps, recipe.train.epochs)
        for name in names:
            rows = prepared.steps * recipe.train.batch_size * recipe.train.gradient_accumulation
            told.expect(name, "training", {"train": rows})
            told.expect(name, "evaluation", judged(recipe, prepared.result.rows * times))

        def propose(values: Mapping[RunningTrial, float | None]) -> list[RunningTrial]:
            if study.finished >= options.trials:
                return []
            if options.timeout is not None and time.monotonic() - started > options.timeout:
                announce(f"time is up after {study.finished} trials; the same command continues")
                return []
            return [study.ask(first_steps=prepared.steps // 4)]

        def run(trials: Sequence[RunningTrial]) -> dict[RunningTrial, float | None]:
            nonlocal failures
            (trial,) = trials
            sections = prepared.sections(trial.values)
            announce(f"trial {trial.number + 1} of {options.trials}: {described(sections)}")
            where = output / TRIALS / f"{trial.number:03d}"
            ended = _train(folder.inside(changed(recipe, sections), where), trial, metric, where, options.keep, told)
            announce(f"  {ended}")
            result = _write(prepared, study, output, options, source, overrides).trials[trial.number]
            failures = failures + 1 if result.state == "failed" else 0
            if failures == IN_A_ROW:
                raise LilyError(
                    f"{failures} trials in a row failed, the last one because: {result.reason}. Remove the cause and "
                    "repeat the command, which continues with the next trial, or start over with --overwrite"
                )
            return {trial: result.value}

        search(propose, run)
        return _write(prepared, study, output, options, source, overrides)


def described(sections: dict[str, dict[str, Any]]) -> str:
    """A trial's values as text."""
    values = {key: value for keys in sections.values() for key, value in keys.items() if value is not None}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _named(number: int) -> str:
    return f"trial {number + 1}"


def _train(recipe: Recipe, trial: RunningTrial, metric: str, where: Path, keep: bool, told: Progress) -> str:
    """Run a trial, or the rest of one, and record it; returns how it ended, as text."""
    if trial.stopped:  # before the search was killed
        trial.end(trial.best, "stopped")
        folder.remove_weights(where)
        return "stopped already"
    where.parent.mkdir(exist_ok=True)
    try:
        begun = folder.is_begun(where)
        result = train.train(
            recipe,
            resume=begun,
            overwrite=not begun,
            watch=trial.watch,
            validation_only=True,
            told=told,
            who=_named(trial.number),
        )
    except DivergedError as error:
        trial.end(None, "diverged")
        folder.remove_weights(where)
        return f"diverged: {error}"
    except Exception as error:  # out of memory for one shape, for example: the search continues with the next trial
        if isinstance(error, OSError) or (isinstance(error, SafetensorError) and disk_error(error) is not None):
            raise  # not caused by the trial, which is repeated by the next command
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        reason = first if isinstance(error, LilyError) else f"{type(error).__name__}: {first}".removesuffix(": ")
        trial.end(None, "failed", reason=reason)
        folder.remove_weights(where)
        return f"failed: {reason}"
    finally:
        told.end(_named(trial.number))
        gc.collect()  # a trainer and its model refer to each other
    value = None if result.best is None else result.best["value"]
    trial.end(
        value,
        "stopped" if trial.stopped else "complete",
        seconds=result.seconds.get("train", 0.0),
        parameters=result.parameters["adapter"],
        forgetting=result.forgetting.get("increase"),
    )
    if not keep:
        folder.remove_weights(where)
    return f"{metric} {shown(metric, value)}" + (", stopped early: worse than the median" if trial.stopped else "")


def _write(
    prepared: Prepared, study: Study, output: Path, options: TuneOptions, source: str | None, overrides: Sequence[str]
) -> TuneResult:
    trials = tuple(study.trials)
    result = replace(prepared.result, trials=trials, importance=study.importance())
    if (best := best_trial(trials, result.metric, options.max_forgetting)) is not None:
        result = replace(result, best=best, recipe=output / BEST)
    write_text(output / RESULT, json.dumps(result.to_dict(), indent=2))
    if best is not None:
        write_text(output / BEST, _best_recipe(prepared, best, result, source, overrides))
    return result


def _best_recipe(
    prepared: Prepared, best: TrialResult, result: TuneResult, source: str | None, overrides: Sequence[str]
) -> str:
    """The text of a recipe with the best values: one that extends `source`, or a complete one."""
    sections = prepared.sections(best.values)
    own = {
        "name": f"{result.name}-tuned",
        "description": f"{result.name} with the values of trial {best.number + 1} of {len(result.trials)} of "
        f"lily tune: {result.metric} {shown(result.metric, best.value)} on {result.rows:,} validation rows.",
        "output": "runs/{name}-{method}-{seed}",
    }
    if source is None:
        return loader.dump_recipe(changed(prepared.recipe, sections, **own))
    values = loader.overriding(overrides)
    for section, keys in sections.items():
        values[section] = {**(values.get(section) or {}), **keys}
    extending = {"extends": loader.from_anywhere(source), **{key: own[key] for key in ("name", "description")}}
    rest = {key: value for key, value in values.items() if key not in own}
    document = {**extending, **rest, "output": own["output"]}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
