"""Replacements of PEFT's saving functions for Lily adapters: names without wrappers, and no file that lacks a tensor.

`lily.tuner.replacements` lists them. Each calls the original for adapters of other methods.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils import save_and_load
from torch import Tensor, nn

from lily.checkpoint.beside import once
from lily.checkpoint.complete import check_complete
from lily.errors import LilyError
from lily.layers import sharding
from lily.plan.config import LilyConfig
from lily.plan.vocabulary import FOLDER, REFERENCES
from lily.plan.wrappers import innermost, plain_name, plain_names

_stock_save_pretrained = PeftModel.save_pretrained
_stock_card = PeftModel.create_or_update_model_card
_stock_get_state = save_and_load.get_peft_model_state_dict

MATRICES = re.compile(r"\.lily_(A|B|router)\.")


class AdapterState(dict[str, Tensor]):
    """An adapter's tensors, which know where they are from: libraries that write LoRA's files need the LoRA instead.

    Args:
        tensors: by name.
        model: that holds the adapter.
        adapter: its name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], model: nn.Module, adapter: str) -> None:
        super().__init__(tensors)
        self.adapter, self._model = adapter, weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model, if it still exists."""
        return self._model()

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # elsewhere it is a plain dictionary


@functools.wraps(_stock_save_pretrained)
def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """`PeftModel.save_pretrained`: a sharded adapter is refused, since stock would wait for the other processes."""
    if not any(isinstance(config, LilyConfig) for config in self.peft_config.values()):
        _stock_save_pretrained(self, save_directory, *args, **kwargs)
        return
    if kwargs.get("state_dict") is None:
        for name, p in self.named_parameters():
            if MATRICES.search(name) and not sharding.is_here(p):
                raise LilyError(
                    f"cannot save to {save_directory}: {name} is sharded, and this process holds only a shard; call "
                    "lily.save_adapter(model, folder) in all processes instead"
                )
    state = kwargs["state_dict"] = _plain_state(self, kwargs.get("state_dict"))
    given = inspect.signature(_stock_save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
    if not given.get("safe_serialization", True):
        raise LilyError(
            f"cannot save to {save_directory}: safe_serialization=False writes a pickle, which can run code and is "
            "never read for Lily; remove the option"
        )
    if not state and given.get("is_main_process", True):
        raise LilyError(
            f"cannot save to {save_directory}: the state_dict that was given is empty; only the first process of a "
            "sharded model has one, so save there, or call lily.save_adapter(model, folder) in all processes"
        )
    with plain_names(self):  # PEFT also reads the base model's class and name
        _stock_save_pretrained(self, save_directory, *args, **kwargs)


def get_state(
    model: nn.Module, state_dict: dict[str, Tensor] | None = None, adapter_name: str = "default", **options: Any
) -> dict[str, Tensor]:
    """`get_peft_model_state_dict`: complete, and each tensor beside the adapter's own once."""
    configs = getattr(innermost(model), "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, LilyConfig):
        with _base_folder(innermost(model), config):
            return _stock_get_state(model, state_dict, adapter_name, **options)  # type: ignore[no-any-return]
    state = _plain_state(model, state_dict)
    with plain_names(model) as inner, _base_folder(inner, config):
        if state:  # processes besides the first are given an empty one, and write nothing
            check_complete(inner, configs, adapter_name, state)
        written: dict[str, Tensor] = _stock_get_state(inner, state, adapter_name, **options)
        if state:
            # names in place of the tensors show which are selected, however they are gathered and renamed
            sources = _stock_get_state(inner, {name: name for name in state}, adapter_name, save_embedding_layers=False)
            check_complete(inner, configs, adapter_name, {*sources.values(), *written})
        return AdapterState(once(inner, adapter_name, written), model, adapter_name)


@contextlib.contextmanager
def _base_folder(model: Any, config: Any) -> Iterator[None]:
    """Context: the configuration names the folder that the base model was read from.

    PEFT compares the vocabulary with the one there, and the name in files may be no place.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    folder = getattr(base, FOLDER, None)
    if folder is None or config is None:
        yield
        return
    name, config.base_model_name_or_path = config.base_model_name_or_path, folder
    try:
        yield
    finally:
        config.base_model_name_or_path = name


def _plain_state(model: nn.Module, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A state dict, default: the model's, by the tensors' plain names."""
    plain = plain_name(model)
    return {plain(name): tensor for name, tensor in (model.state_dict() if given is None else given).items()}


@functools.wraps(_stock_card)
def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
    """`PeftModel.create_or_update_model_card`: the Hub refuses a card whose base model is no hub id."""
    _stock_card(self, output_dir)
    file = Path(output_dir, "README.md")
    card = ModelCard.load(file)
    if str(card.data.get("base_model") or "").startswith(REFERENCES):
        del card.data.base_model
        card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
        card.save(file)
