"""The Auto classes of PEFT and transformers on an adapter's folder: they find its base model, with the right head.

`lily.tuner.replacements` has the replacement of PEFT's, `lily._after_import` that of transformers'.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.auto import _BaseAutoPeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from lily.checkpoint import load
from lily.checkpoint.beside import base_modules, own_tensors
from lily.checkpoint.heads import labels_beside, outputs_of, wrong_head
from lily.errors import LilyError
from lily.io.untrusted import blame, read_header
from lily.plan.vocabulary import FOLDER, REFERENCES

# Which model it is where the name in a file is none that transformers knows, is decided above this folder.
finder: Callable[[str], str] | None = None

CLASSIFIERS = ("SequenceClassification", "ImageClassification", "TokenClassification")
GIVEN = ("num_labels", "id2label", "label2id", "config")

# Base model's name in a file -> where PEFT's Auto classes read it from.
_bases: ContextVar[Mapping[str, str] | None] = ContextVar("lily_bases", default=None)

_stock_auto = _BaseAutoPeftModel.__dict__["from_pretrained"]


@contextlib.contextmanager
def base_found(places: Mapping[str, str]) -> Iterator[None]:
    """Context: a configuration that is read names a place in place of the base model's name."""
    token = _bases.set(places)
    try:
        yield
    finally:
        _bases.reset(token)


def with_base(values: dict[str, Any]) -> dict[str, Any]:
    """The values of an `adapter_config.json`, within `base_found` with the base model's place."""
    places = _bases.get()
    if places is None or not isinstance(values, dict):  # PEFT says what is wrong with a file of another form
        return values
    name = values.get("base_model_name_or_path")
    found = places.get(name) if isinstance(name, str) else None
    return values if found is None else {**values, "base_model_name_or_path": found}


def auto_peft(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """`AutoPeftModel.from_pretrained` and those of its subclasses."""
    stock, name = _stock_auto.__func__, str(pretrained_model_name_or_path)
    if (config := _config(name, **load.download_options(kwargs))) is None:
        return stock(cls, pretrained_model_name_or_path, *args, **kwargs)
    target = getattr(cls._target_class, "__name__", None) or (config.auto_mapping or {}).get("base_model_class")
    kwargs = {**_classes(Path(name), str(target), kwargs), **kwargs}
    recorded, found = config.base_model_name_or_path, _found(name, config)
    if found is None:
        return stock(cls, pretrained_model_name_or_path, *args, **kwargs)
    with base_found({recorded: found}):
        model = stock(cls, pretrained_model_name_or_path, *args, **kwargs)
    for config in model.peft_config.values():
        config.base_model_name_or_path = recorded
    _name(model.get_base_model(), recorded, found)
    return model


def auto_transformers(stock: Any, cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
    """`from_pretrained` of transformers' Auto classes on the folder of an adapter; `stock`: the original function."""
    if (config := _config(str(name))) is None:
        return stock(cls, name, *args, **kwargs)
    kwargs = {**_classes(Path(name), cls.__name__, kwargs), **kwargs}
    if (found := _found(str(name), config)) is None:
        return stock(cls, name, *args, **kwargs)
    options = kwargs.pop("adapter_kwargs", None)
    loaded = stock(cls, found, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info
    model.load_adapter(str(name), adapter_kwargs=options)
    _name(model, config.base_model_name_or_path, found)
    return loaded


def _name(model: Any, recorded: str, found: str) -> None:
    """Saved again, the adapter names its base model as it did."""
    model.name_or_path = recorded
    setattr(model, FOLDER, found)
    if hasattr(model, "config"):
        model.config.name_or_path = recorded


def _config(adapter: str, **hub: Any) -> Any:
    """The adapter's configuration; None: it cannot be read, which PEFT or transformers will say."""
    try:
        return PeftConfig.from_pretrained(adapter, **hub)
    except LilyError:
        raise
    except Exception:
        return None


def _found(adapter: str, config: PeftConfig) -> str | None:
    """Where the adapter's base model is; None: at its name."""
    name = config.base_model_name_or_path
    if finder is None or not isinstance(name, str) or not name:
        return None
    if not name.startswith(REFERENCES) and (not Path(name).is_absolute() or (Path(name) / "config.json").is_file()):
        return None
    return finder(adapter if Path(adapter).is_dir() else name)


def _classes(folder: Path, target: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a classifier's head as the adapter in a local folder has it; none if the caller gave some."""
    if not any(kind in target for kind in CLASSIFIERS) or any(name in given for name in GIVEN):
        return {}
    if (labels := labels_beside(folder)) is not None:
        names = dict(enumerate(labels))
        return {"num_labels": len(labels), "id2label": names, "label2id": {v: k for k, v in names.items()}}
    config, file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    if not config.is_file() or not file.is_file():
        return {}
    try:
        heads = json.loads(config.read_text("utf-8")).get("modules_to_save")
    except (ValueError, AttributeError):
        return {}
    shapes = {name: entry.shape for name, entry in read_header(file).entries.items()}
    count = outputs_of(shapes, heads if isinstance(heads, list) else None)
    return {} if count is None else {"num_labels": count}


def check_head(adapter: str, model: nn.Module) -> None:
    """Refuse an export whose head has another number of classes than the model's; others get the error of PEFT.

    Raises:
        LilyError: names both numbers and the classes.
    """
    folder = Path(adapter)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file() or not (folder / CONFIG_NAME).is_file() or (labels := labels_beside(folder)) is None:
        return
    tensors = {
        f"{name}.{key}": tensor
        for name, _, module in base_modules(model)
        for key, tensor in own_tensors(module).items()
    }
    for name, entry in read_header(file).entries.items():
        here = tensors.get(name.removeprefix("base_model.model."))
        if here is not None and tuple(entry.shape) != tuple(here.shape):
            error = wrong_head(name, entry.shape, here.shape, labels)
            if error is not None:
                raise blame(file, error)
