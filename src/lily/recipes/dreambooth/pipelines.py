"""Pretrained pipelines of recipes, and their denoisers without weights. Weights are read from safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lily.errors import LilyError
from lily.recipes.data.sources import local_path
from lily.recipes.dreambooth.families import FAMILIES, Family, family_of
from lily.recipes.models.load import loading
from lily.recipes.spec.dreambooth import Pipeline

# Name of an architecture -> its pipeline and the configuration of its denoiser, beside this file.
KNOWN = {"sdxl": ("StableDiffusionXLPipeline", "sdxl-unet.json")}


def source_of(model: Pipeline) -> Path | str:
    """A folder, or a hub id.

    Raises:
        LilyError: if there is no such folder, or it holds no pipeline.
    """
    if model.hub is not None:
        return model.hub
    if model.standin is not None:
        from lily.recipes.dreambooth.standin import standin

        return standin(model.standin)
    folder = local_path(model.path or "")
    if not (folder / "model_index.json").is_file():
        raise LilyError(f"{folder}: no model_index.json; name a folder that a diffusers pipeline was saved to")
    return folder


def meta_denoiser(model: Pipeline) -> tuple[Family, nn.Module]:
    """A pipeline's family, and its denoiser on the meta device: names and shapes without weights.

    Raises:
        LilyError: if its configuration cannot be loaded, or its kind is not supported.
    """
    import diffusers

    if model.architecture is not None:
        pipeline, file = KNOWN[model.architecture]
        family = family_of(pipeline)
        config = json.loads((Path(__file__).parent / file).read_text("utf-8"))
    elif model.standin is not None:  # its configuration is known without training it
        from lily.recipes.dreambooth.standin import KINDS

        pipe = KINDS[model.standin]()
        family = family_of(type(pipe).__name__)
        config = dict(getattr(pipe, family.component).config)
    else:
        source = source_of(model)
        family, _ = _family(model, source)
        config = loading(
            "config",
            source,
            lambda: getattr(diffusers, family.kind).load_config(
                source, subfolder=family.component, revision=model.revision, local_files_only=model.hub is None
            ),
        )
    with torch.device("meta"):
        built: nn.Module = loading("config", model.kind, lambda: getattr(diffusers, family.kind).from_config(config))
    return family, built.requires_grad_(False)


def load_pipeline(model: Pipeline) -> Any:
    """The pipeline, frozen and in eval mode.

    Raises:
        LilyError: if it cannot be loaded.
    """
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    source = source_of(model)
    family, index = _family(model, source)
    # diffusers requires optional parts to be named as None if the pipeline was saved without them.
    absent = {part: None for part in family.optional if not any(index.get(part) or ())}
    name = next(name for name, kind in FAMILIES.items() if type(family) is kind)
    pipe = loading(
        "pipeline",
        source,
        lambda: getattr(diffusers, name).from_pretrained(
            source,
            revision=model.revision,
            variant=model.variant,
            torch_dtype=getattr(torch, model.dtype),
            use_safetensors=True,
            local_files_only=model.hub is None,
            **absent,
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def _family(model: Pipeline, source: Path | str) -> tuple[Family, dict[str, Any]]:
    """A pipeline's family, and its model_index.json."""
    from diffusers import DiffusionPipeline

    index: dict[str, Any] = loading(
        "pipeline",
        source,
        lambda: DiffusionPipeline.load_config(source, revision=model.revision, local_files_only=model.hub is None),
    )
    return family_of(str(index.get("_class_name"))), index
