"""Transformers that take packed tokens with a list of picture shapes beside them: Qwen-Image and its kin."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import Family, ForwardArguments, Part
from diffusers_linattn.models.grids import Grid, text_length


def _shapes(arguments: ForwardArguments) -> list[Grid]:
    # As diffusers reads it: the first sample counts; ControlNet pipelines give one shape instead of a list of them.
    shapes = arguments["img_shapes"]
    shapes = shapes[0] if isinstance(shapes, list) else shapes
    return [(shape[0], shape[1], shape[2]) for shape in (shapes if isinstance(shapes, list) else [shapes])]


def _qwen_image(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid, *references = _shapes(arguments)
    if getattr(model.config, "use_layer3d_rope", False) and references:
        # Layered: all pictures but the last are made at once. They are frames of one image.
        *layers, condition = [grid, *references]
        if len({layer[1:] for layer in layers}) > 1:
            raise ValueError(
                f"Qwen-Image-Layered was called with img_shapes {[*layers, condition]}: expected layers of one size, "
                "and last the picture that is taken apart."
            )
        grid, references = (sum(layer[0] for layer in layers), *grid[1:]), [condition]
    return TokenLayout.joint(text=text_length(arguments["encoder_hidden_states"]), grid=grid, references=references)


def _nucleus(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid, *references = _shapes(arguments)
    text = text_length(arguments["encoder_hidden_states"])
    return TokenLayout.joint(text=text, grid=grid, references=references, text_first=False)


_TOKENS_PER_SLOT = 4


def _qwen_image21(model: Any, arguments: ForwardArguments) -> TokenLayout:
    _refuse_flex(model)
    slots = arguments.read_once("img_mask", _first_row)
    parts: list[Part] = []
    at = 0
    shapes = _shapes(arguments)
    for i, grid in enumerate(shapes):
        start = slots.index(True, at)
        parts += [("text", start - at)] if start > at else []
        parts.append(("image" if i == len(shapes) - 1 else "memory", grid))
        at = start + grid[0] * grid[1] * grid[2] // _TOKENS_PER_SLOT
    return TokenLayout.of(parts)


@torch.compiler.disable
def _first_row(mask: torch.Tensor) -> list[bool]:
    return mask[0].tolist()


def _refuse_flex(model: Any) -> None:
    for block in model.transformer_blocks:
        held = getattr(block.attn.processor, "original", None)
        if type(held).__name__ == "QwenImage21FlexAttnProcessor":
            raise ValueError(
                "Qwen-Image 2.1 was converted while it had QwenImage21FlexAttnProcessor, whose block mask diffusers "
                "makes only for that class: expected QwenImage21AttnProcessor. restore(model), then "
                "model.set_attn_processor(QwenImage21AttnProcessor()), then linearize again."
            )


IMAGE_SHAPE_MODELS: dict[str, Family] = {
    "QwenImageTransformer2DModel": Family(
        _qwen_image,
        {"transformer_blocks.*.attn": "joint"},
        order="text, image, references",
        about="Qwen-Image, Qwen-Image-Edit and Edit-Plus (reference images), Layered",
    ),
    "QwenImage21Transformer2DModel": Family(
        _qwen_image21,
        {"transformer_blocks.*.attn": "queries"},
        order="text and references in turn, image; only the image's queries convert, the rest stays causal",
        about="Qwen-Image 2.1 (text to image and editing), with its KV cache",
    ),
    "NucleusMoEImageTransformer2DModel": Family(
        _nucleus,
        {"transformer_blocks.*.attn": "queries"},
        order="image, text; the text asks nothing",
        about="Nucleus-Image",
    ),
}
