"""Build a recipe's trainer: transformers' Trainer or TRL's SFTTrainer.

Added to them: metrics besides the loss, the best adapter as a plain PEFT folder, early stopping on the recipe's metric.
Schedule, accumulation and logging are theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from lily.analysis.history import RoutingCallback
from lily.callbacks.health import HealthCallback
from lily.callbacks.settle import SettleCallback
from lily.distributed import from_first, rank, save_adapter, world_size
from lily.errors import LilyError
from lily.io.atomic import write_text
from lily.progress.progress import Progress as Told
from lily.recipes.data.images import Preprocess
from lily.recipes.data.tasks import Example, Processor
from lily.recipes.methods.configs import learning_rate
from lily.recipes.models.precision import precision_of
from lily.recipes.scoring import metrics as metric_tools
from lily.recipes.scoring.forgetting import LOSS
from lily.recipes.spec.base import CLASSIFYING
from lily.recipes.spec.schema import Recipe
from lily.recipes.trainer.resumable import Cadence, Resumable
from lily.recipes.trainer.telling import Telling

Evaluate = Callable[[torch.nn.Module], dict[str, float]]


class Progress:
    """The evaluations of a run and its best adapter, kept on disk so that a resumed run continues with them.

    Args:
        output: the run's folder.
        metric: the main metric.
        patience: evaluations without improvement before the run should stop; None: never.

    Attributes:
        history: the metrics of every evaluation on the validation rows, with its epoch and step.
        best: the best of them. Where the adapter settles, only evaluations after that count.
        max_general_loss: upper bound on the general-text loss of the selected checkpoint; None: no bound.
    """

    max_general_loss: float | None = None

    def __init__(self, output: Path, metric: str, patience: int | None) -> None:
        self.folder, self.file = output / "best", output / "progress.json"
        self.metric, self.patience = metric, patience
        self.history: list[dict[str, float]] = []
        if rank() == 0 and self.file.is_file() and self.folder.is_dir():
            self.history = json.loads(self.file.read_text("utf-8"))
        self.history = from_first(self.history)

    @property
    def best(self) -> dict[str, float]:
        """The first evaluation that no later one beats, among those of the settled adapter if there are any.

        With `max_general_loss`, among those within it; if there are none, the one with the smallest general loss.
        """
        eligible = [h for h in self.history if h.get("final", 1.0)] or self.history
        if self.max_general_loss is not None:
            within = [h for h in eligible if h[LOSS] <= self.max_general_loss]
            eligible = within or [min(eligible, key=lambda h: h[LOSS])]
        best = eligible[0]
        for evaluation in eligible[1:]:
            if metric_tools.better(self.metric, evaluation[self.metric], best[self.metric]):
                best = evaluation
        return best

    def update(self, model: PeftModel, evaluation: dict[str, float]) -> bool:
        """Record an evaluation, and save the adapter if it is the best; returns `exhausted`."""
        self.history = [h for h in self.history if h["step"] < evaluation["step"]] + [evaluation]
        if self.best is evaluation:
            save_adapter(model, self.folder, overwrite=True)
        if rank() == 0:
            write_text(self.file, json.dumps(self.history))
        return self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether patience is used up."""
        if self.patience is None or not self.history or not self.history[-1].get("final", 1.0):
            return False
        return len(self.history) - 1 - self.history.index(self.best) >= self.patience


def build_trainer(
    recipe: Recipe,
    model: torch.nn.Module,
    processor: Processor,
    train: Sequence[Example],
    validation: Sequence[Example],
    output: Path,
    beyond_loss: Evaluate | None,
    told: Told,
    who: str,
) -> Any:
    """The recipe's Trainer, with the run's `Progress` as `progress`; `beyond_loss` computes further metrics."""
    names = metric_tools.metrics_of(recipe)
    arguments = _arguments(recipe, output, told.verbose)
    images = isinstance(processor, Preprocess)
    common: dict[str, Any] = {"model": model, "processing_class": None if images else processor}
    if recipe.task == "sft":
        try:
            from datasets import Dataset, disable_progress_bars
            from trl import SFTConfig, SFTTrainer
        except ImportError:
            raise LilyError('task: sft needs TRL; pip install "lily-peft[sft]"') from None
        if not told.verbose:
            disable_progress_bars()
        trained = {p: p.data for p in model.parameters() if p.requires_grad}
        config = SFTConfig(
            **arguments, max_length=recipe.data.max_length, packing=recipe.train.packing, eval_packing=False
        )
        trainer = _with_best(SFTTrainer)(
            args=config,
            train_dataset=Dataset.from_list(list(train)),
            eval_dataset=Dataset.from_list(list(validation)),
            **common,
        )
        # On a quantized model TRL rounds trained parameters to bfloat16, in which a small step changes nothing.
        for p, data in trained.items():
            if p.dtype != data.dtype:
                p.data = data
    else:
        trainer = _with_best(Trainer)(
            args=TrainingArguments(**arguments, remove_unused_columns=not images),
            train_dataset=list(train),
            eval_dataset=list(validation),
            data_collator=processor.batch if images else DataCollatorWithPadding(processor),
            compute_metrics=lambda out: score(recipe, out.predictions, out.label_ids),
            **common,
        )
    if not told.verbose:
        trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output / "tensorboard")
    trainer.telling = Telling(told, who, recipe)
    trainer.add_callback(trainer.telling)
    settle = recipe.lily.settle
    if recipe.method == "lily" and settle is not None:
        trainer.add_callback(SettleCallback(settle.start, settle.end))
    trainer.add_callback(Cadence(recipe.train.evaluate_every, recipe.train.save_every or recipe.train.evaluate_every))
    trainer.health = HealthCallback(lambda message: told.warn(f"warning: {message}"))
    trainer.add_callback(trainer.health)
    if recipe.method == "lily" and settle is None:  # SettleCallback records the routing itself
        trainer.routing = RoutingCallback()
        trainer.add_callback(trainer.routing)
    trainer.recipe = recipe
    trainer.beyond_loss = beyond_loss
    trainer.names = names
    trainer.progress = Progress(output, names[0], recipe.train.early_stopping)
    return trainer


