"""Replacements of PEFT's and transformers' loading functions that load Lily adapters through `lily.checkpoint.load`.

`lily.tuner.replacements` lists them. Each calls the original for adapters of other methods.
"""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftModel, inject_adapter_in_model
from peft.config import PeftConfigMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, infer_device, save_and_load
from peft.utils.other import _set_adapter
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from lily.checkpoint import load
from lily.checkpoint.beside import Beside, keep_tied
from lily.checkpoint.format import PREFIX
from lily.checkpoint.load import Opened
from lily.errors import LilyError
from lily.layers.find import refill
from lily.plan.config import LilyConfig
from lily.plan.wrappers import innermost, plain_names
from lily.tuner.auto_classes import check_head, with_base
from lily.tuner.compiled_hotswap import prepare
from lily.tuner.hotswap import opened_state, swap

# Settings that change an adapter's function besides its tensors.
DISTINCTION = ("distinct", "distinct_seed")

_stock_from_json_file = PeftConfigMixin.__dict__["from_json_file"]
_stock_from_pretrained = PeftModel.__dict__["from_pretrained"]
_stock_load_adapter = PeftModel.load_adapter
_stock_load_weights = save_and_load.load_peft_weights
_stock_set_state = save_and_load.set_peft_model_state_dict
stock_transformers = getattr(PeftAdapterMixin.load_adapter, "lily_stock", PeftAdapterMixin.load_adapter)


def _configs(model: Any) -> dict[str, PeftConfig]:
    """Adapter -> configuration; a model without adapters has none."""
    return dict(getattr(innermost(model), "peft_config", None) or {})


def from_json_file(cls: Any, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
    """`PeftConfig.from_json_file`, through which every `adapter_config.json` is read."""
    if not (issubclass(cls, LilyConfig) or issubclass(LilyConfig, cls)):  # another method's
        return with_base(_stock_from_json_file.__func__(cls, path_json_file, **kwargs))
    values = load.config_values(Path(path_json_file), ours=issubclass(cls, LilyConfig))
    if values is None:
        return with_base(_stock_from_json_file.__func__(cls, path_json_file, **kwargs))
    return with_base(values)


def from_pretrained(cls: type[PeftModel], *args: Any, **kwargs: Any) -> PeftModel:
    """`PeftModel.from_pretrained`."""
    stock = _stock_from_pretrained.__func__
    bound = inspect.signature(stock).bind(cls, *args, **kwargs)
    model, model_id, config = bound.arguments["model"], bound.arguments["model_id"], bound.arguments.get("config")
    options = bound.arguments.get("kwargs", {})
    folder = None
    if config is None or isinstance(config, peft.LilyConfig):
        folder = load.find(model_id, load.download_options(options), configured=config is not None)
    if folder is None:
        if not options.get("ignore_mismatched_sizes"):
            check_head(str(model_id), model)
        return stock(*bound.args, **bound.kwargs)
    mapping = bound.arguments.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None)
    opened = Opened.folder(folder, mapping, options.get("ignore_mismatched_sizes", False))
    with load.in_progress(opened):
        ours = LilyConfig.from_pretrained(str(folder)) if config is None else LilyConfig.from_stock(config)
        if config is not None:
            _check_distinction(folder, ours)
        load.check_config(ours, model)
        return stock(*bound.args, **bound.kwargs)


def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """`PeftModel.load_adapter`."""
    if load.current() is not None:  # the second half of `from_pretrained`
        return _stock_load_adapter(self, *args, **kwargs)
    bound = inspect.signature(_stock_load_adapter).bind(self, *args, **kwargs)
    model_id, name = bound.arguments["model_id"], bound.arguments["adapter_name"]
    options = bound.arguments.get("kwargs", {})
    existing = self.peft_config.get(name)
    folder = None
    if existing is None or isinstance(existing, LilyConfig):
        folder = load.find(model_id, load.download_options(options), configured=existing is not None)
    if folder is None:
        carries = any(isinstance(config, LilyConfig) for config in self.peft_config.values())
        with load.naming(Path(model_id, CONFIG_NAME) if carries else None):
            if not options.get("ignore_mismatched_sizes"):
                check_head(str(model_id), self)
            return _stock_load_adapter(self, *args, **kwargs)
    opened = Opened.folder(folder, bound.arguments.get("key_mapping"), options.get("ignore_mismatched_sizes", False))
    with load.in_progress(opened):
        if existing is None:
            load.check_config(LilyConfig.from_pretrained(str(folder)), self)
        elif (plan := load.plan_of(self, name)) is not None:
            opened.check(plan, existing, self, name)
            _check_distinction(folder, existing)
        return _stock_load_adapter(self, *args, **kwargs)


