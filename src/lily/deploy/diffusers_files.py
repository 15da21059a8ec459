"""What diffusers writes of an adapter: the plain LoRA that a static Lily adapter is.

`lily._after_import` calls these where diffusers' own functions would write tensors that nothing reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lily.checkpoint.format import PREFIX
from lily.deploy.lora import LoraExport, as_lora
from lily.deploy.provenance import header
from lily.errors import LilyError
from lily.io.atomic import new_file
from lily.layers.merging import NotStaticError
from lily.tuner.peft_saving import AdapterState

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # diffusers' key for LoRA's configuration in a file's header
KEPT = (
    "nothing is lost: peft.get_peft_model_state_dict(model) has the adapter's tensors for a file of your own; to write "
    "a LoRA, make it static first (lily.collapse, with batches of your data), and train the next one with "
    "routing='static', or with lily.Settling"
)


def lora_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The LoRA of a Lily adapter's tensors, named as PEFT's are, without the prefix.

    Args:
        state: from `peft.get_peft_model_state_dict`.

    Raises:
        LilyError: if the adapter depends on the data, or where the tensors are from is not known.
    """
    model = state.model if isinstance(state, AdapterState) else None
    if model is None:
        raise LilyError(
            "these are tensors of a Lily adapter, and diffusers reads LoRA's; pass what "
            "peft.get_peft_model_state_dict(model) returns as it is, while the model exists"
        )
    assert isinstance(state, AdapterState)
    return _plain(_exported(model, state.adapter))


def save_lora_adapter(
    model: nn.Module,
    save_directory: str | Path,
    adapter_name: str | None = "default",
    upcast_before_saving: bool = False,
    safe_serialization: bool = True,
    weight_name: str | None = None,
) -> None:
    """`save_lora_adapter` of diffusers' models, whose arguments these are.

    Raises:
        LilyError: if the adapter depends on the data, or a pickle is asked for.
    """
    if not safe_serialization:
        raise LilyError(
            f"cannot save to {save_directory}: safe_serialization=False writes a pickle, which can run code; remove it"
        )
    export = _exported(model, adapter_name, torch.float32 if upcast_before_saving else None)
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in export.config.to_dict().items()}
    folder = Path(save_directory)
    if folder.is_file():
        raise LilyError(f"cannot save to {folder}: it is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {**header(export.provenance), METADATA: json.dumps(values, indent=2, sort_keys=True)}
    with new_file(folder / (weight_name or FILE), overwrite=True) as file:
        save_file(_plain(export), file, metadata=metadata)


def _exported(model: nn.Module, adapter: str | None, dtype: torch.dtype | None = None) -> LoraExport:
    try:
        return as_lora(model, adapter=adapter, target="diffusers", dtype=dtype)
    except NotStaticError as error:
        raise LilyError(f"{error}. {KEPT}") from None


def _plain(export: LoraExport) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in export.state_dict().items()}
