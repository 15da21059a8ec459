"""Dispatch by task: which functions train, plan, collapse and export a recipe of text or images, and one for drawing.

Functions are named, not imported: a recipe of text needs no diffusers, and this table lies below all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from lily.recipes.spec.dreambooth import DreamBooth
    from lily.recipes.spec.schema import Recipe

Verb = Literal["train", "print_result", "plan", "collapse", "load_for_export"]

# Task of text or images -> the recipe that those for own data extend.
BASES = {
    "text-classification": "base/encoder",
    "text-regression": "base/encoder",
    "image-classification": "base/vision",
    "sft": "base/chat",
}

# Verb -> (for text and images, for task dreambooth). The two functions of a verb take the same arguments.
FUNCTIONS: dict[Verb, tuple[str, str]] = {
    "train": ("lily.recipes.train.train", "lily.recipes.dreambooth.run.train"),
    "print_result": ("lily.recipes.results.card.print_result", "lily.recipes.dreambooth.report.print_result"),
    "plan": ("lily.recipes.dry_run.text_report", "lily.recipes.dry_run.drawing_report"),
    "collapse": ("lily.recipes.deploy.collapse_text", "lily.recipes.dreambooth.deploy.collapse"),
    "load_for_export": ("lily.recipes.deploy.load_text", "lily.recipes.dreambooth.deploy.load"),
}


def function_for(verb: Verb, recipe: Recipe | DreamBooth | None) -> Callable[..., Any]:
    """The function that does `verb` with recipes of this recipe's task; None: an adapter without a recipe."""
    text, drawing = FUNCTIONS[verb]
    chosen = drawing if recipe is not None and recipe.task == "dreambooth" else text
    module, _, name = chosen.rpartition(".")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
