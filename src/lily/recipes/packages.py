"""Packages that a recipe needs beside the core's, found without importing them."""

from __future__ import annotations

from importlib.util import find_spec

from lily.errors import LilyError
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Recipe

DIFFUSION = '"lily-peft[diffusion]"'

# Module -> what to install.
EXTRAS = {
    "sklearn": '"lily-peft[demo]"',
    "scipy": '"lily-peft[demo]"',
    "accelerate": '"lily-peft[demo]"',
    "transformers": '"lily-peft[demo]"',
    "trl": '"lily-peft[sft]"',
    "datasets": '"lily-peft[sft]"',
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "PIL": '"lily-peft[vision]"',
    "bitsandbytes": '"lily-peft[quantized]"',
    "diffusers": DIFFUSION,
    "optuna": '"lily-peft[tune]"',
    "matplotlib": '"lily-peft[plots]"',
}


def check_packages(recipe: Recipe | DreamBooth) -> None:
    """Check that the packages which a recipe needs are installed.

    Raises:
        LilyError: names what to install.
    """
    for name in _needed(recipe):
        if find_spec(name) is None and not (name == "tensorboard" and find_spec("tensorboardX")):
            extra = DIFFUSION if isinstance(recipe, DreamBooth) else None
            raise LilyError(missing(name, extra))


def _needed(recipe: Recipe | DreamBooth) -> list[str]:
    if isinstance(recipe, DreamBooth):
        return ["diffusers", "accelerate", "PIL"]
    needed = ["sklearn", "scipy", *recipe.train.report_to]
    if recipe.task == "image-classification":
        needed += ["PIL"]
    if recipe.task == "sft":
        needed += ["trl", "datasets"]
    if recipe.model.quantization != "none":
        needed += ["bitsandbytes", "accelerate"]
    return needed


def missing(module: str, extra: str | None = None) -> str:
    """The message about a module that is not installed; by default, with the extra that it belongs to."""
    return f"{module} is not installed; pip install {extra or EXTRAS.get(module, module)}"
