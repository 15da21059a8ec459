"""The plan of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lily.plan.budget import parse_count
from lily.plan.report import PlanReport, Wish, dtype_of, report_of

if TYPE_CHECKING:
    from torch import nn

    from lily.recipes.spec.dreambooth import DreamBooth
    from lily.recipes.spec.schema import Model, Recipe

RECIPE_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class RecipeReport:
    """The dry run of a recipe: the recipe as resolved, its plan, and its first example.

    Attributes:
        name: of the recipe.
        method: the recipe's; the plan is Lily's in any case.
        recipe: the resolved recipe as YAML.
        plan: for the recipe's model.
        preview: (text, trained) of the first training example: the loss counts where trained is True; empty where
            there is no text.
    """

    name: str
    method: str
    recipe: str
    plan: PlanReport
    preview: tuple[tuple[str, bool], ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        import yaml

        return {
            "name": self.name,
            "recipe": yaml.safe_load(self.recipe),
            "plan": self.plan.to_dict(),
            "preview": [{"text": text, "trained": trained} for text, trained in self.preview],
        }


def is_recipe(target: str) -> bool:
    """Whether `target` names a recipe: a YAML file by its ending, or one that ships; `:` and a variant may follow."""
    from lily.recipes import loader

    known, head = loader.shipped(), target.rpartition(":")[0]
    if any(name.lower().endswith(RECIPE_ENDINGS) for name in (target, head)):
        return True
    return not Path(target).expanduser().exists() and (target in known or head in known)


def recipe_report(
    target: str, overrides: Sequence[str], *, batch: int | None = None, tokens: int | None = None
) -> RecipeReport:
    """The dry run of a recipe: all that `lily train` checks before it reads weights, and nothing that it writes.

    Of a recipe that describes its hub's model itself (`model.architecture`) the plan alone: nothing is downloaded.

    Args:
        target: path of a YAML file, or name of a recipe that ships.
        overrides: `key=value` each.
        batch: for the estimates; default: the recipe's.
        tokens: for the estimates; default: the recipe's.

    Raises:
        LilyError: for whatever is wrong with the recipe, its data or its model.
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
    from lily.recipes import loader, methods, models, preflight
    from lily.recipes.data import tasks
    from lily.recipes.models import quantization
    from lily.recipes.spec.places import located

    segments: tuple[tuple[str, bool], ...] = ()
    if recipe.model.architecture is not None:
        with located(recipe, "model", "architecture"):
            model = models.described_model(recipe.model, recipe.task)
    else:
        prepared = preflight.prepare(recipe)
        model = prepared.meta
        segments = tuple(tasks.preview(recipe, prepared.processor, prepared.splits.train[0]).segments)
    wish = wish_of(recipe, model, batch=batch, tokens=tokens)
    dtype = dtype_of(model.config) if recipe.model.dtype == "auto" else recipe.model.dtype
    quantised = recipe.model.quantization
    size = None if quantised == "none" else quantization.frozen_bytes(model, recipe.task, quantised)
    decided = methods.decide(recipe, model)
    plan = report_of(
        model,
        decided.modules,
        decided.plan,
        decided.choice,
        wish,
        name=_said(recipe.model),
        dtype=dtype if size is None else quantised,
        base_bytes=size,
    )
    return RecipeReport(recipe.name, recipe.method, loader.dump_recipe(recipe), plan, segments)


def drawing_report(recipe: DreamBooth, batch: int | None, tokens: int | None) -> RecipeReport:
    """The dry run of subject-driven generation: its images are not looked at, and there is no text to preview."""
    from lily.recipes import loader, methods
    from lily.recipes.dreambooth.run import planned

    family, model, _ = planned(recipe)
    usual = (recipe.subject.resolution // 16) ** 2  # where attention begins: an eighth by the autoencoder, then half
    wish = wish_of(recipe, model, batch=batch, tokens=tokens or usual)
    name = f"{family.component} of {recipe.model.hub or recipe.model.path or recipe.model.standin}"
    found = methods.decide(recipe, model)
    dtype = recipe.model.dtype
    plan = report_of(model, found.modules, found.plan, found.choice, wish, name=name, dtype=dtype, base_bytes=None)
    return RecipeReport(recipe.name, recipe.method, loader.dump_recipe(recipe), plan, ())


def _said(model: Model) -> str:
    """A model as the recipe says it, short enough for a title."""
    if model.package is not None:
        return f"{model.package.member} of {model.package.name} {model.package.version}"
    return model.hub or model.path or f"the stand-in {model.standin}"


def _tokens(recipe: Recipe | DreamBooth, model: nn.Module) -> int:
    """Tokens of a sample; of an image its patches, and one that stands for the whole."""
    from lily.recipes.models.load import image_size

    if recipe.task == "dreambooth":
        return 512
    if recipe.task != "image-classification":
        return recipe.data.max_length
    patch = getattr(model.config, "patch_size", 16)
    size = recipe.data.image.size or image_size(model.config)
    return (size // (patch if isinstance(patch, int) else patch[0])) ** 2 + 1


def wish_of(
    recipe: Recipe | DreamBooth, model: nn.Module, *, batch: int | None = None, tokens: int | None = None
) -> Wish:
    """What a recipe asks of a plan."""
    from lily.recipes.methods.configs import saved_heads, task_type_of

    lily = recipe.lily
    return Wish(
        targets=recipe.targets,
        target_parameters=recipe.target_parameters,
        exclude=recipe.exclude,
        r=lily.r,
        num_A=lily.num_A,
        stride_A=lily.stride_A,
        num_B=lily.num_B,
        parameters=None if lily.params is None else parse_count(lily.params),
        routing=lily.routing,
        task=task_type_of(recipe),
        heads=saved_heads(recipe, model),
        batch=batch or recipe.train.batch_size,
        tokens=tokens or _tokens(recipe, model),
    )
