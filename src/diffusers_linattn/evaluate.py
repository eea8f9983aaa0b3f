"""How close a converted pipeline is to its original, on the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm


def generate(
    pipe: Any, prompts: Sequence[str], *, seed: int = 0, batch_size: int = 8, **call_arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one picture per prompt, the i-th from the seed `seed + i`, whatever the batch size.

    Args:
        pipe: A FLUX-like pipeline, which returns packed latents.
        prompts: One prompt per picture.
        seed: Seed of the first picture.
        batch_size: Pictures made at a time.
        call_arguments: For the pipeline's call.

    Returns:
        The final latents and the pictures, `(pictures, 3, height, width)` in [0, 1].
    """
    latents, images = [], []

    def keep(_: Any, __: int, ___: Any, outputs: dict[str, Any]) -> dict[str, Any]:
        latest.append(outputs["latents"])
        del latest[:-1]
        return outputs

    for start in tqdm(range(0, len(prompts), batch_size), desc="pictures", unit="batch"):
        latest: list[torch.Tensor] = []
        chosen = list(prompts[start : start + batch_size])
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(chosen))]
        output = pipe(chosen, generator=generators, output_type="pt", callback_on_step_end=keep, **call_arguments)
        latents.append(latest[0].float().cpu())
        images.append(output.images.float().cpu())
    return torch.cat(latents), torch.cat(images)


def closeness(
    latents: torch.Tensor, images: torch.Tensor, original_latents: torch.Tensor, original_images: torch.Tensor
) -> dict[str, float]:
    """Same-seed distance to the original: MSE of the latents, PSNR (dB) and SSIM of the pictures.

    Needs torchmetrics. The arguments are what [`generate`] returned for the two pipelines.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    return {
        "latent_mse": float((latents - original_latents).square().mean()),
        "psnr": float(peak_signal_noise_ratio(images, original_images, data_range=1.0)),
        "ssim": float(structural_similarity_index_measure(images, original_images, data_range=1.0)),  # type: ignore[arg-type]
    }
