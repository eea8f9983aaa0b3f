"""Models that take packed tokens, with the grid in position ids or shapes beside them: FLUX and its kin."""

from __future__ import annotations

import tiny
from model_cases.case import Call, Case, tokens


def flux_call(
    height: int, width: int, text: int, batch: int, reference: tuple[int, int] | None = None, channels: int = 16
) -> Call:
    parts: list = [("text", text), ("image", (1, height, width))]
    if reference is not None:
        parts.append(("reference", (1, *reference)))
    return Call(
        tiny.flux_inputs(height, width, text, batch, reference, channels),
        {"joint": tokens(*parts)},
        touched=((slice(None), 2 * width + 1), text + 2 * width + 1),
    )


FLUX_LAYERS = {"transformer_blocks.*.attn": "joint", "single_transformer_blocks.*.attn": "joint"}

POSITION_IDS: dict[str, Case] = {
    "FluxTransformer2DModel": Case(
        tiny.flux,
        FLUX_LAYERS,
        [flux_call(6, 9, 7, 2), flux_call(9, 6, 7, 2), flux_call(5, 3, 77, 1), flux_call(4, 5, 0, 3)],
    ),
    "FluxTransformer2DModel Kontext": Case(
        tiny.flux,
        FLUX_LAYERS,
        [flux_call(6, 9, 7, 2, (4, 5)), flux_call(6, 9, 7, 2), flux_call(3, 7, 1, 1, (6, 6))],
    ),
    "FluxTransformer2DModel Fill": Case(
        lambda: tiny.flux(in_channels=32, out_channels=16), FLUX_LAYERS, [flux_call(4, 6, 7, 2, channels=32)]
    ),
}
