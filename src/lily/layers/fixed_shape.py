"""An adapter's tensors on one layer in a fixed shape, which a compiled model keeps while adapters replace one another.

torch.compile compiles a layer for the rank, the number of experts and the slots of its adapter. So a layer that is
prepared (PEFT's `prepare_model_for_compiled_hotswap`) computes from a copy of its tensors: its own A and B, which hold
everything that distinguishes it, padded with zeros to the largest rank and the largest number of experts. Another
adapter is written into the same memory. The bank keeps what is trained, saved, merged and exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lily import functional
from lily.layers.sharding import is_here
from lily.plan.config import LilyConfig
from lily.plan.options import DYNAMIC
from lily.plan.sharing_plan import Group
from lily.plan.specs import PARAMETERS


class Shape(NamedTuple):
    """What compiled code depends on.

    Attributes:
        r: the largest rank, own ranks included.
        num_B: the largest number of experts.
        routing: a data-dependent one, for which static weights can stand in; or `static`.
        activation: between A and B.
    """

    r: int
    num_B: int
    routing: str
    activation: str

    def refusal(self, r: int, num_B: int, routing: str, activation: str) -> str | None:
        """Why an adapter does not fit, in words that follow its name; None: it fits."""
        dynamic = num_B > 1 and routing in DYNAMIC
        if r > self.r:
            return f"has rank {r}, and the model is prepared for {self.r}; prepare it with target_rank={r}"
        if activation != self.activation:
            return f"has activation={activation!r}, and the model is compiled for {self.activation!r}"
        if dynamic and routing != self.routing:
            return (
                f"has routing={routing!r}, and the model is prepared for {self.routing!r}; give its configuration to "
                "prepare_model_for_compiled_hotswap (config), or collapse it"
            )
        if dynamic and num_B > self.num_B:
            return (
                f"has num_B={num_B}, and the model is prepared for {self.num_B}; give its configuration to "
                "prepare_model_for_compiled_hotswap (config)"
            )
        return None


def shape_of(group: Group, config: LilyConfig, routing_for: Callable[[str], str]) -> Shape:
    """The shape of an adapter's layer of a group, which has `LilyLayer.routing_for`, without room for more."""
    routing = "static" if config.settled == 1 or group.kind in PARAMETERS else routing_for(str(config.routing))
    return Shape(group.r + group.own_r, group.num_B, routing, config.options_of(group.name).activation)


