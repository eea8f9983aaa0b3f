"""Transformers that take packed tokens with their grid in position ids beside them: FLUX and its kin."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import DOUBLE_AND_SINGLE, TEXT, Family, ForwardArguments, Layouts, Part
from diffusers_linattn.models.grids import Grid, grids_of_ids, text_length


def _flux(model: Any, arguments: ForwardArguments) -> TokenLayout:
    # Fill and Control add channels, not tokens; Kontext and others append the tokens of references.
    grid, *references = arguments.read_once("img_ids", grids_of_ids)
    return TokenLayout.joint(text=text_length(arguments["encoder_hidden_states"]), grid=grid, references=references)


def _flux2(model: Any, arguments: ForwardArguments) -> TokenLayout:
    mode = arguments.get("kv_cache_mode")
    if mode is None:
        return _flux(model, arguments)
    # Klein with a KV cache: the references stand before the image and see themselves alone. Later steps have their
    # keys and values without their positions, so that their grids are taken to be unknown from the first step on.
    text = text_length(arguments["encoder_hidden_states"])
    grids = arguments.read_once("img_ids", grids_of_ids)
    cache = arguments.get("kv_cache")
    count = arguments.get("num_ref_tokens", 0) if cache is None else cache.num_ref_tokens
    parts: list[Part] = [("text", text), ("memory", count), ("image", grids[-1])]
    return TokenLayout.of(part for part in parts if part[1])


def _flux3(model: Any, arguments: ForwardArguments) -> dict[str, Layouts]:
    grid = arguments.read_once("img_ids", _grid_of_ids)
    scopes: dict[str, Layouts] = {}
    references: list[Grid] = []
    if arguments.get("image_cond_ids") is not None:
        references = arguments.read_once("image_cond_ids", grids_of_ids)
        scopes["references"] = TokenLayout.of([("reference", reference) for reference in references])
    text = text_length(arguments["encoder_hidden_states"])
    scopes["joint"] = TokenLayout.joint(text=text, grid=grid, references=references)
    return scopes


def _grid_of_ids(ids: torch.Tensor) -> Grid:
    grids = grids_of_ids(ids)
    if len(grids) != 1:
        raise ValueError(
            f"The position ids are those of {len(grids)} pictures, expected one image: this model takes no references "
            "in its image tokens."
        )
    return grids[0]


def _krea2(model: Any, arguments: ForwardArguments) -> TokenLayout:
    text = text_length(arguments["encoder_hidden_states"])
    grid = arguments.read_once("position_ids", lambda ids: _grid_of_ids(ids[text:]))
    return TokenLayout.joint(text=text, grid=grid)


_IMAGE_INDICATOR = 2
_IMAGE_POSITION_OFFSET = 65536


def _ideogram4(model: Any, arguments: ForwardArguments) -> TokenLayout:
    text, grid = arguments.read_once("position_ids", _text_then_grid)
    images = arguments.read_once("indicator", _image_tokens)
    packed = arguments.read_once("segment_ids", _most_segments)
    expected = (text, grid[1] * grid[2])
    if packed > 1 or any(image != expected for image in images):
        raise ValueError(
            f"Ideogram 4 was called with {packed} segments in a sequence, and with images that begin and are long as "
            f"{sorted(set(images))}: expected one segment, and {expected[1]} image tokens from {text} to the end in "
            "every sample. Pack samples as Ideogram4Pipeline does: padding, text, image, one sample for each row."
        )
    return TokenLayout.joint(text=text, grid=grid)


@torch.compiler.disable
def _text_then_grid(ids: torch.Tensor) -> tuple[int, Grid]:
    is_image = ids[0, :, 0] >= _IMAGE_POSITION_OFFSET
    text = int((~is_image).sum())
    if not torch.equal(ids[:, text:], ids[:1, text:].expand(len(ids), -1, -1)):
        raise ValueError(
            "Ideogram 4 was called with position ids of images that begin elsewhere or are of another size in another "
            "sample: expected the same image ids in every sample, as Ideogram4Pipeline makes them."
        )
    return text, _grid_of_ids(ids[0, text:])


@torch.compiler.disable
def _image_tokens(indicator: torch.Tensor) -> list[tuple[int, int]]:
    """First image token and number of image tokens in each sample."""
    is_image = (indicator == _IMAGE_INDICATOR).to(torch.uint8)
    return list(zip(is_image.argmax(1).tolist(), is_image.sum(1).tolist(), strict=True))


@torch.compiler.disable
def _most_segments(segment_ids: torch.Tensor) -> int:
    return max(len(set(row) - {-1}) for row in segment_ids.tolist())


_IDS = ("img_ids", "txt_ids")


def _like_flux(about: str) -> Family:
    return Family(_flux, DOUBLE_AND_SINGLE, order="text, image, references", about=about, shared=_IDS)


POSITION_ID_MODELS: dict[str, Family] = {
    "FluxTransformer2DModel": _like_flux("FLUX.1 dev, schnell, Kontext (reference image), Fill, Control"),
    "ChromaTransformer2DModel": _like_flux("Chroma"),
    "BriaTransformer2DModel": _like_flux("Bria 3.2"),
    "BriaFiboTransformer2DModel": _like_flux("Bria Fibo, Fibo Edit (reference images)"),
    "OvisImageTransformer2DModel": _like_flux("Ovis-Image"),
    "LongCatImageTransformer2DModel": _like_flux("LongCat-Image, LongCat-Image-Edit (reference image)"),
    "Flux2Transformer2DModel": Family(
        _flux2,
        DOUBLE_AND_SINGLE,
        order="text, image, references; with a KV cache text, references, image",
        about="FLUX.2 dev and Klein, with and without reference images, Klein with a KV cache",
    ),
    "Flux3Transformer2DModel": Family(
        _flux3,
        {
            "mode_blocks.image.*.attn": "image",
            "mode_blocks.image_cond.*.attn": "references",
            "single_transformer_blocks.*.attn": "joint",
        },
        order="text, image, references",
        about="FLUX.3, with and without reference images",
        left={"txt_mode_blocks.*.attn": TEXT},
        shared=_IDS,
    ),
    "Krea2Transformer2DModel": Family(
        _krea2,
        {"transformer_blocks.*.attn": "joint"},
        order="text, image",
        about="Krea 2",
        left={"text_fusion.*.attn": TEXT},
        shared=("position_ids",),
    ),
    "Ideogram4Transformer2DModel": Family(
        _ideogram4,
        {"layers.*.attention": "joint"},
        order="padding and text, image",
        about="Ideogram 4; one sample for each sequence, as its pipeline makes them",
    ),
}
