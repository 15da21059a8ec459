"""Write exports. Folders are written under a temporary name and renamed when they are complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from lily.checkpoint.format import PREFIX
from lily.deploy.card import beside, labels_of, task_of
from lily.deploy.extra_tensors import other_entries, saved_modules
from lily.deploy.lora import LoraExport
from lily.deploy.provenance import header, origin, write_provenance
from lily.errors import LilyError
from lily.io.atomic import new_folder, write_text
from lily.layers.layer import LilyLayer
from lily.plan.specs import LINEAR
from lily.plan.uncalled_layers import ALWAYS, uncalled
from lily.plan.wrappers import innermost, plain_names
from lily.tuner.adapter import find


def write_lora(
    export: LoraExport,
    folder: str | Path,
    *,
    overwrite: bool = False,
    layout: str = "peft",
    component: str | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write an exported LoRA as a folder.

    Args:
        export: from `as_lora`.
        folder: the folder to write, atomically.
        overwrite: replace an existing folder.
        layout: `peft` (also for vLLM), or `diffusers`: a file for `load_lora_weights` of a pipeline.
        component: diffusers: the adapted part of the pipeline, `unet` or `transformer`; default: derived from the class
            of the adapted model.
        files: further text files by name, such as a README.md in place of the short card that is written.

    Raises:
        LilyError: if the folder exists, or the layout cannot express the export.
        OSError: if it cannot be written; nothing is left behind.
    """
    if layout not in ("peft", "diffusers"):
        raise LilyError(f"layout={layout!r} is not known; choose peft or diffusers")
    if component is not None and layout != "diffusers":
        raise LilyError(f"component={component!r} is only for layout='diffusers'; remove it")
    diffusers = layout == "diffusers"
    state = _pipeline_state(export, component) if diffusers else export.state_dict()
    file = "pytorch_lora_weights.safetensors" if diffusers else SAFETENSORS_WEIGHTS_NAME
    with new_folder(folder, overwrite) as new:
        if not diffusers:
            export.config.save_pretrained(str(new))
        save_file(state, new / file, metadata=header(export.provenance))
        write_provenance(new, export.provenance)
        kind = "diffusers" if diffusers else "lora"
        _write_beside(new, beside(kind, export.provenance, export.task, export.labels, files))


