"""A static adapter as a plain LoRA.

Exact by construction: with static weights the update of a layer is `scaling * (sum_e p_e B_e).T @ A`, which is a LoRA
of the same rank. It is approximated only at a smaller rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import Tensor, nn

from lily.checkpoint.format import PREFIX
from lily.deploy.attention import as_pairs, attention_of, names_in_file
from lily.deploy.card import labels_of, task_of
from lily.deploy.extra_tensors import other_entries, saved_modules
from lily.deploy.lora_layer import Layer, cut, finished
from lily.deploy.provenance import origin
from lily.deploy.readers import TARGETS, Target, check_readable, padded_rank, server_of_experts
from lily.deploy.shared_experts import MODULES, shared_outer
from lily.errors import LilyError
from lily.layers.layer import NESTED
from lily.layers.merging import Factors
from lily.plan.options import layer_patterns
from lily.plan.select_parts import select_parameters
from lily.plan.sharing_plan import Group
from lily.plan.specs import CONVOLUTIONS, EMBEDDING, EXPERTS, PARAMETERS, SLICE, layer_spec
from lily.plan.wrappers import plain_names
from lily.tuner.adapter import Adapted, find

# Largest share of energy that a smaller rank may discard without `force`.
TOLERANCE = 0.01


@dataclass(frozen=True)
class LoraExport:
    """A LoRA, ready to write.

    Attributes:
        layers: name -> its matrices.
        groups: name -> the layer's group in the plan.
        rank: the largest rank.
        config: PEFT's configuration of the LoRA.
        other: biases and modules saved whole, by their names in the file.
        provenance: see `lily.deploy.provenance.origin`.
        component: the adapted part of a diffusers pipeline, such as `unet`; None for any other model.
        experts: `peft`, or `shared`: see `as_lora`.
        names: name -> the layer's name in the file, where that is another one.
        task: the Hub's name of what the model does; None: unknown.
        labels: the classes of a classifier.
    """

    layers: dict[str, Layer]
    groups: dict[str, Group]
    rank: int
    config: LoraConfig
    other: dict[str, Tensor]
    provenance: dict[str, Any]
    component: str | None = None
    experts: str = "peft"
    names: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None
    labels: list[str] | None = None

    @property
    def size(self) -> int:
        """Size of its tensors in bytes."""
        tensors = [t for layer in self.layers.values() for t in (layer.A, layer.B)] + list(self.other.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def energies(self) -> dict[str, float]:
        """Layer -> kept energy."""
        return {name: layer.energy for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The file's entries."""
        out = dict(self.other)
        for name, layer in self.layers.items():
            for key, tensor in lora_entries(name, layer, self.groups).items():
                written = self.names[name] + key.removeprefix(name) if name in self.names else key
                out[f"{PREFIX}{written}"] = tensor.contiguous()
        return out


def lora_entries(name: str, layer: Layer, groups: Mapping[str, Group]) -> dict[str, Tensor]:
    """One layer's entries of a file, in the layout of PEFT's LoRA for its kind.

    Source: `peft.tuners.lora.layer` (`_ConvNd`, `Embedding`, `ParamWrapper`).

    Args:
        name: name of the layer.
        layer: its matrices.
        groups: groups of all layers, in the model's order: adapted parameters of one module are nested, the last
            outermost.
    """
    group, A, B = groups[name], layer.A, layer.B
    if group.kind in CONVOLUTIONS:
        ones, g = (1,) * len(group.kernel), group.conv_groups
        A = A.view(A.shape[0], -1, *group.kernel)  # the channels of all groups
        B = torch.unflatten(torch.unflatten(B, 0, (g, -1)), 2, (g, -1)).diagonal(0, 0, 2).movedim(-1, 0)
        B = B.flatten(0, 1).view(group.out_features, -1, *ones)  # of (groups, out / groups, rank / groups)
    elif group.kind == EMBEDDING:
        return {f"{name}.lora_embedding_A": A, f"{name}.lora_embedding_B": B}
    elif group.kind in PARAMETERS:
        module = name.rpartition(".")[0]
        beside = [n for n, g in groups.items() if g.kind in PARAMETERS and n.rpartition(".")[0] == module]
        name = module + NESTED * (len(beside) - 1 - beside.index(name))
        if group.kind == EXPERTS:  # A expert by expert, B with the experts innermost
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}


