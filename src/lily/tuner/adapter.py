"""Find an adapter inside a model, to read or change it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from lily.checkpoint.stock import decide_file_format
from lily.errors import LilyError
from lily.layers.bank import LilyBank, banks_in
from lily.layers.find import layers_of, refill, watch_masks
from lily.layers.layer import LilyLayer
from lily.layers.router import Logits
from lily.plan.config import LilyConfig
from lily.plan.sharing_plan import SharingPlan
from lily.plan.wrappers import innermost


@dataclass(frozen=True)
class Adapted:
    """One adapter of a model.

    Attributes:
        name: name of the adapter.
        root: the base model, which holds the bank; names of layers are relative to it.
        bank: the shared tensors.
        config: the adapter's configuration.
        layers: name -> adapted layer, in the plan's order.
    """

    name: str
    root: nn.Module
    bank: LilyBank
    config: LilyConfig
    layers: dict[str, LilyLayer]

    @property
    def plan(self) -> SharingPlan:
        """The adapter's sharing plan."""
        return self.bank.plans[self.name]

    def watch_masks(self) -> None:
        """Record attention masks for the layers that use them now."""
        watch_masks(self.root)

    @torch.no_grad()
    def make_static(self, logits: dict[str, Tensor] | None = None) -> None:
        """Turn a data-dependent adapter into a static one, in place.

        Args:
            logits: layer -> logits (experts,) of its weights; default: the logits that the layers have.
        """
        for name, layer in self.layers.items():
            router = layer.router_of(self.name)
            layer.change_settings(self.name, routing="static")
            if router is None:
                continue
            if logits is not None:
                like = logits[name].to(router.device, torch.float32)
                layer.lily_logits[self.name] = Logits(like, router.requires_grad)
            if self.name in layer.lily_router:
                del layer.lily_router[self.name]
        self.bank.settled.pop(self.name, None)
        if self.name in self.bank.lily_R:
            del self.bank.lily_R[self.name]
        self.bank.plans[self.name] = replace(self.plan, routing="static", shared_router=False)
        self.config.routing, self.config.settled, self.config.shared_router = "static", None, False
        decide_file_format(self.config, self.plan, self.root)
        refill(self.root, self.name)
        self.watch_masks()


def find(model: nn.Module, adapter: str | None = None) -> Adapted:
    """The named adapter of a model.

    Args:
        model: a `PeftModel`, or a model with an adapter injected.
        adapter: default: the active one.

    Raises:
        LilyError: if the model carries no Lily adapter, or none of that name.
    """
    banks = banks_in(model)
    if not banks:
        raise LilyError(f"this {type(model).__name__} carries no Lily adapter; load one with PeftModel.from_pretrained")
    root, bank = banks[0]
    active = cast(list[str], bank.active_adapters)
    if adapter is None:
        if len(active) != 1:
            raise LilyError(f"several adapters are active ({', '.join(active)}); name one of them")
        adapter = active[0]
    if adapter not in bank.plans:
        raise LilyError(f"no adapter {adapter!r} on this model; there are {', '.join(bank.plans)}")
    configs = getattr(innermost(model), "peft_config", None) or getattr(root, "peft_config", {})
    named = layers_of(root)
    layers = {name: named[name] for name in bank.plans[adapter].slots}
    return Adapted(adapter, root, bank, cast(LilyConfig, configs[adapter]), layers)
