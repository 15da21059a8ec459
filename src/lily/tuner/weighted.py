"""PEFT's `add_weighted_adapter`: a new adapter from others of the same model.

The new adapter is a configuration and the tensors of its file, loaded as a file is. Their content comes from
`weighted_cat`, which keeps the sharing, or from `weighted_pairs`, in which each layer has an A and B for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lily.checkpoint.format import KEY
from lily.errors import LilyError
from lily.plan.config import LilyConfig
from lily.plan.config_checks import check
from lily.plan.options import layer_patterns
from lily.plan.select import select_targets
from lily.plan.sharing_plan import Group, build_plan
from lily.plan.specs import PARALLEL_MODULE, PARAMETERS, SLICE
from lily.plan.wrappers import plain_names
from lily.tuner.adapter import find
from lily.tuner.weighted_cat import exact_sum
from lily.tuner.weighted_pairs import combined_pairs
from lily.tuner.weighted_terms import KINDS, PRUNING, SIGN_METHODS, Combined, How, NotSharedError, Shape, Term


class WeightedMixin:
    """The part of `LilyModel` that combines adapters."""

    model: nn.Module
    peft_config: dict[str, LilyConfig]

    if TYPE_CHECKING:  # BaseTuner's, which has no types
        inject_adapter: Any

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add a combination of adapters under a new name, frozen and not active; see PEFT's `LoraModel`.

        `cat` is the exact weighted sum, for every routing. The other kinds, for static adapters, are what PEFT's LoRA
        makes of each layer's A and B; the new adapter then has these for each layer (`own_r`).

        Args:
            adapters: names.
            weights: one for each, of either sign.
            adapter_name: name of the new adapter.
            combination_type: one of `weighted_terms.KINDS`.
            svd_rank: as for the next ones, see PEFT.
            svd_clamp: for kinds with svd.
            svd_full_matrices: without effect: the vectors that are taken are the same.
            svd_driver: for kinds with svd.
            density: kept share, for kinds that prune.
            majority_sign_method: `total` or `frequency`, for kinds with ties.

        Raises:
            LilyError: for an unknown adapter or option, a name that exists, and adapters that cannot be combined in
                this way. The model is then unchanged.
        """
        how = How(combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)
        _check(self.peft_config, adapters, weights, adapter_name, how)
        config, state = _combination(self.model, adapters, weights, how)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        set_peft_model_state_dict(self.model, state, adapter_name=adapter_name)


def _combination(
    model: nn.Module, names: Sequence[str], weights: Sequence[float], how: How
) -> tuple[LilyConfig, dict[str, Tensor]]:
    """The configuration of a combination, and its tensors by their names in a file."""
    with plain_names(model) as root:
        terms = [Term(find(root, name), float(weight)) for name, weight in zip(names, weights, strict=True)]
        config = _targets(root, terms)
        groups = build_plan(select_targets(root, copy.deepcopy(config)), config).groups
        combined = _combined(groups, terms, how)
        _shape(config, groups, combined)
        facts = {"type": how.combination_type, "adapters": list(names), "weights": [t.weight for t in terms]}
        config.provenance = {"combination": facts}
        return config, combined.state | _beside(root, config, terms)


def _check(
    configs: Mapping[str, LilyConfig], names: Sequence[str], weights: Sequence[float], new: str, how: How
) -> None:
    known = ", ".join(configs)
    if new in configs:
        raise LilyError(
            f"there is an adapter {new!r} already; choose another adapter_name, or call delete_adapter({new!r}) first"
        )
    if not names:
        raise LilyError(f"adapters is empty; name some of {known}")
    for name in names:
        if name not in configs:
            raise LilyError(f"adapter {name!r} does not exist; the model has {known}")
    if len(weights) != len(names):
        raise LilyError(f"{len(names)} adapters and {len(weights)} weights; give one weight for each adapter")
    kind = how.combination_type
    if kind not in KINDS:
        raise LilyError(f"combination_type={kind!r} is not known; choose one of {', '.join(KINDS)}")
    if kind.removesuffix("_svd") in PRUNING and (how.density is None or not 0 <= how.density <= 1):
        raise LilyError(
            f"combination_type={kind!r} with density={how.density!r}; give a share from 0 to 1, such as 0.5"
        )
    if how.majority_sign_method not in SIGN_METHODS:
        raise LilyError(
            f"majority_sign_method={how.majority_sign_method!r} is not known; choose {' or '.join(SIGN_METHODS)}"
        )
    if how.svd_rank is not None and how.svd_rank < 1:
        raise LilyError(f"svd_rank={how.svd_rank!r} is not a rank; give a positive integer, or leave it out")


