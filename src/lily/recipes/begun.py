"""What an earlier version began goes on as it was begun: defaults of recipes that have changed since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Recipe

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe | DreamBooth)

# Keys of the section `lily` whose default is now None, and what a version meant that did not have the key or the None.
EARLIER = {"scaling": 1.0, "distinct": "none"}


def as_begun(recipe: AnyRecipe, folder: Path) -> AnyRecipe:
    """The recipe, with what its open keys meant to the version that began a run, a search or a comparison in a folder.

    Args:
        recipe: the recipe to go on with; keys that it sets stay as they are.
        folder: where runs are; it may be missing.
    """
    kept, single = _kept(folder)
    if kept is None or "params" not in kept:  # runs keep every key; a recipe without some was put there by someone
        return recipe
    changed = {}
    for key, meaning in EARLIER.items():
        # the scale of a single run of a search is what the search tried, not the recipe's
        given = kept.get(key) if single or key == "distinct" else None
        if getattr(recipe.lily, key) is None and (key not in kept or given is not None):
            changed[key] = meaning if given is None else given
    if not changed:
        return recipe
    return cast(AnyRecipe, recipe.model_copy(update={"lily": recipe.lily.model_copy(update=changed)}))


def _kept(folder: Path) -> tuple[Mapping[str, Any] | None, bool]:
    """The section `lily` of the recipe in a folder, and whether that is what all its runs begin from."""
    for file, inside in ((folder / "recipe.yaml", ()), (folder / "settings.json", ("recipe",))):
        if (found := _section(file, inside)) is not None:
            return found, True
    for file in sorted(folder.glob("*/**/recipe.yaml")):
        if (found := _section(file, ())) is not None:
            return found, False
    return None, False


def _section(file: Path, inside: tuple[str, ...]) -> Mapping[str, Any] | None:
    try:
        values = yaml.safe_load(file.read_text("utf-8"))  # JSON is YAML
        for key in (*inside, "lily"):
            values = values[key]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, yaml.YAMLError):
        return None  # whoever reads the file says what is wrong with it
    return values if isinstance(values, Mapping) else None
