"""Replacements of PEFT's optimizers for LoRA, which look for tensors of LoRA's names and find none of Lily's.

`lily.tuner.registry` installs them. Each calls the original for models without a Lily adapter.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from peft import optimizers
from peft.optimizers import lorafa, loraplus
from torch import nn
from torch.optim import Optimizer

from lily.errors import LilyError
from lily.layers.bank import banks_in
from lily.plan.specs import EMBEDDING

_stock_loraplus = loraplus.create_loraplus_optimizer
_stock_lorafa = lorafa.create_lorafa_optimizer


@functools.wraps(_stock_loraplus)
def _create_loraplus(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """`create_loraplus_optimizer`: `lily.optim.create_optimizer` with the ratio for B."""
    from lily.optim import create_optimizer  # which may be what imports PEFT, and with it this module

    banks = banks_in(model)
    if not banks:
        return _stock_loraplus(  # type: ignore[no-any-return]
            model, optimizer_cls, lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, **kwargs
        )
    active = ((bank, name) for _, bank in banks for name in cast(list[str], bank.active_adapters))
    for group in (group for bank, name in active for group in bank.plans[name].groups):
        if group.kind == EMBEDDING:
            raise LilyError(
                f"create_loraplus_optimizer has a rate for embeddings (loraplus_lr_embedding), which Lily's A and B of "
                f"{group.name} do not get; give them the rates of all others with lily.optim.create_optimizer(model, "
                f"{optimizer_cls.__name__}, lr={lr}, B_lr_ratio={loraplus_lr_ratio})"
            )
    kwargs.pop("loraplus_lr_embedding", None)
    decay = kwargs.pop("loraplus_weight_decay", kwargs.pop("weight_decay", 0.0))
    return create_optimizer(model, optimizer_cls, lr=lr, B_lr_ratio=loraplus_lr_ratio, weight_decay=decay, **kwargs)


@functools.wraps(_stock_lorafa)
def _create_lorafa(model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
    """`create_lorafa_optimizer`: refused, since it projects the gradient of each B by the one A that belongs to it."""
    if banks_in(model):
        raise LilyError(
            "create_lorafa_optimizer is for LoRA, where each B has one A; a B of Lily is used with several A. Call "
            "lily.optim.create_optimizer(model, torch.optim.AdamW, lr=..., B_lr_ratio=...) instead"
        )
    return _stock_lorafa(model, *args, **kwargs)  # type: ignore[no-any-return]


PATCHES: list[tuple[Any, str, Any, Any]] = [
    *((m, "create_loraplus_optimizer", _create_loraplus, _stock_loraplus) for m in (optimizers, loraplus)),
    *((m, "create_lorafa_optimizer", _create_lorafa, _stock_lorafa) for m in (optimizers, lorafa)),
]
