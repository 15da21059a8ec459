"""PEFT's `convert_to_lora` on models with a bank. `lily.tuner.replacements` installs the replacement."""

from __future__ import annotations

import functools

import torch
from peft.tuners.lora import conversion
from torch import Tensor, nn

from lily.layers.bank import LilyBank

_stock_conversion = conversion._convert_module_to_lora


@functools.wraps(_stock_conversion)
def convert_module_to_lora(
    module: nn.Module, rank: int | float, adapter_name: str = "default"
) -> tuple[Tensor, Tensor, int]:
    """Stock PEFT's, except for the bank, a tuner layer without an update: rank 0 makes PEFT skip it."""
    if isinstance(module, LilyBank):
        return torch.zeros(0, 0), torch.zeros(0, 0), 0
    return _stock_conversion(module, rank, adapter_name)  # type: ignore[no-any-return]
