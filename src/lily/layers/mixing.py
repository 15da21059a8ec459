"""The mixing weights of one layer in a forward: its router or logits, settling, and their record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lily import functional
from lily.layers.devices import onload
from lily.layers.sharding import mean_of_all
from lily.layers.traced import exporting


class MixingMixin(nn.Module):
    """The part of an adapted layer that decides how its experts are mixed; see `lily.layers.layer.LilyLayer`."""

    if TYPE_CHECKING:
        settings: Any
        bank: Any
        lily_router: Any
        lily_logits: Any
        statistics: Any
        training: bool
        _mask: Any
        _cast_input_dtype: Any

        @property
        def conv_groups(self) -> int:
            """See `LilyLayer`."""

    def router_of(self, adapter: str, device: torch.device | None = None) -> Tensor | None:
        """R (experts, r), the static logits (experts,), or None where the routing learns nothing; on a device."""
        settings = self.settings[adapter]
        if settings.num_B == 1 or settings.routing == "uniform":
            return None
        router = self._router(adapter)
        if router.is_meta:
            onload(self)
            router = self._router(adapter)
        if device is not None and router.device != device:
            router = router.to(device)
        if settings.own_r and settings.routing != "static":
            # The own ranks, the last of each group of a convolution, do not take part in routing.
            shared = torch.unflatten(router, -1, (self.conv_groups, -1))
            return F.pad(shared, (0, settings.own_r // self.conv_groups)).flatten(-2)
        return router

    def logits_of(self, adapter: str) -> nn.Parameter:
        """The static logits (experts,) of an adapter that has them."""
        return cast(nn.Parameter, self.lily_logits[adapter].weight)

    def _router(self, adapter: str) -> Tensor:
        if self.settings[adapter].routing == "static":
            return self.logits_of(adapter)
        if adapter not in self.lily_router:
            return cast(Tensor, self.bank.router(adapter, self.settings[adapter].slot))
        return cast(Tensor, self.lily_router[adapter].weight)

    def _settled_router(self, adapter: str, done: bool) -> tuple[str, Tensor]:
        """The routing before or after settling and its router, plus zero times the unused one.

        Without a gradient for the unused one, distributed training would wait for it.
        """
        router, logits = cast(Tensor, self.router_of(adapter)), self.logits_of(adapter)
        used, unused = (logits, router) if done else (router, logits)
        if self.training and unused.requires_grad:
            used = used + 0 * unused.sum().to(used.dtype)
        return ("static" if done else self.settings[adapter].routing), used

    @torch.no_grad()
    def _record(self, adapter: str, x: Tensor, A: Tensor) -> None:
        """Record expert weights that the fused path does not return; recomputes h."""
        settings, statistics = self.settings[adapter], self.statistics[adapter]
        if statistics.wants(self.training):
            mask = self.bank.masks.mask_for(x)
            h = functional.down(self._cast_input_dtype(x, A.dtype), A, settings.activation)
            routing = "token" if statistics.per_token else settings.routing
            router = self.router_of(adapter, x.device)
            statistics.add(functional.weights(h, settings.num_B, router, routing, mask), h, mask)

    def _weights(self, adapter: str, h: Tensor, x: Tensor) -> Tensor:
        """The mixing weights of a forward: (E,), (batch, 1, E) or (..., E)."""
        settings, router = self.settings[adapter], self.router_of(adapter, h.device)
        experts, routing = settings.num_B, settings.routing
        statistics = None if exporting() else self.statistics.get(adapter)
        settled = self.bank.settled.get(adapter) if experts > 1 else None
        mask = self._mask(x, h) if routing == "sequence" or statistics is not None else None
        if settled is not None:
            logits = self.logits_of(adapter)
            target = functional.softmax(logits).to(h.dtype)
            if settled.done:
                return functional.softmax(self._settled_router(adapter, True)[1]).to(h.dtype)
        if routing == "batch" and self.training and router is not None and settings.batch_scope == "global":
            w = mean_of_all(functional.route(h, router))
        else:
            w = functional.weights(h, experts, router, routing, mask)
        if statistics is not None and statistics.wants(self.training):
            per_token = functional.weights(h, experts, router, "token") if statistics.per_token else w
            statistics.add(per_token, h, mask)
        if settled is not None:
            w = settled.blend(w, target.detach()) + (0 * logits.sum()).to(h.dtype)
        return w
