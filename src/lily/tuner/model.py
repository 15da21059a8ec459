"""`LilyModel`, PEFT's tuner for Lily: turns a plan into layers and a bank.

What it does with files is in `lily.tuner.files`, merging in `lily.tuner.merging`.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING
from peft.utils.integrations import init_empty_weights
from peft.utils.other import _get_submodules
from torch import Tensor, nn

from lily.checkpoint import format
from lily.checkpoint.beside import tied_modules
from lily.checkpoint.load import current
from lily.checkpoint.stock import decide_file_format
from lily.errors import LilyError
from lily.io.words import some
from lily.layers.bank import BANK, LilyBank, Settled, bank_of
from lily.layers.conv import Conv
from lily.layers.devices import onload, placement_of
from lily.layers.embedding import Embedding
from lily.layers.find import layers_of, watch_masks
from lily.layers.layer import LilyLayer
from lily.layers.linear import Linear
from lily.layers.parallel_module import ParallelModule
from lily.layers.parameter import Parameter
from lily.layers.part import PartLayer
from lily.layers.quantized import keep_differentiable
from lily.layers.sharding import engine_in
from lily.layers.slice import Slice
from lily.layers.trained_rows import name_rows
from lily.plan.attention import InProjection
from lily.plan.config import LilyConfig
from lily.plan.select import select_targets
from lily.plan.sharing_plan import SharingPlan, build_plan, target_name
from lily.plan.specs import CONVOLUTIONS, EMBEDDING, LINEAR, PARALLEL_MODULE, PARAMETERS, ModuleSpec
from lily.plan.tokens_first import is_tokens_first, reads_positions
from lily.plan.wrappers import innermost, plain_names
from lily.tuner import call_uncalled, data_start
from lily.tuner.adapter_names import rows_by_name
from lily.tuner.check_targets import check_beside, check_targets
from lily.tuner.files import FilesMixin
from lily.tuner.merging import ModelMergingMixin
from lily.tuner.model_tags import add_tag
from lily.tuner.removal import activate_saved, remove_if_empty
from lily.tuner.replaced import drop_replaced
from lily.tuner.routing import decide_routing
from lily.tuner.weighted import WeightedMixin

LAYERS: dict[str, type[LilyLayer]] = {
    LINEAR: Linear,
    **dict.fromkeys(CONVOLUTIONS, Conv),
    EMBEDDING: Embedding,
    PARALLEL_MODULE: ParallelModule,
}


class LilyModel(WeightedMixin, FilesMixin, ModelMergingMixin):
    """A model with Lily adapters. `peft.get_peft_model` creates it.

    Args:
        model: the base model.
        peft_config: a `LilyConfig`, or stock PEFT's, which implies batch routing.
        adapter_name: name of the first adapter.
    """

    prefix: str = "lily_"
    uses_shared_state = False  # the bank is part of the model, so an injected adapter is complete
    tuner_layer_cls = LilyLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        base = getattr(model, "base_model", None)
        if isinstance(model, PeftModel) and isinstance(base, LilyModel):
            model = base.model  # a second `get_peft_model` of a wrapped model adapts what is inside
        before = dict(getattr(model, "peft_config", None) or {})
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            if before:  # PEFT has already added the new one to these
                model.peft_config.clear()  # type: ignore[operator, union-attr]
                model.peft_config.update(before)  # type: ignore[operator, union-attr]
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan, then inject; the model is unchanged if the plan fails. See PEFT's `BaseTuner.inject_adapter`.

        A `state_dict` selects the layers only if the configuration does not: a file holds shared tensors once, so it
        need not name every layer.

        Raises:
            LilyError: see `lily.plan.select.select_modules` and `lily.plan.build_plan`.
        """
        config = LilyConfig.from_stock(self.peft_config[adapter_name])
        others = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        if others or config.layers_by_name:  # of another adapter or model: what is decided here is of this one alone
            config = copy.deepcopy(config)
        self.peft_config[adapter_name], self._adapter, self._copied = config, adapter_name, others[:1]
        config.modules_to_tie = None  # of the model that the configuration was used for before
        named = None if state_dict is None else format.layers_named(state_dict)
        if named is not None and config.target_modules is None and not config.target_parameters:
            if not named:
                raise LilyError(
                    "the state_dict has no tensor of a Lily adapter, so it names no layer; give target_modules"
                )
            config.target_modules = named
        engine = None if config.inference_mode else engine_in(model)
        if engine is not None:
            warnings.warn(
                f"adapter {adapter_name!r} is added inside {engine}, which averages only the gradients of tensors "
                "that it was made with, so each process would train a different adapter; adapt first, then wrap",
                stacklevel=2,
            )
        with plain_names(self):
            model = innermost(model)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            if any(target_name(n, self._targets) != target_name(n, config.target_modules) for n in self._plan.slots):
                config.target_modules = self._targets  # PEFT shortens a long list to names that group otherwise
            name_rows(model)
        if not config.inference_mode:
            keep_differentiable(model)
        if named is not None:
            _warn_of_surplus(named, self._plan)
        add_tag(model)
        watch_masks(model)
        call_uncalled.watch(model)
        _warn_of_diffusers(model, config)

    def _prepare_adapter_config(self, peft_config: LilyConfig, model_config: dict[str, Any]) -> LilyConfig:
        """PEFT's default modules by architecture; not needed with parallel modules, or parameters of an unknown one."""
        known = model_config.get("model_type") in self.target_module_mapping
        others = peft_config.parallel_modules or (peft_config.target_parameters and not known)
        if peft_config.target_modules is None and others:
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)  # type: ignore[no-any-return]

    def _prepare_model(self, peft_config: LilyConfig, model: nn.Module) -> None:
        """PEFT's last step before it replaces a layer: every check is here, so that nothing fails half-way."""
        specs = select_targets(model, peft_config)
        call_uncalled.add_in_projections(model, [spec.path for spec in specs])
        try:
            self._decide(peft_config, model, specs)
        except Exception:
            call_uncalled.watch(model)
            raise

    def _decide(self, peft_config: LilyConfig, model: nn.Module, specs: list[ModuleSpec]) -> None:
        check_targets(model, specs)
        check_beside(model, peft_config, specs)
        decide_routing(peft_config, model)
        self._plan = self._plan_of_copied(specs) or build_plan(specs, peft_config)
        self._targets = peft_config.target_modules
        peft_config.resolve_scaling(self._plan.ranks)
        self._placements = {spec.name: placement_of(model, spec) for spec in specs}
        self._parts: dict[str, list[str]] = {}
        for spec in specs:
            self._parts.setdefault(spec.path, []).append(spec.name)
        decide_file_format(peft_config, self._plan, model)
        if (opened := current()) is not None:
            opened.check(self._plan, peft_config, model)
        drop_replaced(model, self._adapter)

    def _plan_of_copied(self, specs: list[ModuleSpec]) -> SharingPlan | None:
        """The plan of the adapter with the same configuration object, whose file may have decided the sharing."""
        plans = bank_of(self.model).plans if self._copied else {}
        plan = next((plans[name] for name in self._copied if name in plans), None)
        return plan if plan is not None and set(plan.slots) == {spec.name for spec in specs} else None

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """PEFT's finds none where an earlier adapter saves the embedding whole."""
        return tied_modules(self.model)[1]

    def _add_modules_to_save_to_tie(self, peft_config: LilyConfig, tied_weight_keys: list[str]) -> None:
        """Save the input embedding, and tie the modules to it that have its weight; see PEFT."""
        embedding, tied = tied_modules(self.model)
        assert embedding is not None  # something is tied to it
        kept = [name for name in peft_config.modules_to_save or () if not any(t.endswith(name) for t in tied)]
        peft_config.modules_to_save = kept if embedding.endswith(tuple(kept)) else [*kept, embedding]
        peft_config.modules_to_tie = set(tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: LilyConfig, tied_weight_keys: list[str]) -> None:
        """LoRA ties the transposed update; data-dependent experts have no transpose.

        Raises:
            LilyError: always.
        """
        raise LilyError(
            "ensure_weight_tying ties what modules_to_save and trainable_token_indices train, and cannot tie adapters "
            f"on the input embedding and {' and '.join(tied_weight_keys)} (target_modules): train them whole "
            "(modules_to_save), train rows (trainable_token_indices), or remove ensure_weight_tying"
        )

    def _check_target_module_exists(self, peft_config: LilyConfig, key: str) -> Any:
        """See PEFT. The plan has what is adapted; only what PEFT calls excluded is not in it."""
        if any(self._plan.group_of(name).kind not in PARAMETERS for name in self._parts.get(key, ())):
            return True
        found = bool(peft_config.target_modules) and check_target_module_exists(peft_config, key)
        return found if isinstance(found, _ExcludedModule) else False

    def _create_and_replace(
        self,
        peft_config: LilyConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        bank, plan = self._bank(adapter_name, peft_config), self._plan
        if current_key not in plan.slots:
            for name in self._parts[current_key]:
                self._adapt_part(peft_config, adapter_name, name, Slice)
            return
        group, slot, device = plan.group_of(current_key), plan.slots[current_key], self._placements[current_key][0]
        existing = _in_chain(target)
        layer: Any = existing or LAYERS[group.kind](target, bank)
        layer.tokens_first = is_tokens_first(self.model, current_key)
        layer.reads_positions = reads_positions(current_key)
        layer.update_layer(adapter_name, group, slot, peft_config, device)
        if existing is None:
            self._put(layer, adapter_name, parent, target_name)

    def _adapt_part(
        self,
        peft_config: LilyConfig,
        adapter_name: str,
        name: str,
        kind: type[PartLayer],
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Add an adapter to a part of a module, outside the adapters on its other parts."""
        path, _, part = name.rpartition(".")
        parent, target, target_name = _get_submodules(self.model, path)
        nested = target.nested if isinstance(target, kind) else []
        existing = next((layer for layer in nested if layer.part == part), None)
        with context():
            bank = self._bank(adapter_name, peft_config)
            layer = existing or kind(target, bank, part)
            layer.tokens_first = is_tokens_first(self.model, path)
            group, slot, device = self._plan.group_of(name), self._plan.slots[name], self._placements[name][0]
            layer.update_layer(adapter_name, group, slot, peft_config, device)
        if existing is None:
            self._put(layer, adapter_name, parent, target_name)

    def _inject_parameters(
        self, peft_config: LilyConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """PEFT's step after the layers are replaced: adapt the parameters of the plan."""
        plan = self._plan
        names = [name for group in plan.groups if group.kind in PARAMETERS for name in group.layers]
        context = init_empty_weights if low_cpu_mem_usage else contextlib.nullcontext
        for name in names:
            self._adapt_part(peft_config, adapter_name, name, Parameter, context)
        return names

    def _bank(self, adapter_name: str, peft_config: LilyConfig) -> LilyBank:
        """The bank, with this adapter's tensors in it."""
        root = innermost(self.model)
        if not hasattr(root, BANK):
            root.add_module(BANK, LilyBank())
        bank = bank_of(root)
        if bank.plans.get(adapter_name) is not self._plan:  # first layer of this adapter
            activations = {g.name: peft_config.options_of(g.name).activation for g in self._plan.groups}
            bank.add(adapter_name, self._plan, self._placements, peft_config.init_weights, activations)
            if peft_config.init_weights == "data" and not peft_config.inference_mode:
                bank.awaiting[adapter_name] = data_start.Awaiting(root, adapter_name)
            if peft_config.settled is not None:
                bank.settled[adapter_name] = Settled(peft_config.settled)
        return bank

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for layer in layers_of(model).values():
            base = layer.get_base_layer()
            # PEFT trains what a layer has as `bias`, and saves what is named so: the attention's is `in_proj_bias`.
            if isinstance(base, InProjection) and base.bias is not None:
                base.bias.requires_grad_(False)

    def _put(self, layer: nn.Module, adapter_name: str, parent: nn.Module, target_name: str) -> None:
        if adapter_name not in self.active_adapters:
            for own in (p for name, p in layer.named_parameters() if not name.startswith("base_layer.")):
                own.requires_grad_(False)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's also moves the adapter to the base weight's device (meta, if offloaded) and needs one named `weight`.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's last step after it has loaded an adapter and accelerate has spread the model over devices.
        with plain_names(self):
            onload(self.model, bank_of(self.model).arrived)
        bank_of(self.model).arrived = {}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate the named adapters; all of them take part in a forward. See PEFT."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if hasattr(innermost(self.model), BANK):
            bank_of(self.model).set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, its shared tensors included; with the last one, all that adapts the model. See PEFT."""
        super().delete_adapter(adapter_name)
        activate_saved(self.model, self.active_adapters)
        call_uncalled.watch(self.model)
        remove_if_empty(self.model)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        """Around `forward` and `generate`: rows of different adapters (`adapter_names`), as for LoRA.

        Raises:
            LilyError: if a name is unknown, or the adapters cannot be mixed.
        """
        return rows_by_name(self.model, kwargs)


def _in_chain(target: nn.Module) -> LilyLayer | None:
    """The adapted layer that `target` is, or that layers of other methods are around (in a mixed model)."""
    while isinstance(target, BaseTunerLayer) and not isinstance(target, LilyLayer):
        target = target.base_layer
    return target if isinstance(target, LilyLayer) else None


def _warn_of_surplus(named: set[str], plan: SharingPlan) -> None:
    surplus = sorted(named - set(plan.slots))
    if surplus or not named:
        tensors = f"tensors for {some(surplus)}, which the configuration does not adapt"
        warnings.warn(
            f"the state_dict has {tensors if named else 'no tensor of a Lily adapter'}; correct target_modules, or "
            "leave it out to adapt the layers that the state_dict names",
            stacklevel=3,
        )


def _warn_of_diffusers(model: nn.Module, config: LilyConfig) -> None:
    """Before a training whose result diffusers' own functions could not save."""
    added = getattr(model, "_hf_peft_config_loaded", False)  # by diffusers' `add_adapter`
    if added and type(model).__module__.partition(".")[0] == "diffusers" and config.dynamic and config.settled is None:
        warnings.warn(
            f"routing={config.routing!r}: files of diffusers hold plain LoRA, which this adapter is not, so "
            "save_lora_adapter and save_lora_weights will refuse it; use routing='static', or make it static during "
            "training (lily.Settling) or afterwards (lily.collapse)",
            stacklevel=3,
        )