def _check_distinction(folder: Path, config: LilyConfig) -> None:
    """Refuse the tensors of a folder for an adapter that permutes or signs their rows in another way: all would fit."""
    if not (folder / CONFIG_NAME).is_file():
        return
    of_file = LilyConfig.from_pretrained(str(folder))
    for key in DISTINCTION:
        if (then := getattr(of_file, key)) != (now := getattr(config, key)):
            raise LilyError(
                f"{folder / CONFIG_NAME} has {key}={then!r} and the adapter to load it into {key}={now!r}, so its "
                f"tensors would mean something else; set {key}={then!r}, or load it under another adapter name without "
                "a configuration"
            )


def load_weights(
    model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None, **options: Any
) -> dict[str, Tensor]:
    """`load_peft_weights`: a Lily adapter's tensors are read from safetensors only, and must be finite."""
    opened = load.current()
    if opened is None:
        folder = load.find(model_id, load.download_options(options))
        if folder is None:
            return _stock_load_weights(model_id, device, key_mapping, **options)  # type: ignore[no-any-return]
        opened = Opened.folder(folder, key_mapping)
    device = device or infer_device()
    return {name: tensor.to("cpu" if device == "mps" else device) for name, tensor in opened.state.items()}


def set_state(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """`set_peft_model_state_dict`: check that all tensors of a Lily adapter fit before the first is copied."""
    config = _configs(model).get(adapter_name)
    plan = load.plan_of(model, adapter_name)
    if not isinstance(config, LilyConfig) or plan is None:
        return _stock_set_state(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage)
    opened = load.current()
    with load.naming(opened.header.path if opened and opened.header else None):
        load.check_fit(peft_model_state_dict, plan, config, model, adapter_name, ignore_mismatched_sizes)
    # low_cpu_mem_usage replaces parameters, each by a separate one
    kept = keep_tied(model) if low_cpu_mem_usage else contextlib.nullcontext()
    with plain_names(model, fsdp=False) as inner, kept:
        beside = Beside(inner, config, plan, adapter_name)
        result = _stock_set_state(
            inner, beside.for_model(peft_model_state_dict), adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage
        )
        beside.tie(inner, adapter_name)
        refill(inner, adapter_name)
    return result


def transformers_load_adapter(
    self: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | str = "auto",
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`model.load_adapter` of transformers, which its `from_pretrained` uses too.

    It matches names of tensors to names of parameters and would miss the bank, so Lily's files are loaded as PEFT does.
    Other adapters are passed on.
    """
    options = (low_cpu_mem_usage, is_trainable, hotswap, *args)
    load_config = kwargs.get("load_config")
    source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    hub = {**(getattr(load_config, "download_kwargs", None) or {}), **(kwargs.get("adapter_kwargs") or {})}
    hub["local_files_only"] = hub.get("local_files_only") or kwargs.get("local_files_only")
    hub = {key: hub[key] for key in ("revision", "token", "cache_dir", "subfolder", "local_files_only") if hub.get(key)}
    name = adapter_name or "default"
    existing = getattr(self, "peft_config", {}).get(name)
    if hotswap == "auto":
        hotswap = getattr(self, "_hotswap_enabled", False) and existing is not None
    folder = None
    if (
        adapter_state_dict is None
        and source is not None
        and (peft_config is None or isinstance(peft_config, LilyConfig))
    ):
        folder = load.find(source, hub, configured=peft_config is not None)
    config = peft_config
    if config is None and folder is not None:
        config = LilyConfig.from_pretrained(str(folder))
    if not isinstance(config, LilyConfig) or (existing is not None) != bool(hotswap):
        return stock_transformers(
            self, peft_model_id, adapter_name, peft_config, adapter_state_dict, *options, **kwargs
        )
    if folder is not None:
        if peft_config is not None:
            _check_distinction(folder, config)
        opened = Opened.folder(folder)
    elif adapter_state_dict is not None:
        opened = opened_state(adapter_state_dict)
    else:
        raise LilyError(
            "load_adapter got a configuration without tensors; pass peft_model_id or adapter_state_dict too"
        )
    config.inference_mode = not is_trainable
    if hotswap:
        result = swap(self, name, config, opened)
    else:
        result = _add(self, name, config, opened)
        if (prepared := self._prepare_peft_hotswap_kwargs) is not None:
            prepare(self, config=config, **prepared)
            self._prepare_peft_hotswap_kwargs = None
    if config.inference_mode:
        self.eval()
        for layer in (module for module in self.modules() if isinstance(module, BaseTunerLayer)):
            layer.requires_grad_(False)  # as transformers does, those of other adapters too
    return result


def _add(model: Any, name: str, config: LilyConfig, opened: Opened) -> Any:
    with load.in_progress(opened):
        load.check_config(config, model)
        inject_adapter_in_model(config, model, name)
        _set_adapter(model, name, inference_mode=config.inference_mode)  # saved modules; PEFT switches the layers alone
        model._hf_peft_config_loaded = True
        return set_state(model, {key.removeprefix(PREFIX): t for key, t in opened.state.items()}, name)
