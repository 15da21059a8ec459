"""States of optimizers, schedules, gradient scalers and random generators as safetensors and JSON, without pickles.

Such a state is nested dictionaries, lists and tuples of numbers and tensors. The tensors go into one safetensors file
and the nesting, with tuples distinct from lists and numbers allowed as keys, into one JSON file. Both are exact.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lily.errors import LilyError

SPOILED = "{file} is not a training state that can be resumed ({error}); start again with --overwrite"


def save_state(state: Any, folder: Path, name: str) -> None:
    """Write `name.json` and, if there are tensors, `name.safetensors` into an existing folder.

    The state consists of dictionaries, lists, tuples, numbers, texts, None, tensors and NumPy arrays.
    """
    tensors: dict[str, Tensor] = {}
    tree = _packed(state, tensors)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")


def load_state(folder: Path, name: str) -> Any:
    """The state that `save_state` wrote; NumPy arrays come back as tensors.

    Raises:
        LilyError: if the files are missing or damaged.
    """
    file, table = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        return _unpacked(json.loads(file.read_text("utf-8")), load_file(table) if table.is_file() else {})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise LilyError(SPOILED.format(file=file, error=error)) from error


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON values; its tensors are added to `tensors`."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_packed(item, tensors) for item in value]
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_unpacked(item, tensors) for item in inner)
    return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in inner}


def random_state() -> dict[str, Any]:
    """The state of all random generators: Python's, NumPy's, torch's and the current GPU's."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the generators from `random_state`; on a machine without a GPU, all but the GPU's."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
