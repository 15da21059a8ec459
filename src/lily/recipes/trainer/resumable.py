"""A Trainer that can be stopped at any moment; the resumed run ends with the same bits as an uninterrupted one.

transformers writes checkpoints under their final names, with pickles, and draws another order of the rows when it
resumes within an epoch. Here a checkpoint gets its name when it is complete (`checkpoints`), holds safetensors and JSON
(`state_files`), and includes the random state at the start of its epoch.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal, NoReturn

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lily import distributed
from lily.analysis.history import RoutingCallback
from lily.callbacks.health import HealthCallback
from lily.plan.wrappers import plain_names
from lily.recipes.trainer import checkpoints, memory
from lily.recipes.trainer.checkpoints import Moment
from lily.recipes.trainer.parallel import Parallel
from lily.recipes.trainer.signals import Signals
from lily.recipes.trainer.state_files import load_state, random_state, save_state, set_random_state

Every = int | Literal["epoch"]


def due(every: Every, step: int, epoch: float, last: bool) -> bool:
    """Whether a periodic action is due after these optimizer steps and epochs; at the `last` step all are."""
    return last or (epoch == int(epoch) if every == "epoch" else step % every == 0)


class Cadence(TrainerCallback):  # type: ignore[misc]
    """Schedules evaluations and checkpoints; at the same step the evaluation comes first, also at an epoch's end.

    transformers schedules those of an epoch after those of its last step, so a run killed in between would resume
    without the evaluation.
    """

    def __init__(self, evaluate_every: Every, save_every: Every) -> None:
        self.evaluate_every, self.save_every = evaluate_every, save_every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """After each optimizer step."""
        last = state.global_step >= state.max_steps
        control.should_evaluate = due(self.evaluate_every, state.global_step, state.epoch, last)
        control.should_save = due(self.save_every, state.global_step, state.epoch, last)


class Resumable(Parallel):
    """Mixin, to come before a Trainer class. The attributes are set before training.

    Attributes:
        progress: the evaluations and the best adapter.
        routing: records the routing, which becomes part of each checkpoint.
    """

    signals: Signals
    progress: Any
    health: HealthCallback
    routing: RoutingCallback | None = None
    _moment = Moment()
    _writing: Path | None = None
    _saved_step = -1
    _started = 0.0
    _random: dict[str, Any] | None = None
    _epoch_random: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Time spent in training, including the runs that this one resumes."""
        return self._moment.seconds + time.perf_counter() - self._started

    @property
    def peak_bytes(self) -> int:
        """Peak memory, including the runs that this one resumes."""
        return max(self._moment.peak_bytes, memory.peak_bytes())

    def resume(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint or from the start.

        Raises:
            KeyboardInterrupt: at Ctrl-C, after a checkpoint.
            SystemExit: at SIGTERM, after a checkpoint; exit code 143.
        """
        self._moment, self._started = Moment.read(checkpoint), time.perf_counter()
        self.health.routers.state = self._moment.router
        with self.signals.deferred():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.signals.received is not None:  # received after the last step
            raise self.signals.ending()

    # -- stopping

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, *rest: Any, **more: Any) -> None:
        number = self.signals.agreed(self.args.device)
        if number is not None:
            self._leave(number)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *rest, **more)

    def _evaluate(self, *arguments: Any, **more: Any) -> Any:
        before = random_state()
        try:
            metrics = super()._evaluate(*arguments, **more)
        except (KeyboardInterrupt, SystemExit):
            if self.signals.received is not None:
                set_random_state(before)
                self._leave(self.signals.received)
            raise
        # early stopping makes this the last step, which always leaves a checkpoint
        self.control.should_save |= self.control.should_training_stop
        return metrics

    def _leave(self, number: int) -> NoReturn:
        if self._saved_step != self.state.global_step:
            self.health.check_weights(self.args, self.state, self.model, self.optimizer)
            self._save_checkpoint(self.model, None)
        raise self.signals.ending(number)

    # -- resuming

    def _run_epoch(self, **arguments: Any) -> None:
        checkpoint, first = arguments["resume_from_checkpoint"], arguments["epoch"] == arguments["epochs_trained"]
        if checkpoint is not None and first:
            # training resumes from this checkpoint: do not write it again
            self._saved_step = self.state.global_step
            state = self._load_random(Path(checkpoint))
            set_random_state(state["now"])
            if self._moment.owed:
                self._moment.owed = False
                self._evaluate(None, None)
            # transformers checks this only after one more step
            if self.state.global_step >= self.state.max_steps or self.progress.exhausted:
                self.control.should_training_stop = True
            if self.control.should_training_stop:
                return
            self._random = random_state()
            if arguments["steps_trained_in_current_epoch"]:
                set_random_state(state["epoch"])
        self._epoch_random = random_state()
        super()._run_epoch(**arguments)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random is not None:
            set_random_state(self._random)

    def _load_random(self, checkpoint: Path) -> Any:
        """The random state of this process; of the first one, if the checkpoint is of fewer processes."""
        name = f"random_{self.args.process_index}"
        return load_state(checkpoint, name if (checkpoint / f"{name}.json").is_file() else "random_0")

    # -- writing

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, main = self.state.global_step, bool(self.args.should_save)
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{step}"
        with checkpoints.written(checkpoint, main, self.accelerator.wait_for_everyone) as new:
            self._writing = new.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = None
            if main:
                owed, router = bool(self.control.should_evaluate), self.health.routers.state
                moment = Moment(self.progress.history, owed, self.seconds, self.peak_bytes, router)
                moment.write(new, self.progress.folder)
                if self.routing is not None:
                    self.routing.write(new)
        self._saved_step = step

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or super()._get_output_dir(trial))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: the run writes its own cards beside the adapters."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            model = distributed.peft_model_of(self.model)
            with plain_names(model):
                model.save_pretrained(output_dir, state_dict=state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(
            {"now": random_state(), "epoch": self._epoch_random}, Path(output_dir), f"random_{self.args.process_index}"
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:  # it writes and reads the optimizer itself
            super()._save_optimizer_and_scheduler(output_dir)
            return
        states = {"optimizer": self.optimizer_state(), "scheduler": self.lr_scheduler.state_dict()}
        if self.args.should_save:
            save_state(states, Path(output_dir), "optimizer")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            states = load_state(Path(checkpoint), "optimizer")
            self.load_optimizer_state(states["optimizer"])
            self.lr_scheduler.load_state_dict(states["scheduler"])

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(scaler.state_dict(), Path(output_dir), "scaler")

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint is not None:
            scaler.load_state_dict(load_state(Path(checkpoint), "scaler"))
