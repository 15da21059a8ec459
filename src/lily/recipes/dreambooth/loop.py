"""The training loop: accelerate around diffusers' parts.

The random numbers of a step (images, noise, times, dropout) follow from the seed and the step's number alone, so a
resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lily.errors import LilyError
from lily.io.atomic import new_folder, write_text
from lily.progress.progress import Progress
from lily.recipes.dreambooth import adapters
from lily.recipes.dreambooth.families import Family, Text
from lily.recipes.dreambooth.latents import Encoded
from lily.recipes.dreambooth.objectives import Objective
from lily.recipes.results.run_files import newest_checkpoint
from lily.recipes.scoring.metrics import figures
from lily.recipes.spec.dreambooth import DreamBooth, Steps
from lily.recipes.trainer.state_files import load_state, save_state

STATE, PROGRESS = "state", "progress.json"
TRAINING, VALIDATION = "training", "validation"  # stages of what is told
EVALUATED = 4  # batch size of the fixed loss


@dataclass(frozen=True)
class World:
    """The model and data of a run.

    Attributes:
        model: the denoiser with its adapter.
        dtype: of its frozen weights.
        images: those of the subject.
        prior: those of its class; None without prior preservation.
        text: the subject's prompt, and the class's where there is a prior: one row each.
    """

    model: Any
    family: Family
    objective: Objective
    dtype: torch.dtype
    images: Encoded
    prior: Encoded | None
    text: Text

    @classmethod
    def of(
        cls, recipe: DreamBooth, pipe: Any, family: Family, images: Encoded, prior: Encoded | None, text: Text
    ) -> World:
        """Build it from a recipe and a pipeline whose denoiser has its adapter."""
        objective, dtype = family.objective(pipe.scheduler, recipe.train), getattr(torch, recipe.model.dtype)
        return cls(getattr(pipe, family.component), family, objective, dtype, images, prior, text)

    def losses(
        self, model: nn.Module, images: Encoded, rows: list[int], latents: Tensor, noise: Tensor, times: Tensor
    ) -> Tensor:
        """The loss of each sample, (batch,); `rows`: the index of each sample's prompt."""
        text = self.text.rows(rows).to(self.dtype)

        def predict(noisy: Tensor, at: Tensor) -> Tensor:
            return self.family.predict(model, noisy.to(self.dtype), at, text, images.sizes)

        return self.objective.losses(predict, latents, noise, times)


def generator(*numbers: int) -> torch.Generator:
    """A random generator seeded with these numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


def chosen(count: int, batch: int, micro: int, seed: int) -> Tensor:
    """Indices (batch,) into `count` images for batch number `micro`: each image once per epoch, in a new order."""
    positions = range(micro * batch, (micro + 1) * batch)
    orders = {p // count: torch.randperm(count, generator=generator(seed, 1, p // count)) for p in positions}
    return torch.stack([orders[p // count][p % count] for p in positions])


def train_loss(world: World, model: nn.Module, recipe: DreamBooth, micro: int) -> Tensor:
    """The loss of batch number `micro`, prior preservation included; `model` as accelerate prepared it."""
    count, source = recipe.train.batch_size, generator(recipe.seed, 0, micro)
    torch.manual_seed(int(torch.randint(2**62, (), generator=source)))  # for dropout
    parts = [world.images.rows(chosen(len(world.images), count, micro, recipe.seed))]
    if world.prior is not None:
        parts.append(world.prior.rows(chosen(len(world.prior), count, micro, recipe.seed + 1)))
    images = Encoded(*(torch.cat([getattr(p, n) for p in parts]) for n in ("mean", "std", "sizes")))
    latents, times = images.draw(source), world.objective.draw(len(images), source)
    noise = torch.randn(latents.shape, generator=source).to(latents)
    rows = [number for number in range(len(parts)) for _ in range(count)]
    losses = world.losses(model, images, rows, latents, noise, times)
    weight = 0.0 if recipe.subject.prior is None else recipe.subject.prior.weight
    return losses[:count].mean() + (weight * losses[count:].mean() if world.prior is not None else 0.0)


@torch.no_grad()
def fixed_loss(world: World, images: Encoded, row: int, times: int, seed: int) -> float:
    """The loss with the same noise at the same levels (`times` for each image) in every call, for comparisons.

    `row` is the index of the images' prompt.
    """
    training = world.model.training
    world.model.eval()
    levels, total = world.objective.even(times), 0.0
    for number in range(len(images)):
        source = generator(seed, 2, number)
        noise = torch.randn(times, *images.mean.shape[1:], generator=source).to(images.mean)
        for at in torch.split(torch.arange(times), EVALUATED):
            same = images.rows(torch.full((len(at),), number))
            losses = world.losses(world.model, same, [row] * len(at), same.mean, noise[at], levels[at])
            total += float(losses.sum())
    world.model.train(training)
    return total / (times * len(images))


def accelerator_for(train: Steps, precision: str) -> Any:
    """An accelerator for one process.

    Raises:
        LilyError: for several processes, or float16 without a GPU.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if precision == "float16" and not torch.cuda.is_available():
        raise LilyError("train.precision=float16 needs a GPU; use bfloat16 or float32")
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run may have had another precision
    accelerator = Accelerator(
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision],
        gradient_accumulation_steps=train.gradient_accumulation,
        cpu=not torch.cuda.is_available(),
    )
    if accelerator.num_processes > 1:
        raise LilyError(
            f"task dreambooth runs in one process, not {accelerator.num_processes}; start it without a launcher"
        )
    return accelerator


