"""Image transformers whose image stream is more than one grid: references, padding, samples of several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import TEXT, Family, ForwardArguments, Part
from diffusers_linattn.models.grids import Grid, patch_grid, text_length


def _glm_image(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    parts: list[Part] = [("text", text_length(arguments["encoder_hidden_states"])), ("image", grid)]
    caches = arguments.get("kv_caches")
    if caches is not None and caches[0].mode == "write":
        _note_reference(caches, grid)
    if caches is not None and caches[0].mode == "read" and caches[0].k_caches:
        parts = [*_cached_references(caches), *parts]
    return TokenLayout.of(parts)


def _note_reference(caches: Any, grid: Grid) -> None:
    # A call for each reference fills the cache, which keeps keys and values but not what they are of.
    grids = caches.reference_grids if caches[0].k_caches and hasattr(caches, "reference_grids") else {}
    sample = caches[0].current_sample_idx
    caches.reference_grids = {**grids, sample: [*grids.get(sample, []), grid]}


def _cached_references(caches: Any) -> list[Part]:
    kept = caches[0].k_caches
    noted = [getattr(caches, "reference_grids", {}).get(sample, []) for sample in range(len(kept))]
    alike = all(grids == noted[0] for grids in noted)
    if alike and sum(height * width for _, height, width in noted[0]) == kept[0].shape[1]:
        return [("memory", grid) for grid in noted[0]]
    return [("memory", kept[0].shape[1])]  # of unknown grids: written before the conversion, or not alike


def _hidream(model: Any, arguments: ForwardArguments) -> list[TokenLayout]:
    latents = arguments["hidden_states"]
    if arguments.get("hidden_states_masks") is not None:
        sizes, stream = _hidream_sizes(arguments), latents.shape[1]
    else:
        size = patch_grid(latents, model.config.patch_size)[1:]
        sizes = [size] * len(latents)
        # Pictures that are not square are padded with zeros, which are attended.
        stream = size[0] * size[1] if latents.shape[-1] == latents.shape[-2] else model.max_seq
    llama = arguments["encoder_hidden_states_llama3"][0].shape[-2]
    # Twice: the last layer's states, carried through all blocks, and those of a layer for each block.
    text = arguments["encoder_hidden_states_t5"].shape[-2] + 2 * llama
    return [TokenLayout.of([*_padded("image", (1, height, width), stream), ("text", text)]) for height, width in sizes]


def _hidream_sizes(arguments: ForwardArguments) -> list[tuple[int, int]]:
    sizes: Any = arguments["img_sizes"]
    if isinstance(sizes, torch.Tensor):
        sizes = arguments.read_once("img_sizes", torch.Tensor.tolist)
    return [(int(height), int(width)) for height, width in sizes]


def _joy_image_edit(model: Any, arguments: ForwardArguments) -> TokenLayout:
    latents = arguments["hidden_states"]
    # (batch, pictures, channels, frames, height, width): the picture that is made comes last, and goes first.
    num_references = latents.shape[1] - 1 if latents.ndim == 6 else 0
    grid = patch_grid(latents[:, -1] if latents.ndim == 6 else latents, model.config.patch_size)
    text = text_length(arguments["encoder_hidden_states"])
    return TokenLayout.joint(text=text, grid=grid, references=[grid] * num_references, text_first=False)


def _joy_image_edit_plus(model: Any, arguments: ForwardArguments) -> list[TokenLayout]:
    num_patches, text = arguments["hidden_states"].shape[1], text_length(arguments["encoder_hidden_states"])
    layouts = []
    for grid, *references in arguments["shape_list"]:
        parts: list[Part] = [("image", grid), *(("reference", reference) for reference in references)]
        padding = num_patches - TokenLayout.of(parts).length
        layouts.append(TokenLayout.of([*parts, ("padding", padding), ("text", text)]))
    return layouts


_Z_IMAGE_MULTIPLE = 32  # Z-Image pads each text and each picture to a multiple of this, and attends to the padding


def _z_image(model: Any, arguments: ForwardArguments) -> dict[str, list[TokenLayout]]:
    size = arguments.get("patch_size", 2)
    patch = (arguments.get("f_patch_size", 1), size, size)
    pictures, captions = arguments["x"], arguments["cap_feats"]
    omni = isinstance(pictures[0], list)
    joint, image = [], []
    for i, (latents, caption) in enumerate(zip(pictures, captions, strict=True)):
        if omni:
            stream = _z_image_omni(latents, patch)
            parts = [*_z_image_texts(caption), *stream, *_z_image_semantics(model, arguments, i)]
        else:
            stream = _z_image_padded("image", patch_grid(latents[None], patch))
            parts = [*stream, *_z_image_texts([caption])]
        joint.append(TokenLayout.of(parts))
        image.append(TokenLayout.of(stream))
    return {"joint": joint, "image": image}


def _z_image_omni(pictures: Sequence[torch.Tensor | None], patch: Grid) -> list[Part]:
    parts: list[Part] = []
    for i, latents in enumerate(pictures):
        kind = "image" if i == len(pictures) - 1 else "reference"
        if latents is None:
            parts.append(("padding", _Z_IMAGE_MULTIPLE))
        else:
            parts += _z_image_padded(kind, patch_grid(latents[None], patch))
    return parts


def _z_image_texts(captions: Sequence[torch.Tensor]) -> list[Part]:
    return [("text", _round_up(len(caption))) for caption in captions]


def _z_image_semantics(model: Any, arguments: ForwardArguments, sample: int) -> list[Part]:
    # What SigLIP saw in the references stands for their meaning, which all of the image may need: text.
    features = arguments["siglip_feats"]
    if features[0] is None or model.siglip_embedder is None:
        return []
    sizes = [0 if item is None else item.shape[0] * item.shape[1] for item in features[sample]]
    return [("text", _round_up(max(size, 1))) for size in sizes]


def _z_image_padded(kind: str, grid: Grid) -> list[Part]:
    return _padded(kind, grid, _round_up(grid[0] * grid[1] * grid[2]))


def _round_up(length: int) -> int:
    return length + -length % _Z_IMAGE_MULTIPLE


def _padded(kind: str, grid: Grid, length: int) -> list[Part]:
    padding = length - grid[0] * grid[1] * grid[2]
    return [(kind, grid), ("padding", padding)] if padding else [(kind, grid)]


IMAGE_STREAM_MODELS: dict[str, Family] = {
    "GlmImageTransformer2DModel": Family(
        _glm_image,
        {"transformer_blocks.*.attn1": "joint"},
        order="references from the cache, text, image",
        about="GLM-Image",
    ),
    "HiDreamImageTransformer2DModel": Family(
        _hidream,
        {"double_stream_blocks.*.attn1": "joint", "single_stream_blocks.*.attn1": "joint"},
        order="image, padding where it is not square, text",
        about="HiDream-I1",
    ),
    "JoyImageEditTransformer3DModel": Family(
        _joy_image_edit,
        {"double_blocks.*.attn": "joint"},
        order="image, references, text",
        about="JoyImage-Edit",
    ),
    "JoyImageEditPlusTransformer3DModel": Family(
        _joy_image_edit_plus,
        {"double_blocks.*.attn": "joint"},
        order="image, references, padding, text; each sample has its own sizes",
        about="JoyImage-Edit-Plus",
    ),
    "ZImageTransformer2DModel": Family(
        _z_image,
        {"layers.*.attention": "joint", "noise_refiner.*.attention": "image"},
        order="image, padding, text (Omni: text, references, image, SigLIP); each sample has its own sizes",
        about="Z-Image, Z-Image-Turbo, Z-Image-Omni",
        left={"context_refiner.*.attention": TEXT, "siglip_refiner.*.attention": TEXT},
    ),
}
