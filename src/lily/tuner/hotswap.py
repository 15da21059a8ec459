"""Hot-swapping: an adapter of a model is replaced by another one in place.

PEFT's functions know LoRA alone. `lily.tuner.replacements` replaces them by these, which call the originals for LoRA.
`lily.tuner.compiled_hotswap` prepares a model, so that a swap does not recompile it.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft import PeftModel
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
from lily.io.words import some
from lily.layers.bank import Settled, banks_in
from lily.layers.devices import placement_of
from lily.layers.find import layers_of, masked_layers, watch_masks
from lily.layers.fixed_shape import shape_of
from lily.layers.layer import LilyLayer
from lily.layers.sharding import is_sharded
from lily.plan.config import LilyConfig
from lily.plan.select import select_targets
from lily.plan.sharing_plan import SharingPlan, build_plan
from lily.plan.wrappers import plain_names
from lily.tuner.routing import decide_routing

_stock_hotswap = hotswap.hotswap_adapter
_stock_hotswap_state = hotswap.hotswap_adapter_from_state_dict


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
        check_free(root, adapter)
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


def check_free(root: nn.Module, adapter: str) -> None:
    """Refuse an adapter whose tensors are not all here, or are in use elsewhere.

    Args:
        root: holds the bank.
        adapter: its name.

    Raises:
        LilyError: if it is merged or recorded, or its tensors are sharded or offloaded.
    """
    for name, module in root.named_modules():
        rows = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
        if isinstance(rows, BaseTunerLayer) and adapter in rows.merged_adapters:
            raise LilyError(f"adapter {adapter!r} is merged into {name}; call unmerge_adapter() first")
        if isinstance(module, LilyLayer) and adapter in module.statistics:
            raise LilyError(f"the routing of adapter {adapter!r} is being recorded; wait for the end of the recording")
    for p in _parameters(root, adapter).values():
        if is_sharded(p) or p.is_meta:
            where = "offloads" if p.is_meta else "shards"
            raise LilyError(
                f"adapter {adapter!r} cannot be replaced in place: an engine {where} its tensors; load the other one "
                "before the model is wrapped"
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
                f"an adapter can be replaced by one of the same layers only; the other one {which} "
                f"{some(sorted(names))}; load it under another adapter name"
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
        shape = shape_of(plan.group_of(name), config, layers[name].routing_for)
        why = fixed[adapter].shape.refusal(*shape) if adapter in fixed else None
        if why is not None:
            raise LilyError(f"the other adapter {why} ({name}), so it cannot replace {adapter!r} without recompilation")
        if adapter in fixed and config.settled not in (None, 1):
            raise LilyError(f"the routing of the other adapter is settling, which {adapter!r} is not compiled for")


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


@functools.wraps(_stock_hotswap)
def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """`hotswap_adapter`, which reads the other adapter from a folder or the hub."""
    folder = load.find(model_name_or_path, load.download_options(kwargs))
    if folder is None:
        _stock_hotswap(model, model_name_or_path, adapter_name, torch_device, **kwargs)
    else:
        opened = Opened.folder(folder, kwargs.get("key_mapping"))
        swap(model, adapter_name, LilyConfig.from_pretrained(str(folder)), opened)


@functools.wraps(_stock_hotswap_state)
def hotswap_state(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: Any, *args: Any, **kwargs: Any
) -> None:
    """`hotswap_adapter_from_state_dict`, with the other adapter's tensors and configuration."""
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
