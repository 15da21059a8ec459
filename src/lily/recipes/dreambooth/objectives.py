"""Training objectives of denoisers: noise or velocity prediction with a noise schedule, and flow matching.

Sources: DDPM (arXiv 2006.11239), v-prediction (2202.00512), min-SNR weighting (2303.09556), rectified flow with
logit-normal timesteps (2403.03206). The schedules and weightings are those of diffusers.

Letters: `latents` x of shape (batch, channels, height, width), `noise` of the same shape, `times` (batch,) indices into
the schedule.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from lily.errors import LilyError

# (noisy latents, timesteps in the model's units) -> prediction of the latents' shape.
Predict = Callable[[Tensor, Tensor], Tensor]


class Objective(ABC):
    """How noise is added, and what the model predicts; `steps` is the schedule's length."""

    steps: int

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random times for training, (count,)."""

    def even(self, count: int) -> Tensor:
        """Times spread evenly over the schedule, (count,), for a loss that can be compared."""
        return ((torch.arange(count) + 0.5) / count * self.steps).long()

    @abstractmethod
    def losses(self, predict: Predict, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The loss of each sample, (batch,), in float32."""


def _per_sample(predicted: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)


class Diffusion(Objective):
    """Noise (epsilon) or velocity prediction, as the pipeline's scheduler is configured.

    Args:
        scheduler: the pipeline's.
        min_snr_gamma: weight losses by min(SNR, gamma) / SNR; None: no weighting.

    Raises:
        LilyError: for a schedule of another kind.
    """

    def __init__(self, scheduler: Any, min_snr_gamma: float | None = None) -> None:
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.kind = self.scheduler.config.prediction_type
        self.steps = int(self.scheduler.config.num_train_timesteps)
        self.gamma = min_snr_gamma
        if self.kind not in ("epsilon", "v_prediction"):
            raise LilyError(
                f"the pipeline's scheduler predicts {self.kind!r}; only epsilon and v_prediction can be trained"
            )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform over the schedule."""
        return torch.randint(0, self.steps, (count,), generator=generator)

    def losses(self, predict: Predict, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Objective.losses`."""
        times = times.to(latents.device)
        predicted = predict(self.scheduler.add_noise(latents, noise, times), times)
        velocity = self.kind == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, times) if velocity else noise
        losses = _per_sample(predicted, target)
        if self.gamma is None:
            return losses
        snr = compute_snr(self.scheduler, times)
        weighted: Tensor = losses * snr.clamp(max=self.gamma) / (snr + 1 if velocity else snr)
        return weighted


class Flow(Objective):
    """Rectified flow: the model predicts the velocity, noise - latents.

    Args:
        scheduler: the pipeline's.
        weighting: distribution of times and weights of losses, by diffusers' names.
        mean: of the logit, for logit_normal.
        std: of the logit, for logit_normal.
    """

    def __init__(self, scheduler: Any, weighting: str = "logit_normal", mean: float = 0.0, std: float = 1.0) -> None:
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(copy.deepcopy(scheduler.config))
        self.weighting, self.mean, self.std = weighting, mean, std
        self.steps = len(self.scheduler.timesteps)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Distributed as the weighting demands."""
        share = compute_density_for_timestep_sampling(
            self.weighting, count, self.mean, self.std, mode_scale=1.29, generator=generator
        )
        times: Tensor = (share * self.steps).long().clamp(max=self.steps - 1)
        return times

    def losses(self, predict: Predict, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """See `Objective.losses`."""
        sigma = self.scheduler.sigmas[times].to(latents)
        level = sigma.view(-1, 1, 1, 1)  # (batch, 1, 1, 1)
        predicted = predict((1 - level) * latents + level * noise, self.scheduler.timesteps[times].to(latents))
        weights: Tensor = compute_loss_weighting_for_sd3(self.weighting, sigma)
        return weights.float() * _per_sample(predicted, noise - latents)
