"""The teacher in PixArt-Σ's form: cross-attention to the prompt, noise prediction with a learned variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from boards import LETTERS, all_specs, prompt
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from text import TOKENS, WIDTH, TextEncoders, build_t5_tokenizer, separation
from torch import nn


STEPS = 1000
VARIANCE_WEIGHT = 1e-3  # that of Improved DDPM (arXiv 2102.09672), for a bound in bits per number
# The error of the noise is weighed as that of the velocity would be, up to this. Equal weights leave next to nothing
# for the noisiest steps, which are the only ones that cannot see the letter in the picture.
MOST_WEIGHT = 50.0


def build_transformer(latent_channels: int) -> PixArtTransformer2DModel:
    """PixArt in small: eight blocks, four heads of 32; every block starts as the identity, the output as zero."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=latent_channels,
        out_channels=2 * latent_channels,
        num_layers=8,
        cross_attention_dim=128,
        caption_channels=WIDTH,
        sample_size=32,
        patch_size=2,
        use_additional_conditions=False,
    )
    for linear in [transformer.proj_out, transformer.adaln_single.linear]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(num_train_timesteps=STEPS, beta_start=1e-4, beta_end=0.02)


def build_pipeline(
    vae: AutoencoderKL, text: TextEncoders, transformer: PixArtTransformer2DModel
) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        tokenizer=build_t5_tokenizer(lower=True),
        text_encoder=text.t5,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )


@dataclass
class Data:
    """What a training step draws from: latents (boards, 4, 32, 32), and text embeddings with their mask by letter."""

    latents: torch.Tensor
    letters: torch.Tensor
    embeddings: torch.Tensor
    mask: torch.Tensor
    betas: torch.Tensor

    @classmethod
    @torch.no_grad()
    def prepare(cls, pipeline: PixArtSigmaPipeline, latents: torch.Tensor) -> Data:
        prompts = [prompt(letter) for letter in LETTERS]
        embeddings, mask, _, _ = pipeline.encode_prompt(prompts, False, max_sequence_length=TOKENS)
        if separation(embeddings) < 0.1:
            raise ValueError("The pipeline's text encoder does not tell the letters apart.")
        letters = torch.tensor([spec.letter for spec in all_specs()])
        # This pipeline knows no shift of the latents.
        latents = latents + pipeline.vae.config.shift_factor * pipeline.vae.config.scaling_factor
        return cls(latents, letters, embeddings.cpu(), mask.cpu(), build_scheduler().betas.double())

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> dict[str, torch.Tensor]:
        """Noisy boards with the arguments of the transformer, and what the loss compares with."""
        index = torch.randint(len(self.latents), (size,), generator=generator)
        clean = self.latents[index].float()
        noise = torch.randn(clean.shape, generator=generator)
        # Spread evenly over the timesteps, which keeps the loss of a small batch steady.
        quantiles = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        timestep = (quantiles * STEPS).long().clamp(max=STEPS - 1)
        kept = (1 - self.betas).cumprod(0)
        kept_before = torch.cat([kept.new_ones(1), kept[:-1]])
        posterior = self.betas * (1 - kept_before) / (1 - kept)
        posterior[0] = posterior[1]  # 0 has no logarithm
        level = kept[timestep].float()[:, None, None, None]
        letters = self.letters[index]
        tensors = {
            "hidden_states": level.sqrt() * clean + (1 - level).sqrt() * noise,
            "timestep": timestep,
            "encoder_hidden_states": self.embeddings[letters],
            "encoder_attention_mask": self.mask[letters],
            "noise": noise,
            "timestep_weight": (1 / level).clamp(max=MOST_WEIGHT),
            # The factor of the noise in the mean of a step back, and the least and greatest log variance of it.
            "weight": (self.betas / ((1 - kept) * (1 - self.betas)).sqrt())[timestep].float(),
            "least": posterior.log()[timestep].float(),
            "greatest": self.betas.log()[timestep].float(),
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def loss(forward: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The error of the noise, weighed by timestep, and a bound on the variance with the mean held (Improved DDPM)."""
    noise, timestep_weight = batch.pop("noise"), batch.pop("timestep_weight")
    weight, least, greatest = (batch.pop(name)[:, None, None, None] for name in ("weight", "least", "greatest"))
    with torch.autocast(noise.device.type, torch.bfloat16):
        output = forward(**batch, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False)[0]
    predicted, share = output.float().chunk(2, dim=1)
    share = (share + 1) / 2
    log_variance = share * greatest + (1 - share) * least
    error = weight * (predicted.detach() - noise)
    # KL(true step back | predicted one), in bits.
    divergence = 0.5 * (log_variance - least - 1 + (least - log_variance).exp() + error**2 * (-log_variance).exp())
    return (timestep_weight * (predicted - noise) ** 2).mean() + VARIANCE_WEIGHT * divergence.mean() / 0.6931
