"""Writing exports. Every folder is written under a temporary name and appears when it is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from lily.deploy.extra_tensors import PREFIX, other_entries, saved_modules
from lily.deploy.lora import LoraExport
from lily.deploy.provenance import header, origin, write_provenance
from lily.errors import LilyError
from lily.io.atomic import new_folder, write_text
from lily.layers.layer import LilyLayer
from lily.plan.specs import LINEAR
from lily.tuner.adapter import find


def write_lora(
    export: LoraExport,
    folder: str | Path,
    *,
    overwrite: bool = False,
    layout: str = "peft",
    component: str | None = None,
) -> None:
    """Write an exported LoRA as a folder.

    Args:
        export: from `as_lora`.
        folder: appears when it is complete.
        overwrite: replace an existing folder.
        layout: `peft` (also for vLLM), or `diffusers`: a file that `load_lora_weights` of a pipeline reads.
        component: diffusers: the part of the pipeline that it is for, `unet` or `transformer`; default: read off the
            class of the adapted model.

    Raises:
        LilyError: if the folder exists, or the layout cannot express the export.
        OSError: if it cannot be written; nothing is left then.
    """
    if layout not in ("peft", "diffusers"):
        raise LilyError(f"layout={layout!r} is not known; choose peft or diffusers")
    if component is not None and layout != "diffusers":
        raise LilyError(f"component={component!r} goes with layout='diffusers'; leave it out")
    facts = header(export.provenance)
    state = _pipeline_state(export, component) if layout == "diffusers" else export.state_dict()
    with new_folder(folder, overwrite) as new:
        if layout == "diffusers":
            save_file(state, new / "pytorch_lora_weights.safetensors", metadata=facts)
        else:
            export.config.save_pretrained(str(new))
            save_file(state, new / SAFETENSORS_WEIGHTS_NAME, metadata=facts)
        write_provenance(new, export.provenance)


def _pipeline_state(export: LoraExport, component: str | None) -> dict[str, Tensor]:
    """The entries of a diffusers file: it has no configuration, so its reader takes alpha to be the rank."""
    component = component or export.component
    if component is None:
        raise LilyError(
            "which part of a pipeline this LoRA is for cannot be read off the adapted model; "
            "name it: write_lora(..., layout='diffusers', component='unet') or 'transformer'"
        )
    plain = all(layer.scale == 1 and layer.rank == export.rank for layer in export.layers.values())
    if export.other or not plain:
        raise LilyError(
            "a diffusers file holds nothing but A and B of one rank, without a scale; "
            "make the export with as_lora(model, target='diffusers')"
        )
    return {f"{component}.{k.removeprefix(PREFIX)}": v for k, v in export.state_dict().items()}


def write_merged(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    provenance: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Merge a static adapter into its base model and write that as a plain model folder.

    The weights are merged in place, one at a time, so the model is in memory once; `model` is used up.

    Args:
        model: a `PeftModel` around a model with `save_pretrained`.
        folder: appears when it is complete.
        adapter: default: the active one.
        tokenizer: written beside it, if given.
        overwrite: replace an existing folder.
        max_shard_size: of one safetensors file.
        provenance: further facts to keep with it.

    Returns:
        The merged model.

    Raises:
        LilyError: if the adapter cannot be merged or the folder exists; nothing is merged then.
    """
    found = find(model, adapter)
    adapted = [module for module in found.root.modules() if isinstance(module, LilyLayer)]
    others = {name for layer in adapted for name in layer.merged_adapters} - {found.name}
    if others:
        raise LilyError(
            f"adapter {sorted(others)[0]!r} is merged into the base weights now, and would be written too; "
            "unmerge_adapter() first"
        )
    for layer in found.layers.values():
        layer.check_merge(found.name, safe_merge=True)
    if not isinstance(model, peft.PeftModel):
        raise LilyError(
            f"this {type(model).__name__} had its adapter injected, and only a PeftModel can be merged and unloaded; "
            "load the adapter with PeftModel.from_pretrained, or export a LoRA"
        )
    if not hasattr(found.root, "save_pretrained"):
        raise LilyError(
            f"a {type(found.root).__name__} has no save_pretrained; merge_and_unload() and save it yourself"
        )
    facts = origin(found, "merged", provenance)
    with new_folder(folder, overwrite) as new:
        merged: Any = model.merge_and_unload(adapter_names=[found.name])
        merged.save_pretrained(str(new), max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        write_provenance(new, facts)
    return merged  # type: ignore[no-any-return]


def write_stock(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter so that plain PEFT, without this package, computes the same.

    Stock Lily knows batch routing only. A batch-routed adapter is written as it is. A static one gets layers of their
    own, each with its mixed B twice and a router of zeros, which weighs both alike; that is larger than a LoRA, which
    is the better export unless stock Lily itself is wanted.

    Args:
        model: carries the adapter.
        folder: appears when it is complete.
        adapter: default: the active one.
        overwrite: replace an existing folder.
        provenance: further facts to keep with it.

    Raises:
        LilyError: if stock PEFT cannot express the adapter, or the folder exists.
    """
    found = find(model, adapter)
    config = found.config
    facts = origin(found, "stock", provenance)
    if config.routing == "batch" and config.file_dict()["peft_type"] == "LILY":
        with new_folder(folder, overwrite) as new:
            state = get_peft_model_state_dict(model, adapter_name=found.name)
            config.save_pretrained(str(new))
            save_file({k: v.contiguous() for k, v in state.items()}, new / SAFETENSORS_WEIGHTS_NAME, header(facts))
            write_provenance(new, facts)
        return
    if config.bias != "none":
        raise LilyError(f"stock Lily trains no biases (bias={config.bias!r}); export --to lora or --to merged")
    other = {
        type(layer.get_base_layer()).__name__
        for name, layer in found.layers.items()
        if found.plan.group_of(name).kind != LINEAR or not isinstance(layer.get_base_layer(), nn.Linear)
    }
    if other:
        raise LilyError(f"stock Lily adapts nn.Linear only, not {', '.join(sorted(other))}; export --to lora")
    factors = {name: layer.factors(found.name) for name, layer in found.layers.items()}
    r = max(f.A.shape[0] for f in factors.values())
    state = other_entries(model, found)
    for name, f in factors.items():
        padded = (0, 0, 0, r - f.A.shape[0])
        A, B = nn.functional.pad(f.A, padded), nn.functional.pad(f.B, padded)
        state[f"{PREFIX}{name}.lily_A.weight"] = A.cpu().contiguous()
        state[f"{PREFIX}{name}.lily_B.weight"] = torch.cat([B, B]).cpu().contiguous()
        state[f"{PREFIX}{name}.lily_router.weight"] = torch.zeros(2, r)
    values = {
        "peft_type": "LILY", "r": r, "num_B": 2, "stride_A": 1, "scaling": config.scaling, "init_weights": True,
        "target_modules": sorted(found.layers), "modules_to_save": saved_modules(config),
        "task_type": config.task_type, "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision, "inference_mode": True,
    }  # fmt: skip
    with new_folder(folder, overwrite) as new:
        write_text(new / "adapter_config.json", json.dumps(values, indent=2, sort_keys=True))
        save_file(state, new / SAFETENSORS_WEIGHTS_NAME, header(facts))
        write_provenance(new, facts)
