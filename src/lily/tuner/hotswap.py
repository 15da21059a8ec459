"""Hot-swapping: an adapter of a model is replaced by another one in place, without recompiling a compiled model.

PEFT's functions know LoRA alone. `lily.tuner.registry` replaces them by these, which call the originals for LoRA.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import hotswap, save_and_load
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from lily.checkpoint import format, load
from lily.checkpoint.beside import Beside, trained_beside
from lily.checkpoint.format import PREFIX
from lily.checkpoint.load import Opened
from lily.checkpoint.stock import decide_file_format
from lily.errors import LilyError
from lily.layers.bank import LilyBank, Settled, banks_in
from lily.layers.devices import placement_of
from lily.layers.find import layers_of, masked_layers, watch_masks
from lily.layers.fixed_shape import Shape
from lily.layers.layer import LilyLayer
from lily.layers.sharding import is_sharded
from lily.plan.config import LilyConfig
from lily.plan.options import DYNAMIC
from lily.plan.select import select_targets
from lily.plan.sharing_plan import Group, SharingPlan, build_plan
from lily.plan.specs import PARAMETERS
from lily.plan.wrappers import plain_names
from lily.tuner.routing import decide_routing

_stock_hotswap = hotswap.hotswap_adapter
_stock_hotswap_state = hotswap.hotswap_adapter_from_state_dict
_stock_prepare = hotswap.prepare_model_for_compiled_hotswap

SHOWN = 3  # names in a message


def swap(model: nn.Module, adapter: str, config: peft.LilyConfig, opened: Opened) -> Any:
    """Replace an adapter of a model by another one for the same layers, in place.

    Its rank, scale, sharing, routing and every other option may differ; the parameters that exist stay the same
    objects, and train or not as before. Of layers that have a fixed shape, only its values change.

    Args:
        model: holds the adapter.
        adapter: its name, which stays.
        config: the other adapter's configuration; not changed.
        opened: the other adapter's tensors.

    Returns:
        What PEFT's `set_peft_model_state_dict` returns.

    Raises:
        LilyError: if the adapter cannot be replaced by that one; the model is then unchanged.
    """
    config = copy.deepcopy(LilyConfig.from_stock(config))
    with load.in_progress(opened), plain_names(model) as inner:
        configs: dict[str, Any] = getattr(inner, "peft_config", None) or {}
        old = configs.get(adapter)
        if not isinstance(old, LilyConfig):
            known = ", ".join(name for name, own in configs.items() if isinstance(own, LilyConfig))
            raise LilyError(f"no Lily adapter {adapter!r} to replace on this model; there are {known or 'none'}")
        root, bank = banks_in(inner)[0]
        _check_state_of(root, adapter)
        masked = masked_layers(root)
        load.check_config(config, root)
        plan = _plan(root, config, bank.plans[adapter])
        config.inference_mode, config.modules_to_tie = old.inference_mode, old.modules_to_tie
        _check_beside(inner, adapter, old, config, plan)
        opened.check(plan, config, inner, adapter)
        _check_shapes(layers_of(root), adapter, plan, config)
        # From here on nothing is refused, so that no adapter is half another one.
        _rebuild(root, adapter, plan, config)
        configs[adapter] = config
        state = opened.state
        if not isinstance(inner, PeftModel):
            state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
        result = save_and_load.set_peft_model_state_dict(inner, state, adapter_name=adapter)
        bank.arrived = {}
        decide_file_format(config, bank.plans[adapter], root)
    if masked_layers(root) != masked:  # hooks that change would recompile a model
        watch_masks(root)
    return result


def _check_state_of(root: nn.Module, adapter: str) -> None:
    """Refuse an adapter whose tensors are not all here, or are in use elsewhere."""
    for name, module in root.named_modules():
        rows = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        if isinstance(rows, BaseTunerLayer) and adapter in rows.merged_adapters:
            raise LilyError(f"adapter {adapter!r} is merged into {name}; call unmerge_adapter() before it is replaced")
        if isinstance(module, LilyLayer) and adapter in module.statistics:
            raise LilyError(f"the routing of adapter {adapter!r} is being recorded; replace it afterwards")
    for p in _parameters(root, adapter).values():
        if is_sharded(p) or p.is_meta:
            where = "offloads" if p.is_meta else "shards"
            raise LilyError(
                f"adapter {adapter!r} cannot be replaced in place: an engine {where} its tensors; load the other one "
                "under another name before the model is wrapped"
            )


def _plan(root: nn.Module, config: LilyConfig, old: SharingPlan) -> SharingPlan:
    """The other adapter's plan; refused unless it is for the layers that the model's is for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers and routing: the first adapter's has been given
        if config.target_modules is None and not (config.target_parameters or config.parallel_modules):
            config.target_modules = {spec.path for spec in format.specs_of(old)}
        specs = select_targets(root, config)
        decide_routing(config, root)
    here, wanted = {s.name: s for s in format.specs_of(old)}, {s.name: s for s in specs}
    for which, names in (("adapts", wanted.keys() - here), ("does not adapt", here.keys() - wanted)):
        if names:
            raise LilyError(
                f"an adapter can be replaced by one of the same layers only; the other one {which} {_listed(names)}; "
                "load it under another adapter name"
            )
    if (name := next((name for name in here if here[name] != wanted[name]), None)) is not None:
        raise LilyError(f"the other adapter adapts {name} in another way: {wanted[name]}, and not {here[name]}")
    plan = build_plan(specs, config)
    config.resolve_scaling(plan.ranks)
    return plan