def as_lora(
    model: nn.Module,
    *,
    adapter: str | None = None,
    target: str = "peft",
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
    dtype: torch.dtype | None = None,
    experts: str = "peft",
    provenance: Mapping[str, Any] | None = None,
) -> LoraExport:
    """Convert a static adapter to a LoRA.

    Args:
        model: the model with the adapter.
        adapter: name of the adapter; default: the active one.
        target: the reader: `peft`, `vllm`, `llama.cpp` or `diffusers`; decides padding and what is refused.
        rank: rank of the LoRA; default: the adapter's, which is exact. A smaller rank truncates the SVD of each layer's
            update.
        tolerance: largest share of a layer's energy (squared norm of its update) that truncation may discard.
        force: truncate even if more is discarded.
        dtype: dtype of the tensors; default: the adapter's, or float32 instead of half precision, which cannot hold
            mixed experts exactly.
        experts: how stacked experts of a mixture are written: `peft`, or `shared`, as SGLang and vLLM read them, with
            the outer matrices once for all experts; see `lily.deploy.shared_experts`.
        provenance: further facts to store with it.

    Raises:
        LilyError: if the adapter depends on the data, the target cannot read a part of it, or truncation discards too
            much.
    """
    wanted = TARGETS.get(target)
    if wanted is None:
        raise LilyError(f"no export target {target!r}; choose one of {', '.join(TARGETS)}")
    if experts not in ("peft", "shared"):
        raise LilyError(f"experts={experts!r} is not known; choose peft or shared")
    shared = experts == "shared"
    if shared:
        wanted = server_of_experts(target, wanted)
        if rank is not None:
            raise LilyError(f"rank={rank} gives each expert separate matrices; leave out rank, or experts='shared'")
    with plain_names(model) as inner:
        return _as_lora(inner, find(inner, adapter), wanted, target, rank, tolerance, force, dtype, shared, provenance)


def _as_lora(
    model: nn.Module,
    adapted: Adapted,
    wanted: Target,
    target: str,
    rank: int | None,
    tolerance: float,
    force: bool,
    dtype: torch.dtype | None,
    shared: bool,
    provenance: Mapping[str, Any] | None,
) -> LoraExport:
    other = other_entries(model, adapted)
    check_readable(target, wanted, adapted, other)
    factors, groups = _joined(adapted)
    if shared:
        factors, groups = shared_outer(adapted, factors, groups)
    else:
        factors = {name: _without_empty_ranks(f) for name, f in factors.items()}
    own = max(f.A.shape[-2] * groups[name].conv_groups for name, f in factors.items())
    if rank is not None and not 1 <= rank <= own:
        raise LilyError(
            f"rank={rank} is not valid: the adapter has {own}; give a positive integer up to that, or omit rank for "
            "an exact export"
        )
    for name, group in groups.items():
        if rank is not None and rank % group.conv_groups:
            raise LilyError(
                f"rank={rank} is not valid: {name} is a convolution with groups={group.conv_groups}, and LoRA's rank "
                "must be a multiple of that"
            )
    layers = {name: cut(f, rank, groups[name].conv_groups) for name, f in factors.items()}
    poor = {n: layer.energy for n, layer in layers.items() if 1 - layer.energy > tolerance}
    if poor and not force:
        worst = min(poor, key=poor.__getitem__)
        raise LilyError(
            f"rank {rank} keeps too little of {len(poor)} of {len(layers)} layers (least: {poor[worst]:.1%} of the "
            f"energy of {worst}; tolerance {tolerance:g} asks for {1 - tolerance:.1%}); give a larger rank or "
            "tolerance, or force=True (--force)"
        )
    largest = max(layer.rank for layer in layers.values())
    rank_to = padded_rank(largest, target, wanted)
    layers = {
        name: finished(layer, rank_to if wanted.uniform or wanted.ranks else layer.rank, dtype, wanted.uniform)
        for name, layer in layers.items()
    }
    names = names_in_file(layers, adapted.root)
    layers, missing = as_pairs(layers, names, adapted.root)
    other |= missing
    config = _lora_config(adapted, layers, names, rank_to)
    if shared:
        config.target_modules = {*(config.target_modules or ()), *MODULES}
        config.target_parameters = None
    rounded = dtype is not None and any(torch.promote_types(f.B.dtype, dtype) != dtype for f in factors.values())
    exact = not rounded and all(layer.energy == 1 for layer in layers.values())
    facts = origin(adapted, "export", provenance) | {
        "exact": exact, "scaling": adapted.config.scaling, "rank": rank_to,
        "adapter_parameters": adapted.plan.parameters.total,
    }  # fmt: skip
    if rank is not None and rank < own:
        facts["energies"] = {name: layer.energy for name, layer in layers.items()}
    if shared:
        facts["experts"] = "shared"
    how = "shared" if shared else "peft"
    task, labels = task_of(adapted.root), labels_of(adapted.root)
    return LoraExport(layers, groups, rank_to, config, other, facts, _component(adapted.root), how, names, task, labels)


