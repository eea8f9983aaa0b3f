"""What a diffusion model is trained to predict, read off the scheduler of its pipeline.

Shapes: latents and noise are (batch, ...), timesteps (batch,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffusers_linattn.samples.settings import prediction_of


@dataclass(frozen=True)
class Draw:
    """Noise and timesteps of one batch, drawn per sample.

    Args:
        noise: Like the latents.
        level: (batch,) in (0, 1): how far along the noise schedule, to be turned into timesteps by the objective.
    """

    noise: torch.Tensor
    level: torch.Tensor


class FlowMatching:
    """Latents on the straight line to the noise; predicted is noise - latents (arXiv 2209.03003, 2210.02747).

    Schedulers with `invert_sigmas` (Mochi, OmniGen) count timesteps from the noise to the latents, and predicted is
    latents - noise.
    """

    def __init__(self, scheduler: Any):
        self.num_train_timesteps = scheduler.config.num_train_timesteps
        self.inverted = bool(scheduler.config.get("invert_sigmas", False))

    def timesteps(self, level: torch.Tensor) -> torch.Tensor:
        """In the scheduler's units: flow-matching schedulers count from 0 to `num_train_timesteps` along the line."""
        return level * self.num_train_timesteps

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigma = _like(timesteps / self.num_train_timesteps, latents)
        sigma = 1 - sigma if self.inverted else sigma
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return latents - noise if self.inverted else noise - latents


class Denoising:
    """Latents and noise with weights of squared sum 1 (DDPM, arXiv 2006.11239); predicted is the noise, the latents,
    or the velocity between them (arXiv 2202.00512)."""

    def __init__(self, scheduler: Any):
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        self.kept = scheduler.alphas_cumprod.detach().float().cpu()

    def timesteps(self, level: torch.Tensor) -> torch.Tensor:
        return (level * len(self.kept)).long().clamp(max=len(self.kept) - 1)

    def _weights(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self.kept.to(like.device)[timesteps.to(like.device)]
        return _like(kept.sqrt(), like), _like((1 - kept).sqrt(), like)

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        of_latents, of_noise = self._weights(timesteps, latents)
        return of_latents * latents + of_noise * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        of_latents, of_noise = self._weights(timesteps, latents)
        return of_latents * noise - of_noise * latents


Objective = FlowMatching | Denoising


def objective_of(pipe: Any) -> Objective:
    """The objective that a pipeline's model was trained with.

    Raises:
        ValueError: A scheduler that does not tell, such as those of EDM and of consistency models.

    Example:
        >>> from types import SimpleNamespace
        >>> from diffusers import DDIMScheduler
        >>> objective_of(SimpleNamespace(scheduler=DDIMScheduler(prediction_type="v_prediction"))).prediction_type
        'v_prediction'
    """
    scheduler = getattr(pipe, "scheduler", None)
    kind = prediction_of(type(scheduler).__name__, getattr(scheduler, "config", {}))
    if kind == "flow_prediction":
        return FlowMatching(scheduler)
    consistency = type(scheduler).__name__.startswith(("LCM", "TCD"))
    if hasattr(scheduler, "alphas_cumprod") and not consistency and kind in ("epsilon", "v_prediction", "sample"):
        return Denoising(scheduler)
    raise ValueError(
        f"{type(pipe).__name__} has a {type(scheduler).__name__} that predicts {kind!r}: distillation knows flow "
        "matching, epsilon, v_prediction and sample with schedulers that have alphas_cumprod."
    )


def split_variance(prediction: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A prediction (batch, channels, ...) and, from a model that has twice the channels of `like`, its variance.

    Raises:
        ValueError: Neither the shape of the latents nor twice their channels.
    """
    if prediction.shape == like.shape:
        return prediction, None
    if prediction.shape[1] == 2 * like.shape[1] and prediction.shape[2:] == like.shape[2:]:
        mean, variance = prediction.chunk(2, dim=1)
        return mean, variance
    raise ValueError(
        f"The transformer predicts {tuple(prediction.shape)} for latents of {tuple(like.shape)}: expected the same "
        "shape, or twice the channels where the variance is learned."
    )


def draw(latents: torch.Tensor, generators: list[torch.Generator], places: range, of: int, sampling: str) -> Draw:
    """Noise and levels for a part of a batch, one generator per sample, so that parts can be drawn by themselves.

    Levels are spread evenly over the quantiles of the whole batch, which keeps the loss of a small batch steady.

    Args:
        latents: (batch, ...).
        generators: One per sample, on the CPU.
        places: The places of these samples in the whole batch.
        of: Number of samples in the whole batch.
        sampling: `"uniform"`, or `"logit_normal"` (SD3, arXiv 2403.03206), which prefers the middle.
    """
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    within = torch.stack([torch.rand((), generator=generator) for generator in generators])
    level = (torch.tensor(list(places)) + within) / of
    if sampling == "logit_normal":
        level = torch.sigmoid(torch.special.ndtri(level.clamp(1e-6, 1 - 1e-6)))
    return Draw(noise, level)


def _like(per_sample: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return per_sample.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))
