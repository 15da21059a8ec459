"""Small pipelines trained once on CIFAR-10 and kept in the cache, for use where no pretrained one can be downloaded.

Their text encoders stay random, and they draw at 64 pixels; a run on them shows that everything works, not how good a
method is.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lily.errors import LilyError
from lily.recipes.data.images import Preprocess, read_images
from lily.recipes.data.sources import building, cache_folder, local_path
from lily.recipes.dreambooth import tiny
from lily.recipes.dreambooth.families import FAMILIES
from lily.recipes.dreambooth.latents import Encoded, encode
from lily.recipes.spec.dreambooth import Steps

# Part of the cache's folder names: increase it when architecture or training change.
VERSION = 1
KINDS: dict[str, Callable[..., Any]] = {"sdxl": tiny.sdxl, "flow": tiny.sd3}
IMAGES = "${LILY_DATA}/cifar10/train_1000_per_class.tar.xz"
RESOLUTION = 64
T5_TOKENS = 1  # zeros in place of the absent third text encoder; the usual number would be most of a prompt


def standin(kind: str) -> Path:
    """The folder of a small pretrained pipeline, `sdxl` or `flow` (Stable Diffusion 3's shape); built the first time.

    Raises:
        LilyError: if it is neither, or the images to train it on are missing.
    """
    if kind not in KINDS:
        raise LilyError(f"no stand-in {kind!r}; choose one of {', '.join(KINDS)}")
    folder = cache_folder() / "standins"
    target = folder / f"{kind}-{VERSION}"
    if target.is_dir():
        return target
    pixels, names = _images()
    print(f"building the small {kind} pipeline once, in some minutes; it is kept in {target}", file=sys.stderr)
    vae = _autoencoder(folder / f"vae-{VERSION}", pixels)
    pipe = KINDS[kind](vae=vae)
    pipe.set_progress_bar_config(disable=True)
    _train_denoiser(pipe, pixels, names)
    with building(target) as temporary:
        pipe.save_pretrained(temporary, safe_serialization=True)
    return target


def _images() -> tuple[torch.Tensor, list[str]]:
    """CIFAR-10's training images, (10000, 3, 32, 32) in [-1, 1], and their class names."""
    archive = local_path(IMAGES)
    prepare = Preprocess(32, norm="half")
    rows = list(read_images(archive))
    return torch.stack([prepare(Path(row["image"])) for row in rows]), [row["label"] for row in rows]


def _autoencoder(target: Path, pixels: torch.Tensor, steps: int = 1000, batch: int = 32) -> Any:
    """The autoencoder of all stand-ins, trained on 32-pixel images; convolutional, so it takes larger ones too."""
    from diffusers import AutoencoderKL

    if not target.is_dir():
        vae = tiny.autoencoder(seed=0)
        generator = torch.Generator().manual_seed(0)

        def loss() -> torch.Tensor:
            images = pixels[torch.randint(len(pixels), (batch,), generator=generator)]
            latent = vae.encode(images).latent_dist
            noise = torch.randn(latent.mean.shape, generator=generator)
            again = vae.decode(latent.mean + latent.std * noise).sample
            close = F.l1_loss(again, images) + 1e-4 * latent.kl().mean() / latent.mean[0].numel()
            return torch.as_tensor(close)

        _descend("autoencoder", vae, loss, steps, 2e-3)
        vae.register_to_config(scaling_factor=_scale(vae, pixels[:500]))
        with building(target) as temporary:
            vae.save_pretrained(temporary, safe_serialization=True)
    return AutoencoderKL.from_pretrained(target, local_files_only=True, use_safetensors=True).eval()


@torch.no_grad()
def _scale(vae: Any, pixels: torch.Tensor) -> float:
    """The factor that scales the latents to a standard deviation of 1."""
    return float(1 / vae.encode(pixels).latent_dist.mean.std())


def _train_denoiser(pipe: Any, pixels: torch.Tensor, names: list[str], steps: int = 2000, batch: int = 16) -> None:
    """Train the pipeline on CIFAR-10's classes at 64 pixels; one prompt in ten is empty, for guidance."""
    family = FAMILIES[type(pipe).__name__]()
    model = getattr(pipe, family.component)
    classes = sorted(set(names))
    with torch.no_grad():
        text = family.encode(pipe, [*(f"a photo of a {name}" for name in classes), ""], T5_TOKENS)
        encoded = _encode(pipe.vae, pixels)
    ids = torch.tensor([classes.index(name) for name in names])
    objective = family.objective(pipe.scheduler, Steps())
    generator = torch.Generator().manual_seed(1)

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(ids), (batch,), generator=generator)
        empty = torch.rand(batch, generator=generator) < 0.1
        images, prompts = encoded.rows(chosen), text.rows(ids[chosen].masked_fill(empty, len(classes)))
        latents, times = images.draw(generator), objective.draw(batch, generator)
        noise = torch.randn(latents.shape, generator=generator)

        def predict(noisy: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return family.predict(model, noisy, at, prompts, images.sizes)

        return objective.losses(predict, latents, noise, times).mean()

    torch.manual_seed(1)
    _descend(family.kind, model, loss, steps, 1e-3)


def _encode(vae: Any, pixels: torch.Tensor) -> Encoded:
    sizes = torch.tensor([RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION], dtype=torch.float32)
    parts = [
        encode(vae, F.interpolate(part, RESOLUTION, mode="bicubic").clamp(-1, 1), sizes.expand(len(part), 6), 100)
        for part in torch.split(pixels, 1000)
    ]
    return Encoded(*(torch.cat([getattr(p, name) for p in parts]) for name in ("mean", "std", "sizes")))


def _descend(
    what: str, model: torch.nn.Module, loss: Callable[[], torch.Tensor], steps: int, learning_rate: float
) -> None:
    """Train with AdamW, a warm-up and a cosine schedule; prints a line of progress every 250 steps."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    started, total = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        total += value.item()
        if step % 250 == 0:
            print(f"  {what}: step {step}/{steps}, loss {total / 250:.4f}, {time.perf_counter() - started:.0f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
            total = 0.0
    model.requires_grad_(False).eval()
