"""Everything of PEFT's and transformers' that is replaced when this package is registered, and why.

Lily does what it can by methods of `LilyModel`, `LilyConfig` and its layers. Here is the rest: functions that decide by
names of LoRA, or that nothing of a tuner's is asked by. Each calls the original for models and files without Lily.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import peft.functional
import peft.mixed_model
import peft.peft_model
import peft.tuners.mixed
import peft.utils
from peft import PeftModel, helpers, optimizers
from peft.auto import _BaseAutoPeftModel
from peft.config import PeftConfigMixin
from peft.optimizers import lorafa, loraplus
from peft.tuners.lora import conversion
from peft.tuners.mixed import model as mixed_tuner
from peft.utils import PeftType, hotswap, save_and_load
from transformers.integrations.peft import PeftAdapterMixin

from lily.layers.bank import LilyBank
from lily.layers.layer import LilyLayer
from lily.tuner import (
    auto_classes,
    compiled_hotswap,
    mixed,
    peft_loading,
    peft_optimizers,
    peft_saving,
    removal,
    scales,
    status,
    to_lora,
)
from lily.tuner import hotswap as ours
from lily.tuner.model import LilyModel


@dataclass(frozen=True)
class Replacement:
    """An attribute that is replaced.

    Attributes:
        name: of the attribute.
        owners: the classes and modules that have it. PEFT's modules import functions from one another, so a function is
            replaced wherever PEFT or its users look it up.
        value: what takes its place.
        stock: what was there.
        why: the reason.
    """

    name: str
    owners: tuple[Any, ...]
    value: Any
    stock: Any
    why: str


def _replace(name: str, owners: tuple[Any, ...], value: Any, why: str) -> Replacement:
    stock = owners[0].__dict__[name]
    if owners[0] is PeftAdapterMixin:  # `lily._after_import` has replaced it already
        stock = peft_loading.stock_transformers
    return Replacement(name, owners, value, stock, why)


STATE = (peft, peft.utils, peft.peft_model, peft.functional, save_and_load)
LOADING = (peft, peft.utils, peft.peft_model, save_and_load)

REPLACEMENTS = (
    _replace("from_json_file", (PeftConfigMixin,), classmethod(peft_loading.from_json_file),  # type: ignore[arg-type]
             "a Lily file's values are checked before one is used"),
    _replace("from_pretrained", (PeftModel,), classmethod(peft_loading.from_pretrained),
             "a Lily file is checked before the model is touched"),
    _replace("from_pretrained", (_BaseAutoPeftModel,), classmethod(auto_classes.auto_peft),
             "an adapter's base model has a name that is no folder or hub id, and its head the adapter's classes"),
    _replace("load_adapter", (PeftModel,), peft_loading.load_adapter,
             "a Lily file is checked before the model is touched"),
    _replace("load_adapter", (PeftAdapterMixin,), peft_loading.transformers_load_adapter,
             "transformers matches tensors to layers by name, and a shared tensor belongs to no layer"),
    _replace("load_peft_weights", LOADING, peft_loading.load_weights,
             "a Lily file is read once, never from a pickle, and must be finite"),
    _replace("set_peft_model_state_dict", STATE, peft_loading.set_state,
             "all tensors of a Lily adapter must fit before the first is copied; PEFT copies what fits"),
    _replace("get_peft_model_state_dict", STATE, peft_saving.get_state,
             "shared tensors without the wrappers' names, all of them, each once"),
    _replace("save_pretrained", (PeftModel,), peft_saving.save_pretrained,
             "no file that lacks a tensor (sharded models), and no pickle, which could not be loaded"),
    _replace("create_or_update_model_card", (PeftModel,), peft_saving.create_or_update_model_card,
             "the Hub refuses a card whose base model is no hub id"),
    _replace("hotswap_adapter", (hotswap,), ours.hotswap_adapter, "PEFT's is for LoRA's tensors"),
    _replace("hotswap_adapter_from_state_dict", (hotswap,), ours.hotswap_state, "PEFT's is for LoRA's tensors"),
    _replace("prepare_model_for_compiled_hotswap", (hotswap,), compiled_hotswap.prepare,
             "PEFT's is for LoRA's tensors"),
    _replace("create_loraplus_optimizer", (optimizers, loraplus), peft_optimizers.create_loraplus,
             "PEFT's finds B by LoRA's names, so no B of Lily would have the higher rate"),
    _replace("create_lorafa_optimizer", (optimizers, lorafa), peft_optimizers.create_lorafa,
             "PEFT's would train nothing; Lily's error says what does"),
    _replace("rescale_adapter_scale", (helpers,), scales.rescale_adapter_scale, "PEFT's finds LoRA's layers alone"),
    _replace("get_layer_status", (peft, peft.peft_model), status.get_layer_status, "the bank is no adapted layer"),
    _replace("delete_adapter", (peft.functional,), removal.delete_adapter,
             "transformers' `delete_adapter` must take the bank out with the last Lily adapter"),
    _replace("_convert_module_to_lora", (conversion,), to_lora.convert_module_to_lora,
             "`convert_to_lora` must pass over the bank"),
    _replace("MixedModel", (peft.mixed_model,), mixed.LilyMixedModel,
             "PEFT's has a fixed list of methods; Lily's adds one (`mixed=True`)"),
    _replace("COMPATIBLE_TUNER_TYPES", (peft.tuners.mixed,), (*mixed_tuner.COMPATIBLE_TUNER_TYPES, PeftType.LILY),
             "the same list"),
    _replace("PREFIXES", (mixed_tuner,), [*mixed_tuner.PREFIXES, LilyModel.prefix], "the same list, of names"),
    _replace("Layers", (mixed_tuner,), (*mixed_tuner.Layers, LilyLayer, LilyBank), "the same list, of layers"),
)  # fmt: skip
