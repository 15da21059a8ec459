"""`lily plan RECIPE`: everything that can be checked and counted before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lily.errors import LilyError
from lily.plan.report import PlanReport, dtype_of, report_of

if TYPE_CHECKING:
    from torch import nn

    from lily.recipes.data.summary import Summary
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
    """

    name: str
    method: str
    recipe: str
    plan: PlanReport
    preview: tuple[tuple[str, bool], ...]
    data: Summary | None = None
    no_data: str = ""
    learning_rates: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        import yaml

        return {
            "name": self.name,
            "recipe": yaml.safe_load(self.recipe),
            "plan": self.plan.to_dict(),
            "preview": [{"text": text, "trained": trained} for text, trained in self.preview],
            "data": None if self.data is None else self.data.to_dict(),
            "learning_rates": dict(self.learning_rates),
        }


def recipe_report(
    target: str, overrides: Sequence[str], *, batch: int | None = None, tokens: int | None = None
) -> RecipeReport:
    """Check all that `lily train` checks before it reads weights, and plan the adapter; writes nothing.

    A recipe that describes its model (`model.architecture`) gets the plan only: nothing is downloaded.

    Args:
        target: path of a YAML file, or name of a shipped recipe.
        overrides: `key=value` each.
        batch: samples per step, for the estimates; default: the recipe's.
        tokens: tokens per sample, for the estimates; default: the recipe's.

    Raises:
        LilyError: if the recipe, its data or its model is not valid.
    """
    from lily.recipes import loader, preflight
    from lily.recipes.by_task import function_for
    from lily.recipes.results.result import output_folder

    recipe = loader.load_any(target, list(overrides))
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
    if recipe.model.architecture is not None:
        with located(recipe, "model", "architecture"):
            model = models.described_model(recipe.model, recipe.task)
        seen, no_data = _described_data(recipe)
    else:
        prepared = preflight.prepare(recipe)
        model = prepared.meta
        seen, no_data = prepared.data, ""
        preview = tasks.preview(recipe, prepared.processor, prepared.first)
    dtype = dtype_of(model.config) if recipe.model.dtype == "auto" else str(recipe.model.dtype)
    size = None
    if recipe.model.quantization != "none":
        dtype = recipe.model.quantization
        size = quantization.frozen_bytes(model, recipe.task, recipe.model.quantization)
    report = _report(recipe, model, _model_name(recipe.model), dtype, batch, tokens, preview, size)
    return replace(report, data=seen, no_data=no_data)


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
    return _report(recipe, model, name, recipe.model.dtype, batch, tokens)


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
    return RecipeReport(recipe.name, recipe.method, loader.dump_recipe(recipe), plan, preview, learning_rates=rates)


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
