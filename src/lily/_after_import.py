"""Act once a library is imported, so that `import lily` need not import it.

PEFT brings transformers and torch, which take seconds; `lily --help` and the checks of a recipe need none of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

# Functions of diffusers that remove adapters from the model which is their first argument.
REMOVING = ("recurse_remove_peft_layers", "delete_adapter_layers")
# TRL's trainers that can send an adapter to vLLM without merging it.
SYNCING = ("async_grpo.async_grpo_trainer", "async_distillation.async_distillation_trainer")
WATCHED = ("diffusers", "trl")
AUTO = "transformers.models.auto.auto_factory"
PART = "lily_"  # in the name of every tensor of a Lily adapter
SKIPPED = "_skip_layerwise_casting_patterns"
BANK = "lily_bank"  # as in `lily.layers.bank`
# What is replaced in transformers, diffusers and TRL, and why. Without Lily each calls the original.
REPLACED = {
    f"{AUTO}._BaseAutoModelClass.from_pretrained": "an adapter's base model has a name that is no folder or hub id; "
    "the Auto classes have copies, which are replaced too",
    "diffusers.utils.peft_utils.recurse_remove_peft_layers": "takes the layers out and does not know the bank",
    "diffusers.utils.peft_utils.delete_adapter_layers": "deletes an adapter in each layer and does not know the bank",
    "diffusers.utils.peft_utils.set_weights_and_activate_adapters": "splits layers' names, and the bank's has one part",
    "diffusers.utils.state_dict_utils.convert_state_dict_to_diffusers": "knows LoRA's names: gets the LoRA",
    "diffusers.loaders.peft.PeftAdapterMixin.save_lora_adapter": "writes the file of a LoRA: writes the LoRA",
    "diffusers.loaders.peft.PeftAdapterMixin.load_lora_adapter": "`hotswap=True` would delete a Lily adapter: refused",
    "diffusers.models.modeling_utils.ModelMixin.enable_layerwise_casting": "would store routers in few bits: it leaves "
    "LoRA's tensors out by their names",
    "diffusers.loaders.lora_base.LoraBaseMixin.pack_weights": "writes the file of a LoRA: gets the LoRA",
    "diffusers.loaders.lora_base.LoraBaseMixin._save_lora_weights": "would read a `LilyConfig` as LoRA's",
    "diffusers.loaders.lora_base.LoraBaseMixin.set_lora_device": "moves LoRA's tensors by their names",
    **{f"trl.experimental.{trainer}.{name}": "sends LoRA's tensors to vLLM: sends the LoRA"
       for trainer in SYNCING for name in ("validate_lora_for_vllm_sync", "save_lora_adapter")},
}  # fmt: skip


@dataclass(frozen=True)
class Handlers:
    """What other libraries' functions do for Lily; each imports what it needs when it is called.

    Attributes:
        register: make PEFT use this package.
        removed: after diffusers has taken adapters out of a model.
        lora_state: a Lily adapter's tensors -> those of the LoRA that it is.
        save_lora_adapter: the same of a model and an adapter's name, in a file; the other arguments are diffusers'.
        refuse_lora: as the replacement of the adapter of that name.
        sync_config: the configuration of the LoRA that a model's active adapter is, for vLLM.
        save_for_sync: the same as a folder; the arguments are TRL's.
        from_auto_class: `from_pretrained` of a transformers Auto class on an adapter's folder, after the original.
    """

    register: Callable[[], None]
    removed: Callable[[Any], None]
    lora_state: Callable[[Any], Any]
    save_lora_adapter: Callable[..., None]
    refuse_lora: Callable[[Any], None]
    sync_config: Callable[[Any], Any]
    save_for_sync: Callable[..., None]
    from_auto_class: Callable[..., Any]


def after_import(name: str, act: Callable[[], None]) -> None:
    """Call `act` when the module has been imported; at once if it has been already."""
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        act()
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Clients:
    """What is replaced in transformers, diffusers and TRL at the moment."""

    handlers: Handlers | None = None
    on = False
    restoring: ClassVar[dict[str, Callable[[], None]]] = {}  # replaced attribute -> puts the original back


def watch(handlers: Handlers) -> None:
    """Register after PEFT's import, and let transformers, diffusers and TRL find Lily without importing them here."""
    _Clients.handlers = handlers
    after_import("peft", handlers.register)
    after_import("transformers.integrations.peft", _import_peft_before_loading)
    replace()


def replace() -> None:
    """Replace what is in `REPLACED`: now, or when its module is imported."""
    handlers = _Clients.handlers
    if handlers is None or _Clients.on:
        return
    _Clients.on = True
    after_import(AUTO, lambda: _in_auto_classes(handlers))
    after_import("diffusers.utils.peft_utils", lambda: _in_peft_utils(handlers))
    after_import("diffusers.utils.state_dict_utils", lambda: _in_state_dict_utils(handlers))
    after_import("diffusers.loaders.peft", lambda: _in_models(handlers))
    after_import("diffusers.loaders.lora_base", lambda: _in_pipelines(handlers))
    after_import("diffusers.models.modeling_utils", _in_layerwise_casting)
    for trainer in SYNCING:
        after_import(name := f"trl.experimental.{trainer}", functools.partial(_in_trainer, name, handlers))


