"""The space of `lily tune`: values that Optuna proposes, in a journal that survives being killed at any moment.

The journal is Optuna's format (lines of JSON, no pickle), so its dashboard reads it. The values of a trial depend only
on the seed, its number and the trials before it, so an interrupted search continues as if it had not been interrupted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
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
FIRST = 5  # random trials before TPE proposes values, and complete ones before a trial may be stopped early
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.RUNNING: "running",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class TrialResult:
    """One trial."""

    number: int  # counted from 0
    state: str  # complete, stopped (early, because it was worse than the median), diverged, failed or running
    values: Values  # knob -> value
    value: float | None = None  # main metric on the validation rows, of its best adapter; None: it was not evaluated
    steps: int = 0  # optimizer steps
    seconds: float = 0.0  # of training
    parameters: int = 0  # of the adapter
    forgetting: float | None = None  # increase of the loss on general text; None: not measured
    reason: str = ""  # why it failed, or empty


class Study:
    """The trials of a search.

    Args:
        folder: of its journal. Only one process may use it at a time.
        space: to search.
        metric: main metric; decides whether more or less is better.
        seed: of the search.

    Raises:
        LilyError: if the journal is damaged.
    """

    def __init__(self, folder: Path, space: Space, metric: str, seed: int) -> None:
        self.space, self.metric, self.seed = space, metric, seed
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
                _result(trial)
        except OSError:
            raise
        except Exception as error:  # Optuna raises many types for lines that are not its own
            raise LilyError(
                f"{file} is not the journal of a search ({type(error).__name__}: {error}); start over with --overwrite"
            ) from None

    @property
    def trials(self) -> list[TrialResult]:
        """All trials, by number."""
        return [_result(trial) for trial in self._study.trials if trial.state in STATES]

    @property
    def finished(self) -> int:
        """How many trials have ended."""
        return sum(trial.state.is_finished() for trial in self._study.trials)

    def ask(self, first_steps: int = 0) -> RunningTrial:
        """The next trial: one that was interrupted, or else a new one.

        Args:
            first_steps: optimizer steps before which a trial may not be stopped.
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
        for name, knob in self.space.ranges.items():
            trial.suggest_float(name, knob.low, knob.high, log=True)
        if self.space.shapes:
            trial.suggest_categorical("shape", [shape.name for shape in self.space.shapes])
        return RunningTrial(self._study, trial, self.metric)

    def importance(self) -> dict[str, float]:
        """Knob -> share of the differences between complete trials that it explains; empty: too few trials."""
        complete = [trial for trial in self._study.trials if trial.state == TrialState.COMPLETE]
        if len(complete) < FIRST or len({trial.value for trial in complete}) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shares = optuna.importance.get_param_importances(self._study)
        return {name: float(share) for name, share in shares.items()}


class RunningTrial:
    """A trial that is not finished.

    Attributes:
        number: counted from 0.
        values: knob -> value.
    """

    def __init__(self, study: optuna.Study, trial: Trial, metric: str) -> None:
        self._study, self._trial, self._metric = study, trial, metric
        self.number: int = trial.number
        self.values: Values = dict(trial.params)

    @property
    def stopped(self) -> bool:
        """Whether the decision to stop it was made, perhaps before an interruption."""
        return bool(self._trial.user_attrs.get("stopped"))

    @property
    def best(self) -> float | None:
        """The best of its evaluations so far; None before the first one."""
        values = list(self._study.trials[self.number].intermediate_values.values())
        less = self._study.direction == optuna.study.StudyDirection.MINIMIZE
        return (min if less else max)(values) if values else None

    def watch(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Record the evaluations so far; returns whether to stop, because it is worse than the median of the others."""
        recorded = self._study.trials[self.number].intermediate_values
        for evaluation in history:
            if int(evaluation["step"]) not in recorded:
                self._trial.report(float(evaluation[self._metric]), int(evaluation["step"]))
        if self._trial.should_prune():
            self._trial.set_user_attr("stopped", True)
        return self.stopped

    def end(self, value: float | None, state: str, **figures: float | int | str | None) -> None:
        """Record how it ended. The search does not learn from a trial that failed, and does not repeat it.

        Args:
            value: main metric of its best adapter.
            state: complete, stopped, diverged or failed.
            figures: further attributes of `TrialResult`.
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
            self._study.tell(self._trial, state=TrialState.FAIL if state == "failed" else TrialState.PRUNED)


def _result(trial: FrozenTrial) -> TrialResult:
    figures = trial.user_attrs
    return TrialResult(
        number=trial.number,
        state="diverged" if figures.get("diverged") else STATES.get(trial.state, "waiting"),
        values=dict(trial.params),
        value=figures.get("value"),
        steps=int(max(trial.intermediate_values, default=0)),
        seconds=float(figures.get("seconds", 0.0)),
        parameters=int(figures.get("parameters", 0)),
        forgetting=figures.get("forgetting"),
        reason=str(figures.get("reason", "")),
    )


def _mend(file: Path) -> None:
    """Remove the incomplete last line and the lock that a killed process left; the next line would be damaged."""
    Path(f"{file}.lock").unlink(missing_ok=True)
    if file.is_file():
        with file.open("r+b") as journal:
            text = journal.read()
            journal.truncate(text.rfind(b"\n") + 1)
