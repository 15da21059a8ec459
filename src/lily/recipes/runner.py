"""The trainers: transformers' Trainer and TRL's SFTTrainer, with what a recipe adds to them.

Added: metrics that need generation, the best adapter kept as a plain PEFT folder, early stopping on the recipe's own
metric. Everything else (schedule, accumulation, checkpointing, resuming, logging) is theirs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments

from lily.errors import LilyError
from lily.files import sync_folder, write_text
from lily.recipes import metrics as metric_tools
from lily.recipes.methods import learning_rate
from lily.recipes.schema import Recipe
from lily.recipes.tasks import Example

Evaluate = Callable[[torch.nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Score:
    """A value of the main metric and when it was reached."""

    epoch: float
    value: float


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write a PEFT folder that is complete from the moment it has its name; an older one is replaced."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    model.save_pretrained(str(new))
    for file in new.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


class Best:
    """Keeps the best adapter of a run in its folder, across resumes.

    Args:
        output: the run's folder.
        metric: the main metric.
        patience: evaluations without gain before the run should stop; None: never.
    """

    def __init__(self, output: Path, metric: str, patience: int | None) -> None:
        self.folder, self.file = output / "best", output / "best.json"
        self.metric, self.patience = metric, patience
        self.score: Score | None = None
        self.idle = 0
        if self.file.is_file() and self.folder.is_dir():
            values = json.loads(self.file.read_text("utf-8"))
            self.score, self.idle = Score(values["epoch"], values["value"]), values["idle"]

    def update(self, model: PeftModel, epoch: float, value: float) -> bool:
        """Take note of an evaluation; True means that patience is used up."""
        current = metric_tools.worst(self.metric) if self.score is None else self.score.value
        if self.score is None or metric_tools.better(self.metric, value, current):
            self.score, self.idle = Score(epoch, value), 0
            save_adapter(model, self.folder)
        else:
            self.idle += 1
        write_text(self.file, json.dumps({**asdict(self.score), "idle": self.idle}))
        return self.patience is not None and self.idle >= self.patience


def build_trainer(
    recipe: Recipe,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    validation: Sequence[Example],
    output: Path,
    generate: Evaluate | None,
    quiet: bool,
) -> Any:
    """The recipe's trainer.

    Args:
        recipe: schedule and task.
        model: with its adapter; frozen parameters are left out of the optimiser.
        tokenizer: the model's.
        train: encoded examples.
        validation: encoded examples.
        output: the run's folder.
        generate: further validation metrics that need generation.
        quiet: no progress bar.

    Returns:
        A Trainer whose `best` is the run's `Best`.
    """
    names = metric_tools.metrics_of(recipe)
    arguments = _arguments(recipe, output, quiet)
    optimiser = torch.optim.AdamW(_groups(recipe, model), weight_decay=recipe.train.weight_decay)
    common: dict[str, Any] = {"model": model, "processing_class": tokenizer, "optimizers": (optimiser, None)}
    if recipe.task == "sft":
        try:
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer
        except ImportError:
            raise LilyError('task: sft needs TRL; pip install "lily-peft[sft]"') from None
        config = SFTConfig(
            **arguments, max_length=recipe.data.max_length, packing=recipe.train.packing, eval_packing=False
        )
        trainer = _with_best(SFTTrainer)(
            args=config,
            train_dataset=Dataset.from_list(list(train)),
            eval_dataset=Dataset.from_list(list(validation)),
            **common,
        )
    else:
        trainer = _with_best(Trainer)(
            args=TrainingArguments(**arguments, train_sampling_strategy="group_by_length"),
            train_dataset=list(train),
            eval_dataset=list(validation),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda out: score(recipe, out.predictions, out.label_ids),
            **common,
        )
    trainer.generate = generate
    trainer.main_metric = names[0]
    trainer.best = Best(output, names[0], recipe.train.early_stopping)
    return trainer


def score(recipe: Recipe, predictions: Any, labels: Any) -> dict[str, float]:
    """A head's outputs (rows, outputs) against labels: the recipe's metrics."""
    outputs = predictions[0] if isinstance(predictions, tuple) else predictions
    predicted = outputs.argmax(-1) if recipe.task == "text-classification" else outputs.reshape(-1)
    return metric_tools.compute(metric_tools.metrics_of(recipe), predicted, labels)


def _with_best(base: type[Trainer]) -> Any:
    class RecipeTrainer(base):  # type: ignore[misc, valid-type]
        generate: Evaluate | None = None
        main_metric = "loss"
        best: Best
        history: list[dict[str, float]]

        def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
            """Also: generation metrics, and the best adapter of the validation rows."""
            found: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if f"{metric_key_prefix}_loss" in found:
                found[f"{metric_key_prefix}_perplexity"] = float(np.exp(min(found[f"{metric_key_prefix}_loss"], 80.0)))
            if eval_dataset is None and metric_key_prefix == "eval":
                self._note(found)
            return found

        def _note(self, found: dict[str, float]) -> None:
            if self.generate is not None:
                found.update({f"eval_{name}": value for name, value in self.generate(self.model).items()})
            if self.state.global_step == 0 or self.state.global_step in self._noted:
                return
            self._noted.add(self.state.global_step)
            value = found[f"eval_{self.main_metric}"]
            if self.best.update(self.model, float(self.state.epoch or 0.0), value):
                self.control.should_training_stop = True

        def train(self, *args: Any, **kwargs: Any) -> Any:
            """As the base, remembering which steps were evaluated."""
            self._noted: set[int] = set()
            return super().train(*args, **kwargs)

    return RecipeTrainer


def precision_of(recipe: Recipe) -> str:
    """What the recipe's precision means on this machine: `auto` is bfloat16 where the hardware multiplies it."""
    chosen = recipe.train.precision
    if chosen != "auto":
        return chosen
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def _arguments(recipe: Recipe, output: Path, quiet: bool) -> dict[str, Any]:
    t = recipe.train
    every = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    if isinstance(t.evaluate_every, int):
        every = {"eval_strategy": "steps", "save_strategy": "steps"}
        every |= {"eval_steps": t.evaluate_every, "save_steps": t.evaluate_every}  # type: ignore[dict-item]
    precision = precision_of(recipe)
    return {
        "output_dir": str(output / "checkpoints"),
        "num_train_epochs": t.epochs,
        "max_steps": t.max_steps or -1,
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": t.eval_batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation,
        "learning_rate": learning_rate(recipe),
        "warmup_steps": t.warmup,
        "lr_scheduler_type": t.schedule,
        "max_grad_norm": t.max_grad_norm,
        "bf16": precision == "bfloat16",
        "fp16": precision == "float16",
        "gradient_checkpointing": t.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if t.gradient_checkpointing else None,
        "report_to": list(t.report_to) or "none",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_total_limit": 1,
        "logging_steps": 50,
        "disable_tqdm": quiet,
        "log_level": "error" if quiet else "passive",
        **every,
    }


def _groups(recipe: Recipe, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: the adapter, and a new head with its own learning rate."""
    rate = learning_rate(recipe)
    adapter, head = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (head if "modules_to_save" in name else adapter).append(p)
    groups = [(adapter, rate), (head, recipe.train.head_learning_rate or rate)]
    return [{"params": params, "lr": lr} for params, lr in groups if params]
