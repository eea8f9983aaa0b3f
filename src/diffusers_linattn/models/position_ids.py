"""Transformers that take packed tokens with their grid in position ids or shapes beside them: FLUX and its kin."""

from __future__ import annotations

from typing import Any

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import Family, ForwardArguments
from diffusers_linattn.models.grids import grids_of_ids, text_length


def _flux(model: Any, arguments: ForwardArguments) -> TokenLayout:
    # Fill and Control add channels, not tokens; Kontext appends the tokens of a reference with ids[:, 0] = 1.
    grid, *references = arguments.read_once("img_ids", grids_of_ids)
    return TokenLayout.joint(text=text_length(arguments["encoder_hidden_states"]), grid=grid, references=references)


_DOUBLE_AND_SINGLE = {"transformer_blocks.*.attn": "joint", "single_transformer_blocks.*.attn": "joint"}

POSITION_ID_MODELS: dict[str, Family] = {
    "FluxTransformer2DModel": Family(
        _flux,
        _DOUBLE_AND_SINGLE,
        order="text, image, references",
        about="FLUX.1 dev, schnell, Kontext (reference image), Fill, Control",
        shared=("img_ids", "txt_ids"),
    ),
}
