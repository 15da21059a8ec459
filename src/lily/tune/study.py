"""A search that Optuna steers, kept in a journal that lives through being killed at any moment.

The journal is Optuna's own (lines of JSON, no pickle), so its dashboard reads it. What a trial tries depends on the
seed, its number and the trials before it alone, so a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from lily.errors import LilyError
from lily.io.atomic import naming
from lily.recipes.scoring import metrics as metric_tools
from lily.tune.space import Space, Values

NAME = "lily"
JOURNAL = "study.journal"
FIRST = 5  # trials before the search is led by what it has seen, and before one may be stopped early
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.RUNNING: "running",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Tried:
    """One trial.

    Attributes:
        number: its number, from 0.
        state: complete, stopped (early, because it was worse than the median), diverged, failed or running.
        values: knob -> what was tried.
        value: main metric on the validation rows, of its best adapter; None: it has none.
        steps: optimiser steps done.
        seconds: of training.
        parameters: of the adapter.
        forgetting: increase of the loss on general text; None: not measured.
        reason: why it failed; empty: it did not.
    """

    number: int
    state: str
    values: Values
    value: float | None = None
    steps: int = 0
    seconds: float = 0.0
    parameters: int = 0
    forgetting: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


class Study:
    """The trials of a search.

    Args:
        folder: where its journal is, or will be. Only one process may use it at a time.
        space: what is searched.
        metric: the main metric, which says whether more or less is better.
        seed: of the search.

    Raises:
        LilyError: if the journal is none, or is of another search.
    """

    def __init__(self, folder: Path, space: Space, metric: str, seed: int) -> None:
        self.space, self.metric, self.seed = space, metric, seed
        self._distributions = distributions(space)
        self._first_steps = 0
        file = folder / JOURNAL
        _mend(file)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        less = metric in metric_tools.LOWER_IS_BETTER
        try:
            with naming(file):
                self._study = optuna.create_study(
                    storage=JournalStorage(JournalFileBackend(str(file))),
                    study_name=NAME,
                    direction="minimize" if less else "maximize",
                    load_if_exists=True,
                )
            for trial in self._study.trials:
                _tried(trial)
        except OSError:
            raise
        except Exception as error:  # whatever lines that are no journal make of it
            raise LilyError(
                f"{file} is no journal of a search ({type(error).__name__}: {error}); start anew with --overwrite"
            ) from None

    @property
    def tried(self) -> list[Tried]:
        """All trials, by number."""
        return [_tried(trial) for trial in self._study.trials if trial.state in STATES]

    @property
    def finished(self) -> int:
        """How many trials have ended."""
        return sum(trial.state.is_finished() for trial in self._study.trials)

    def ask(self, first_steps: int = 0) -> Going:
        """The next trial: one that was killed, or else a new one.

        Args:
            first_steps: of a trial, before which it may not be stopped.
        """
        running = [trial for trial in self._study.trials if trial.state == TrialState.RUNNING]
        number = running[0].number if running else len(self._study.trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(
                seed=(self.seed * 1009 + number) % 2**32, n_startup_trials=FIRST, multivariate=True
            )
        self._study.pruner = optuna.pruners.MedianPruner(n_startup_trials=FIRST, n_warmup_steps=first_steps)
        if not running and number == 0:
            self._study.enqueue_trial(self.space.start)
        trial = Trial(self._study, running[0]._trial_id) if running else self._study.ask()
        for name, found in self._distributions.items():
            _suggest(trial, name, found)
        return Going(self._study, trial, self.metric)

    def importance(self) -> dict[str, float]:
        """How much of the differences between complete trials each knob explains; empty: too few trials to say."""
        complete = [trial for trial in self._study.trials if trial.state == TrialState.COMPLETE]
        if len(complete) < FIRST or len({trial.value for trial in complete}) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(self._study)
        return {name: float(value) for name, value in found.items()}


class Going:
    """A trial that is on its way.

    Attributes:
        number: its number.
        values: what it tries.
    """

    def __init__(self, study: optuna.Study, trial: Trial, metric: str) -> None:
        self._study, self._trial, self._metric = study, trial, metric
        self.number: int = trial.number
        self.values: Values = dict(trial.params)

    @property
    def stopped(self) -> bool:
        """Whether it was decided to stop it, perhaps before it was killed."""
        return bool(self._trial.user_attrs.get("stopped"))

    @property
    def best(self) -> float | None:
        """The best of its evaluations so far; None: there is none yet."""
        values = list(self._study.trials[self.number].intermediate_values.values())
        less = self._study.direction == optuna.study.StudyDirection.MINIMIZE
        return (min if less else max)(values) if values else None

    def watch(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Take note of the evaluations so far; whether to stop it, as worse than the median of those before."""
        known = self._study.trials[self.number].intermediate_values
        for found in history:
            if int(found["step"]) not in known:
                self._trial.report(float(found[self._metric]), int(found["step"]))
        if self._trial.should_prune():
            self._trial.set_user_attr("stopped", True)
        return self.stopped

    def fail(self, reason: str) -> None:
        """Keep why it failed. The search neither learns from it nor tries it again."""
        self._trial.set_user_attr("reason", reason)
        self._study.tell(self._trial, state=TrialState.FAIL)

    def end(self, value: float | None, state: str, **figures: float | int | None) -> None:
        """Keep how it ended.

        Args:
            value: main metric of its best adapter.
            state: complete, stopped or diverged.
            figures: those of `Tried`.
        """
        for name, figure in figures.items():
            self._trial.set_user_attr(name, figure)
        if state == "diverged":
            self._trial.set_user_attr("diverged", True)
        if value is not None and math.isfinite(value):
            self._trial.set_user_attr("value", value)
        if state == "complete" and value is not None and math.isfinite(value):
            self._study.tell(self._trial, value)
        else:
            self._study.tell(self._trial, state=TrialState.PRUNED)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """A space in Optuna's words."""
    found: dict[str, BaseDistribution] = {
        name: FloatDistribution(knob.low, knob.high, log=True) for name, knob in space.ranges.items()
    }
    if space.shapes:
        found["shape"] = CategoricalDistribution([shape.name for shape in space.shapes])
    return found


def _suggest(trial: Trial, name: str, found: BaseDistribution) -> None:
    if isinstance(found, FloatDistribution):
        trial.suggest_float(name, found.low, found.high, log=found.log)
    elif isinstance(found, CategoricalDistribution):
        trial.suggest_categorical(name, found.choices)


def _tried(trial: FrozenTrial) -> Tried:
    told = trial.user_attrs
    state = "diverged" if told.get("diverged") else STATES.get(trial.state, "waiting")
    steps = max(trial.intermediate_values, default=0)
    return Tried(
        number=trial.number,
        state=state,
        values=dict(trial.params),
        value=told.get("value"),
        steps=int(steps),
        seconds=float(told.get("seconds", 0.0)),
        parameters=int(told.get("parameters", 0)),
        forgetting=told.get("forgetting"),
        reason=str(told.get("reason", "")),
    )


def _mend(file: Path) -> None:
    """Take away what a killed process left: half a line, which would spoil the next one, and its lock."""
    Path(f"{file}.lock").unlink(missing_ok=True)
    if file.is_file():
        with file.open("r+b") as journal:
            text = journal.read()
            journal.truncate(text.rfind(b"\n") + 1)
