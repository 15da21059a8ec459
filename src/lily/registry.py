"""Making PEFT use this package for Lily, and undoing it."""

from __future__ import annotations

import re
from typing import Any

import peft
import torch
from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lily import LilyModel as StockModel
from peft.tuners.lora import conversion
from peft.utils import PeftType, hotswap, load_peft_weights
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from lily.bank import LilyBank
from lily.config import EXTENDED_TYPE, LilyConfig
from lily.model import LilyModel

_stock_conversion = conversion._convert_module_to_lora


def _convert_module_to_lora(
    module: nn.Module, rank: int | float, adapter_name: str = "default"
) -> tuple[Tensor, Tensor, int]:
    """Stock's, but for the bank, which is a tuner layer that adds nothing itself: rank 0 passes it over."""
    if isinstance(module, LilyBank):
        return torch.zeros(0, 0), torch.zeros(0, 0), 0
    found: tuple[Tensor, Tensor, int] = _stock_conversion(module, rank, adapter_name)
    return found


_stock_load_adapter = PeftAdapterMixin.load_adapter


def _load_adapter(
    self: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`model.load_adapter` of transformers, which its `from_pretrained` uses too.

    It matches names of tensors to names of parameters itself, and so would miss the bank; Lily's files are read by
    PEFT's own loading instead. Anything else goes its usual way.
    """
    load_config = kwargs.get("load_config")
    source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    hub = {**(getattr(load_config, "download_kwargs", None) or {}), **(kwargs.get("adapter_kwargs") or {})}
    hub["local_files_only"] = hub.get("local_files_only") or kwargs.get("local_files_only")
    hub = {key: hub[key] for key in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if hub.get(key)}
    config = peft_config
    if config is None and source is not None:
        config = PeftConfig.from_pretrained(source, **hub)
    name = adapter_name or "default"
    known = name in getattr(self, "peft_config", {})
    if not isinstance(config, LilyConfig) or known or kwargs.get("hotswap") is True:
        return _stock_load_adapter(self, peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
    config.inference_mode = not kwargs.get("is_trainable", False)
    state = adapter_state_dict if adapter_state_dict is not None else load_peft_weights(source, device="cpu", **hub)
    inject_adapter_in_model(config, self, name)
    self._hf_peft_config_loaded = True
    try:
        found = set_peft_model_state_dict(self, state, adapter_name=name)
    except Exception:
        self.delete_adapter(name)
        raise
    if config.inference_mode:
        self.eval()
    return found


# What decides an adapter's function besides its tensors: two that differ here cannot be swapped.
HOTSWAP_KEYS = [
    "r", "stride_A", "num_A", "num_B", "scaling", "routing", "activation", "rank_pattern", "settled", "target_modules",
    "target_parameters",
]  # fmt: skip

_stock_hotswap = hotswap.hotswap_adapter_from_state_dict


def _hotswap(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: PeftConfig, *args: Any, **kwargs: Any
) -> None:
    """PEFT's second half of `hotswap_adapter`, which knows LoRA's tensors alone: copy ours into their places.

    The parameters stay the same objects, so a compiled model is not compiled again.
    """
    if not isinstance(config, LilyConfig):
        _stock_hotswap(model, state_dict, adapter_name, config, *args, **kwargs)
        return
    inserted = re.compile(rf"(lily_[A-Za-z]+)\.{re.escape(adapter_name)}(?=\.|$)")
    plain = {inserted.sub(r"\1", key): tensor for key, tensor in state_dict.items()}
    set_peft_model_state_dict(getattr(model, "_orig_mod", model), plain, adapter_name=adapter_name)


def register() -> None:
    """Make PEFT use this package wherever it meets `PeftType.LILY`. `import lily` does; calling it again is harmless.

    `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and what builds on them then work with
    `lily.LilyConfig`, and a plain `peft.LilyConfig` keeps its meaning (batch routing). `peft.convert_to_lora` works
    for static adapters.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LILY] = LilyConfig
    PEFT_TYPE_TO_CONFIG_MAPPING[EXTENDED_TYPE] = LilyConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LILY] = LilyModel
    conversion._convert_module_to_lora = _convert_module_to_lora
    PeftAdapterMixin.load_adapter = _load_adapter
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LILY] = HOTSWAP_KEYS
    hotswap.hotswap_adapter_from_state_dict = _hotswap


def unregister() -> None:
    """Give `PeftType.LILY` back to stock PEFT. Models that already carry our adapters keep working."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LILY] = peft.LilyConfig
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(EXTENDED_TYPE, None)
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LILY] = StockModel
    conversion._convert_module_to_lora = _stock_conversion
    PeftAdapterMixin.load_adapter = _stock_load_adapter
    hotswap.CONFIG_KEYS_TO_CHECK.pop(PeftType.LILY, None)
    hotswap.hotswap_adapter_from_state_dict = _stock_hotswap
