"""Adapter folders: the recipe kept beside an adapter, the base model that it is for, and its classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lily.errors import LilyError
from lily.recipes import loader
from lily.recipes.results.run_files import adapter_path, kept_recipe
from lily.recipes.spec.base import Task
from lily.recipes.spec.dreambooth import DreamBooth
from lily.recipes.spec.schema import Model, Recipe

TASKS: dict[str, Task] = {
    "CAUSAL_LM": "sft",
    "SEQ_CLS": "text-classification",
}  # PEFT's task types, where there is no recipe


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder and what belongs to it. No weight has been read.

    Attributes:
        path: the folder that holds adapter_config.json.
        recipe: the one that was named, else the one kept beside the adapter; None: there is neither.
        base: the folder or hub id that replaces the recipe's base model; None: no replacement.
    """

    path: Path
    recipe: Recipe | DreamBooth | None
    base: str | None = None

    @classmethod
    def of(cls, folder: str | AdapterFolder, recipe: str | None = None, base: str | None = None) -> AdapterFolder:
        """Find the adapter in a folder.

        Args:
            folder: a run's folder, or an adapter folder; one that was found before is returned.
            recipe: name or path of a recipe; default: the one kept beside the adapter.
            base: folder or hub id of the base model; default: where the recipe or the adapter says it is.

        Raises:
            LilyError: if there is no adapter, or the recipe cannot be used.
        """
        if isinstance(folder, AdapterFolder):
            return folder
        path = adapter_path(folder)
        kept = kept_recipe(path)
        chosen = recipe or (None if kept is None else str(kept))
        try:
            loaded = None if chosen is None else loader.load_any(chosen)
        except LilyError:
            if recipe is not None or base is None:
                raise
            loaded = None  # --base says what the kept recipe, perhaps of an older version, would
        if isinstance(loaded, Recipe) and recipe is None and loaded.model.trust_remote_code:
            if base is None:
                raise LilyError(
                    f"{kept} wants to run code from the model's repository (trust_remote_code); "
                    f"if you trust it, say so with --recipe {kept}"
                )
            model = loaded.model.model_copy(update={"trust_remote_code": False})
            loaded = loaded.model_copy(update={"model": model})
        if isinstance(loaded, Recipe) and base is not None:
            loaded = loaded.model_copy(update={"model": _at(loaded.model, base)})
        return cls(path, loaded, base)

    def text_recipe(self) -> Recipe:
        """The recipe of an adapter for text or images.

        Raises:
            LilyError: if there is no recipe, or it is one of task dreambooth.
        """
        if self.recipe is None:
            raise LilyError(f"{self.path} holds no recipe.yaml; name the recipe with --recipe")
        if isinstance(self.recipe, DreamBooth):
            raise LilyError(f"{self.path} is an adapter of task dreambooth; this works on adapters for text and images")
        return self.recipe

    def base_model(self) -> tuple[Model, Task]:
        """The base model and the task: those of the recipe, else those that adapter_config.json names.

        Raises:
            LilyError: if neither names a model that can be found, or PEFT's task type is not supported.
        """
        if self.recipe is not None:
            recipe = self.text_recipe()
            return recipe.model, recipe.task
        from peft import PeftConfig  # takes seconds to import, which no error about a folder should

        from lily.recipes.models.reference import named

        config = PeftConfig.from_pretrained(str(self.path))
        where = self.base or config.base_model_name_or_path
        if not where:
            raise LilyError(f"{self.path} does not say which base model it is for; name it with --base")
        if self.base is None and (known := named(where)) is None and not Path(where).is_dir():
            raise LilyError(
                f"{self.path} is for the base model {where!r}, which is no folder here; name it with --base"
            )
        if config.task_type not in TASKS:
            raise LilyError(
                f"{self.path}: without a recipe, task_type must be CAUSAL_LM or SEQ_CLS, not {config.task_type}; name "
                "the recipe with --recipe, or use lily.export in Python, which takes any model"
            )
        if self.base is None and known is not None:
            return known, TASKS[config.task_type]
        return Model(path=where) if Path(where).expanduser().exists() else Model(hub=where), TASKS[config.task_type]

    def labels(self) -> tuple[str, ...] | None:
        """The classes kept beside the adapter; None: it has no labels.json.

        Raises:
            LilyError: if the file is no list of names.
        """
        from lily.checkpoint.heads import labels_beside  # imports torch

        return labels_beside(self.path)

    def outputs(self) -> tuple[str, ...]:
        """The classes, or the numbers of the outputs of the head that the adapter's file holds; two if it has none."""
        from lily.io.untrusted import read_header

        if (labels := self.labels()) is not None:
            return labels
        for key, entry in read_header(self.path / "adapter_model.safetensors").entries.items():
            if ".lily_" not in key and key.endswith("weight") and entry.shape:
                return tuple(map(str, range(entry.shape[0])))
        return ("0", "1")


def _at(model: Model, base: str) -> Model:
    """The recipe's base model, from another folder or repository."""
    kind = "path" if Path(base).expanduser().exists() else "hub"
    cleared = dict.fromkeys((*Model.kinds, "revision", "architecture"))
    return model.model_copy(update={**cleared, kind: base, "format": "transformers"})