def _joined(adapted: Adapted) -> tuple[dict[str, Factors], dict[str, Group]]:
    """Each layer's update and group, with the slices of one layer joined into one update of the whole layer.

    This is exact: ranks add up, the slices' A are concatenated, and each slice's columns of B are zero at the outputs
    of other slices.
    """
    factors: dict[str, Factors] = {}
    groups: dict[str, Group] = {}
    slices: dict[str, list[tuple[Group, Factors]]] = {}
    for name, layer in adapted.layers.items():
        group, update = adapted.plan.group_of(name), layer.factors(adapted.name)
        if group.kind == SLICE:
            slices.setdefault(name.rpartition(".")[0], []).append((group, update))
        else:
            factors[name], groups[name] = update, group
    for name, parts in slices.items():
        out = layer_spec(name, adapted.root.get_submodule(name)).out_features
        wide = []
        for group, update in parts:
            assert group.rows is not None
            whole = update.B.new_zeros(update.B.shape[0], out)
            part = group.rows.view(whole)
            part.copy_((update.scaling * update.B).view(part.shape))
            wide.append(whole)
        factors[name] = Factors(torch.cat([update.A for _, update in parts]), torch.cat(wide), 1.0)
        first, rank = parts[0][0], factors[name].A.shape[0]
        groups[name] = Group(name, first.in_features, out, rank, 1, ((name,),))
    return factors, groups


def _without_empty_ranks(f: Factors) -> Factors:
    """Without the ranks that are zero in A and in B, such as the shared one of combined adapters; one rank stays."""
    used = torch.stack([t.any(-1).view(-1, t.shape[-2]).any(0) for t in (f.A, f.B)]).any(0)
    if used.all() or not used.any():
        return f
    return replace(f, A=f.A[..., used, :], B=f.B[..., used, :])


def _lora_config(adapted: Adapted, layers: Mapping[str, Layer], names: Mapping[str, str], rank: int) -> LoraConfig:
    config = adapted.config
    ranks = {attention_of(name, names): layer.rank for name, layer in layers.items()}
    alphas = {attention_of(name, names): round(layer.scale * layer.rank) for name, layer in layers.items()}
    alpha = alphas[next(n for n, r in ranks.items() if r == rank)]
    keys = layer_patterns(ranks)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_target_modules(adapted, names),
        target_parameters=_target_parameters(adapted),
        rank_pattern={keys[n]: r for n, r in ranks.items() if r != rank},
        alpha_pattern={keys[n]: a for n, a in alphas.items() if a != alpha},
        fan_in_fan_out=any(type(m.get_base_layer()).__name__ == "Conv1D" for m in adapted.layers.values()),
        bias={"lily_only": "lora_only"}.get(config.bias, config.bias),
        modules_to_save=saved_modules(config),
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _target_modules(adapted: Adapted, names: Mapping[str, str]) -> list[str]:
    """The shortest names that match these layers and no others."""
    specs = [spec for group in adapted.plan.groups for spec in group.specs if group.kind not in PARAMETERS]
    layers = list(dict.fromkeys(attention_of(spec.path, names) for spec in specs))
    if not layers:
        return []
    inside = tuple(f"{name}." for name in layers)
    others = [n for n, _ in adapted.root.named_modules() if n and n not in layers and not n.startswith(inside)]
    return sorted(_find_minimal_target_modules(layers, others))


def _target_parameters(adapted: Adapted) -> list[str] | None:
    """The adapted parameters as `module.parameter` if that matches no others, else their full names."""
    names = [name for name in adapted.layers if adapted.plan.group_of(name).kind in PARAMETERS]
    short = sorted({".".join(name.split(".")[-2:]) for name in names})
    if names and {spec.name for spec in select_parameters(adapted.root, short)} == set(names):
        return short
    return names or None


def _component(root: nn.Module) -> str | None:
    """The attribute of a diffusers pipeline that holds such a model; None for models of other libraries."""
    kind = type(root)
    if kind.__module__.partition(".")[0] != "diffusers":
        return None
    return "unet" if "UNet" in kind.__name__ else "transformer" if "Transformer" in kind.__name__ else None
