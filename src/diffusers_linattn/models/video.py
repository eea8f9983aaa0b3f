"""Video transformers."""

from __future__ import annotations

from typing import Any

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import Family, ForwardArguments
from diffusers_linattn.models.grids import lengths_of_mask, patch_grid


def _mochi(model: Any, arguments: ForwardArguments) -> list[TokenLayout]:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    # Each sample has an attention call of its own, without the padding of its text.
    lengths = arguments.read_once("encoder_attention_mask", lengths_of_mask)
    return [TokenLayout.joint(text=length, grid=grid, text_first=False) for length in lengths]


VIDEO_MODELS: dict[str, Family] = {
    "MochiTransformer3DModel": Family(
        _mochi,
        {"transformer_blocks.*.attn1": "joint"},
        order="video, text; each sample has its own text length",
        about="Mochi 1",
    ),
}