def restore() -> None:
    """Put back what is in `REPLACED`, and watch for it no more."""
    _Clients.on = False
    for finder in [f for f in sys.meta_path if isinstance(f, _Finder)]:
        if finder.name == AUTO or finder.name.partition(".")[0] in WATCHED:
            sys.meta_path.remove(finder)
    while _Clients.restoring:
        _Clients.restoring.popitem()[1]()


def replaced() -> set[str]:
    """The attributes of `REPLACED` whose modules are imported, while they are replaced."""
    return set(_Clients.restoring)


def _put(owner: Any, name: str, ours: Any) -> None:
    """Replace an attribute of a class or module."""
    stock = owner.__dict__[name]
    setattr(owner, name, ours)
    where = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__name__}"
    _Clients.restoring[f"{where}.{name}"] = functools.partial(setattr, owner, name, stock)


def _import_peft_before_loading() -> None:
    """Let transformers' `load_adapter` import PEFT before it runs, so that it is replaced.

    PEFT must not be imported earlier: it imports models of transformers, which may be what is being imported now.
    """
    mixin = sys.modules["transformers.integrations.peft"].PeftAdapterMixin
    stock = mixin.load_adapter

    @functools.wraps(stock)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(ImportError):  # stock says what is missing
            importlib.import_module("peft")
        now = mixin.load_adapter if mixin.load_adapter is not load_adapter else stock
        return now(self, *args, **kwargs)

    if not hasattr(stock, "lily_stock"):
        load_adapter.lily_stock = stock  # type: ignore[attr-defined]
        mixin.load_adapter = load_adapter


def _is_adapter(folder: Any) -> bool:
    """Whether it is the folder of an adapter alone; with a config.json it is a whole model, which may hold one."""
    if not isinstance(folder, (str, os.PathLike)):
        return False
    return os.path.isfile(os.path.join(folder, "adapter_config.json")) and not os.path.exists(
        os.path.join(folder, "config.json")
    )


def _in_auto_classes(handlers: Handlers) -> None:
    """Replace `from_pretrained` of the base class, and the copies that classes made before have of it."""
    owners = [sys.modules[AUTO]._BaseAutoModelClass]
    for owner in owners:
        owners.extend(owner.__subclasses__())
        if "from_pretrained" in owner.__dict__:
            _in_auto_class(owner, handlers)


def _in_auto_class(owner: Any, handlers: Handlers) -> None:
    stock = owner.__dict__["from_pretrained"].__func__

    @functools.wraps(stock)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        folder = pretrained_model_name_or_path
        # a class that is made later copies this function, and keeps it after `restore`
        if _Clients.on and _is_adapter(folder):
            return handlers.from_auto_class(stock, cls, folder, *args, **kwargs)
        return stock(cls, folder, *args, **kwargs)

    _put(owner, "from_pretrained", classmethod(from_pretrained))


