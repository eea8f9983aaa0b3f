"""The teacher in FLUX's form: text and image in one sequence, flow matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from boards import LETTERS, all_specs, prompt
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from text import TOKENS, WIDTH, TextEncoders
from torch import nn
from torch.nn import functional


SHIFT = 2.0


def build_transformer(latent_channels: int) -> FluxTransformer2DModel:
    """FLUX in small: two double blocks, six single ones, four heads of 32; zero where training starts from nothing."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    # diffusers leaves out the adaLN-zero initialisation: every block starts as the identity.
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    modulations += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in [*modulations, transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_pipeline(vae: AutoencoderKL, text: TextEncoders, transformer: FluxTransformer2DModel) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
        transformer=transformer,
    )


@dataclass
class Data:
    """What a training step draws from: latents (boards, 4, 32, 32), and text embeddings by letter."""

    latents: torch.Tensor
    letters: torch.Tensor
    embeddings: torch.Tensor
    pooled: torch.Tensor
    text_ids: torch.Tensor
    image_ids: torch.Tensor

    @classmethod
    @torch.no_grad()
    def prepare(cls, pipeline: FluxPipeline, latents: torch.Tensor) -> Data:
        prompts = [prompt(letter) for letter in LETTERS]
        embeddings, pooled, text_ids = pipeline.encode_prompt(prompts, None, max_sequence_length=TOKENS)
        image_ids = FluxPipeline._prepare_latent_image_ids(1, 16, 16, torch.device("cpu"), torch.float32)
        letters = torch.tensor([spec.letter for spec in all_specs()])
        packed = FluxPipeline._pack_latents(latents, *latents.shape)
        return cls(packed, letters, embeddings.cpu(), pooled.cpu(), text_ids.cpu(), image_ids)

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> dict[str, torch.Tensor]:
        """Noisy boards with the arguments of the transformer, and the target."""
        index = torch.randint(len(self.latents), (size,), generator=generator)
        clean = self.latents[index].float()
        noise = torch.randn(clean.shape, generator=generator)
        sigma = draw_sigmas(size, generator)
        letters = self.letters[index]
        tensors = {
            "hidden_states": torch.lerp(clean, noise, sigma[:, None, None]),
            "timestep": sigma,
            "encoder_hidden_states": self.embeddings[letters],
            "pooled_projections": self.pooled[letters],
            "txt_ids": self.text_ids,
            "img_ids": self.image_ids,
            "target": noise - clean,
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def draw_sigmas(size: int, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal noise levels, spread evenly over the quantiles of a batch and shifted as the scheduler shifts."""
    quantiles = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    sigma = torch.sigmoid(torch.special.ndtri(quantiles.clamp(1e-5, 1 - 1e-5)) * 1.2)
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def loss(forward: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The flow matching loss of a batch."""
    target = batch.pop("target")
    with torch.autocast(target.device.type, torch.bfloat16):
        predicted = forward(**batch, return_dict=False)[0]
    return functional.mse_loss(predicted.float(), target)
