"""A Trainer that means the same on any number of processes: the same batches, the same losses, the same checkpoints.

transformers gives each process batches of its own, tops the last ones up with rows from the beginning, averages over
processes what is a mean over fewer rows, and writes FSDP's checkpoints in forms that depend on the engine. Here a
batch is one of the recipe, whoever computes it (`batches`), and a checkpoint holds the gathered adapter
and optimiser, so that a run goes on with more or fewer processes, or under another engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from lily import distributed
from lily.recipes.methods.configs import learning_rate
from lily.recipes.spec.schema import Recipe
from lily.recipes.trainer.batches import SHARE, Batches, Part, weight_of


class Parallel(Trainer):  # type: ignore[misc]
    """To be mixed in before a Trainer.

    Attributes:
        recipe: set before training.
        look: is shown the model once its engine has sharded it, before any checkpoint is loaded into it.
    """

    recipe: Recipe
    optimizer: Any
    look: Callable[[Any], None] | None = None

    @property
    def shards(self) -> bool:
        """Whether the engine holds parts of the model in each process."""
        zero = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return bool(self.is_fsdp_enabled or (zero is not None and zero.zero_stage == 3))

    @property
    def usable(self) -> Any:
        """The model to call: as its engine wrapped it where that is needed for a forward."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.model

    # -- the same rows

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The part of every batch that is this process's."""
        rows, collate = self._encoded(self.train_dataset, "training")
        size = self.recipe.train.batch_size
        lengths = None
        if self.recipe.task not in ("sft", "image-classification"):
            lengths = [len(row["input_ids"]) for row in self.train_dataset]
        group = size * self.recipe.train.gradient_accumulation
        batches = Batches(len(rows), size, self.recipe.seed, lengths, group)
        part = Part(rows, collate, self.args.process_index, self.args.world_size)
        return self._loader(range(len(rows)), batch_sampler=batches, collate_fn=part)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """All rows in every process: a mean over rows must not depend on how they are shared out."""
        if self.args.world_size == 1:
            loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
            return loader
        self.gather_function = _own
        rows, collate = self._encoded(eval_dataset or self.eval_dataset, "evaluation")
        return self._loader(
            rows, sampler=SequentialSampler(rows), collate_fn=collate, batch_size=self.args.eval_batch_size
        )

    def _encoded(self, rows: Any, what: str) -> tuple[Any, Any]:
        """The rows, and what makes a batch of them, without what the model does not take."""
        if hasattr(rows, "column_names"):
            return self._remove_unused_columns(rows, description=what), self.data_collator
        return rows, self._get_collator_with_removed_columns(self.data_collator, description=what)

    def _loader(self, rows: Any, **how: Any) -> DataLoader[Any]:
        loader = DataLoader(rows, pin_memory=self.args.dataloader_pin_memory, **how)
        # accelerate's, for what it does around a loader; each process has been given what it needs already
        ready: DataLoader[Any] = prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return ready

    # -- the same loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Only of tokens: a model with a head takes the mean of its rows, whatever it is told."""
        if self.recipe.task != "sft":
            return None
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As it is, but for a part that is smaller or larger than the others'."""
        share = inputs.pop(SHARE, None)
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if share is None or num_items_in_batch is not None:
            return found
        weight = weight_of(share, self.args.world_size)
        return (found[0] * weight, found[1]) if return_outputs else found * weight

    # -- the optimiser, made when the parameters are what they will be

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on the recipe's parameter groups."""
        if self.optimizer is None:
            groups = parameter_groups(self.recipe, self.model if model is None else model)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.recipe.train.weight_decay)
        made: torch.optim.Optimizer = self.optimizer
        return made

    # -- the same checkpoints

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.look is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.look(self.usable)
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
            else:
                self._load_from_checkpoint(resume_from_checkpoint, self.model_wrapped)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, gathered."""
        if self.is_fsdp_enabled:
            self._save(output_dir, distributed.gathered_state(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            distributed.load_weights(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state as one process has it, gathered in the first one."""
        if self.is_fsdp_enabled:
            return distributed.optimizer_state(self.model, self.optimizer)
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """The other way round."""
        if self.is_fsdp_enabled:
            distributed.load_optimizer_state(self.model, self.optimizer, state)
        else:
            self.optimizer.load_state_dict(state)


def _own(value: Any) -> Any:
    """In place of gathering: this process has them all."""
    return value


def parameter_groups(recipe: Recipe, model: nn.Module) -> list[dict[str, Any]]:
    """The adapter, and a new head with its own learning rate. Frozen parameters are left out."""
    rate = learning_rate(recipe)
    adapter: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (head if "modules_to_save" in name else adapter).append(p)
    groups = [(adapter, rate), (head, recipe.train.head_learning_rate or rate)]
    return [{"params": params, "lr": lr} for params, lr in groups if params]
