"""Images encoded once as the latents that a diffusion model works on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lily.errors import LilyError
from lily.recipes.data.images import ENDINGS, Preprocess, upright


@dataclass(frozen=True)
class Encoded:
    """Images encoded by the autoencoder.

    Attributes:
        mean: (images, channels, height, width), scaled as the denoiser expects.
        std: the same shape.
        sizes: (images, 6): original height and width, crop's top and left, target height and width.
    """

    mean: Tensor
    std: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def rows(self, indices: Tensor) -> Encoded:
        """Some of the images, in this order."""
        return Encoded(self.mean[indices], self.std[indices], self.sizes[indices])

    def draw(self, generator: torch.Generator) -> Tensor:
        """Sample latents from the autoencoder's distribution of each image."""
        noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.std * noise.to(self.mean)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, sorted by name.

    Raises:
        LilyError: if there are none.
    """
    if not folder.is_dir():
        raise LilyError(f"{folder} is not a folder; name one that holds the images")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and p.is_file())
    if not files:
        raise LilyError(f"{folder} holds no images ({', '.join(ENDINGS)}); name the folder that does")
    return files


def read(files: list[Path], resolution: int) -> tuple[Tensor, Tensor]:
    """Read images, resized to `resolution` along the shorter side and center-cropped.

    Returns:
        Pixels (images, 3, resolution, resolution) in [-1, 1], and sizes (images, 6).

    Raises:
        LilyError: if a file is no image.
    """
    from PIL import Image

    prepare = Preprocess(resolution, norm="half", crop=True)
    pixels = torch.stack([prepare(file) for file in files])
    sizes = []
    for file in files:
        with Image.open(file) as image:
            wide, high = upright(image).size
        scale = resolution / min(wide, high)
        left, top = ((max(resolution, round(side * scale)) - resolution) // 2 for side in (wide, high))
        sizes.append([high, wide, top, left, resolution, resolution])
    return pixels, torch.tensor(sizes, dtype=torch.float32)


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, sizes: Tensor, batch: int = 8) -> Encoded:
    """Encode what `read` returns in float32, also with an autoencoder of another dtype (SDXL's overflows in float16).

    `batch` is the number of images at a time.
    """
    own, device = vae.dtype, next(vae.parameters()).device
    if own != torch.float32:
        vae.to(dtype=torch.float32)
    parts = [vae.encode(part.to(device)).latent_dist for part in torch.split(pixels, batch)]
    if own != torch.float32:
        vae.to(dtype=own)
    mean, std = torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    return Encoded((mean - shift) * scale, std * scale, sizes.to(device))
