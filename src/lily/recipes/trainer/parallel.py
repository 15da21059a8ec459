"""A Trainer with the same batches, losses and checkpoints on any number of processes.

transformers gives each process separate batches, fills the last ones up with repeated rows, averages over processes
means over unequal numbers of rows, and writes FSDP checkpoints that depend on the engine. Here the recipe's batch is
split among the processes (`batches`), and a checkpoint holds the gathered adapter and optimizer, so that a run resumes
on more or fewer processes, or under another engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from lily import distributed
from lily.callbacks.null_space import NullSpaceCallback, null_space
from lily.recipes.spec.schema import Recipe
from lily.recipes.trainer.batches import SHARE, Batches, Part, weight_of
from lily.recipes.trainer.optimizer_groups import parameter_groups
from lily.tuner.data_start import initialize_from_data

# The start from data stops after this number of batches, if the directions have not converged before.
DATA_BATCHES = 32


class Parallel(Trainer):  # type: ignore[misc]
    """Mixin, to come before a Trainer class.

    Attributes:
        recipe: set before training.
        on_sharded: called with the model after the engine has sharded it, before a checkpoint is loaded into it.
    """

    recipe: Recipe
    optimizer: Any
    on_sharded: Callable[[Any], None] | None = None

    @property
    def shards(self) -> bool:
        """Whether the engine holds parts of the model in each process."""
        zero = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return bool(self.is_fsdp_enabled or (zero is not None and zero.zero_stage == 3))

    @property
    def usable(self) -> Any:
        """The model to call: the engine's wrapper where a forward needs it."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.model

    # -- the same rows

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The part of every batch that belongs to this process."""
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
        """All rows in every process, so that a mean over rows does not depend on the number of processes."""
        if self.args.world_size == 1:
            loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
            return loader
        self.gather_function = lambda value: value  # every process has all rows
        rows, collate = self._encoded(eval_dataset or self.eval_dataset, "evaluation")
        return self._loader(
            rows, sampler=SequentialSampler(rows), collate_fn=collate, batch_size=self.args.eval_batch_size
        )

    def _encoded(self, rows: Any, what: str) -> tuple[Any, Any]:
        """Rows and collator without the columns that the model does not take."""
        if hasattr(rows, "column_names"):
            return self._remove_unused_columns(rows, description=what), self.data_collator
        return rows, self._get_collator_with_removed_columns(self.data_collator, description=what)

    def _loader(self, rows: Any, **how: Any) -> DataLoader[Any]:
        loader = DataLoader(rows, pin_memory=self.args.dataloader_pin_memory, **how)
        # for accelerate's bookkeeping; the rows are split among the processes already, so it gets one process
        ready: DataLoader[Any] = prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return ready

    def start_from_data(self) -> None:
        """Start A (`init_weights: data`) from the first training batches, those of all processes together."""

        def forward(model: nn.Module, batch: dict[str, Any]) -> None:
            model(**{name: value for name, value in batch.items() if name != SHARE})

        batches = self.get_train_dataloader()
        initialize_from_data(self.model, batches, max_batches=DATA_BATCHES, forward=forward)

    def keep_out(self, texts: Sequence[dict[str, Any]]) -> None:
        """Keep A out of what these encoded texts use (`lily.null_space`)."""
        section, device = self.recipe.lily.null_space, next(self.model.parameters()).device
        assert section is not None
        batches = [{"input_ids": torch.tensor([text["input_ids"]], device=device)} for text in texts]
        self.add_callback(NullSpaceCallback(null_space(self.model, batches, energy=section.energy)))

    # -- the same loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """None unless the loss is over tokens: models with a head ignore the number and take the mean over rows."""
        if self.recipe.task != "sft":
            return None
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, weighted where this process has fewer or more rows of the batch than the others."""
        share = inputs.pop(SHARE, None)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if share is None or num_items_in_batch is not None:
            return loss
        weight = weight_of(share, self.args.world_size)
        return (loss[0] * weight, loss[1]) if return_outputs else loss * weight

    # -- the optimizer, created after the engine has replaced the parameters

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on the recipe's parameter groups."""
        if self.optimizer is None:
            groups = parameter_groups(self.recipe, self.model if model is None else model)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.recipe.train.weight_decay)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    # -- the same checkpoints

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.on_sharded is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.on_sharded(self.usable)
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
        """The optimizer's state as on a single process, gathered in the first one."""
        if self.is_fsdp_enabled:
            return distributed.optimizer_state(self.model, self.optimizer)
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load what `optimizer_state` returned."""
        if self.is_fsdp_enabled:
            distributed.load_optimizer_state(self.model, self.optimizer, state)
        else:
            self.optimizer.load_state_dict(state)
