"""One adapted layer: its own router, where its shared tensors are, and one call into the mathematics.

Here: what layers of all kinds have in common, and the linear one. Others: `lily.layers.conv`, `lily.layers.embedding`,
`lily.layers.parameter`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from lily import functional
from lily.errors import LilyError
from lily.kernels import fused
from lily.layers.bank import LilyBank
from lily.layers.devices import onload, weight_of
from lily.layers.exact_merge import Undo, add, fold, unfold
from lily.layers.routing_statistics import RoutingStatistics
from lily.layers.sharding import is_here, mean_of_all
from lily.plan.config import LilyConfig
from lily.plan.options import DYNAMIC
from lily.plan.sharing_plan import Group, Slot


class NotStaticError(LilyError):
    """The update depends on the data, so it is no matrix. The message names the ways out."""

    def __init__(self, adapter: str, routing: str, activation: str) -> None:
        why = f"routing={routing!r} depends on the data"
        ways = (
            "turn it into a static one first (lily.collapse, or `lily collapse` on the command line), or train the "
            "next one with `settle`, which makes it static while it learns"
        )
        if activation != "none":
            why = f"activation={activation!r} between A and B is not linear"
            ways = "use the adapter unmerged, or train one with activation='none'"
        super().__init__(f"adapter {adapter!r} cannot be merged or exported: {why}; {ways}")


@dataclass(frozen=True)
class Factors:
    """The update of a layer whose routing is static: `scaling * B.T @ A`; of stacked experts, one each.

    Attributes:
        A: (r, in), or (experts, r, in).
        B: (r, out), or (experts, r, out), the experts of B already mixed.
        scaling: multiplies the update.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def delta(self) -> Tensor:
        """The update as (out, in), or (experts, out, in)."""
        return self.scaling * (self.B.mT @ self.A)


@dataclass(frozen=True)
class Merged:
    """An adapter that is in the base weight now: what it was then, and how to take it out."""

    factors: Factors
    undo: Undo


