"""`lily tune`: a search over a recipe's knobs, on its validation rows alone."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lily.distributed import world_size
from lily.errors import DivergedError, LilyError
from lily.io.atomic import disk_error, write_text
from lily.recipes import loader, methods, preflight, train
from lily.recipes.scoring import metrics as metric_tools
from lily.recipes.scoring.metrics import shown
from lily.recipes.spec.schema import Recipe
from lily.tune import folder, ranking
from lily.tune.space import Space, Values, cadence, changed, changes, space_of, steps_of
from lily.tune.study import JOURNAL, Going, Study, Tried

RESULT, BEST, TRIALS = "tune.json", "best.yaml", "trials"
IN_A_ROW = 3  # failures after which the fault is hardly the trials'
OWN = (RESULT, BEST, TRIALS, JOURNAL, f"{JOURNAL}.lock")


@dataclass(frozen=True)
class Wish:
    """What a search is asked for.

    Attributes:
        trials: in all, those of earlier commands counted.
        timeout: seconds after which no new trial begins.
        knobs: to search; None: all that the method has.
        ranges: knob -> bounds, where they are not the usual ones.
        budget: parameters that a shape may cost; None: what the recipe's own costs.
        grid: every num_A with every num_B.
        max_forgetting: the best must not increase the loss on general text by more.
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
class Tuned:
    """What a search found; `tune.json` is this.

    Attributes:
        name: of the recipe.
        method: of the recipe.
        metric: main metric, on the validation rows.
        rows: validation rows.
        tested: whether the recipe has test rows, which no trial has seen.
        space: what was searched.
        tried: all trials, by number.
        best: the best one; None: no trial is complete yet.
        importance: knob -> share of the differences that it explains; empty: too few trials.
        recipe: the best values as a recipe's file; None: there is no best.
    """

    name: str
    method: str
    metric: str
    rows: int
    tested: bool
    space: Space
    tried: tuple[Tried, ...]
    best: Tried | None
    importance: dict[str, float]
    recipe: Path | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "name": self.name,
            "method": self.method,
            "metric": self.metric,
            "rows": self.rows,
            "tested": self.tested,
            "space": self.space.to_dict(),
            "best": None if self.best is None else self.best.to_dict(),
            "importance": self.importance,
            "trials": [trial.to_dict() for trial in self.tried],
        }


@dataclass(frozen=True)
class Search:
    """A search, ready to begin: the recipe with its space, and how often a trial is evaluated."""

    recipe: Recipe
    space: Space
    every: int | str
    steps: int
    rows: int
    tested: bool
    metric: str

    def sections(self, values: Values) -> dict[str, dict[str, Any]]:
        """What a trial changes of the recipe."""
        more = {} if self.every == self.recipe.train.evaluate_every else {"train": {"evaluate_every": self.every}}
        return {**changes(self.space, values), **more}

    def recipe_of(self, values: Values, output: Path) -> Recipe:
        """A trial's recipe."""
        return folder.placed(changed(self.recipe, self.sections(values)), output)


def output_folder(recipe: Recipe) -> Path:
    """Where a search is kept if nobody says where."""
    return Path("runs") / f"{recipe.name}-{recipe.method}-tune"


def prepare(recipe: Recipe, wish: Wish) -> Search:
    """Everything that can be found wrong before the first trial.

    Raises:
        LilyError: for anything wrong with the recipe, its data or the wish.
    """
    if world_size() > 1:
        raise LilyError("a search runs in one process; start it without torchrun or accelerate launch")
    if wish.trials < 1:
        raise LilyError(f"--trials {wish.trials}: give at least 1")
    if wish.max_forgetting is not None and recipe.forgetting is None:
        raise LilyError("--max-forgetting needs the recipe to measure it; give it a section forgetting")
    known = metric_tools.metrics_of(recipe)[0]
    prepared = preflight.prepare(recipe)
    decided = methods.decide(recipe, prepared.meta)
    space = space_of(
        recipe,
        decided,
        prepared.config,
        knobs=wish.knobs,
        ranges=wish.ranges,
        budget=wish.budget,
        grid=wish.grid,
    )
    rows = len(prepared.train)
    every = cadence(recipe, rows)
    splits = prepared.splits
    return Search(recipe, space, every, steps_of(recipe, rows), len(splits.validation), bool(splits.test), known)