def _targets(root: nn.Module, terms: Sequence[Term]) -> LilyConfig:
    """The first adapter's configuration, with the layers of all of them."""
    config: LilyConfig = copy.deepcopy(terms[0].adapted.config)
    named = {spec.name: (group, spec) for t in terms for group in t.adapted.plan.groups for spec in group.specs}
    config.group_options, config.shared_router, config.settled, config.init_weights = None, False, None, True
    config.rank_pattern, config.scaling_pattern, config.stock_grouping = {}, {}, False
    config.adapted_layers = None  # of the file that the first adapter was loaded from; the others may have more layers
    selected = {spec.name for spec in select_targets(root, copy.deepcopy(config))}
    if selected == set(named):
        return config
    config.exclude_modules, config.layers_to_transform, config.layers_pattern = None, None, None
    slices: dict[str, dict[str, list[int]]] = {}
    for name, (group, _) in named.items():
        if group.kind == SLICE and group.rows is not None:
            layer, _, part = name.rpartition(".")
            slices.setdefault(layer, {})[part] = [group.rows.start, group.rows.stop, group.rows.period]
    kinds = {name: group.kind for name, (group, _) in named.items()}
    config.target_slices = slices or None
    config.target_parameters = [name for name, kind in kinds.items() if kind in PARAMETERS] or None
    config.parallel_modules = [name for name, kind in kinds.items() if kind == PARALLEL_MODULE] or None
    others = (*PARAMETERS, PARALLEL_MODULE, SLICE)
    config.target_modules = {*(name for name, kind in kinds.items() if kind not in others), *slices}
    return config


def _combined(groups: Sequence[Group], terms: Sequence[Term], how: How) -> Combined:
    divided = next((group for group in groups if group.conv_groups > 1), None)
    if divided is not None:
        raise LilyError(
            f"{divided.name} is a convolution with groups={divided.conv_groups}, which divide the ranks among them, so "
            "adapters on it cannot be combined; activate both at once with set_adapter, or merge one after the other"
        )
    dynamic = next((term.name for term in terms if term.dynamic), None)
    if how.combination_type == "cat" or len(terms) == 1:  # one adapter is only multiplied, as PEFT's LoRA is
        try:
            return exact_sum(groups, terms)
        except NotSharedError as why:
            if dynamic is not None:
                raise LilyError(
                    f"cannot combine {' and '.join(term.name for term in terms)}, because the routing of {dynamic!r} "
                    f"depends on the data and {why}; make it static first (lily.collapse, or train with `settle`)"
                ) from None
    elif dynamic is not None:
        raise LilyError(
            f"combination_type={how.combination_type!r} needs one matrix per layer, and the routing of {dynamic!r} "
            "depends on the data; use combination_type='cat', which is exact for every routing, or make it static "
            "first (lily.collapse, or train with `settle`)"
        )
    return combined_pairs(groups, terms, how)


def _shape(config: LilyConfig, groups: Sequence[Group], combined: Combined) -> None:
    """Write what the groups need into a configuration: once if all need the same, else under the groups' names."""
    first = combined.shapes[0]
    for option, value in vars(first).items():
        setattr(config, option, value)
    config.distinct, config.scaling = "none", 1.0
    config.routing, config.routing_is_default = combined.routing, False
    config.shared_router = combined.shared_router
    if config.routing != "batch":
        config.batch_scope = "local"
    by_name = {group.name: shape for group, shape in zip(groups, combined.shapes, strict=True)}
    if any(replace(shape, r=first.r) != first for shape in by_name.values()):
        config.group_options = {
            name: {key: value for key, value in vars(shape).items() if key != "r" and value is not None}
            for name, shape in by_name.items()
        }
    if any(shape.r != first.r for shape in combined.shapes):
        ranks = _ranks(groups, combined.shapes)
        config.rank_pattern = {key: ranks[key] for key in sorted(ranks, key=len, reverse=True)}  # the first that fits
    check(config)


def _ranks(groups: Sequence[Group], shapes: Sequence[Shape]) -> dict[str, int]:
    """The ranks by the groups' names; by each layer's where groups of one name have several."""
    keys = layer_patterns(layer for group in groups for layer in group.layers)
    of_name: dict[str, set[int]] = {}
    for group, shape in zip(groups, shapes, strict=True):
        of_name.setdefault(group.name, set()).add(shape.r)
    return {
        key: shape.r
        for group, shape in zip(groups, shapes, strict=True)
        for key in ([group.name] if len(of_name[group.name]) == 1 else [keys[layer] for layer in group.layers])
    }


def _beside(root: nn.Module, config: LilyConfig, terms: Sequence[Term]) -> dict[str, Tensor]:
    """What one of the adapters trains beside its layers, which the new one takes unchanged; two cannot be combined."""
    wrappers = [m for m in root.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    whole = [t for t in terms if any(t.name in wrapper._adapters for wrapper in wrappers)]
    config.modules_to_save, config.trainable_token_indices = None, None
    if not whole:
        return {}
    if len(whole) > 1:
        raise LilyError(
            f"{' and '.join(t.name for t in whole)} train modules or rows whole (modules_to_save, "
            "trainable_token_indices), which cannot be combined; combine adapters of which at most one does"
        )
    source = whole[0].adapted.config
    config.modules_to_save, config.trainable_token_indices = source.modules_to_save, source.trainable_token_indices
    state = get_peft_model_state_dict(root, adapter_name=whole[0].name, save_embedding_layers=False)
    return {key: tensor for key, tensor in state.items() if not KEY.match(key)}
