"""`lily plan RECIPE`: everything that can be checked and counted before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lily.errors import LilyError
from lily.plan.report import PlanReport, dtype_of, linear_layers, report_of
from lily.recipes.schedule import Schedule, drawing_schedule, schedule_of

if TYPE_CHECKING:
    from torch import nn

    from lily.plan.decide import Decided
    from lily.recipes.data.summary import Summary
    from lily.recipes.methods.terms import Terms
    from lily.recipes.pace import Work
    from lily.recipes.preflight import Prepared
    from lily.recipes.spec.dreambooth import DreamBooth
    from lily.recipes.spec.schema import Model, Recipe


@dataclass(frozen=True)
class RecipeReport:
    """The dry run of a recipe: the recipe as resolved, its plan, its data, and its first example.

    Attributes:
        recipe: as YAML.
        plan: of Lily on the recipe's model, for every method.
        preview: (text, trained) of the first training example; the loss counts where trained is True. Empty if no
            example was read.
        data: what the data are; None where they were not read.
        no_data: why they were not read.
        learning_rates: part of what is trained -> learning rate; empty if train.B_lr_ratio and train.router_lr_ratio
            change none.
        schedule: steps and evaluations; None where the rows that they follow from were not read.
        work: what a pass computes, for an estimate of the time; None where there is none.
        source: the recipe that was planned.
        decided: Lily on its model.
        terms: learning rate and scale of the recipe's method and of those beside it.
    """

    name: str
    method: str
    recipe: str
    plan: PlanReport
    preview: tuple[tuple[str, bool], ...]
    data: Summary | None = None
    no_data: str = ""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    schedule: Schedule | None = None
    work: Work | None = None
    source: Recipe | DreamBooth | None = None
    decided: Decided | None = None
    terms: tuple[Terms, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; what only people read (from `schedule` on) is left out."""
        import yaml

        return {
            "name": self.name,
            "recipe": yaml.safe_load(self.recipe),
            "plan": self.plan.to_dict(),
            "preview": [{"text": text, "trained": trained} for text, trained in self.preview],
            "data": None if self.data is None else self.data.to_dict(),
            "learning_rates": dict(self.learning_rates),
        }


def recipe_report(recipe: Recipe | DreamBooth, *, batch: int | None = None, tokens: int | None = None) -> RecipeReport:
    """Check all that `lily train` checks before it reads weights, and plan the adapter; writes nothing.

    A recipe that describes its model (`model.architecture`) gets the plan only: nothing is downloaded.

    Args:
        recipe: from `lily.recipes.loader.load_any`.
        batch: samples per step, for the estimates; default: the recipe's.
        tokens: tokens per sample, for the estimates; default: the longest example's, at most the recipe's.

    Raises:
        LilyError: if the recipe's data or its model is not valid.
    """
    from lily.recipes import preflight
    from lily.recipes.by_task import function_for
    from lily.recipes.results.result import output_folder

    preflight.check_output(recipe, output_folder(recipe))
    report: RecipeReport = function_for("plan", recipe)(recipe, batch, tokens)
    return report


def text_report(recipe: Recipe, batch: int | None, tokens: int | None) -> RecipeReport:
    """`recipe_report` for text and images."""
    from lily.recipes import models, preflight
    from lily.recipes.data import tasks
    from lily.recipes.models import quantization
    from lily.recipes.spec.locations import located

    preview: tuple[tuple[str, bool], ...] = ()
    schedule = work = None
    if recipe.model.architecture is not None:
        with located(recipe, "model", "architecture"):
            model = models.described_model(recipe.model, recipe.task)
        seen, no_data = _described_data(recipe)
        if seen is not None:
            schedule = schedule_of(recipe, seen.parts[0].used)
    else:
        prepared = preflight.prepare(recipe)
        model = prepared.meta
        seen, no_data = prepared.data, ""
        tokens = tokens or _longest(recipe, prepared.data)
        preview = tasks.preview(recipe, prepared.processor, prepared.first)
        schedule, work = schedule_of(recipe, len(prepared.train)), _work(recipe, prepared)
    dtype = dtype_of(model.config) if recipe.model.dtype == "auto" else str(recipe.model.dtype)
    size = None
    if recipe.model.quantization != "none":
        dtype = recipe.model.quantization
        size = quantization.frozen_bytes(model, recipe.task, recipe.model.quantization)
    report = _report(recipe, model, _model_name(recipe.model), dtype, batch, tokens, preview, size)
    return replace(report, data=seen, no_data=no_data, schedule=schedule, work=work)


