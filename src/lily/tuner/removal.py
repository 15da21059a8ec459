"""Give a model its own modules back once its last Lily adapter is gone, whichever library removed it.

PEFT and transformers delete adapters layer by layer and leave the empty layers; diffusers takes the layers out and does
not know the bank. `lily.tuner.replacements` replaces PEFT's function, `lily._after_import` those of diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import peft.functional
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from lily.layers.bank import BANK, banks_in
from lily.layers.layer import LilyLayer
from lily.tuner import call_uncalled
from lily.tuner.model_tags import remove_tag

_stock_delete = peft.functional.delete_adapter


def remove_if_empty(model: nn.Module) -> None:
    """Take the layers, the bank and the hooks off each model inside `model` of which no Lily adapter is left."""
    for root, bank in banks_in(model):
        if any(isinstance(m, LilyLayer) and m.settings for m in root.modules()):
            continue
        for adapter in list(bank.plans):
            bank.delete_adapter(adapter)
        bank.watch(root, [])
        _unwrap_layers(root)
        unwrap_saved(root)
        call_uncalled.watch(root)
        delattr(root, BANK)
        remove_tag(root)


def _unwrap_layers(module: nn.Module) -> None:
    for name, child in list(module._modules.items()):
        while isinstance(child, LilyLayer):
            child = child.base_layer
            setattr(module, name, child)
        if child is not None:
            _unwrap_layers(child)


def unwrap_saved(module: nn.Module) -> None:
    """Put back the modules that PEFT had wrapped to train them whole or in rows, where no adapter does any more."""
    for name, child in list(module._modules.items()):
        while isinstance(child, AuxiliaryTrainingWrapper) and not child._adapters:
            child = child.original_module
            setattr(module, name, child)
        if child is not None:
            unwrap_saved(child)


def activate_saved(module: nn.Module, adapters: Sequence[str]) -> None:
    """Activate what adapters trained beside their layers; PEFT does so only where the deleted adapter had it too.

    Args:
        module: the model.
        adapters: those that a deletion left active.
    """
    for wrapper in (m for m in module.modules() if isinstance(m, AuxiliaryTrainingWrapper)):
        own = [name for name in adapters if name in wrapper._adapters]
        if own and not wrapper.active_adapters:
            wrapper.set_adapter(own[0])


@functools.wraps(_stock_delete)
def delete_adapter(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`peft.functional.delete_adapter`, which transformers' `delete_adapter` calls."""
    left = _stock_delete(model, *args, **kwargs)
    activate_saved(model, left or ())
    remove_if_empty(model)
    return left
