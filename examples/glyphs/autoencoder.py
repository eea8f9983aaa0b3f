"""The autoencoder of the glyph teacher: 128x128 pixels to 32x32 latents with four channels, and back."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from boards import all_specs, cell
from diffusers import AutoencoderKL
from torch.nn import functional
from tqdm import trange


LATENT_CHANNELS = 4
KL_WEIGHT = 1e-3


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def all_cells() -> torch.Tensor:
    """Every cell there is, as uint8 (14040, 32, 32), in the order of `all_specs`."""
    return torch.stack([torch.from_numpy(cell(spec).copy()) for spec in all_specs()])


def _crops(cells: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Pieces of boards of 2x2 cells (a quarter of the pixels of a board), in [-1, 1]."""
    index = torch.randint(len(cells), (count,), generator=generator)
    gray = cells[index].float() / 127.5 - 1
    return gray[:, None].repeat(1, 3, 2, 2)


def _set_statistics(vae: AutoencoderKL, cells: torch.Tensor, generator: torch.Generator) -> None:
    """Write into the config the shift and the factor that give the latents mean 0 and standard deviation 1."""
    index = torch.randint(len(cells), (512,), generator=generator)
    boards = (cells[index].float() / 127.5 - 1)[:, None].repeat(1, 3, 4, 4)
    device = next(vae.parameters()).device
    with torch.no_grad():
        latents = torch.cat([vae.encode(part.to(device)).latent_dist.mode() for part in boards.split(32)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train_autoencoder(folder: Path, steps: int, seed: int, device: torch.device) -> AutoencoderKL:
    """The trained autoencoder, from `folder` when it is there already."""
    if folder.exists():
        return AutoencoderKL.from_pretrained(folder).to(device).eval()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    cells = all_cells()
    vae = build_autoencoder().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    progress = trange(steps, desc="autoencoder")
    for _ in progress:
        images = _crops(cells, 32, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = functional.l1_loss(decoded.float(), images)
        loss = error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(l1=f"{error.item():.4f}", refresh=False)
    vae.eval()
    _set_statistics(vae, cells, generator)
    partial = folder.with_name(folder.name + ".partial")
    vae.save_pretrained(partial)
    os.replace(partial, folder)
    return vae
