"""`lily collapse` and `lily export` for adapters of task dreambooth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lily.errors import LilyError
from lily.recipes.dreambooth import adapters, loop, run
from lily.recipes.results.adapter_folder import AdapterFolder
from lily.recipes.spec.dreambooth import DreamBooth

if TYPE_CHECKING:
    from lily.deploy.collapse import CollapseReport


def collapse(
    location: AdapterFolder, new: Path, *, calibration: str | None, held_out: str | None, rows: int, refit_steps: int
) -> CollapseReport:
    """Collapse an adapter over its subject's images, at noise levels spread over the schedule.

    Writes the static adapter into `new`, and `diffusers/` in it for pipelines. The drift is measured on noise that did
    not calibrate. `rows` changes nothing here; see `lily.recipes.deploy.collapse_adapter`.

    Raises:
        LilyError: for anything wrong with the adapter or the recipe, or if data are named.
    """
    from lily.deploy.collapse import collapse

    if calibration is not None or held_out is not None:
        raise LilyError("--data and --held-out are for text; the recipe's images calibrate this adapter")
    spec = _recipe(location)
    prepared = run.prepare(spec)
    family, pipe = prepared.family, run.load(spec, prepared)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    text, _, _ = run.texts(spec, pipe, family, [])
    images = run.encoded(spec, pipe, prepared.subject)
    model = getattr(pipe, family.component)
    adapters.load(model, location.path)
    world = loop.World.of(spec, pipe, family, images, None, text)
    seed = spec.validation.seed
    calibrating, judged = (calls(world, spec.validation.times, s) for s in (seed, seed + 1))
    report = collapse(model, calibrating, judged, refit_steps=refit_steps)
    adapters.write(model, new)
    adapters.write_for_pipelines(model, pipe, family, new / "diffusers")
    return report


def calls(world: loop.World, times: int, seed: int) -> list[dict[str, Any]]:
    """The denoiser's keyword arguments in each call of `loop.fixed_loss`: batches for `lily.collapse`."""
    seen: list[dict[str, Any]] = []
    handle = world.model.register_forward_pre_hook(lambda m, args, named: seen.append(named), with_kwargs=True)
    try:
        loop.fixed_loss(world, world.images, 0, times, seed)
    finally:
        handle.remove()
    return seen


def load(location: AdapterFolder, *, weights: bool, dtype: str) -> tuple[Any, None, dict[str, Any]]:
    """The denoiser with the adapter, for export; its weights are not read, so `dtype` changes nothing.

    Raises:
        LilyError: if `weights` are needed.
    """
    if weights:
        raise LilyError(
            f"{location.path} is for a pipeline, whose weights are not read, so no merged model is written and no "
            "intruder dimension reduced; export --to lora --for diffusers"
        )
    _, meta, _ = run.planned(_recipe(location))
    model = meta.to_empty(device="cpu")  # memory that nothing is written to costs nothing
    adapters.load(model, location.path)
    return model, None, {}


def _recipe(location: AdapterFolder) -> DreamBooth:
    assert isinstance(location.recipe, DreamBooth)  # `by_task` chose this module
    return location.recipe
