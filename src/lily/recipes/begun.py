"""What an earlier version began goes on as it was begun: defaults of recipes that have changed since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Recipe

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | DreamBooth)


def as_begun(recipe: AnyRecipe, folder: Path) -> AnyRecipe:
    """The recipe, with what its open keys meant to the version that began a run, a search or a comparison in a folder.

    Args:
        recipe: the recipe to go on with; keys that it sets stay as they are.
        folder: where runs are; it may be missing.
    """
    kept = _kept(folder)
    if kept is None or "params" not in kept:  # runs keep every key; a recipe without some was put there by someone
        return recipe
    changed: dict[str, Any] = {}
    if recipe.lily.distinct is None and kept.get("distinct", "none") == "none":
        changed["distinct"] = "none"
    if recipe.lily.scaling is None and "distinct" not in kept:  # as old as that, the default scale was a number
        changed["scaling"] = 1.0
    if recipe.lily.params is not None and recipe.lily.fewest is None and "fewest" not in kept:
        changed["fewest"] = 2
    if not changed:
        return recipe
    return cast(AnyRecipe, recipe.model_copy(update={"lily": recipe.lily.model_copy(update=changed)}))


def _kept(folder: Path) -> Mapping[str, Any] | None:
    """The section `lily` of the recipe of a run, a search, or the first run of a comparison or a sweep."""
    # not in every folder, since this one may be refused later, such as `/`
    runs = [file for part in ("runs", "tuning") for file in sorted((folder / part).glob("**/recipe.yaml"))]
    files = (folder / "recipe.yaml", folder / "settings.json", *runs)
    return next((found for file in files if (found := _section(file)) is not None), None)


def _section(file: Path) -> Mapping[str, Any] | None:
    try:
        values = yaml.safe_load(file.read_text("utf-8"))  # JSON is YAML
        values = (values["recipe"] if file.suffix == ".json" else values)["lily"]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, yaml.YAMLError):
        return None  # whoever reads the file says what is wrong with it
    return values if isinstance(values, Mapping) else None
