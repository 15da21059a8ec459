"""PEFT's status of an adapted model, where the bank is no layer: what it holds belongs to the layers.

`lily.tuner.replacements` installs the replacement, which calls the original first.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import peft
import peft.peft_model
from torch import nn

from lily.layers.bank import BANK

_stock_status = peft.peft_model.get_layer_status


@functools.wraps(_stock_status)
def get_layer_status(model: nn.Module) -> list[Any]:
    """`get_layer_status`, which `get_model_status` sums up."""
    statuses = _stock_status(model)
    banks = [status for status in statuses if status.name.rpartition(".")[2] == BANK]
    return [_with(status, banks) for status in statuses if status not in banks]


def _with(status: Any, banks: list[Any]) -> Any:
    """A layer's status with that of its adapters' shared tensors."""
    if not status.module_type.startswith("lily."):
        return status
    requires_grad, devices = dict(status.requires_grad), dict(status.devices)
    for bank in banks:
        for name in set(status.available_adapters) & set(bank.requires_grad):
            own, shared = requires_grad.get(name, bank.requires_grad[name]), bank.requires_grad[name]
            requires_grad[name] = own if own == shared else "irregular"
            devices[name] = sorted({*devices.get(name, ()), *bank.devices[name]})
    return replace(status, requires_grad=requires_grad, devices=devices)
