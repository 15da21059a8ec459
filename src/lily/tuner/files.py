"""An adapter's tensors on their way from a model to a file and back: PEFT's names <-> ours.

`lily.checkpoint.format` has the names in files. PEFT calls the methods of `FilesMixin` when it saves and loads.
"""

from __future__ import annotations

import copy

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from lily.checkpoint import format
from lily.checkpoint.stock import decide_file_format
from lily.layers.bank import BANK, LilyBank, bank_of
from lily.layers.devices import is_spread, placement_of
from lily.layers.find import layers_of
from lily.layers.layer import LilyLayer
from lily.plan.config import LilyConfig
from lily.plan.sharing_plan import SharingPlan, build_plan
from lily.plan.wrappers import unwrapped
from lily.tuner import data_start


class FilesMixin(BaseTuner):  # type: ignore[misc]
    """The part of `LilyModel` that meets files."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LilyConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        bank, _ = _find_bank(model)
        data_start.warn_if_awaiting(bank, adapter_name)
        plan = bank.plans[adapter_name]
        # A grouping that does not follow from the written configuration must be visible in the file.
        written = copy.copy(config)
        written.stock_grouping = False
        as_configured = plan == build_plan(format.specs_of(plan), written)
        if config.settled == 1:  # the routers are no longer used
            state_dict = {k: v for k, v in state_dict.items() if f".lily_router.{adapter_name}." not in k}
        names = {path: name for name, path in _part_keys(model, adapter_name).items()}
        state_dict = {names.get(unwrapped(k), k): v for k, v in state_dict.items()}
        out = format.dump(state_dict, adapter_name, plan, every_layer=not as_configured)
        out.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        return out

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LilyConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        bank, root = _find_bank(model)
        bank.stop_waiting(adapter_name)
        format.check_base(bank.plans[adapter_name], config.adapted_layers, config.base_model_name_or_path)
        tensors, plan = format.resolve(state_dict, bank.plans[adapter_name], config.settled)
        if plan is not bank.plans[adapter_name]:
            _regroup(model.get_submodule(root.rstrip(".")), config, adapter_name, plan)
        out = dict(tensors.other)
        out.update({f"{root}{BANK}.lily_A.{adapter_name}.{i}": t for i, t in tensors.A.items()})
        out.update({f"{root}{BANK}.lily_B.{adapter_name}.{i}": t for i, t in tensors.B.items()})
        out.update({f"{root}{BANK}.lily_R.{adapter_name}.{i}": t for i, t in tensors.shared_router.items()})
        own = {f"{root}{name}.lily_router.{adapter_name}.weight": t for name, t in tensors.router.items()}
        own |= {f"{root}{name}.lily_logits.{adapter_name}.weight": t for name, t in tensors.logits.items()}
        own |= {
            f"{root}{name}.lily_{part}.{adapter_name}.weight": t
            for part, layers in tensors.own.items()
            for name, t in layers.items()
        }
        keys = _part_keys(model, adapter_name)
        out.update({keys.get(key, key): t for key, t in own.items()})
        if is_spread(model):
            bank.arrived = {key.removeprefix(root): t for key, t in out.items()}
        return out


def _part_keys(model: nn.Module, adapter: str) -> dict[str, str]:
    """What nested layers have for themselves: name in files -> name in the model, which includes the nesting."""
    return {
        f"{m.name_in_plan(path)}.{own}": f"{path}.{own}"
        for path, m in ((unwrapped(path), m) for path, m in model.named_modules())
        if isinstance(m, LilyLayer) and m.name_in_plan(path) != path
        for own in (f"{name}.{adapter}.weight" for name in m.adapter_layer_names)
    }


def _find_bank(model: nn.Module) -> tuple[LilyBank, str]:
    """The bank, and the name (with a trailing dot) of the module that it belongs to."""
    for name, module in model.named_modules():
        if isinstance(module, LilyBank):
            return module, unwrapped(name.removesuffix(BANK))
    raise AttributeError("the model carries no Lily adapter")


def _regroup(model: nn.Module, config: LilyConfig, adapter: str, plan: SharingPlan) -> None:
    """Recreate an adapter's shared tensors for another plan of the same layers."""
    bank = bank_of(model)
    old = bank.tensors(adapter)[0][0]
    layers = layers_of(model)
    placements = {spec.name: placement_of(model, spec) for spec in format.specs_of(plan)}
    bank.add(adapter, plan, placements, init_weights=None)
    for tensors in bank.tensors(adapter):
        tensors.requires_grad_(old.requires_grad)
        tensors.to("meta" if old.device.type == "meta" else None, old.dtype)
    for name, slot in plan.slots.items():
        layers[name].change_settings(adapter, slot=slot)
    decide_file_format(config, plan, model)
