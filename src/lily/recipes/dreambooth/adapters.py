"""Adapters on a denoiser, through diffusers' `add_adapter`, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lily.checkpoint.format import PREFIX
from lily.deploy.lora import as_lora
from lily.deploy.write import write_lora
from lily.errors import LilyError
from lily.io.atomic import new_folder
from lily.recipes.dreambooth.families import Family

WEIGHTS = "adapter_model.safetensors"


def add(model: Any, config: PeftConfig, hub: str | None = None, revision: str | None = None) -> list[nn.Parameter]:
    """Put an adapter on a frozen denoiser.

    Args:
        model: a diffusers model without an adapter.
        config: of the adapter.
        hub: hub id of the pipeline, for the adapter's files.
        revision: of the hub id.

    Returns:
        The trained parameters, in float32 also where the denoiser is not.
    """
    model.add_adapter(config)
    for added in model.peft_config.values():
        added.base_model_name_or_path, added.revision = hub, revision
    cast_training_params(model, torch.float32)
    return [p for p in model.parameters() if p.requires_grad]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors, on the CPU, by their names in a file."""
    state = get_peft_model_state_dict(model)
    return {f"{PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def save(model: Any, folder: Path) -> None:
    """Write a folder that PEFT loads; an existing one is replaced when the new one is complete."""
    with new_folder(folder, overwrite=True) as new:
        write(model, new)


def write(model: Any, folder: Path) -> None:
    """Write the files that PEFT loads into an existing folder."""
    model.peft_config["default"].save_pretrained(str(folder))
    save_file(state_of(model), folder / WEIGHTS, metadata={"format": "pt"})


def load(model: Any, folder: str | Path) -> PeftConfig:
    """Load a saved adapter onto a denoiser, for inference.

    Args:
        model: a diffusers model without an adapter, such as `pipe.unet`.
        folder: written by `save`.

    Returns:
        The adapter's configuration.

    Raises:
        LilyError: if the folder holds no adapter, or one for another model.
    """
    folder = Path(folder)
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise LilyError(f"{folder} holds no adapter ({name} is missing); name a run's last/ folder")
    config = PeftConfig.from_pretrained(str(folder))
    model.add_adapter(config)
    load_weights(model, folder / WEIGHTS)
    model.requires_grad_(False).eval()
    return config


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a file's tensors into the model's adapter.

    Raises:
        LilyError: if the file has tensors of another adapter.
    """
    state = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}
    unexpected = set_peft_model_state_dict(model, state).unexpected_keys
    if unexpected:
        raise LilyError(f"{file} does not fit the adapter, which has no tensor {unexpected[0]}; name its own folder")


def write_for_pipelines(model: Any, pipe: Any, family: Family, folder: Path) -> bool:
    """Write a LoRA for a pipeline's `load_lora_weights`; an existing folder is replaced when the new one is complete.

    Returns:
        False, and nothing is written, where the adapter depends on its input, which a LoRA cannot.
    """
    config = model.peft_config["default"]
    if str(getattr(config.peft_type, "value", config.peft_type)) == "LORA":
        with new_folder(folder, overwrite=True) as new:
            named: dict[str, Any] = {
                f"{family.component}_lora_layers": get_peft_model_state_dict(model),
                f"{family.component}_lora_adapter_metadata": config.to_dict(),
            }
            pipe.save_lora_weights(str(new), **named)
        return True
    if config.dynamic or config.activation != "none":
        return False
    write_lora(as_lora(model, target="diffusers"), folder, layout="diffusers", overwrite=True)
    return True
