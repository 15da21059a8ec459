"""State of one adapted layer: its settings, its router, where its shared tensors are; and one call into the math.

Each kind of layer has a subclass (`linear`, `conv`, `embedding`, `slice`, `parameter`, `parallel_module`). Mixing
weights are in `mixing`, what a layer has for itself in `own`, merging in `merging`, scales in `scales`, shapes that do
not change with the adapter in `fixed_shape`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn

from lily import functional
from lily.errors import LilyError
from lily.kernels import fused
from lily.kernels.mixing import How
from lily.layers.bank import LilyBank
from lily.layers.devices import execution_device, onload, weight_of
from lily.layers.fixed_shape import FixedShapeMixin
from lily.layers.merging import Factors, MergingMixin, NotStaticError
from lily.layers.mixing import MixingMixin
from lily.layers.own import Distinction, OwnMixin
from lily.layers.router import Logits, LogitsByAdapter, Router
from lily.layers.routing_statistics import RoutingStatistics
from lily.layers.scales import Ranks, ScaleMixin
from lily.layers.sharding import is_here
from lily.layers.traced import exporting
from lily.plan.config import LilyConfig
from lily.plan.options import DYNAMIC
from lily.plan.sharing_plan import Group, Slot

NESTED = ".base_layer"


@dataclass(frozen=True)
class Settings:
    """What is fixed about one adapter on one layer; see `LilyConfig` for the options.

    Attributes:
        slot: where its A and B are in the bank.
        r: the rank.
        num_B: experts.
        stride: of stacked experts, how many in a row share an A.
        scaling: multiplies the update, now.
        configured_scaling: what it is unless something changes it; see `lily.layers.scales`.
        routing: as it is now: `lily.collapse` and settling make it `static`.
        batch_scope: whether `batch` routing averages over one process or all.
        activation: between A and B.
        dropout: probability, on h.
        distinction: what distinguishes the layer from the others of its group; None if nothing does.
        own_r: rank of the A and B of a single layer.
    """

    slot: Slot
    r: int
    num_B: int
    stride: int
    scaling: float
    configured_scaling: float
    routing: str
    batch_scope: str
    activation: str
    dropout: float
    distinction: Distinction | None
    own_r: int


class LilyLayer(MixingMixin, OwnMixin, FixedShapeMixin, ScaleMixin, MergingMixin):
    """An adapted layer of any kind. A and B are in the bank; see `lily.layers.bank`.

    Args:
        base_layer: the frozen layer.
        bank: the shared tensors.

    Attributes:
        settings: adapter -> its settings on this layer.
        lily_router: adapter -> R as `nn.Linear(r, experts)`, for token, sequence and batch routing.
        lily_logits: adapter -> `Logits` (experts,), for static routing and while a routing settles.
        lily_gain: adapter -> gain (r,), with `gain`; lily_own_A, lily_own_B: its own pair, with `own_r`.
        statistics: adapter -> recorder of its routing; empty unless something records it.
        tokens_first: whether its input is (tokens, batch, ...), where `sequence` routing would average over a batch.
        reads_positions: whether its input is positions, where it would average over as many as the batch has tokens;
            it has `token` routing in both cases.
    """

    cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` changes it
    adapter_layer_names: tuple[str, ...] = ("lily_router", "lily_logits", "lily_gain", "lily_own_A", "lily_own_B")
    other_param_names: tuple[str, ...] = ("settings", "statistics", "rounding", "fixed_shapes")

    def __init__(self, base_layer: nn.Module, bank: LilyBank) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.transposed = type(self.get_base_layer()).__name__ == "Conv1D"
        # In a tuple, so that nn.Module does not register it: the bank belongs to the root alone.
        self._bank = (bank,)
        self.settings: dict[str, Settings] = {}
        self.lily_router = nn.ModuleDict({})
        self.lily_logits = LogitsByAdapter({})
        self.lily_gain, self.lily_own_A, self.lily_own_B = (nn.ModuleDict({}) for _ in range(3))
        self.fixed_shapes = nn.ModuleDict({})
        self.statistics: dict[str, RoutingStatistics] = {}
        self.tokens_first = self.reads_positions = False
        self.merged_as, self.rounding, self.merged_adapters = {}, {}, []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    @property
    def conv_groups(self) -> int:
        """Groups of a convolution, among which the ranks are divided."""
        return 1

    @property
    def bank(self) -> LilyBank:
        """The shared tensors."""
        return self._bank[0]

    @property
    def r(self) -> Ranks:
        """Adapter -> rank, of which diffusers counts the adapters."""
        return Ranks(self)

    @property
    def base(self) -> nn.Module:
        """The base layer without any wrapper."""
        return self.get_base_layer()  # type: ignore[no-any-return]

    @property
    def in_features(self) -> int | None:
        """The base layer's input features, channels or rows, as of PEFT's LoRA layers; None: it has no such number."""
        return _get_in_out_features(self.base)[0]  # type: ignore[no-any-return]

    @property
    def out_features(self) -> int | None:
        """The base layer's output features, channels or columns; see `in_features`."""
        return _get_in_out_features(self.base)[1]  # type: ignore[no-any-return]

    @property
    def adapted_weight(self) -> Any:
        """The base weight that the update is for; None where the base layer has none."""
        return weight_of(self.get_base_layer())

    @property
    def whole_weight(self) -> Any:
        """The parameter that `adapted_weight` is, or is a part of."""
        return self.adapted_weight

    def name_in_plan(self, path: str) -> str:
        """What a plan calls the layer that is at `path` in the model: its name without adapters around it."""
        return re.sub(rf"({re.escape(NESTED)})+$", "", path)

    def acting(self) -> list[str]:
        """The adapters that take part in a forward now. A merged one that is switched off is unmerged first."""
        if self.merged_adapters:
            if self._disable_adapters:
                self.unmerge()
            return []
        return [] if self._disable_adapters else [name for name in self.active_adapters if name in self.settings]

    def _get_available_adapters(self) -> set[str]:
        return set(self.settings)

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
        own = config.options_of(group.name)
        scaling = config.scaling_of(group.name, group.layers[slot.place])
        self.settings[adapter] = Settings(
            slot, group.r, group.num_B, group.stride, scaling, scaling, self.routing_for(str(config.routing)),
            config.batch_scope, own.activation, own.dropout, self._add_own(adapter, group, slot, config), group.own_r,
        )  # fmt: skip
        if group.num_B > 1 and config.routing in DYNAMIC and not config.shared_router:
            self.lily_router[adapter] = Router(group.r, group.num_B)
            if config.settled is not None:
                self.lily_logits[adapter] = Logits(torch.zeros(group.logits_shape))
        elif group.num_B > 1 and config.routing == "static":
            # Random, not zero: with equal weights all experts get equal gradients and would stay equal forever.
            self.lily_logits[adapter] = Logits(torch.randn(group.logits_shape))
        self._move_adapter_to_device_of_base_layer(adapter, device)

    @property
    def routes_by_sequence(self) -> bool:
        """Whether an adapter averages over the tokens of a sample."""
        return any(s.routing == "sequence" and s.num_B > 1 for s in self.settings.values())

    def routing_for(self, routing: str) -> str:
        """The routing that a configuration's is on this layer."""
        return "token" if routing == "sequence" and (self.tokens_first or self.reads_positions) else routing

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, from the bank too: transformers calls this on each layer, but not on the bank."""
        self.bank.delete_adapter(adapter_name)
        super().delete_adapter(adapter_name)

    def _all_available_adapter_names(self) -> list[str]:
        # PEFT activates the first of these after a deletion. It must be the same one on every layer.
        return sorted(self.bank.plans)

    def _move_own(self, adapter: str, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move the layer's own tensors of an adapter, unless they are on the meta device because a file follows."""
        for own in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter in own and not cast(Tensor, own[adapter].weight).is_meta:
                own[adapter].to(device, dtype)

    def tensors_of(self, adapter: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (experts, r, out), where the bank has them now, or on a device.

        Of a convolution with groups, B is (experts, r / groups, out).

        Raises:
            LilyError: if a sharding engine holds them in parts that have not been gathered.
        """
        num_B, (A, B) = self.settings[adapter].num_B, self._pair(adapter, device)
        if not (is_here(A) and is_here(B)):
            raise LilyError(
                f"the shared tensors of adapter {adapter!r} are sharded and have not been gathered: lily_bank was made "
                "a separate unit, or the model is called without its wrapper; wrap the root of the model, which "
                "contains the bank, and call that (with FSDP2: fully_shard(model) after fully_shard(layer) for each "
                "layer)"
            )
        return A, B.view(num_B, B.shape[0] // num_B, B.shape[1])

    def _pair(self, adapter: str, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """The layer's A (r, in) and B (experts * r, out), on a device."""
        A, B = self._shared_pair(adapter, device)
        settings = self.settings[adapter]
        if settings.distinction is not None and is_here(A):
            A = settings.distinction.apply(A, self._own(adapter, "lily_gain", A.device))
        if settings.own_r and is_here(A) and is_here(B):
            A, B = self._with_own(adapter, A, B)
        return A, B

    def _shared_pair(self, adapter: str, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """The bank's A (r, in) and B (experts * r, out), on a device: layers on several devices share one bank."""
        bank, settings = self._bank[0], self.settings[adapter]
        A, B = bank.pair(adapter, settings.slot)
        if device is not None and not (A.device == device and B.device == device):
            if A.is_meta or B.is_meta:
                onload(bank)
                A, B = bank.pair(adapter, settings.slot)
            A, B = A.to(device), B.to(device)
        return A, B

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output for `x` plus the updates, in its dtype. Kinds with a faster way override this."""
        adapters, base = self.acting(), self.base_layer
        if "_hf_hook" in base.__dict__:  # accelerate may run the base layer on another device than its input's
            x = x.to(execution_device(base) or x.device)
        result: Tensor = base(x, *args, **kwargs)
        for adapter in adapters:
            result = result + self.update_of(adapter, x).to(result.dtype)
        return result

    def update_of(self, adapter: str, x: Tensor) -> Tensor:
        """What one adapter adds to the base layer's output.

        Args:
            adapter: its name; must be on this layer.
            x: the base layer's input; if floating, it is cast to the adapter's dtype, as PEFT does.

        Returns:
            Of the shape of the base layer's output.
        """
        if (fixed := self._fixed(adapter)) is not None:
            h = functional.hidden(self._down(x, fixed.A), fixed.shape.activation)
            return self._out(fixed.update(h, self._mask(x, h) if fixed.shape.routing == "sequence" else None), x)
        settings, (A, B) = self.settings[adapter], self.tensors_of(adapter, x.device)
        h = functional.hidden(self._down(x, A), settings.activation, settings.dropout, self.training)
        w = self._weights(adapter, h, x)
        if w.ndim > 1 and self.conv_groups == 1 and exporting():
            return self._out(settings.scaling * functional.mix_expanded(h, w, B), x)
        return self._out(settings.scaling * functional.mix(h, w, B, self.conv_groups), x)

    def _down(self, x: Tensor, A: Tensor) -> Tensor:
        """The input projected by A, before the activation: (..., r), where the leading dimensions are tokens."""
        return self._cast_input_dtype(x, A.dtype) @ A.T  # type: ignore[no-any-return]

    def inputs_of_A(self, x: Tensor) -> Tensor | None:
        """The vectors (..., in) that A multiplies for an input `x`; None: there are none, or they are not visible."""
        return x

    def _out(self, update: Tensor, x: Tensor) -> Tensor:
        """The update (..., out) in the shape of the base layer's output."""
        return update

    def _mask(self, x: Tensor, h: Tensor) -> Tensor | None:
        """Which tokens of the input count, (batch, tokens); None: all do."""
        return self.bank.masks.mask_for(x)

    def _plus_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """`result` (..., out) plus an adapter's update for `x` (..., in), fused where possible."""
        fast = self._fast(adapter, x)
        if fast:
            return fused.plus_update(result, x, fast)
        return result + self.update_of(adapter, x).to(result.dtype)

    def _fast(self, adapter: str, x: Tensor) -> fused.Update | None:
        """The adapter's update for `fused`, or None where only the reference can compute it."""
        if exporting() or self._fixed(adapter) is not None:
            return None
        bank, settings, router = self._bank[0], self.settings[adapter], self.router_of(adapter, x.device)
        routing = settings.routing
        settled = bank.settled.get(adapter) if router is not None else None
        if settled is not None:
            if settled.begun and not settled.done:
                return None
            routing, router = self._settled_router(adapter, settled.done)
        if routing == "batch" and (not self.training or settings.batch_scope == "global"):
            return None  # batch routing exists to give stock PEFT's results, to the last bit
        A, B = self._shared_pair(adapter, x.device)
        dtype = fused.product_dtype(x, A, B)
        if dtype is None:
            return None
        rows, factor, own_A, own_B = None, None, None, None
        if settings.distinction is not None:
            gain = self._own(adapter, "lily_gain", A.device)
            rows, factor = settings.distinction.arrangement(A.device, gain)
        if settings.own_r:
            own_A, own_B = (self._own(adapter, part, A.device) for part in ("lily_own_A", "lily_own_B"))
        dropout = settings.dropout if self.training else 0.0
        how = How(routing, settings.num_B, settings.scaling, dtype, settings.activation, dropout, self.transposed)
        mask = bank.masks.mask_for(x) if routing == "sequence" else None
        if mask is not None and functional.is_of_samples(mask, x):
            return None
        update = fused.Update(A, B, router, how, mask, rows, factor, own_A, own_B)
        if adapter in self.statistics and routing != "static":
            self._record(adapter, x, update.pair[0])
        return update

    def is_static(self, adapter: str) -> bool:
        """Whether the adapter's update is one matrix for all data, so that it can be merged and exported."""
        settings, settled = self.settings[adapter], self.bank.settled.get(adapter)
        fixed = settings.num_B == 1 or settings.routing not in DYNAMIC
        return (fixed or (settled is not None and settled.done)) and settings.activation == "none"

    def factors(self, adapter: str) -> Factors:
        """The adapter's update as a product, in at least float32.

        Raises:
            LilyError: if the update depends on the data.
        """
        settings = self.settings[adapter]
        if not self.is_static(adapter):
            raise NotStaticError(adapter, settings.routing, settings.activation)
        tensors = self.tensors_of(adapter, self.bank.pair(adapter, settings.slot)[1].device)
        A, B = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)
        logits = self.logits_of(adapter) if settings.num_B > 1 and adapter in self.lily_logits else None
        with torch.autocast(B.device.type, enabled=False):
            mixed = self._mixed(B, None if logits is None else logits.detach())
        return Factors(A, mixed, settings.scaling)

    def _mixed(self, B: Tensor, logits: Tensor | None) -> Tensor:
        """The B of each matrix of the base weight, its experts mixed by static weights."""
        return functional.static_B(B, logits)

    def __repr__(self) -> str:
        return "lily." + super().__repr__()
