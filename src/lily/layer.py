"""One adapted layer: its own router, where its shared tensors are, and one call into the mathematics."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lily import functional
from lily.bank import LilyBank
from lily.config import DYNAMIC, LilyConfig
from lily.errors import LilyError
from lily.plan import Group, Slot


class LilyLayer(BaseTunerLayer):  # type: ignore[misc]
    """State of an adapted layer. A and B are in the bank; see `lily.bank`.

    Attributes:
        lily_router: adapter -> R as `nn.Linear(r, experts)`, for token, sequence and batch routing.
        lily_logits: adapter -> logits (experts,), for static routing.
        slots: adapter -> where its A and B are in the bank.
    """

    adapter_layer_names: tuple[str, ...] = ("lily_router", "lily_logits")
    other_param_names: tuple[str, ...] = ("slots", "r", "num_B", "scaling", "routing", "activation", "dropout")

    def __init__(self, base_layer: nn.Module, bank: LilyBank) -> None:
        self.base_layer = base_layer
        # In a tuple, so that nn.Module does not register it: the bank belongs to the root alone.
        self._bank = (bank,)
        self.lily_router = nn.ModuleDict({})
        self.lily_logits = nn.ParameterDict({})
        self.slots: dict[str, Slot] = {}
        self.r: dict[str, int] = {}
        self.num_B: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.routing: dict[str, str] = {}
        self.activation: dict[str, str] = {}
        self.dropout: dict[str, float] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def bank(self) -> LilyBank:
        """The shared tensors."""
        return self._bank[0]

    def _get_available_adapters(self) -> set[str]:
        return set(self.slots)

    def update_layer(self, adapter: str, group: Group, slot: Slot, config: LilyConfig) -> None:
        """Add an adapter: its settings and, where its routing needs one, its router.

        Args:
            adapter: its name.
            group: the layer's group in the plan.
            slot: where its A and B are.
            config: the adapter's configuration.
        """
        self.slots[adapter] = slot
        self.r[adapter], self.num_B[adapter] = group.r, group.num_B
        self.scaling[adapter], self.routing[adapter] = config.scaling, str(config.routing)
        self.activation[adapter], self.dropout[adapter] = config.activation, config.dropout
        if group.num_B > 1 and config.routing in DYNAMIC:
            router = nn.Linear(group.r, group.num_B, bias=False)
            nn.init.kaiming_uniform_(router.weight, a=math.sqrt(5))
            self.lily_router[adapter] = router
        elif group.num_B > 1 and config.routing == "static":
            # Random, not zero: with equal weights all experts get equal gradients and would stay equal for ever.
            self.lily_logits[adapter] = nn.Parameter(torch.randn(group.num_B))
        self._move_adapter_to_device_of_base_layer(adapter)

    def router_of(self, adapter: str) -> Tensor | None:
        """R (experts, r), the static logits (experts,), or None where the routing learns nothing."""
        if adapter in self.lily_router:
            return cast(Tensor, self.lily_router[adapter].weight)
        return cast(Tensor | None, self.lily_logits.get(adapter))

    def update_of(self, adapter: str, x: Tensor) -> Tensor:
        """What one adapter adds to the base layer's output.

        Args:
            adapter: its name; must be on this layer.
            x: (..., in), of any floating dtype: it is cast to the adapter's, as PEFT does.

        Returns:
            (..., out).
        """
        bank, slot, num_B = self.bank, self.slots[adapter], self.num_B[adapter]
        tensors_A, tensors_B = bank.tensors(adapter)
        A, B = tensors_A[slot.A], tensors_B[slot.B]
        x = self._cast_input_dtype(x, A.dtype)
        if A.device != x.device:  # layers on several devices share one bank
            A, B = A.to(x.device), B.to(x.device)
        return functional.lily(
            x,
            A,
            B.view(num_B, B.shape[0] // num_B, B.shape[1]),
            self.router_of(adapter),
            routing=self.routing[adapter],
            scaling=self.scaling[adapter],
            activation=self.activation[adapter],
            dropout=self.dropout[adapter],
            training=self.training,
            mask=bank.masks.mask_for(x) if self.routing[adapter] == "sequence" else None,
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible yet.

        Raises:
            LilyError: always.
        """
        raise LilyError(
            "a Lily adapter cannot be merged: token, sequence and batch routing depend on the data. "
            "Use the adapter unmerged (PeftModel.from_pretrained), or unload() to get the base model back"
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""


class Linear(nn.Module, LilyLayer):
    """An adapted linear layer: `nn.Linear`, a quantised stand-in for it, or GPT-2's `Conv1D`.

    The base layer is called as it is, so whatever it does (dequantise, shard, transpose) it goes on doing.

    Args:
        base_layer: the frozen layer.
        bank: the shared tensors.
    """

    def __init__(self, base_layer: nn.Module, bank: LilyBank) -> None:
        super().__init__()
        LilyLayer.__init__(self, base_layer, bank)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` (..., in) -> (..., out), in the dtype of the base layer's output."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter in cast(list[str], self.active_adapters):
            if adapter in self.slots:
                result = result + self.update_of(adapter, x).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "lily." + super().__repr__()