class FixedShape(nn.Module):
    """The padded copy. Its buffers are not in state dicts.

    Args:
        shape: what it is padded to.
        A: (r, in), or (stacked, r, in); an adapter's, whose other sizes, dtype and device it takes.
        B: (experts, r, out), or mixed by static weights: (r, out), or (stacked, r, out).

    Attributes:
        A: (shape.r, in), or (stacked, shape.r, in).
        B: (shape.num_B, shape.r, out), or without experts as the argument; times the scale.
        router: R (shape.num_B, shape.r); None without experts.
        bias: (shape.num_B,), added to the router's logits: 0 for an expert, -inf for one that does not exist.
        current: whether it holds the adapter as it is now.
    """

    def __init__(self, shape: Shape, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.shape, self.current = shape, False
        routed = shape.routing in DYNAMIC
        sizes_B = (shape.num_B, shape.r, B.shape[-1]) if routed else (*B.shape[:-2], shape.r, B.shape[-1])
        self.A: Tensor
        self.B: Tensor
        self.router: Tensor | None
        self.bias: Tensor | None
        for name, sizes in (
            ("A", (*A.shape[:-2], shape.r, A.shape[-1])),
            ("B", sizes_B),
            ("router", (shape.num_B, shape.r) if routed else None),
            ("bias", (shape.num_B,) if routed else None),
        ):
            self.register_buffer(name, None if sizes is None else A.new_zeros(sizes), persistent=False)

    def fill(self, A: Tensor, B: Tensor, router: Tensor | None) -> None:
        """Write an adapter into it.

        Args:
            A: as of the class.
            B: as of the class, times the scale.
            router: R (experts, r); None: B is mixed by static weights.
        """
        _put(self.A, A)
        if self.router is None or self.bias is None:
            _put(self.B, B)
        else:
            experts = 1 if router is None else len(router)
            _put(self.B, B.unsqueeze(0) if router is None else B)
            self.router.zero_()
            self.bias.fill_(-math.inf)
            self.bias[:experts] = 0
            if router is not None:
                self.router[:experts, : router.shape[1]] = router
        self.current = True

    def update(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """The update (..., out) from h (..., shape.r); `mask` (batch, tokens) as of `functional.pool`."""
        if self.router is None or self.bias is None:
            return h @ self.B
        p = functional.softmax(h @ self.router.T + self.bias)
        return functional.mix(h, functional.pool(p, self.shape.routing, mask), self.B)


class FixedShapeMixin(nn.Module):
    """The part of an adapted layer that has fixed shapes; see `lily.layers.layer.LilyLayer`.

    In training mode, where the tensors change, the layer computes from the bank.

    Attributes:
        fixed_shapes: adapter -> its tensors in a fixed shape, if it was prepared.
    """

    fixed_shapes: Any

    if TYPE_CHECKING:
        settings: Any
        bank: Any
        statistics: Any
        adapter_layer_names: Any
        lily_logits: Any
        logits_of: Any
        router_of: Any
        tensors_of: Any
        get_base_layer: Any
        _mixed: Any

    def fix_shape(self, adapter: str, shape: Shape) -> None:
        """Let an adapter have a fixed shape from now on."""
        A, B, _ = self._to_fix(adapter)
        self.fixed_shapes[adapter] = FixedShape(shape, A, B)
        self.refill(adapter)

    @torch.no_grad()
    def refill(self, adapter: str) -> None:
        """Bring the fixed shape of an adapter, if it has one, up to date with its tensors and its scale."""
        if adapter not in self.fixed_shapes:
            return
        fixed, settled = self.fixed_shapes[adapter], self.bank.settled.get(adapter)
        here = all(is_here(t) for t in self.bank.pair(adapter, self.settings[adapter].slot))
        fixed.current = False
        if here and (settled is None or settled.done):
            A, B, router = self._to_fix(adapter)
            fixed.fill(A, B * self.settings[adapter].scaling, router)

    def train(self, mode: bool = True) -> Any:
        """See PyTorch. After training, the fixed shapes are brought up to date."""
        super().train(mode)
        if not mode:
            for adapter in self.fixed_shapes:
                self.refill(adapter)
        return self

    @torch.no_grad()
    def _to_fix(self, adapter: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and the router of an adapter; without a router B is mixed."""
        settings, settled = self.settings[adapter], self.bank.settled.get(adapter)
        device = next(self.get_base_layer().parameters()).device
        A, B = self.tensors_of(adapter, device)
        if settings.num_B > 1 and settings.routing in DYNAMIC and settled is None:
            return A, B, self.router_of(adapter, device)
        logits = self.logits_of(adapter).to(device) if settings.num_B > 1 and adapter in self.lily_logits else None
        return A, self._mixed(B, logits), None

    def _fixed(self, adapter: str) -> FixedShape | None:
        """What a forward computes an adapter's update from; None: from its tensors themselves."""
        if adapter not in self.fixed_shapes or self.training or adapter in self.statistics:
            return None
        fixed: FixedShape = self.fixed_shapes[adapter]
        if torch.is_grad_enabled() and self._trains(adapter):
            fixed.current = False  # until the next call of eval()
        return fixed if fixed.current else None

    def _trains(self, adapter: str) -> bool:
        own = [
            getattr(self, part)[adapter].weight for part in self.adapter_layer_names if adapter in getattr(self, part)
        ]
        shared = self.bank.lily_R[adapter].values() if adapter in self.bank.lily_R else ()
        return any(t.requires_grad for t in (*own, *shared, *self.bank.pair(adapter, self.settings[adapter].slot)))


def _put(target: Tensor, value: Tensor) -> None:
    """Write a smaller tensor into the first entries of `target`, and zeros into the others."""
    target.zero_()
    target[tuple(slice(size) for size in value.shape)] = value.to(target)