def _write_beside(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        write_text(folder / name, text)


def _pipeline_state(export: LoraExport, component: str | None) -> dict[str, Tensor]:
    """The entries of a diffusers file, which has no configuration: its reader assumes that alpha is the rank."""
    component = component or export.component
    if component is None:
        raise LilyError(
            "which part of a pipeline this LoRA adapts is not known from the class of the model; "
            "name it: write_lora(..., layout='diffusers', component='unet') or 'transformer'"
        )
    plain = all(layer.scale == 1 and layer.rank == export.rank for layer in export.layers.values())
    if export.other or not plain:
        raise LilyError(
            "a diffusers file holds only A and B of one rank, without a scale; "
            "export with as_lora(model, target='diffusers')"
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
    files: Mapping[str, str] | None = None,
) -> nn.Module:
    """Merge a static adapter into its base model and write that as a plain model folder.

    The weights are merged in place, so the model is in memory once; `model` cannot be used afterwards.

    Args:
        model: a `PeftModel` around a model with `save_pretrained`.
        folder: the folder to write, atomically.
        adapter: name of the adapter; default: the active one.
        tokenizer: also written, if given.
        overwrite: replace an existing folder.
        max_shard_size: largest size of one safetensors file.
        provenance: further facts to store with it.
        files: further text files by name, such as a README.md in place of the short card that is written.

    Returns:
        The merged model.

    Raises:
        LilyError: if the adapter cannot be merged or the folder exists; nothing is merged then.
    """
    model = innermost(model)
    adapted = find(model, adapter)
    layers = [module for module in adapted.root.modules() if isinstance(module, LilyLayer)]
    others = {name for layer in layers for name in layer.merged_adapters} - {adapted.name}
    if others:
        raise LilyError(
            f"adapter {sorted(others)[0]!r} is merged into the base weights, and would be written too; "
            "unmerge_adapter() first"
        )
    for layer in adapted.layers.values():
        layer.check_merge(adapted.name, safe_merge=True)
    if not isinstance(model, peft.PeftModel):
        raise LilyError(
            f"this {type(model).__name__} had its adapter injected, and only a PeftModel can be merged and unloaded; "
            "load the adapter with PeftModel.from_pretrained, or export a LoRA"
        )
    if not hasattr(adapted.root, "save_pretrained"):
        raise LilyError(
            f"a {type(adapted.root).__name__} has no save_pretrained; use merge_and_unload() and save its state dict"
        )
    facts = origin(adapted, "merged", provenance)
    texts = beside("merged", facts, task_of(adapted.root), labels_of(adapted.root), files)
    with new_folder(folder, overwrite) as new:
        merged: Any = model.merge_and_unload(adapter_names=[adapted.name])
        with plain_names(merged) as plain:
            cast(Any, plain).save_pretrained(str(new), max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        write_provenance(new, facts)
        _write_beside(new, texts)
    return merged  # type: ignore[no-any-return]


def write_stock(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter: str | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter so that plain PEFT, without this package, computes the same.

    Stock Lily has batch routing only. A batch-routed adapter is written unchanged. For a static one every layer is
    written separately, with its mixed B twice and a router of zeros, which weights both equally; that is larger than a
    LoRA, which is the better export unless stock Lily is required.

    Args:
        model: the model with the adapter.
        folder: the folder to write, atomically.
        adapter: name of the adapter; default: the active one.
        overwrite: replace an existing folder.
        provenance: further facts to store with it.
        files: further text files by name, such as a README.md in place of the short card that is written.

    Raises:
        LilyError: if stock PEFT cannot express the adapter, or the folder exists.
    """
    model = innermost(model)
    adapted = find(model, adapter)
    config = adapted.config
    facts = origin(adapted, "stock", provenance)
    texts = beside("stock", facts, task_of(adapted.root), labels_of(adapted.root), files)
    if config.routing == "batch" and config.file_dict()["peft_type"] == "LILY":
        with new_folder(folder, overwrite) as new:
            state = get_peft_model_state_dict(model, adapter_name=adapted.name)
            config.save_pretrained(str(new))
            save_file({k: v.contiguous() for k, v in state.items()}, new / SAFETENSORS_WEIGHTS_NAME, header(facts))
            write_provenance(new, facts)
            _write_beside(new, texts)
        return
    if config.bias != "none":
        raise LilyError(f"stock Lily trains no biases (bias={config.bias!r}); export --to lora or --to merged")
    if config.trainable_token_indices:
        raise LilyError("stock Lily trains no rows of an embedding (trainable_token_indices); export --to lora")
    other = {
        type(layer.get_base_layer()).__name__
        for name, layer in adapted.layers.items()
        if adapted.plan.group_of(name).kind != LINEAR or not isinstance(layer.get_base_layer(), nn.Linear)
    }
    if other:
        raise LilyError(f"stock Lily adapts nn.Linear only, not {', '.join(sorted(other))}; export --to lora")
    read = uncalled(dict(adapted.root.named_modules()))
    if lost := [name for name in adapted.layers if name in read and read[name].remedy in ALWAYS]:
        why = read[lost[0]]
        raise LilyError(
            f"stock Lily does nothing on {lost[0]}, since {why.parent} reads its weight {why.why}; export --to merged"
        )
    factors = {name: layer.factors(adapted.name) for name, layer in adapted.layers.items()}
    r = max(f.A.shape[0] for f in factors.values())
    assert isinstance(config.scaling, float | int)  # decided when the adapter was added
    state = other_entries(model, adapted)
    for name, f in factors.items():
        padded = (0, 0, 0, r - f.A.shape[0])
        A, B = nn.functional.pad(f.A, padded), nn.functional.pad(f.B * (f.scaling / config.scaling), padded)
        state[f"{PREFIX}{name}.lily_A.weight"] = A.cpu().contiguous()
        state[f"{PREFIX}{name}.lily_B.weight"] = torch.cat([B, B]).cpu().contiguous()
        state[f"{PREFIX}{name}.lily_router.weight"] = torch.zeros(2, r)
    saved = [*(saved_modules(config) or ()), *sorted(config.modules_to_tie or ())]
    values = {
        "peft_type": "LILY", "r": r, "num_B": 2, "stride_A": 1, "scaling": config.scaling, "init_weights": True,
        "target_modules": sorted(adapted.layers), "modules_to_save": saved or None,
        "task_type": config.task_type, "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision, "inference_mode": True,
    }  # fmt: skip
    with new_folder(folder, overwrite) as new:
        write_text(new / "adapter_config.json", json.dumps(values, indent=2, sort_keys=True))
        save_file(state, new / SAFETENSORS_WEIGHTS_NAME, header(facts))
        write_provenance(new, facts)
        _write_beside(new, texts)
