"""Replacements of PEFT's optimizers for LoRA, which look for tensors of LoRA's names and find none of Lily's.

`lily.tuner.replacements` lists them. Each calls the original for models without a Lily adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from peft.optimizers import lorafa, loraplus
from torch import nn
from torch.optim import Optimizer

from lily.errors import LilyError
from lily.layers.bank import banks_in
from lily.layers.embedding import Embedding
from lily.plan.specs import EMBEDDING

_stock_loraplus = loraplus.create_loraplus_optimizer
_stock_lorafa = lorafa.create_lorafa_optimizer
EMBEDDING_LR = 1e-6  # PEFT's default for the adapters of embeddings


@functools.wraps(_stock_loraplus)
def create_loraplus(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """`create_loraplus_optimizer`: `lily.optim.create_optimizer` with the ratio for B, and a rate for embeddings."""
    from lily.optim import create_optimizer  # which may be what imports PEFT, and with it this module

    if not banks_in(model):
        return _stock_loraplus(  # type: ignore[no-any-return]
            model, optimizer_cls, lr=lr, loraplus_lr_ratio=loraplus_lr_ratio, **kwargs
        )
    decay = kwargs.pop("loraplus_weight_decay", kwargs.pop("weight_decay", 0.0))
    rate = kwargs.pop("loraplus_lr_embedding", EMBEDDING_LR)
    optimizer = create_optimizer(
        model, optimizer_cls, lr=lr, B_lr_ratio=loraplus_lr_ratio, weight_decay=decay, **kwargs
    )
    of_embeddings = {id(p) for p in _of_embeddings(model)}
    apart = [p for group in optimizer.param_groups for p in group["params"] if id(p) in of_embeddings]
    if apart:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in of_embeddings]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        optimizer.add_param_group({"name": "embedding", "params": apart, "lr": rate, "weight_decay": decay})
        optimizer.param_groups.insert(1, optimizer.param_groups.pop())  # PEFT's order
    return optimizer


def _of_embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    """Everything of Lily's that adapts embeddings: A and B in the bank, and what each layer has for itself."""
    for _, bank in banks_in(model):
        for adapter, plan in bank.plans.items():
            tensors_A, tensors_B = bank.tensors(adapter)
            yield from (A for A, (group, _) in zip(tensors_A, plan.blocks, strict=True) if group.kind == EMBEDDING)
            yield from (B for B, group in zip(tensors_B, plan.groups, strict=True) if group.kind == EMBEDDING)
            for number, group in enumerate(plan.groups):
                if plan.shared_router and group.kind == EMBEDDING and group.num_B > 1:
                    yield bank.lily_R[adapter][str(number)]  # type: ignore[index]
    for layer in (m for m in model.modules() if isinstance(m, Embedding)):
        yield from (p for name, p in layer.named_parameters() if not name.startswith("base_layer."))


@functools.wraps(_stock_lorafa)
def create_lorafa(model: nn.Module, *args: Any, **kwargs: Any) -> Optimizer:
    """`create_lorafa_optimizer`: refused, since it projects the gradient of each B by the one A that belongs to it."""
    if banks_in(model):
        raise LilyError(
            "create_lorafa_optimizer is for LoRA, where each B has one A; a B of Lily is used with several A. Call "
            "lily.optim.create_optimizer(model, torch.optim.AdamW, lr=..., B_lr_ratio=...) instead"
        )
    return _stock_lorafa(model, *args, **kwargs)  # type: ignore[no-any-return]
