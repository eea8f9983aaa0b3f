"""Image models that attend over the image alone; the prompt comes through cross-attention or not at all."""

from __future__ import annotations

import tiny
from model_cases.case import Call, Case, tokens


def pixart_call(height: int, width: int, text: int, batch: int) -> Call:
    grid = (1, height // 2, width // 2)
    return Call(
        tiny.pixart_inputs(height, width, text, batch),
        {"image": tokens(("image", grid))},
        touched=((slice(None), slice(None), 5, 6), 2 * grid[2] + 3),
        hidden=("encoder_hidden_states", (-1, slice(text // 2, None))),
    )


def dit_call(size: int, batch: int) -> Call:
    return Call(
        tiny.dit_inputs(size, batch),
        {"image": tokens(("image", (1, size // 2, size // 2)))},
        touched=((slice(None), slice(None), 5, 6), 2 * (size // 2) + 3),
    )


IMAGE_ALONE: dict[str, Case] = {
    "DiTTransformer2DModel": Case(
        tiny.dit, {"transformer_blocks.*.attn1": "image"}, [dit_call(16, 2), dit_call(16, 1)]
    ),
    "PixArtTransformer2DModel": Case(
        tiny.pixart,
        {"transformer_blocks.*.attn1": "image"},
        [pixart_call(12, 20, 8, 2), pixart_call(20, 12, 8, 2), pixart_call(8, 24, 12, 1)],
    ),
}