def tune(
    recipe: Recipe,
    output: Path,
    wish: Wish,
    *,
    source: str | None = None,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    quiet: bool = True,
    announce: Callable[[str], None] = lambda said: None,
) -> Tuned:
    """Search a recipe's knobs; killed and called again, it goes on.

    Args:
        recipe: where to start from, and all that is not searched.
        output: the folder of the search.
        wish: how much, and what.
        source: name or path that the recipe was read from, for the recipe that is written to extend; None: it is
            written out.
        overrides: given beside it.
        overwrite: begin anew.
        quiet: no progress bars of the trials.
        announce: is told what happens, line by line.

    Returns:
        What was found, also written to `tune.json` and `best.yaml` after every trial.

    Raises:
        LilyError: for anything wrong, before the first trial where it can be known; or when trial after trial fails.
            A single one that does is told in the result.
        OSError: naming a path, when the disk is full; the trial goes on the next time.
    """
    search = prepare(recipe, wish)
    for note in search.space.notes:
        announce(note)
    settings = {"recipe": recipe.model_dump(mode="json"), "space": search.space.to_dict(), "every": search.every}
    started, failures = time.monotonic(), 0
    with folder.opened(output, settings, OWN, overwrite):
        study = Study(output, search.space, search.metric, recipe.seed)
        while study.finished < wish.trials:
            if wish.timeout is not None and time.monotonic() - started > wish.timeout:
                announce(f"time is up after {study.finished} trials; the same command goes on")
                break
            going = study.ask(first_steps=search.steps // 4)
            announce(f"trial {going.number + 1} of {wish.trials}: {said(search.sections(going.values))}")
            announce(f"  {_try(search, going, output / TRIALS / f'{going.number:03d}', wish.keep, quiet)}")
            told = _write(search, study, output, wish, source, overrides)
            last = next(trial for trial in told.tried if trial.number == going.number)
            failures = failures + 1 if last.state == "failed" else 0
            if failures == IN_A_ROW:
                raise LilyError(
                    f"{failures} trials in a row failed, the last one because: {last.reason}. Mend that and give the "
                    "same command, which goes on with the next trial, or begin anew with --overwrite"
                )
        return _write(search, study, output, wish, source, overrides)


def said(sections: dict[str, dict[str, Any]]) -> str:
    """A trial's values in words."""
    values = {key: value for keys in sections.values() for key, value in keys.items() if value is not None}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _try(search: Search, going: Going, run: Path, keep: bool, quiet: bool) -> str:
    """Run a trial, or the rest of one; how it ended, in words."""
    metric = search.metric
    if going.stopped:  # before it was killed
        going.end(going.best, "stopped")
        folder.lighten(run)
        return "stopped already"
    recipe = search.recipe_of(going.values, run)
    run.parent.mkdir(exist_ok=True)
    try:
        begun = folder.begun(run)
        result = train.train(
            recipe, resume=begun, overwrite=not begun, quiet=quiet, watch=going.watch, validation_only=True
        )
    except DivergedError as error:
        going.end(None, "diverged")
        folder.lighten(run)
        return f"diverged: {error}"
    except Exception as error:  # out of memory for one shape, say: the others are not held up
        if isinstance(error, OSError) or (isinstance(error, SafetensorError) and disk_error(error) is not None):
            raise  # no fault of the trial's, which goes on next time
        reason = _reason(error)
        going.fail(reason)
        folder.lighten(run)
        return f"failed: {reason}"
    finally:
        gc.collect()  # a trainer and its model refer to each other
    value = None if result.best is None else result.best["value"]
    state = "stopped" if going.stopped else "complete"
    going.end(
        value,
        state,
        seconds=result.seconds.get("train", 0.0),
        parameters=result.parameters["adapter"],
        forgetting=result.forgetting.get("increase"),
    )
    if not keep:
        folder.lighten(run)
    return f"{metric} {shown(metric, value)}" + (" when it was stopped, worse than the median" if going.stopped else "")


def _reason(error: Exception) -> str:
    """An error in one line."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return said if isinstance(error, LilyError) else f"{type(error).__name__}: {said}".removesuffix(": ")


def _write(
    search: Search, study: Study, output: Path, wish: Wish, source: str | None, overrides: Sequence[str]
) -> Tuned:
    tried = tuple(study.tried)
    best = ranking.best(tried, search.metric, wish.max_forgetting)
    file = None if best is None else output / BEST
    found = Tuned(
        search.recipe.name,
        search.recipe.method,
        search.metric,
        search.rows,
        search.tested,
        search.space,
        tried,
        best,
        study.importance(),
        file,
    )
    write_text(output / RESULT, json.dumps(found.to_dict(), indent=2))
    if best is not None and file is not None:
        write_text(file, _recipe(search, best, len(tried), source, overrides))
    return found


def _recipe(search: Search, best: Tried, trials: int, source: str | None, overrides: Sequence[str]) -> str:
    recipe, name = search.recipe, f"{search.recipe.name}-tuned"
    why = (
        f"{recipe.name} with what lily tune found: trial {best.number + 1} of {trials}, {search.metric} "
        f"{shown(search.metric, best.value)} on {search.rows:,} validation rows."
    )
    sections = search.sections(best.values)
    if source is None:
        own = changed(recipe, sections, name=name, description=why, output="runs/{name}-{method}-{seed}")
        return loader.dump_recipe(own)
    values = folder.extending(source, overrides, name, sections, why)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
