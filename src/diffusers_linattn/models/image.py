"""Image transformers whose token grid is the shape of their latents."""

from __future__ import annotations

from typing import Any

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import CROSS, TEXT, Family, ForwardArguments
from diffusers_linattn.models.grids import lengths_of_mask, patch_grid, text_length


def _image(model: Any, arguments: ForwardArguments) -> TokenLayout:
    return TokenLayout.image(patch_grid(arguments["hidden_states"], model.config.patch_size))


def _dit(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    if grid[1] != grid[2]:
        raise ValueError(
            f"DiTTransformer2DModel makes square pictures only, got latents of {grid[1]}x{grid[2]} tokens: diffusers "
            "takes the square root of the number of tokens when it unpatchifies."
        )
    return TokenLayout.image(grid)


def _image_then_text(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    return TokenLayout.joint(text=text_length(arguments["encoder_hidden_states"]), grid=grid, text_first=False)


def _lumina2(model: Any, arguments: ForwardArguments) -> list[TokenLayout]:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    lengths = arguments.read_once("encoder_attention_mask", lengths_of_mask)
    return [TokenLayout.joint(text=length, grid=grid) for length in lengths]


IMAGE_MODELS: dict[str, Family] = {
    "DiTTransformer2DModel": Family(
        _dit,
        {"transformer_blocks.*.attn1": "image"},
        order="image",
        about="DiT; square pictures only, as in diffusers",
    ),
    "PixArtTransformer2DModel": Family(
        _image,
        {"transformer_blocks.*.attn1": "image"},
        order="image",
        about="PixArt-α, PixArt-Σ",
        left={"transformer_blocks.*.attn2": CROSS},
    ),
    "SD3Transformer2DModel": Family(
        _image_then_text,
        {"transformer_blocks.*.attn": "joint", "transformer_blocks.*.attn2": "image"},
        order="image, text",
        about="Stable Diffusion 3 and 3.5",
    ),
    "Lumina2Transformer2DModel": Family(
        _lumina2,
        {"layers.*.attn": "joint", "noise_refiner.*.attn": "image"},
        order="text, image, padding; each sample has its own text length",
        about="Lumina Image 2.0",
        left={"context_refiner.*.attn": TEXT},
    ),
}
