"""Tells a command's progress what the Trainer does: its steps, its evaluations, and what it logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lily.progress.progress import Progress
from lily.recipes.scoring.metrics import figures
from lily.recipes.spec.schema import Recipe


class Telling(TrainerCallback):  # type: ignore[misc]
    """Feeds a `Progress` during a training.

    Args:
        told: the command's progress.
        who: the contestant's name.
        recipe: of the run.
    """

    def __init__(self, told: Progress, who: str, recipe: Recipe) -> None:
        self.told, self.who, self.recipe = told, who, recipe
        self.begun, self.evaluations = 0, 0

    @property
    def rows(self) -> float:
        """Rows of a step."""
        return float(self.recipe.train.batch_size * self.recipe.train.gradient_accumulation)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The number of steps is known, and how many a resumed run has left."""
        self.begun = state.global_step
        self.told.expect(self.who, "training", {"train": self.rows * (state.max_steps - state.global_step)})
        self.told.restart()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A step is done."""
        self.told.advance(self.rows, "train")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A batch of an evaluation is done."""
        self.told.advance(args.per_device_eval_batch_size, "judge")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """What the Trainer logs is kept."""
        if state.is_world_process_zero:
            self.told.keep(f"{self.who} step {state.global_step}: {json.dumps(logs)}")

    def evaluated(self, state: TrainerState, loss: float, values: Mapping[str, float], best: bool) -> None:
        """Show an evaluation, and expect the others to take as long."""
        self.evaluations += 1
        done, all_of = state.global_step - self.begun, state.max_steps - self.begun
        times = all_of / done if done else 1.0
        units = self.told.estimate.done(self.who, "evaluation")
        self.told.expect(self.who, "evaluation", {kind: count * times for kind, count in units.items()})
        self.told.evaluated(self.who, self._when(state), figures({"loss": loss, **values}), best)

    def _when(self, state: TrainerState) -> str:
        t = self.recipe.train
        if t.evaluate_every == "epoch" and t.max_steps is None:
            return f"epoch {round(state.epoch or 0.0, 2):g}/{t.epochs:g}"
        return f"step {state.global_step}/{state.max_steps}"