class Router(nn.Linear):
    """R (experts, r). Its layer reads the weight and never calls it.

    Engines that gather a module's weights when it is called must therefore leave it to the block that it is part of.
    PEFT's wrapping policy for FSDP1 makes units of trained modules without children; hence the child.
    """

    def __init__(self, r: int, experts: int) -> None:
        super().__init__(r, experts, bias=False)
        self.not_a_unit = nn.Identity()
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class LilyLayer(BaseTunerLayer):  # type: ignore[misc]
    """State of an adapted layer. A and B are in the bank; see `lily.layers.bank`.

    Attributes:
        lily_router: adapter -> R as `nn.Linear(r, experts)`, for token, sequence and batch routing.
        lily_logits: adapter -> logits (experts,), for static routing and for one that is settling.
        slots: adapter -> where its A and B are in the bank.
        statistics: adapter -> what is being recorded of its routing; empty: nothing is.
        merged_as: adapter -> how it was merged into the base weight.
        rounding: adapter -> share of its update's norm that the last merge rounded away.
        transposed: whether the base weight is (in, out), as GPT-2's `Conv1D` has it.
        converts: whether PEFT's conversion to LoRA, which knows linear layers alone, can take it.
    """

    converts = False

    adapter_layer_names: tuple[str, ...] = ("lily_router", "lily_logits")
    other_param_names: tuple[str, ...] = (
        "slots", "r", "num_B", "scaling", "routing", "batch_scope", "activation", "dropout", "statistics", "rounding",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, bank: LilyBank) -> None:
        self.base_layer = base_layer
        self.transposed = type(self.get_base_layer()).__name__ == "Conv1D"
        # In a tuple, so that nn.Module does not register it: the bank belongs to the root alone.
        self._bank = (bank,)
        self.lily_router = nn.ModuleDict({})
        self.lily_logits = nn.ParameterDict({})
        self.slots: dict[str, Slot] = {}
        self.r: dict[str, int] = {}
        self.num_B: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.routing: dict[str, str] = {}
        self.batch_scope: dict[str, str] = {}
        self.activation: dict[str, str] = {}
        self.dropout: dict[str, float] = {}
        self.statistics: dict[str, RoutingStatistics] = {}
        self.merged_as: dict[str, Merged] = {}
        self.rounding: dict[str, float] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def bank(self) -> LilyBank:
        """The shared tensors."""
        return self._bank[0]

    @property
    def base(self) -> nn.Module:
        """The base layer itself, whatever is around it."""
        return self.get_base_layer()  # type: ignore[no-any-return]

    @property
    def adapted_weight(self) -> Any:
        """The base weight that the update is for; None where the base layer has none."""
        return weight_of(self.get_base_layer())

    @property
    def whole_weight(self) -> Any:
        """The parameter that `adapted_weight` is, or is a part of."""
        return self.adapted_weight

    def name_in_plan(self, path: str) -> str:
        """What a plan calls the layer that is at `path` in the model."""
        return path

    def acting(self) -> list[str]:
        """The adapters that take part in a forward now. A merged one that is switched off is taken out first."""
        if self.merged_adapters:
            if self._disable_adapters:
                self.unmerge()
            return []
        return [] if self._disable_adapters else [name for name in self.active_adapters if name in self.slots]

    def _get_available_adapters(self) -> set[str]:
        return set(self.slots)

    def update_layer(
        self, adapter: str, group: Group, slot: Slot, config: LilyConfig, device: torch.device | None = None
    ) -> None:
        """Add an adapter: its settings and, where its routing needs one, its router.

        Args:
            adapter: its name.
            group: the layer's group in the plan.
            slot: where its A and B are.
            config: the adapter's configuration.
            device: where the layer computes; default: where its base weight is.
        """
        self.slots[adapter] = slot
        self.r[adapter], self.num_B[adapter] = group.r, group.num_B
        own = config.options_of(group.name)
        self.scaling[adapter], self.routing[adapter] = own.scaling, str(config.routing)
        self.batch_scope[adapter] = config.batch_scope
        self.activation[adapter], self.dropout[adapter] = own.activation, own.dropout
        if group.num_B > 1 and config.routing in DYNAMIC and not config.shared_router:
            self.lily_router[adapter] = Router(group.r, group.num_B)
            if config.settled is not None:
                self.lily_logits[adapter] = nn.Parameter(torch.zeros(group.logits_shape))
        elif group.num_B > 1 and config.routing == "static":
            # Random, not zero: with equal weights all experts get equal gradients and would stay equal for ever.
            self.lily_logits[adapter] = nn.Parameter(torch.randn(group.logits_shape))
        self._move_adapter_to_device_of_base_layer(adapter, device)

    def router_of(self, adapter: str, device: torch.device | None = None) -> Tensor | None:
        """R (experts, r), the static logits (experts,), or None where the routing learns nothing; on a device."""
        if self.num_B[adapter] == 1 or self.routing[adapter] == "uniform":
            return None
        router = self._router(adapter)
        if router.is_meta:
            onload(self)
            router = self._router(adapter)
        return router if device is None or router.device == device else router.to(device)

    def _router(self, adapter: str) -> Tensor:
        if self.routing[adapter] == "static":
            return cast(Tensor, self.lily_logits[adapter])
        if adapter not in self.lily_router:
            return self.bank.router(adapter, self.slots[adapter])
        return cast(Tensor, self.lily_router[adapter].weight)

    def tensors_of(self, adapter: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (experts, r, out), where the bank has them now, or on a device."""
        num_B, (A, B) = self.num_B[adapter], self._pair(adapter, device)
        if not (is_here(A) and is_here(B)):
            raise LilyError(
                f"the shared tensors of adapter {adapter!r} are sharded and have not been gathered: lily_bank was made "
                "a unit of its own, or the model is called past its wrapper; wrap the root of the model, whose part "
                "the bank is, and call that (with FSDP2: fully_shard(model) after fully_shard(layer) for each layer)"
            )
        return A, B.view(num_B, B.shape[0] // num_B, B.shape[1])

    def _pair(self, adapter: str, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (experts * r, out), on a device: layers on several devices share one bank."""
        bank, slot = self._bank[0], self.slots[adapter]
        A, B = bank.pair(adapter, slot)
        if device is None or (A.device == device and B.device == device):
            return A, B
        if A.is_meta or B.is_meta:
            onload(bank)
            A, B = bank.pair(adapter, slot)
        return A.to(device), B.to(device)

    def update_of(self, adapter: str, x: Tensor) -> Tensor:
        """What one adapter adds to the base layer's output.

        Args:
            adapter: its name; must be on this layer.
            x: what the base layer takes; if floating, it is cast to the adapter's dtype, as PEFT does.

        Returns:
            Of the shape of the base layer's output.
        """
        A, B = self.tensors_of(adapter, x.device)
        a = self._down(x, A)
        h = functional.hidden(a, self.activation[adapter], self.dropout[adapter], self.training)
        return self._out(self.scaling[adapter] * functional.mix(h, self._weights(adapter, h, x), B), x)

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        """What A makes of the input: (..., r), tokens and all that stands for them before r."""
        return self._cast_input_dtype(x, A.dtype) @ A.T  # type: ignore[no-any-return]

    def _out(self, update: Tensor, x: Tensor) -> Tensor:
        """The update (..., out) in the shape of the base layer's output."""
        return update

    def _mask(self, x: Tensor, h: Tensor) -> Tensor | None:
        """Which tokens of the input count, (batch, tokens); None: all do."""
        return self.bank.masks.mask_for(x)

    def _fast(self, adapter: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, fused.How, Tensor | None] | None:
        """What `fused` needs to compute the adapter's update, or None where only the reference can."""
        bank, routing, router = self._bank[0], self.routing[adapter], self.router_of(adapter, x.device)
        settled = bank.settled.get(adapter) if router is not None else None
        if settled is not None:
            if settled.begun and not settled.done:
                return None
            routing, router = self._settled_router(adapter, settled.done)
        if routing == "batch" and (not self.training or self.batch_scope[adapter] == "global"):
            return None  # what batch routing is for is stock PEFT's results, to the last bit
        A, B = self._pair(adapter, x.device)
        dtype = fused.product_dtype(x, A, B)
        if dtype is None:
            return None
        if adapter in self.statistics and routing != "static":
            self._record(adapter, x, A)
        dropout = self.dropout[adapter] if self.training else 0.0
        how = fused.How(
            routing,
            self.num_B[adapter],
            self.scaling[adapter],
            dtype,
            self.activation[adapter],
            dropout,
            self.transposed,
        )
        mask = bank.masks.mask_for(x) if routing == "sequence" else None
        return A, B, router, how, mask

    def _settled_router(self, adapter: str, done: bool) -> tuple[str, Tensor]:
        """The routing before or after settling, and its router: with no gradient from the one that is idle.

        Without any, distributed training would wait for it.
        """
        router, logits = cast(Tensor, self.router_of(adapter)), cast(Tensor, self.lily_logits[adapter])
        used, idle = (logits, router) if done else (router, logits)
        if self.training and idle.requires_grad:
            used = used + 0 * idle.sum().to(used.dtype)
        return ("static" if done else self.routing[adapter]), used

    @torch.no_grad()
    def _record(self, adapter: str, x: Tensor, A: Tensor) -> None:
        """Note the weights of a forward that the fast path computes, which does not tell them."""
        statistics = self.statistics[adapter]
        if statistics.wants(self.training):
            mask = self.bank.masks.mask_for(x)
            h = functional.down(self._cast_input_dtype(x, A.dtype), A, self.activation[adapter])
            router, routing = (
                self.router_of(adapter, x.device),
                "token" if statistics.per_token else self.routing[adapter],
            )
            statistics.add(functional.weights(h, self.num_B[adapter], router, routing, mask), h, mask)

    def _weights(self, adapter: str, h: Tensor, x: Tensor) -> Tensor:
        experts, router, routing = self.num_B[adapter], self.router_of(adapter, h.device), self.routing[adapter]
        statistics = self.statistics.get(adapter)
        settled = self.bank.settled.get(adapter) if experts > 1 else None
        mask = self._mask(x, h) if routing == "sequence" or statistics is not None else None
        if settled is not None:
            logits = cast(Tensor, self.lily_logits[adapter])
            target = functional.softmax(logits).to(h.dtype)
            if settled.done:
                return functional.softmax(self._settled_router(adapter, True)[1]).to(h.dtype)
        if routing == "batch" and self.training and router is not None and self.batch_scope[adapter] == "global":
            w = mean_of_all(functional.route(h, router))
        else:
            w = functional.weights(h, experts, router, routing, mask)
        if statistics is not None and statistics.wants(self.training):
            seen = functional.weights(h, experts, router, "token") if statistics.per_token else w
            statistics.add(seen, h, mask)
        if settled is not None:
            w = settled.blend(w, target.detach()) + (0 * logits.sum()).to(h.dtype)
        return w

    def is_static(self, adapter: str) -> bool:
        """Whether the adapter's update is one matrix, whatever the data: it can be merged and exported."""
        settled = self.bank.settled.get(adapter)
        fixed = self.num_B[adapter] == 1 or self.routing[adapter] not in DYNAMIC
        return (fixed or (settled is not None and settled.done)) and self.activation[adapter] == "none"

    def factors(self, adapter: str) -> Factors:
        """The adapter's update as a product, in at least float32.

        Raises:
            LilyError: if the update depends on the data.
        """
        if not self.is_static(adapter):
            raise NotStaticError(adapter, self.routing[adapter], self.activation[adapter])
        tensors = self.tensors_of(adapter, self.bank.pair(adapter, self.slots[adapter])[1].device)
        A, B = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)
        logits = self.lily_logits.get(adapter) if self.num_B[adapter] > 1 else None
        with torch.autocast(B.device.type, enabled=False):
            mixed = self._mixed(B, None if logits is None else logits.detach())
        return Factors(A, mixed, self.scaling[adapter])

    def _mixed(self, B: Tensor, logits: Tensor | None) -> Tensor:
        """The B of each matrix of the base weight, its experts mixed by static weights."""
        return functional.static_B(B, logits)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can take this layer's adapter; see `is_static`."""
        return self.converts and adapter_name in self.slots and self.is_static(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's update in the shape and orientation of the base weight.

        Raises:
            LilyError: if the update depends on the data.
        """
        return self._oriented(self.factors(adapter))

    def _oriented(self, factors: Factors) -> Tensor:
        with torch.autocast(factors.A.device.type, enabled=False):
            return factors.delta.mT if self.transposed else factors.delta

    def check_merge(self, adapter: str, safe_merge: bool = False) -> None:
        """Refuse what cannot be merged, before anything is.

        Args:
            adapter: its name.
            safe_merge: also refuse an update that is not finite.

        Raises:
            LilyError: if the update depends on the data, the base weight is quantised, or `safe_merge` finds a fault.
        """
        factors = self.factors(adapter)
        base = self.get_base_layer()
        weight = self.adapted_weight
        plain = type(weight) in fused.PLAIN
        # A float8 weight is quantised too: its scale is somewhere else.
        if not plain or not weight.is_floating_point() or weight.element_size() == 1:
            kind = f"{type(weight).__name__} of {weight.dtype}" if plain else type(weight).__name__
            raise LilyError(
                f"cannot merge into a {type(base).__name__} whose weight is a {kind}: the update "
                "would be rounded to its few values; load the base model unquantised (or call its dequantize()) and "
                "merge there, or export a LoRA"
            )
        if safe_merge and not torch.isfinite(add(weight.data, self._wide(factors, weight))[0]).all():
            raise LilyError(f"merged with adapter {adapter!r} the weight would hold NaN or infinity; it is not merged")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight; computed in at least float32, undone to the last bit by `unmerge`.

        Args:
            safe_merge: refuse values that are not finite.
            adapter_names: default: the active ones.

        Raises:
            LilyError: see `check_merge`. The weight is then as it was.
        """
        for name in self._mergeable(safe_merge, adapter_names):
            weight, factors = self.adapted_weight, self.factors(name)
            merged, undo, error = fold(weight.data, self._wide(factors, weight))
            weight.data.copy_(merged)
            kept = replace(factors, A=factors.A.clone(), B=factors.B.clone())
            self.merged_as[name] = Merged(kept, undo)
            self.rounding[name] = error
            self.merged_adapters.append(name)

    def _mergeable(self, safe_merge: bool, adapter_names: list[str] | None) -> list[str]:
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.slots]
        for name in names:
            self.check_merge(name, safe_merge)
        return names

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with adapters folded in for good (nothing is kept to undo it) or taken out. See PEFT."""
        base: nn.Module = self.get_base_layer()
        if not merge:
            self.unmerge()
            return base
        weight = self.adapted_weight
        for name in self._mergeable(safe_merge, adapter_names):
            merged, error = add(weight.data, self._wide(self.factors(name), weight))
            weight.data.copy_(merged)
            self.rounding[name] = error
        return base

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again, last in first out."""
        while self.merged_adapters:
            name, weight = self.merged_adapters.pop(), self.adapted_weight
            record = self.merged_as.pop(name)
            self.rounding.pop(name, None)
            restored, exact = unfold(weight.data, self._wide(record.factors, weight), record.undo)
            weight.data.copy_(restored)
            if not exact:
                warnings.warn(
                    "unmerged up to rounding, not to the last bit: the base weight or its device changed in between",
                    stacklevel=2,
                )

    def _wide(self, factors: Factors, weight: Tensor) -> Tensor:
        A, B = factors.A.to(weight.device), factors.B.to(weight.device)
        delta = self._oriented(replace(factors, A=A, B=B))
        return delta.to(torch.promote_types(delta.dtype, weight.dtype)).contiguous()