def score(recipe: Recipe, predictions: Any, labels: Any) -> dict[str, float]:
    """The recipe's metrics of a head's outputs (rows, outputs)."""
    outputs = predictions[0] if isinstance(predictions, tuple) else predictions
    predicted = outputs.argmax(-1) if recipe.task in CLASSIFYING else outputs.reshape(-1)
    return metric_tools.compute(metric_tools.metrics_of(recipe), predicted, labels)


def _with_best(base: type[Trainer]) -> Any:
    class RecipeTrainer(Resumable, base):  # type: ignore[misc]
        beyond_loss: Evaluate | None = None
        general: Callable[[torch.nn.Module], float] | None = None
        watch: Callable[[Sequence[dict[str, float]]], bool] | None = None
        names: Sequence[str] = ()
        telling: Telling

        def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*arguments, **more)
            self.health.note_loss(loss)
            return loss

        def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
            """Evaluate, and keep the best adapter."""
            with self.signals.deferred(False), self.telling.told.stage(self.telling.who, "evaluation"):
                metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
                metrics["eval_perplexity"] = float(np.exp(min(metrics["eval_loss"], 80.0)))
                if self.beyond_loss is not None:
                    metrics.update({f"eval_{name}": value for name, value in self.beyond_loss(self.model).items()})
                if self.general is not None:
                    metrics[f"eval_{LOSS}"] = self.general(self.model)
            metrics = from_first(metrics)  # so that all processes decide the same, even if their last bits differ
            step, epoch = self.state.global_step, float(self.state.epoch or 0.0)
            values = {name: metrics[f"eval_{name}"] for name in (*self.names, LOSS) if f"eval_{name}" in metrics}
            # progress of settling, 0 to 1; None: the adapter does not settle, or is static already
            settled = getattr(getattr(self.model, "peft_config", {}).get("default"), "settled", None)
            final = {} if settled is None else {"final": float(settled == 1)}
            self.show_callbacks(values)
            evaluation = {"step": step, "epoch": epoch, **values, **final}
            exhausted = self.progress.update(self.model, evaluation)
            self.telling.evaluated(self.state, metrics["eval_loss"], values, self.progress.best is evaluation)
            if exhausted or (self.watch is not None and self.watch(self.progress.history)):
                self.control.should_training_stop = True
            return metrics

        def show_callbacks(self, values: dict[str, float]) -> None:
            """Show callbacks, dashboards among them, the metrics that `Trainer.evaluate` does not know."""
            known = self.state.log_history[-1] if self.state.log_history else {}
            if more := {f"eval_{name}": value for name, value in values.items() if f"eval_{name}" not in known}:
                self.callback_handler.on_log(self.args, self.state, self.control, more)

    return RecipeTrainer


def _arguments(recipe: Recipe, output: Path, verbose: bool) -> dict[str, Any]:
    t = recipe.train
    precision = precision_of(recipe)
    return {
        "output_dir": str(output / "checkpoints"),
        "num_train_epochs": t.epochs,
        "max_steps": t.max_steps or -1,
        "per_device_train_batch_size": t.batch_size // world_size(),
        "per_device_eval_batch_size": t.eval_batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation,
        "learning_rate": learning_rate(recipe),
        "warmup_steps": t.warmup,
        "lr_scheduler_type": t.schedule if t.min_learning_rate is None else "cosine_with_min_lr",
        "lr_scheduler_kwargs": {}
        if t.min_learning_rate is None
        else {"min_lr_rate": t.min_learning_rate / learning_rate(recipe)},
        "max_grad_norm": t.max_grad_norm,
        "bf16": precision == "bfloat16",
        "fp16": precision == "float16",
        "gradient_checkpointing": t.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if t.gradient_checkpointing else None,
        "report_to": list(t.report_to) or "none",
        "run_name": f"{recipe.name}-{recipe.method}-{recipe.seed}",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        # `Cadence` decides when
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 50,
        "disable_tqdm": True,
        "log_level": "passive" if verbose else "error",
    }
