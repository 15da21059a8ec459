"""Register this package with PEFT for Lily, and unregister it."""

from __future__ import annotations

import functools
import re
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lily import LilyModel as StockModel
from peft.tuners.lora import conversion
from peft.utils import PeftType, hotswap
from torch import Tensor, nn

from lily.errors import LilyError
from lily.layers import sharding
from lily.layers.bank import LilyBank
from lily.plan.config import EXTENDED_TYPE, LilyConfig
from lily.tuner.model import LilyModel
from lily.tuner.peft_loading import HOTSWAP_KEYS, PATCHES

_stock_conversion = conversion._convert_module_to_lora


def _convert_module_to_lora(
    module: nn.Module, rank: int | float, adapter_name: str = "default"
) -> tuple[Tensor, Tensor, int]:
    """Stock PEFT's, except for the bank, a tuner layer without an update: rank 0 makes PEFT skip it."""
    if isinstance(module, LilyBank):
        return torch.zeros(0, 0), torch.zeros(0, 0), 0
    return _stock_conversion(module, rank, adapter_name)  # type: ignore[no-any-return]


_stock_save_pretrained = PeftModel.save_pretrained

MATRICES = re.compile(r"\.lily_(A|B|router)\.")


@functools.wraps(_stock_save_pretrained)
def _save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
    """Stock PEFT's, except for a sharded adapter: stock would wait for the other processes, or write a shard."""
    if kwargs.get("state_dict") is None:
        for name, p in self.named_parameters():
            if MATRICES.search(name) and not sharding.is_here(p):
                raise LilyError(
                    f"cannot save to {save_directory}: {name} is sharded, and this process holds only a shard; call "
                    "lily.save_adapter(model, folder) in all processes instead"
                )
    _stock_save_pretrained(self, save_directory, *args, **kwargs)


def register() -> None:
    """Make PEFT use this package for `PeftType.LILY`. `import lily` does this; calling it again is harmless.

    `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` and their callers then work with
    `lily.LilyConfig`, and a plain `peft.LilyConfig` keeps its meaning (batch routing). `peft.convert_to_lora` works
    for static adapters.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LILY] = LilyConfig
    PEFT_TYPE_TO_CONFIG_MAPPING[EXTENDED_TYPE] = LilyConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LILY] = LilyModel
    conversion._convert_module_to_lora = _convert_module_to_lora
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LILY] = HOTSWAP_KEYS
    PeftModel.save_pretrained = _save_pretrained
    for owner, name, ours, _ in PATCHES:
        setattr(owner, name, ours)


def unregister() -> None:
    """Restore stock PEFT's `PeftType.LILY`. Models that already carry our adapters keep working."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LILY] = peft.LilyConfig
    PEFT_TYPE_TO_CONFIG_MAPPING.pop(EXTENDED_TYPE, None)
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LILY] = StockModel
    conversion._convert_module_to_lora = _stock_conversion
    hotswap.CONFIG_KEYS_TO_CHECK.pop(PeftType.LILY, None)
    PeftModel.save_pretrained = _stock_save_pretrained
    for owner, name, _, stock in PATCHES:
        setattr(owner, name, stock)