def _in_peft_utils(handlers: Handlers) -> None:
    def removing(stock: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(model, *args, **kwargs)
        handlers.removed(model)
        return result

    def weighting(stock: Callable[..., Any], model: Any, adapter_names: Any, weights: Any) -> Any:
        # diffusers takes the first key that is in a layer's name
        weights = [{**weight, BANK: 1.0} if isinstance(weight, dict) else weight for weight in weights]
        return stock(model, adapter_names, weights)

    for name in REMOVING:
        _replace_everywhere("diffusers.utils.peft_utils", name, removing)
    _replace_everywhere("diffusers.utils.peft_utils", "set_weights_and_activate_adapters", weighting)


def _in_state_dict_utils(handlers: Handlers) -> None:
    def converting(stock: Callable[..., Any], state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(handlers.lora_state(state_dict) if _is_lily(state_dict) else state_dict, *args, **kwargs)

    _replace_everywhere("diffusers.utils.state_dict_utils", "convert_state_dict_to_diffusers", converting)


def _in_models(handlers: Handlers) -> None:
    mixin = sys.modules["diffusers.loaders.peft"].PeftAdapterMixin
    stock, stock_load = mixin.save_lora_adapter, mixin.load_lora_adapter

    def is_ours(model: Any, adapter: Any) -> bool:
        return _is_ours(getattr(model, "peft_config", {}).get(adapter))

    @functools.wraps(stock)
    def save_lora_adapter(self: Any, save_directory: Any, adapter_name: Any = "default", *args: Any, **kw: Any) -> None:
        if is_ours(self, adapter_name):
            handlers.save_lora_adapter(self, save_directory, adapter_name, *args, **kw)
        else:
            stock(self, save_directory, adapter_name, *args, **kw)

    @functools.wraps(stock_load)
    def load_lora_adapter(self: Any, source: Any, prefix: Any = "transformer", hotswap: bool = False, **kw: Any) -> Any:
        if hotswap and is_ours(self, name := kw.get("adapter_name")):  # diffusers would delete the adapter
            handlers.refuse_lora(name)
        return stock_load(self, source, prefix, hotswap, **kw)

    _put(mixin, "save_lora_adapter", save_lora_adapter)
    _put(mixin, "load_lora_adapter", load_lora_adapter)


def _in_layerwise_casting() -> None:
    mixin = sys.modules["diffusers.models.modeling_utils"].ModelMixin
    stock = mixin.enable_layerwise_casting

    @functools.wraps(stock)
    def enable_layerwise_casting(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("skip_modules_pattern", args[2] if len(args) > 2 else None) is not None:
            stock(self, *args, **kwargs)
            return
        own = vars(self).get(SKIPPED)
        setattr(self, SKIPPED, (*(getattr(self, SKIPPED) or ()), PART))
        try:
            stock(self, *args, **kwargs)
        finally:
            delattr(self, SKIPPED)
            if own is not None:
                setattr(self, SKIPPED, own)

    _put(mixin, "enable_layerwise_casting", enable_layerwise_casting)


def _in_pipelines(handlers: Handlers) -> None:
    mixin = sys.modules["diffusers.loaders.lora_base"].LoraBaseMixin
    stock_pack, stock_save = mixin.pack_weights, mixin.__dict__["_save_lora_weights"].__func__

    @functools.wraps(stock_pack)
    def pack_weights(layers: Any, prefix: Any) -> Any:
        return stock_pack(handlers.lora_state(layers) if _is_lily(layers) else layers, prefix)

    @functools.wraps(stock_save)
    def save(cls: Any, save_directory: Any, lora_layers: Any, lora_metadata: Any, *args: Any, **kwargs: Any) -> None:
        # diffusers would read a Lily configuration as LoRA's; without one it takes the ranks from the tensors
        plain = {
            part: None if str((values or {}).get("peft_type", "")).rpartition(".")[2].startswith("LILY") else values
            for part, values in lora_metadata.items()
        }
        stock_save(cls, save_directory, lora_layers, plain, *args, **kwargs)

    stock_device = mixin.set_lora_device

    @functools.wraps(stock_device)
    def set_lora_device(self: Any, adapter_names: Any, device: Any) -> None:
        parts = [part for name in self._lora_loadable_modules if (part := getattr(self, name, None)) is not None]
        layers = [layer for part in parts for layer in part.modules() if hasattr(layer, "adapter_layer_names")]
        if not any(PART + "A" in layer.adapter_layer_names for layer in layers):
            stock_device(self, adapter_names, device)
            return
        for holder in [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]:
            for adapter in [adapter for adapter in adapter_names if adapter in holder]:
                holder[adapter].to(device)

    _put(mixin, "set_lora_device", set_lora_device)
    _put(mixin, "pack_weights", staticmethod(pack_weights))
    _put(mixin, "_save_lora_weights", classmethod(save))


def _in_trainer(name: str, handlers: Handlers) -> None:
    """Let a trainer of TRL send a Lily adapter as the LoRA that it is; its own functions know LoRA's alone."""
    module: Any = sys.modules[name]
    stock_config = getattr(module, "validate_lora_for_vllm_sync", None)
    stock_save = getattr(module, "save_lora_adapter", None)
    if stock_config is None or stock_save is None:  # an earlier TRL, which merges
        return

    @functools.wraps(stock_config)
    def validate(model: Any) -> Any:
        active = [model.peft_config[name] for name in model.active_adapters]
        return handlers.sync_config(model) if any(map(_is_ours, active)) else stock_config(model)

    @functools.wraps(stock_save)
    def save(model: Any, accelerator: Any, adapter_name: str, dest_dir: str) -> None:
        ours = _is_ours(model.peft_config[adapter_name])
        (handlers.save_for_sync if ours else stock_save)(model, accelerator, adapter_name, dest_dir)

    _put(module, "validate_lora_for_vllm_sync", validate)
    _put(module, "save_lora_adapter", save)


def _is_ours(config: Any) -> bool:
    return type(config).__module__.startswith("lily.")


def _is_lily(state: Any) -> bool:
    return isinstance(state, dict) and any(PART in str(name) for name in state)


def _replace_everywhere(home: str, name: str, ours: Callable[..., Any]) -> None:
    """Replace a function of diffusers in the modules that have imported it, by `ours(stock, ...)`."""
    stock = getattr(sys.modules[home], name)
    replacement = functools.wraps(stock)(functools.partial(ours, stock))
    _swap_in_diffusers(name, stock, replacement)
    _Clients.restoring[f"{home}.{name}"] = functools.partial(_swap_in_diffusers, name, replacement, stock)


def _swap_in_diffusers(name: str, old: Any, new: Any) -> None:
    for module in [module for key, module in list(sys.modules.items()) if key.partition(".")[0] == "diffusers"]:
        if vars(module).get(name) is old:
            setattr(module, name, new)


class _Finder(MetaPathFinder):
    """Finds one module where it is, with a loader that calls `act` after it has run."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def done(self) -> None:
        """Act once."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self.act()


class _Loader(Loader):
    """The module's loader, which tells the finder when the module has run."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.finder.done()