class Run:
    """A training run: its state, its checkpoints, its history.

    Args:
        recipe: the schedule.
        world: model and data.
        accelerator: see `accelerator_for`.
        folder: of the checkpoints.
        validate: called with the step before training, every `validation.every` steps and at the end, in eval mode;
            returns what goes into the history.

    Attributes:
        history: the metrics of every validation, with its step.
    """

    def __init__(
        self,
        recipe: DreamBooth,
        world: World,
        accelerator: Any,
        folder: Path,
        validate: Callable[[int], dict[str, float]],
    ) -> None:
        from diffusers.optimization import get_scheduler

        from lily.recipes.trainer.optimizer_groups import parameter_groups

        t = recipe.train
        self.recipe, self.world, self.folder, self.validate = recipe, world, folder, validate
        self.accelerator = accelerator
        self.parameters = [p for p in world.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameter_groups(recipe, world.model), weight_decay=t.weight_decay)
        name = "constant_with_warmup" if t.schedule == "constant" else t.schedule
        schedule = get_scheduler(name, optimizer, num_warmup_steps=t.warmup, num_training_steps=t.max_steps)
        self.model, self.optimizer, self.schedule = accelerator.prepare(world.model, optimizer, schedule)
        self.history: list[dict[str, float]] = []
        self.step = 0

    def run(self, told: Progress) -> None:
        """Train to the recipe's last step, with validations and checkpoints.

        Raises:
            LilyError: if the loss is not finite; the last checkpoint is kept.
        """
        who, total, every = self.recipe.method, self.recipe.train.max_steps, self.recipe.validation.every
        told.expect(who, TRAINING, {"train": total - self.step})
        told.expect(who, VALIDATION, {"draw": math.ceil((total - self.step) / every) + (not self.history)})
        if not self.history:
            self._validate({}, told)
        self.model.train()
        losses: list[float] = []
        with told.stage(who, TRAINING):
            while self.step < total:
                losses.append(self._one_step())
                self.step += 1
                told.advance(1, "train")
                if self.step % every == 0 or self.step == total:
                    self._validate({"train_loss": sum(losses) / len(losses)}, told)
                    losses = []
                    self._save()
        self.world.model.eval()

    def _one_step(self) -> float:
        accumulated, value = self.recipe.train.gradient_accumulation, 0.0
        for part in range(accumulated):
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    loss = train_loss(self.world, self.model, self.recipe, self.step * accumulated + part)
                if not math.isfinite(loss.item()):
                    raise LilyError(
                        f"the loss is {loss.item()} at step {self.step + 1}; lower train.learning_rate{self._kept()}"
                    )
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.parameters, self.recipe.train.max_grad_norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            value += loss.item() / accumulated
        return value

    def _kept(self) -> str:
        kept = newest_checkpoint(self.folder)
        return "" if kept is None else f"; the adapter of step {int(kept.name.rpartition('-')[2])} is in {kept}"

    def _validate(self, metrics: dict[str, float], told: Progress) -> None:
        who, total = self.recipe.method, self.recipe.train.max_steps
        with told.stage(who, VALIDATION):
            self.world.model.eval()
            self.history.append({"step": self.step, **metrics, **self.validate(self.step)})
            self.world.model.train()
            told.advance(1, "draw")
        losses = {name: value for name, value in self.history[-1].items() if name != "step"}
        best = self.step > 0 and losses["loss"] == min(entry["loss"] for entry in self.history)
        told.evaluated(who, f"step {self.step}/{total}", figures(losses), best)

    def _save(self) -> None:
        """Write a checkpoint, which gets its name when it is complete, and remove older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"checkpoint-{self.step}"
        with new_folder(target, overwrite=True) as new:
            save_file(adapters.state_of(self.world.model), new / adapters.WEIGHTS)
            kept = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
            if self.accelerator.scaler is not None:
                kept["scaler"] = self.accelerator.scaler.state_dict()
            save_state(kept, new, STATE)
            write_text(new / PROGRESS, json.dumps({"step": self.step, "history": self.history}))
        for old in self.folder.glob("checkpoint-*"):
            if old != target:
                shutil.rmtree(old)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            LilyError: if it cannot be read.
        """
        try:
            kept = load_state(checkpoint, STATE)
            progress = json.loads((checkpoint / PROGRESS).read_text("utf-8"))
            adapters.load_weights(self.world.model, checkpoint / adapters.WEIGHTS)
            # the name in checkpoints of earlier versions differs in its spelling
            self.optimizer.load_state_dict(next(state for name, state in kept.items() if name.startswith("optimi")))
            self.schedule.load_state_dict(kept["schedule"])
            if self.accelerator.scaler is not None and "scaler" in kept:
                self.accelerator.scaler.load_state_dict(kept["scaler"])
        except Exception as error:  # a damaged file may raise anything, by its part
            raise LilyError(
                f"checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}); remove it and start again "
                "with --overwrite"
            ) from None
        self.step, self.history = int(progress["step"]), list(progress["history"])
