"""What differs between the pipelines that can be trained: which part denoises, and how it is called.

Everything else (schedules, text encoders, autoencoders, sampling) is diffusers' own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lily.errors import LilyError
from lily.recipes.dreambooth.objectives import Diffusion, Flow, Objective
from lily.recipes.spec.dreambooth import Steps


@dataclass(frozen=True)
class Text:
    """Encoded prompts."""

    tokens: Tensor  # (prompts, length, width)
    pooled: Tensor  # (prompts, width)

    def rows(self, indices: Sequence[int] | Tensor) -> Text:
        """Some of the prompts, in this order."""
        return Text(self.tokens[indices], self.pooled[indices])

    def to(self, *where: Any) -> Text:
        """On another device or in another dtype."""
        return Text(self.tokens.to(*where), self.pooled.to(*where))


class Family(ABC):
    """The interface of the training loop to a kind of pipeline.

    Attributes:
        component: the pipeline's attribute of the denoiser, which is adapted.
        kind: class of the denoiser, in diffusers.
        flow: whether it is trained by flow matching.
        guided_by_negative: whether sampling takes a negative prompt (classifier-free guidance).
        optional: components that a pipeline may have been saved without.
    """

    component: str
    kind: str
    flow = True
    guided_by_negative = True
    optional: tuple[str, ...] = ()

    def objective(self, scheduler: Any, train: Steps) -> Objective:
        """The training objective for the pipeline's scheduler."""
        if self.flow:
            return Flow(scheduler, train.weighting, train.logit_mean, train.logit_std)
        return Diffusion(scheduler, train.min_snr_gamma)

    @abstractmethod
    def encode(self, pipe: Any, prompts: Sequence[str], max_tokens: int | None) -> Text:
        """Prompts as the pipeline encodes them.

        Args:
            pipe: with its text encoders.
            prompts: any number; an empty one serves guidance.
            max_tokens: for a T5 encoder; default: the pipeline's own.
        """

    @abstractmethod
    def predict(self, model: nn.Module, noisy: Tensor, times: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """Call the denoiser.

        Args:
            model: the denoiser.
            noisy: (batch, channels, height, width).
            times: (batch,), as the scheduler numbers them.
            text: one row per sample.
            sizes: (batch, 6): original height and width, crop's top and left, target height and width.

        Returns:
            (batch, channels, height, width).
        """


class Sdxl(Family):
    """Stable Diffusion XL: a UNet, two CLIP text encoders, sizes as a condition."""

    component, kind, flow = "unet", "UNet2DConditionModel", False

    def encode(self, pipe: Any, prompts: Sequence[str], max_tokens: int | None) -> Text:
        """See `Family.encode`; an empty prompt is all zeros if the pipeline is configured so."""
        tokens, _, pooled, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        if pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([not p for p in prompts], device=tokens.device)
            tokens, pooled = tokens.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return Text(tokens, pooled)

    def predict(self, model: nn.Module, noisy: Tensor, times: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """See `Family.predict`."""
        added = {"text_embeds": text.pooled, "time_ids": sizes.to(noisy)}
        out = model(sample=noisy, timestep=times, encoder_hidden_states=text.tokens, added_cond_kwargs=added)
        return cast(Tensor, out.sample)


class Sd3(Family):
    """Stable Diffusion 3: a transformer over patches and text together, trained by flow matching."""

    component, kind = "transformer", "SD3Transformer2DModel"
    optional = ("text_encoder_3", "tokenizer_3")

    def encode(self, pipe: Any, prompts: Sequence[str], max_tokens: int | None) -> Text:
        """See `Family.encode`."""
        length = {} if max_tokens is None else {"max_sequence_length": max_tokens}
        tokens, _, pooled, _ = pipe.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, **length
        )
        return Text(tokens, pooled)

    def predict(self, model: nn.Module, noisy: Tensor, times: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """See `Family.predict`."""
        out = model(
            hidden_states=noisy, timestep=times, encoder_hidden_states=text.tokens, pooled_projections=text.pooled
        )
        return cast(Tensor, out.sample)


class Flux(Family):
    """FLUX: as `Sd3`, on latents packed two by two, with explicit positions and distilled guidance."""

    component, kind = "transformer", "FluxTransformer2DModel"
    guided_by_negative = False
    guidance = 1.0  # input of the guidance-distilled model in training, as in diffusers' examples

    def encode(self, pipe: Any, prompts: Sequence[str], max_tokens: int | None) -> Text:
        """See `Family.encode`."""
        length = {} if max_tokens is None else {"max_sequence_length": max_tokens}
        tokens, pooled, _ = pipe.encode_prompt(list(prompts), None, **length)
        return Text(tokens, pooled)

    def predict(self, model: nn.Module, noisy: Tensor, times: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """See `Family.predict`."""
        from diffusers import FluxPipeline

        batch, channels, height, width = noisy.shape
        positions = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype)
        config: Any = model.config
        packed: Tensor = model(
            hidden_states=FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            timestep=times / 1000,
            guidance=noisy.new_full((batch,), self.guidance) if config.guidance_embeds else None,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.tokens,
            txt_ids=noisy.new_zeros(text.tokens.shape[1], 3),
            img_ids=positions,
        ).sample
        # (batch, height/2 * width/2, channels * 4) back to where _pack_latents took them from
        out = packed.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, channels, height, width)


# Class in model_index.json -> family.
FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionXLPipeline": Sdxl,
    "StableDiffusion3Pipeline": Sd3,
    "FluxPipeline": Flux,
}


def family_of(pipeline: str) -> Family:
    """The family of a pipeline's class.

    Raises:
        LilyError: if there is none.
    """
    if pipeline not in FAMILIES:
        raise LilyError(f"{pipeline} is not a supported pipeline; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline]()