def _work(recipe: Recipe, prepared: Prepared) -> Work | None:
    """What a pass computes: batches are as long as their longest row, about the 95th percentile of the lengths."""
    from lily.recipes import pace
    from lily.recipes.models.precision import precision_of

    tokens, lengths = tokens_of(recipe, prepared.meta), prepared.data.parts[0].lengths
    if lengths is not None:
        tokens = max(1, min(lengths.p95, recipe.data.max_length))
    shapes = [(layer.in_features, layer.out_features) for layer in linear_layers(prepared.meta)]
    rank = int(getattr(prepared.config, "r", 0) or 1)
    return pace.work_of(prepared.meta.config, shapes, rank, tokens, precision_of(recipe))


def _longest(recipe: Recipe, data: Summary) -> int | None:
    """Tokens of the longest example, as it is cut: a batch is no longer than that. None: images, or packed rows."""
    longest = [part.lengths.longest for part in data.parts if part.lengths is not None]
    return None if recipe.train.packing or not longest else min(max(longest), recipe.data.max_length)


def _described_data(recipe: Recipe) -> tuple[Summary | None, str]:
    """The data beside a described model, without lengths, or why they are not read."""
    from lily.recipes import data
    from lily.recipes.data import sources
    from lily.recipes.data.summary import summarize

    for key, file in recipe.data.files.items():
        name = f"data.{'.'.join(key)}"
        if file.path is None:
            return None, f"{name} is downloaded, which a plan of a described model (model.architecture) does not do"
        try:
            sources.local_path(file.path)
        except LilyError as error:
            return None, f"{name} is not here: {error}"
    return summarize(recipe, data.load_splits(recipe), {}), ""


def drawing_report(recipe: DreamBooth, batch: int | None, tokens: int | None) -> RecipeReport:
    """`recipe_report` for subject-driven generation; its images are not read, and there is no preview."""
    from lily.recipes.dreambooth.run import planned

    family, model, _ = planned(recipe)
    name = f"{family.component} of {recipe.model.hub or recipe.model.path or recipe.model.standin}"
    report = _report(recipe, model, name, recipe.model.dtype, batch, tokens)
    return replace(report, schedule=drawing_schedule(recipe))


def _report(
    recipe: Recipe | DreamBooth,
    model: nn.Module,
    name: str,
    dtype: str,
    batch: int | None,
    tokens: int | None,
    preview: tuple[tuple[str, bool], ...] = (),
    base_bytes: int | None = None,
) -> RecipeReport:
    from lily.recipes import loader, methods
    from lily.recipes.methods.terms import contestants, terms_of

    decided = methods.decide(recipe, model)
    plan = report_of(
        model,
        decided,
        name=name,
        dtype=dtype,
        batch=batch or recipe.train.batch_size,
        tokens=tokens or tokens_of(recipe, model),
        base_bytes=base_bytes,
        lora_alpha=None if recipe.lora.alpha is None else float(recipe.lora.alpha),
    )
    rates = methods.planned_rates(recipe, decided.plan)
    return RecipeReport(
        recipe.name,
        recipe.method,
        loader.dump_recipe(recipe),
        plan,
        preview,
        learning_rates=rates,
        source=recipe,
        decided=decided,
        terms=tuple(terms_of(recipe, model, contestants(recipe))),
    )


def _model_name(model: Model) -> str:
    if model.package is not None:
        return f"{model.package.member} of {model.package.name} {model.package.version}"
    return model.hub or model.path or f"the stand-in {model.standin}"


def tokens_of(recipe: Recipe | DreamBooth, model: nn.Module) -> int:
    """Tokens of a sample; of an image, its patches and one for the whole image."""
    from lily.recipes.models.load import image_size

    if recipe.task == "dreambooth":
        return (recipe.subject.resolution // 16) ** 2  # the autoencoder divides by 8, and attention starts at half
    if recipe.task != "image-classification":
        return recipe.data.max_length
    patch = getattr(model.config, "patch_size", 16)
    size = recipe.data.image.size or image_size(model.config)
    return (size // (patch if isinstance(patch, int) else patch[0])) ** 2 + 1
