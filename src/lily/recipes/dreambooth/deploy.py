"""Taking a trained drawing adapter elsewhere: static over the recipe's own images, and onto a model for export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lily.io.atomic import new_folder, write_text
from lily.recipes.dreambooth import adapters, loop, run
from lily.recipes.spec.dreambooth import DreamBooth

if TYPE_CHECKING:
    from lily.deploy.collapse import CollapseReport

KEPT = ("recipe.yaml", "README.md")


def collapse_adapter(
    folder: Path, output: str, recipe: DreamBooth, *, refit_steps: int = 0, overwrite: bool = False
) -> CollapseReport:
    """Collapse an adapter over its subject's images, at noise levels spread over the schedule.

    Args:
        folder: of the adapter.
        output: the folder to write: the static adapter, and `diffusers/` in it for pipelines.
        recipe: that it was trained by.
        refit_steps: see `lily.collapse`.
        overwrite: replace the output folder.

    Returns:
        The report, also written as `collapse.json`. Its drift is measured on noise that did not calibrate.

    Raises:
        LilyError: for anything wrong with the adapter, the recipe or the output folder.
    """
    from lily.deploy.collapse import collapse

    with new_folder(output, overwrite) as new:
        prepared = run.prepare(recipe)
        family, pipe = prepared.family, run.load(recipe, prepared)
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        text, _, _ = run.texts(recipe, pipe, family, [])
        images = run.encoded(recipe, pipe, prepared.subject)
        model = getattr(pipe, family.component)
        adapters.load(model, folder)
        world = loop.World.of(recipe, pipe, family, images, None, text)
        seed = recipe.validation.seed
        known, held_out = (calls(world, recipe.validation.times, s) for s in (seed, seed + 1))
        report = collapse(model, known, held_out, refit_steps=refit_steps)
        adapters.write(model, new)
        adapters.write_for_pipelines(model, pipe, family, new / "diffusers")
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copy(folder / name, new / name)
        write_text(new / "collapse.json", json.dumps(report.to_dict(), indent=2))
        return report


def calls(world: loop.World, times: int, seed: int) -> list[dict[str, Any]]:
    """What the denoiser is called with while its fixed loss is taken: batches for `lily.collapse`.

    Args:
        world: the model and its images.
        times: noise levels of each image.
        seed: of the noise.
    """
    seen: list[dict[str, Any]] = []
    handle = world.model.register_forward_pre_hook(lambda m, args, named: seen.append(named), with_kwargs=True)
    try:
        loop.fixed_loss(world, world.images, 0, times, seed)
    finally:
        handle.remove()
    return seen


def without_weights(folder: Path, recipe: DreamBooth) -> Any:
    """The recipe's denoiser with an adapter, where the denoiser's own weights are not needed and not read."""
    _, meta, _ = run.planned(recipe)
    model = meta.to_empty(device="cpu")  # memory that nothing is written to costs nothing
    adapters.load(model, folder)
    return model
