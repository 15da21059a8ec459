"""Combinations by PEFT's own LoRA: every layer's static update is a pair of A and B, and so is the combined one.

The result is a Lily adapter in which nothing is shared: each layer has its pair for itself (`own_r`), beside one shared
rank that is zero and stays so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from lily.errors import LilyError
from lily.layers.merging import Factors
from lily.layers.own import members_of
from lily.plan.sharing_plan import Group
from lily.tuner.weighted_terms import PRUNING, Combined, How, Shape, Term

NEW = "combined adapters"  # no adapter of a model can have this name


def combined_pairs(groups: Sequence[Group], terms: Sequence[Term], how: How) -> Combined:
    """The combination of static adapters.

    Args:
        groups: the groups of the new adapter's layers.
        terms: the adapters.
        how: see `How`.

    Raises:
        LilyError: if an update is not static, or the combination needs equal ranks and has others.
    """
    group_of = {name: group for group in groups for name in group.layers}
    updates = {t.name: {n: layer.factors(t.name) for n, layer in t.adapted.layers.items()} for t in terms}
    matrices = {name: members_of(group_of[name]) for name in _in_model_order(terms)}
    _check_ranks(updates, how.combination_type)
    pairs = iter(_by_lora(matrices, updates, terms, how))
    own = {name: [next(pairs) for _ in range(count)] for name, count in matrices.items()}
    rank = max(A.shape[0] for tensors in own.values() for A, _ in tensors)
    state: dict[str, Tensor] = {}
    for name, tensors in own.items():
        for part, side in zip("AB", zip(*tensors, strict=True), strict=True):
            padded = [nn.functional.pad(t, (0, 0, 0, rank - t.shape[0])) for t in side]
            state[f"{name}.lily_own_{part}.weight"] = torch.cat(padded)
    for group in groups:
        for part, width in (("A", group.in_features), ("B", group.out_features)):
            like = state[f"{group.layers[0]}.lily_own_{part}.weight"]
            state[f"{group.layers[0]}.lily_{part}.weight"] = like.new_zeros(1, width)
    dropout = next(iter(terms[0].adapted.layers.values())).settings[terms[0].name].dropout
    return Combined([Shape(1, num_A=1, own_r=rank, dropout=dropout)] * len(groups), "static", state)


def _in_model_order(terms: Sequence[Term]) -> list[str]:
    """The names of all adapted layers as PEFT meets them, so that random pruning draws what it draws for LoRA."""
    adapted = {layer: name for t in terms for name, layer in t.adapted.layers.items()}
    return [adapted[m] for m in terms[0].adapted.root.modules() if m in adapted]


def _check_ranks(updates: dict[str, dict[str, Factors]], kind: str) -> None:
    if kind not in ("linear", *PRUNING):
        return
    ranks: dict[str, tuple[str, int]] = {}
    for adapter, layers in updates.items():
        for name, factors in layers.items():
            r = factors.A.shape[-2]
            other, theirs = ranks.setdefault(name, (adapter, r))
            if r != theirs:
                raise LilyError(
                    f"combination_type={kind!r} adds up A and B and so needs equal ranks, but {other!r} has rank "
                    f"{theirs} and {adapter!r} {r} on {name}; use 'cat', which is exact, or 'svd'"
                )


@torch.no_grad()
def _by_lora(
    matrices: dict[str, int], updates: dict[str, dict[str, Factors]], terms: Sequence[Term], how: How
) -> list[tuple[Tensor, Tensor]]:
    """A (rank, in) and B (rank, out) of every matrix, in order, as `LoraModel.add_weighted_adapter` combines them."""
    places = [(name, i) for name, count in matrices.items() for i in range(count)]
    model = nn.ModuleList(_frame(updates, name) for name, _ in places)
    lora: LoraModel | None = None
    with torch.random.fork_rng(devices=[]):
        r = max(f.A.shape[-2] for layers in updates.values() for f in layers.values())  # of all: PEFT compares them
        for adapter, layers in updates.items():
            ranks = {str(n): layers[name].A.shape[-2] for n, (name, _) in enumerate(places) if name in layers}
            rank_pattern = {n: rank for n, rank in ranks.items() if rank != r}
            config = LoraConfig(r=r, target_modules=list(ranks), rank_pattern=rank_pattern)
            if lora is None:
                lora = LoraModel(model, config, adapter)
            else:
                lora.peft_config[adapter] = config
                lora.inject_adapter(model, adapter)
            for n in ranks:
                name, i = places[int(n)]
                f = layers[name]
                A, B = (t if t.ndim == 2 else t[i] for t in (f.A, f.B))
                layer: Any = model.get_submodule(n)
                layer.lora_A[adapter].weight.data, layer.lora_B[adapter].weight.data = A, B.mT
                layer.scaling[adapter] = f.scaling
    assert lora is not None
    # The leading singular vectors are the same ones, and with all of them PEFT fails at a rank above a layer's inputs.
    options = {**vars(how), "svd_full_matrices": False}
    lora.add_weighted_adapter([t.name for t in terms], [t.weight for t in terms], NEW, **options)
    layers_of_lora: list[Any] = [model.get_submodule(str(n)) for n in range(len(places))]
    return [(m.lora_A[NEW].weight.data, m.lora_B[NEW].weight.data.mT) for m in layers_of_lora]


def _frame(updates: dict[str, dict[str, Factors]], name: str) -> nn.Linear:
    """A linear layer of the sizes of an adapted one, whose weight takes no memory."""
    f = next(layers[name] for layers in updates.values() if name in layers)
    frame = nn.Linear(f.A.shape[-1], f.B.shape[-1], bias=False, device="meta")
    frame.weight = nn.Parameter(f.A.new_zeros(()).expand(f.B.shape[-1], f.A.shape[-1]), requires_grad=False)
    return frame