def _check_beside(model: nn.Module, adapter: str, old: LilyConfig, new: LilyConfig, plan: SharingPlan) -> None:
    """Refuse an adapter that trains other modules, biases or rows beside its layers."""
    both = []
    for config in (old, new):
        rows = {name: row[2] for name, row in trained_beside(model, config).rows.items()}
        both.append((set(Beside(model, config, plan, adapter).needed), rows))
    if both[0] != both[1]:
        shown = [
            f"modules_to_save={sorted(config.modules_to_save or ())}, bias={config.bias!r}, "
            f"trainable_token_indices={config.trainable_token_indices}"
            for config in (old, new)
        ]
        raise LilyError(
            f"an adapter can be replaced only by one that trains the same beside its layers; the model's has {shown[0]}"
            f", the other one {shown[1]}; load it under another adapter name"
        )


def _check_shapes(layers: dict[str, LilyLayer], adapter: str, plan: SharingPlan, config: LilyConfig) -> None:
    for name in plan.slots:
        fixed = layers[name].fixed_shapes
        group = plan.group_of(name)
        why = fixed[adapter].shape.refusal(*_shape_of(group, config)) if adapter in fixed else None
        if why is not None:
            raise LilyError(f"the other adapter {why} ({name}), so it cannot replace {adapter!r} without recompilation")
        if adapter in fixed and config.settled not in (None, 1):
            raise LilyError(f"the routing of the other adapter is settling, which {adapter!r} is not compiled for")


def _shape_of(group: Group, config: LilyConfig) -> Shape:
    own = config.options_of(group.name)
    routing = "static" if config.settled == 1 or group.kind in PARAMETERS else str(config.routing)
    return Shape(group.r + group.own_r, group.num_B, routing, own.activation)


def _rebuild(root: nn.Module, adapter: str, plan: SharingPlan, config: LilyConfig) -> None:
    """Give an adapter the tensors and settings of another plan and configuration; values follow from the file."""
    bank, layers = banks_in(root)[0][1], layers_of(root)
    before, like = _parameters(root, adapter), bank.tensors(adapter)[0][0]
    placements = {spec.name: placement_of(root, spec) for spec in format.specs_of(plan)}
    activations = {group.name: config.options_of(group.name).activation for group in plan.groups}
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten, so training goes on as without a swap
        bank.add(adapter, plan, placements, None, activations)
        for name, slot in plan.slots.items():
            layer = layers[name]
            for part in (getattr(layer, part) for part in layer.adapter_layer_names):
                if adapter in part:
                    del part[adapter]
            layer.update_layer(adapter, plan.group_of(name), slot, config, placements[name][0])
    if config.settled is not None:
        bank.settled[adapter] = Settled(config.settled)
    else:
        bank.settled.pop(adapter, None)
    for path, owner, key in _places(root, adapter):
        new: Any = owner._parameters[key]
        if (old := before.get(path)) is None:
            new.data = new.data.to(dtype=like.dtype)
            new.requires_grad_(like.requires_grad)
            continue
        if old.shape != new.shape:
            old.data, old.grad = new.data.to(old.device, old.dtype), None
        owner._parameters[key] = old


