"""The exact weighted sum of adapters that keeps what their layers share: `combination_type="cat"`.

Ranks add up: A, B, gains and own pairs are concatenated along r, and weights and scales are multiplied into B. Experts
are joined in one of two ways:

- Static weights: the experts of one adapter are zero on the ranks of the others. With n adapters that have several
  experts each gets 1/n of the softmax, so its B is multiplied by n.
- Data-dependent weights: an expert for every choice of one expert of each adapter, the logits of which add up. Then
  softmax(l1_e + l2_f) = p1_e * p2_f, and its sums over f and over e are the weights of each adapter alone, for each
  token and so for every mean of tokens.

A layer's distinction acts on all ranks of one adapter; where layers that share A are distinct, each gets an A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lily.layers.own import members_of
from lily.plan.sharing_plan import Group
from lily.plan.specs import EXPERTS
from lily.tuner.weighted_terms import Combined, NotSharedError, Shape, Term


@dataclass(frozen=True)
class Share:
    """What one adapter gives to one group of the new one.

    Attributes:
        term: the adapter.
        group: the group in the adapter's plan.
        private: whether its static update becomes each layer's own A and B, beside experts that depend on the data.
    """

    term: Term
    group: Group
    private: bool

    def layer(self, name: str) -> Any:
        """The adapted layer."""
        return self.term.adapted.layers[name]

    def settings(self, name: str) -> Any:
        """The adapter's settings on a layer."""
        return self.layer(name).settings[self.term.name]

    @property
    def first(self) -> Any:
        """The settings of the group's first layer."""
        return self.settings(self.group.layers[0])

    @property
    def experts(self) -> int:
        """Experts that the layers weigh differently."""
        return 1 if self.first.routing == "uniform" else self.group.num_B

    @property
    def one_scale(self) -> float | None:
        """The scale of all layers; None: they have different ones."""
        scales = {self.settings(name).scaling for name in self.group.layers}
        return scales.pop() if len(scales) == 1 else None

    @property
    def distinct(self) -> bool:
        """Whether a fixed permutation or signs distinguish its layers."""
        own = (self.settings(name).distinction for name in self.group.layers)
        changed = any(d is not None and (d.rows is not None or d.signs is not None) for d in own)
        return changed and self.term.adapted.config.options_of(self.group.name).distinct != "none"

    @property
    def private_rank(self) -> int:
        """Ranks that a layer has for itself."""
        return self.group.own_r + (self.group.r if self.private else 0)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        A, B = self.term.adapted.bank.pair(self.term.name, self.settings(name).slot)
        return _wide(A), _wide(B)

    def shared_A(self, name: str) -> Tensor:
        """The A that a layer shares, (tensors, r, in): one, or those of all blocks of stacked experts."""
        A = self._pair(name)[0]
        return A.view(-1, self.group.r, A.shape[1])

    def layer_A(self, name: str) -> Tensor:
        """A layer's A with its distinction, gain and, where layers differ in it, scale: (members, r, in)."""
        A, settings = self._pair(name)[0], self.settings(name)
        if settings.distinction is not None:
            gain = self.layer(name)._own(self.term.name, "lily_gain", A.device)
            A = settings.distinction.apply(A, None if gain is None else _wide(gain))
        A = A.view(-1, self.group.r, A.shape[1])
        if len(A) < members_of(self.group):
            A = A[torch.arange(members_of(self.group), device=A.device) // self.group.stride]
        return A * self._scale_of_rows(name)

    def gain(self, name: str) -> Tensor:
        """A layer's gain and, where layers differ in it, scale: (members, r)."""
        own = self.layer(name)._own(self.term.name, "lily_gain", self._pair(name)[0].device)
        gain = self._pair(name)[0].new_ones(members_of(self.group) * self.group.r) if own is None else _wide(own)
        return gain.view(-1, self.group.r) * self._scale_of_rows(name)

    def _scale_of_rows(self, name: str) -> float:
        return self.settings(name).scaling if self.one_scale is None else 1.0

    @property
    def B(self) -> Tensor:
        """The experts with the adapter's weight and, where layers agree in it, scale: (experts, r, out)."""
        B = self._pair(self.group.layers[0])[1]
        B = B.view(self.group.num_B, self.group.r, B.shape[1])
        B = B if self.experts == self.group.num_B else B.mean(0, keepdim=True)
        return B * (self.term.weight * (1.0 if self.one_scale is None else self.one_scale))

    def router(self, name: str) -> Tensor:
        """A layer's R (experts, r); zero for one expert."""
        if self.experts == 1:
            return self._pair(name)[1].new_zeros(1, self.group.r)
        return _wide(self.layer(name)._router(self.term.name))

    def log_weights(self, name: str) -> Tensor:
        """Logarithms of a layer's static weights, (experts,) or (members, experts)."""
        return torch.log_softmax(_wide(self.layer(name).logits_of(self.term.name)), -1)

    def private_pairs(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """What becomes a layer's own pairs: A (members, ranks, in) and B (members, ranks, out)."""
        layer, members = self.layer(name), members_of(self.group)
        if self.private:
            f = layer.factors(self.term.name)
            A, B = (t.expand(members, *t.shape[-2:]) for t in (f.A, f.B))
            return [(A, B * (self.term.weight * f.scaling))]
        if not self.group.own_r:
            return []
        own = (layer._own(self.term.name, f"lily_own_{part}", self._pair(name)[0].device) for part in "AB")
        A, B = (_wide(t).view(members, self.group.own_r, -1) for t in own)
        return [(A, B * (self.term.weight * self.settings(name).scaling))]


@torch.no_grad()
def exact_sum(groups: Sequence[Group], terms: Sequence[Term]) -> Combined:
    """The sum of adapters, as an adapter that shares as they do.

    Args:
        groups: the groups of the new adapter's layers.
        terms: the adapters.

    Raises:
        NotSharedError: if there is none, with the reason.
    """
    routings = {t.adapted.config.routing for t in terms if t.dynamic}
    if len(routings) > 1:
        raise NotSharedError(f"they have different routings ({', '.join(sorted(map(str, routings)))})")
    for t in terms:
        settled = t.adapted.bank.settled.get(t.name)
        if settled is not None and settled.begun and not settled.done:
            raise NotSharedError(f"{t.name!r} is between its routers and its static weights while it settles")
    routed = [t for t in terms if t.dynamic]
    common_router = bool(routed) and all(t.adapted.config.shared_router for t in routed)
    state: dict[str, Tensor] = {}
    shapes = []
    for group in groups:
        shares = [share for t in terms if (share := _share(group, t, bool(routed))) is not None]
        shapes.append(_add_group(state, group, shares, bool(routed), common_router))
    options: dict[str, Shape] = {}
    for group, shape in zip(groups, shapes, strict=True):
        first = options.setdefault(group.name, shape)
        if replace(shape, r=first.r) != first:  # a configuration has options by name
            raise NotSharedError(f"layers called {group.name} have several shapes, and other options in each")
    return Combined(shapes, str(next(iter(routings), "static")), state, common_router)


def _share(group: Group, term: Term, beside_routers: bool) -> Share | None:
    adapted = term.adapted
    own = [name for name in group.layers if name in adapted.layers]
    if not own:
        return None
    source = adapted.plan.group_of(own[0])
    if source.members != group.members:
        raise NotSharedError(f"{term.name!r} shares the B of {group.name} among other layers")
    return Share(term, source, beside_routers and not term.dynamic and _has_logits(term, own[0]))


def _has_logits(term: Term, name: str) -> bool:
    settings = term.adapted.layers[name].settings[term.name]
    return settings.num_B > 1 and settings.routing != "uniform"


def _add_group(
    state: dict[str, Tensor], group: Group, shares: Sequence[Share], dynamic: bool, common_router: bool
) -> Shape:
    """Add a group's tensors to `state` and return what it needs."""
    activations = {share.first.activation for share in shares}
    one_scale = all(share.private or share.one_scale is not None for share in shares)
    if len(activations) > 1:
        raise NotSharedError(f"the activations of {group.name} differ")
    if activations != {"none"} and any(share.private for share in shares):
        raise NotSharedError(f"{group.name} has static weights and an activation in another of them")
    if not one_scale and (dynamic or activations != {"none"}):
        raise NotSharedError(f"layers of {group.name} have different scales")
    public = [share for share in shares if not share.private]
    stride = _stride(group, public)
    gain = stride is not None and (not one_scale or any(share.group.gain for share in public))
    own_r = sum(share.private_rank for share in shares)
    for name in _first_layers(group, stride):
        parts = [s.layer_A(name) if stride is None else s.shared_A(name) for s in public]
        A = torch.cat(parts, 1) if parts else _zeros(group, shares, group.in_features, group.kind == EXPERTS)
        state[f"{name}.lily_A.weight"] = A.flatten(0, 1)
    B = _joined_B(public, dynamic) if public else _zeros(group, shares, group.out_features)
    state[f"{group.layers[0]}.lily_B.weight"] = B.flatten(0, 1)
    for number, name in enumerate(group.layers):
        if len(B) > 1 and not dynamic:
            state[f"{name}.lily_logits"] = torch.cat([s.log_weights(name) for s in public if s.experts > 1], -1)
        elif len(B) > 1 and not (common_router and number):
            state[f"{name}.lily_router.weight"] = _chosen([s.router(name) for s in public])
        if gain:
            state[f"{name}.lily_gain.weight"] = torch.cat([s.gain(name) for s in public], 1).flatten()
        if own_r:
            pairs = [pair for share in shares for pair in share.private_pairs(name)]
            for part, tensors in zip("AB", zip(*pairs, strict=True), strict=True):
                state[f"{name}.lily_own_{part}.weight"] = torch.cat(tensors, 1).flatten(0, 1)
    r = B.shape[1]
    return Shape(
        r, len(B), stride or 1, None, own_r, "ones" if gain else "none", activations.pop(), shares[0].first.dropout
    )


def _stride(group: Group, shares: Sequence[Share]) -> int | None:
    """How many layers in a row share an A; None: each layer has its own, with its distinction and gain in it."""
    if not shares or any(share.distinct for share in shares):
        return None
    stride, names = shares[0].group.stride, group.members
    blocks = tuple(tuple(names[i : i + stride]) for i in range(0, len(names), stride))
    return stride if all(share.group.blocks == blocks for share in shares) else None


def _first_layers(group: Group, stride: int | None) -> Sequence[str]:
    """The layers under which a file has the group's A."""
    return group.layers if stride is None or group.kind == EXPERTS else group.layers[::stride]


def _joined_B(shares: Sequence[Share], dynamic: bool) -> Tensor:
    """The experts of all adapters, (experts, ranks, out)."""
    tensors = [share.B for share in shares]
    routed = [B for B in tensors if len(B) > 1]
    if dynamic or not routed:
        return _chosen(tensors)
    joined = tensors[0].new_zeros(sum(map(len, routed)), sum(B.shape[1] for B in tensors), tensors[0].shape[2])
    expert, rank = 0, 0
    for B in tensors:
        if len(B) == 1:  # in every expert, so with weight 1
            joined[:, rank : rank + B.shape[1]] = B
        else:
            joined[expert : expert + len(B), rank : rank + B.shape[1]] = len(routed) * B
            expert += len(B)
        rank += B.shape[1]
    return joined


def _chosen(tensors: Sequence[Tensor]) -> Tensor:
    """For every choice of one row of each (experts, ...) tensor: the rows, concatenated along their first dimension."""
    choices = torch.cartesian_prod(*(torch.arange(len(t)) for t in tensors)).view(-1, len(tensors))
    return torch.cat([t[rows.to(t.device)] for t, rows in zip(tensors, choices.T, strict=True)], 1)


def _zeros(group: Group, shares: Sequence[Share], width: int, stacked: bool = False) -> Tensor:
    """The shared rank of a group whose layers have all they have for themselves."""
    device = shares[0].term.adapted.bank.pair(shares[0].term.name, shares[0].first.slot)[0].device
    return torch.zeros(members_of(group) if stacked else 1, 1, width, device=device)


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))
