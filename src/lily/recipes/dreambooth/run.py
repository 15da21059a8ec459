"""`lily train` for subject-driven generation: from a recipe to an adapter, its metrics and its images."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lily.errors import LilyError
from lily.io.atomic import new_folder, write_text
from lily.plan.select import select_modules
from lily.progress.display import standard
from lily.progress.progress import Progress
from lily.recipes import loader, methods, preflight
from lily.recipes.begun import as_begun
from lily.recipes.data.sources import local_path
from lily.recipes.methods.terms import warnings_of
from lily.recipes.models.precision import precision_of
from lily.recipes.packages import check_packages
from lily.recipes.results.card import adapter_costs, adapter_summary
from lily.recipes.results.model_card import without_home
from lily.recipes.results.result import Result, output_folder, started
from lily.recipes.results.run_files import newest_checkpoint
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.locations import located

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lily.recipes.dreambooth.families import Family, Text
    from lily.recipes.dreambooth.latents import Encoded

CLASS_IMAGES = "class-images"


@dataclass(frozen=True)
class Prepared:
    """A checked run, ready to start.

    Attributes:
        meta: the denoiser on the meta device.
        subject: the subject's images.
        prior: images of its class; None where there is no prior, or its images are generated.
    """

    family: Family
    meta: nn.Module
    config: PeftConfig
    subject: list[Path]
    prior: list[Path] | None


def planned(recipe: DreamBooth) -> tuple[Family, nn.Module, PeftConfig]:
    """The denoiser without weights, and the configuration of its adapter.

    Raises:
        LilyError: for missing packages, an unsupported pipeline, or targets that match nothing.
    """
    check_packages(recipe)
    from lily.recipes.dreambooth.pipelines import meta_denoiser

    with located(recipe, "model", recipe.model.kind):
        family, meta = meta_denoiser(recipe.model)
    config = methods.peft_config(recipe, meta)
    assert config is not None  # there is no method `none` here
    return family, meta, config


def prepare(recipe: DreamBooth) -> Prepared:
    """Load and check everything that a run needs besides the weights.

    Raises:
        LilyError: for anything wrong with packages, images, pipeline or targets.
    """
    from lily.recipes.dreambooth.latents import image_files, read

    family, meta, config = planned(recipe)
    with located(recipe, "subject", "images"):
        subject = image_files(local_path(recipe.subject.images))
        read(subject, 8)
    prior = None
    if recipe.subject.prior is not None and recipe.subject.prior.images is not None:
        with located(recipe, "subject", "prior", "images"):
            prior = image_files(local_path(recipe.subject.prior.images))[: recipe.subject.prior.count]
            read(prior, 8)
    return Prepared(family, meta, config, subject, prior)


def train(
    recipe: DreamBooth,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    told: Progress | None = None,
) -> Result:
    """Train and write a recipe's adapter, with images before, during and after; see `lily.recipes.train.train`.

    Returns:
        The result, also written to the run's folder: `metrics.json`, `recipe.yaml`, `last/` (the adapter for PEFT),
        `diffusers/` (a LoRA for a pipeline's `load_lora_weights`, unless the adapter is dynamic) and `samples/`.

    Raises:
        LilyError: for anything wrong with recipe, images, pipeline or folder, and for a loss that is not finite.
    """
    if told is None:
        with Progress(standard(quiet)) as told, told.active():
            return train(recipe, resume=resume, overwrite=overwrite, told=told)
    begin = time.perf_counter()
    output = output_folder(recipe)
    recipe = as_begun(recipe, output) if resume else recipe
    preflight.check_folder(recipe, output, resume, overwrite)
    told.announce([recipe.method, *(["lora"] if "lora" in recipe.baselines else [])])
    with told.stage(recipe.method, "loading"):
        prepared = prepare(recipe)
        for warning in warnings_of(recipe, prepared.meta):
            told.warn(f"warning: {warning}")
        pipe = load(recipe, prepared)

    if overwrite and not resume:
        shutil.rmtree(output, ignore_errors=True)
    (output / "samples").mkdir(parents=True, exist_ok=True)
    write_text(output / "recipe.yaml", loader.dump_recipe(recipe))
    told.log_to(output / "train.log")
    result = _run(recipe, prepared, pipe, output, resume, told)
    del pipe
    _write(result, recipe, output, begin)
    if "lora" in recipe.baselines and recipe.method != "lora":
        result.baselines["lora"] = _lora(recipe, output, told)
        _write(result, recipe, output, begin)
    return result


def _write(result: Result, recipe: DreamBooth, output: Path, begin: float) -> None:
    from lily.recipes.dreambooth.report import model_card

    result.seconds["total"] = time.perf_counter() - begin
    result.write(output / "metrics.json")
    write_text(output / "last" / "recipe.yaml", loader.dump_recipe(without_home(recipe)))
    write_text(output / "last" / "README.md", model_card(recipe, result))


def load(recipe: DreamBooth, prepared: Prepared) -> Any:
    """Load the pipeline, whose denoiser must have the planned layers.

    Raises:
        LilyError: if it has others, or cannot be loaded.
    """
    from lily.recipes.dreambooth.pipelines import load_pipeline

    with located(recipe, "model", recipe.model.kind):
        pipe = load_pipeline(recipe.model)
    step = pipe.vae_scale_factor * 2  # a UNet's levels and a transformer's patches need an even number
    with located(recipe, "subject", "resolution"):
        if recipe.subject.resolution % step:
            raise LilyError(f"subject.resolution={recipe.subject.resolution}: the pipeline needs a multiple of {step}")
    wanted = methods.lily_config(recipe, prepared.meta)
    loaded, expected = (select_modules(m, wanted) for m in (getattr(pipe, prepared.family.component), prepared.meta))
    with located(recipe, "model", "architecture"):
        if loaded != expected:
            raise LilyError(
                f"model.architecture={recipe.model.architecture}: the pipeline has other layers ({len(loaded)} to "
                f"adapt, {len(expected)} expected); remove the key"
            )
    return pipe


def _run(recipe: DreamBooth, prepared: Prepared, pipe: Any, output: Path, resume: bool, told: Progress) -> Result:
    from accelerate.utils import set_seed

    from lily.recipes.dreambooth import adapters, loop, samples

    v, family = recipe.validation, prepared.family
    accelerator = loop.accelerator_for(recipe.train, precision_of(recipe))
    pipe.to(accelerator.device)
    model = getattr(pipe, family.component)
    total = sum(p.numel() for p in model.parameters())
    prompts = v.prompts or [recipe.subject.prompt]
    text, drawn, empty = texts(recipe, pipe, family, prompts)

    prior = _prior(recipe, prepared, pipe, family, text, empty, output)
    images = encoded(recipe, pipe, prepared.subject)
    set_seed(recipe.seed)
    adapters.add(model, prepared.config, recipe.model.hub, recipe.model.revision)
    if recipe.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    world = loop.World.of(recipe, pipe, family, images, prior, text)

    def validate(step: int) -> dict[str, float]:
        with accelerator.autocast():
            losses = {"loss": loop.fixed_loss(world, images, 0, v.times, v.seed)}
            if prior is not None:
                losses["prior_loss"] = loop.fixed_loss(world, prior, 1, v.times, v.seed)
        # outside autocast, in which an autoencoder that the pipeline puts in float32 would overflow in float16
        for number, prompt in enumerate(drawn):
            images_drawn = samples.draw(pipe, family, prompt, empty, recipe.subject.resolution, v, v.images, v.seed)
            samples.write_grid(images_drawn, output / "samples" / _grid(step, number))
        return losses

    run = loop.Run(recipe, world, accelerator, output / "checkpoints", validate)
    told.tell(
        f"{recipe.name}  {recipe.task}, {recipe.method}, seed {recipe.seed}: {len(images)} images, "
        f"{sum(p.numel() for p in run.parameters):,} parameters train, into {output}"
    )
    checkpoint = newest_checkpoint(output / "checkpoints") if resume else None
    if checkpoint is not None:
        run.resume(checkpoint)
    clock = time.perf_counter()
    run.run(told)
    result = started(recipe, "loss", "train", ("diffusers", "accelerate"))
    result.seconds["train"] = time.perf_counter() - clock
    adapters.save(model, output / "last")
    adapters.write_for_pipelines(model, pipe, family, output / "diffusers")
    result.before, result.final, result.history = _loss(run.history[0]), _loss(run.history[-1]), run.history
    epochs = run.step * recipe.train.batch_size * recipe.train.gradient_accumulation / len(images)
    result.last = {"epoch": epochs, "value": run.history[-1]["loss"]}
    best = min(run.history[1:], key=lambda h: h["loss"])
    result.best = {"epoch": epochs * best["step"] / run.step, "value": best["loss"]}
    result.rows = {"train": len(images), "prior": 0 if prior is None else len(prior), "validation": 0, "test": 0}
    result.parameters = {"adapter": sum(p.numel() for p in run.parameters), "head": 0, "base": total}
    result.adapter = {**adapter_summary(model, recipe), "component": family.component}
    result.adapter_bytes = (output / "last" / adapters.WEIGHTS).stat().st_size
    result.samples = [
        {"prompt": prompt, "before": f"samples/{_grid(0, number)}", "after": f"samples/{_grid(run.step, number)}"}
        for number, prompt in enumerate(prompts)
    ]
    return result


def _grid(step: int, number: int) -> str:
    return f"step-{step:05d}-prompt-{number}.png"


def _loss(found: dict[str, float]) -> dict[str, float]:
    return {name: found[name] for name in ("loss", "prior_loss") if name in found}


def texts(recipe: DreamBooth, pipe: Any, family: Family, prompts: list[str]) -> tuple[Text, list[Text], Text]:
    """Encode prompts to train on, prompts to draw and the empty one; then drop the text encoders to free memory."""
    import torch

    prior = [] if recipe.subject.prior is None else [recipe.subject.prior.prompt]
    known = [recipe.subject.prompt, *prior]
    with torch.no_grad():
        every = family.encode(pipe, [*known, *prompts, ""], recipe.model.max_tokens)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, None)
    one_each = [every.rows([i]) for i in range(len(known), len(every.tokens))]
    return every.rows(list(range(len(known)))), one_each[:-1], one_each[-1]


def encoded(recipe: DreamBooth, pipe: Any, files: list[Path]) -> Encoded:
    """Encode images at the recipe's resolution."""
    from lily.recipes.dreambooth.latents import encode, read

    return encode(pipe.vae, *read(files, recipe.subject.resolution), batch=1)


def _prior(
    recipe: DreamBooth, prepared: Prepared, pipe: Any, family: Family, text: Text, empty: Text, output: Path
) -> Encoded | None:
    """Encoded images of the class: the recipe's, or generated by the pipeline before it gets its adapter."""
    from lily.recipes.dreambooth.latents import image_files
    from lily.recipes.dreambooth.samples import draw

    wanted = recipe.subject.prior
    if wanted is None:
        return None
    if prepared.prior is not None:
        return encoded(recipe, pipe, prepared.prior)
    folder = output / CLASS_IMAGES
    if not folder.is_dir():  # a resumed run has them already
        resolution = recipe.subject.resolution
        made = draw(pipe, family, text.rows([1]), empty, resolution, recipe.validation, wanted.count, recipe.seed)
        with new_folder(folder) as new:
            for number, image in enumerate(made):
                image.save(new / f"{number:04d}.png")
    return encoded(recipe, pipe, image_files(folder))


def _lora(recipe: DreamBooth, output: Path, told: Progress) -> dict[str, float]:
    """The metrics and costs of the same run with LoRA, in a subfolder."""
    changes: dict[str, Any] = {"method": "lora", "baselines": [], "output": str(output / "lora")}
    if recipe.subject.prior is not None and (output / CLASS_IMAGES).is_dir():
        prior = recipe.subject.prior.model_copy(update={"images": str(output / CLASS_IMAGES)})
        changes["subject"] = recipe.subject.model_copy(update={"prior": prior})
    other = recipe.model_copy(update=changes)
    lora = train(other, overwrite=True, told=told)
    return {**lora.final, **adapter_costs(lora)}