def _places(root: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, name in the module) of each parameter of an adapter that is its own."""
    bank = banks_in(root)[0][1]
    holders = [("bank", bank, bank.adapter_layer_names)]
    holders += [(name, layer, layer.adapter_layer_names) for name, layer in layers_of(root).items()]
    for name, holder, parts in holders:
        for part in parts:
            own = getattr(holder, part)
            for key, _ in own[adapter].named_parameters() if adapter in own else ():
                yield f"{name}.{part}.{key}", own[adapter], key


def _parameters(root: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {name: owner.get_parameter(key) for name, owner, key in _places(root, adapter)}


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:SHOWN]) + (f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else "")


@functools.wraps(_stock_hotswap)
def _hotswap(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    folder = load.find(model_name_or_path, load.download_options(kwargs))
    if folder is None:
        _stock_hotswap(model, model_name_or_path, adapter_name, torch_device, **kwargs)
    else:
        swap_folder(model, adapter_name, folder, kwargs.get("key_mapping"))


def swap_folder(model: nn.Module, adapter: str, folder: Path, key_mapping: Any = None) -> Any:
    """`swap` by the adapter in a local folder."""
    return swap(model, adapter, LilyConfig.from_pretrained(str(folder)), Opened.folder(folder, key_mapping))


@functools.wraps(_stock_hotswap_state)
def _hotswap_state(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
) -> None:
    if not isinstance(config, peft.LilyConfig):
        _stock_hotswap_state(model, state_dict, adapter_name, config, *args, **kwargs)
        return
    inserted = re.compile(rf"(lily_[A-Za-z_]+)\.{re.escape(adapter_name)}(?=\.|$)")
    swap(model, adapter_name, config, opened_state({inserted.sub(r"\1", key): t for key, t in state_dict.items()}))


def opened_state(state: dict[str, Tensor]) -> Opened:
    """An adapter's tensors, whose names may begin with PEFT's prefix."""
    return Opened({PREFIX + key.removeprefix(PREFIX): tensor for key, tensor in state.items()})


def refuse_lora(adapter: str) -> None:
    """Refuse a LoRA in the place of a Lily adapter.

    Raises:
        LilyError: always.
    """
    raise LilyError(
        f"hotswap=True: adapter {adapter!r} is Lily's, and a LoRA cannot take its place; load the LoRA under another "
        "adapter_name, or replace it by a Lily adapter (peft.utils.hotswap.hotswap_adapter)"
    )


@functools.wraps(_stock_prepare)
def prepare(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """PEFT's `prepare_model_for_compiled_hotswap`, for Lily's adapters too.

    Args:
        model: with the first adapter, not yet compiled.
        target_rank: the largest rank of the adapters, own ranks included; default: those of the model's.
        config: configurations of adapters that will be swapped in, one or a dictionary; they say how many experts and
            which routing to compile for. Those of LoRA are changed as by PEFT.
        check_compiled: what to do about a model that is compiled already: `error`, `warn` or `ignore`.

    Raises:
        LilyError: if `target_rank` is below a rank of the model's, the adapters cannot replace one another, or the
            model is compiled already.
    """
    given = list(config.values()) if isinstance(config, dict) else [] if config is None else [config]
    others = {str(i): own for i, own in enumerate(given) if not isinstance(own, peft.LilyConfig)}
    found = banks_in(model)
    if not found or any(isinstance(module, LoraLayer) for module in model.modules()):
        _stock_prepare(model, target_rank=target_rank, config=others or None, check_compiled=check_compiled)
    else:
        _check_compiled(model, check_compiled)
    with plain_names(model) as inner:
        wanted = [LilyConfig.from_stock(own) for own in given if isinstance(own, peft.LilyConfig)]
        shapes = [
            (layer, adapter, shape)
            for root, bank in banks_in(inner)
            for adapter in bank.plans
            for layer, shape in _shapes_to_fix(inner, root, bank, adapter, wanted, target_rank)
        ]
    for layer, adapter, shape in shapes:
        layer.fix_shape(adapter, shape)
    for root, _ in found:
        watch_masks(root)


def _check_compiled(model: nn.Module, check_compiled: str) -> None:
    if check_compiled not in ("error", "warn", "ignore"):
        raise LilyError(f"check_compiled={check_compiled!r} is not known; expected error, warn or ignore")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        if check_compiled == "error":
            raise LilyError("the model is compiled already; call prepare_model_for_compiled_hotswap before that")
        if check_compiled == "warn":
            warnings.warn("the model is compiled already, so preparing it recompiles it", stacklevel=4)


def _shapes_to_fix(
    model: nn.Module, root: nn.Module, bank: LilyBank, adapter: str, wanted: list[LilyConfig], target_rank: int | None
) -> Iterator[tuple[LilyLayer, Shape]]:
    """Each layer of an adapter, with the shape into which it and adapters of the configurations `wanted` fit."""
    _check_state_of(root, adapter)
    plan, layers = bank.plans[adapter], layers_of(root)
    configs: Any = model.peft_config
    config: LilyConfig = configs[adapter]
    if config.settled not in (None, 1):
        raise LilyError(f"the routing of adapter {adapter!r} is settling; prepare the model when it has settled")
    for name in plan.slots:
        group = plan.group_of(name)
        own = _shape_of(group, config)
        if target_rank is not None and target_rank < own.r:
            raise LilyError(f"target_rank={target_rank} is below the rank {own.r} of adapter {adapter!r} on {name}")
        options = [(own.num_B, own.routing)]
        if group.kind not in PARAMETERS:
            options += [(c.options_of(group.name).num_B, _routing(c, root)) for c in wanted]
        dynamic = [(num_B, routing) for num_B, routing in options if num_B > 1 and routing in DYNAMIC]
        routings = sorted({routing for _, routing in dynamic})
        if len(routings) > 1:
            raise LilyError(
                f"adapters of routing {' and '.join(routings)} cannot replace one another in a compiled model; "
                "collapse those of one of them"
            )
        num_B = max((num_B for num_B, _ in dynamic), default=1)
        yield layers[name], Shape(target_rank or own.r, num_B, routings[0] if routings else "static", own.activation)


def _routing(config: LilyConfig, root: nn.Module) -> str:
    """The routing that a configuration has on a model."""
    config = copy.copy(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decide_routing(config, root)
    return "static" if config.settled == 1 else str(config.routing)


PATCHES: list[tuple[Any, str, Any, Any]] = [
    (hotswap, "hotswap_adapter", _hotswap, _stock_hotswap),
    (hotswap, "hotswap_adapter_from_state_dict", _hotswap_state, _stock_hotswap_state),
    (hotswap, "prepare_model_for_compiled_hotswap", prepare, _stock_prepare),
]
