"""Image transformers that take input images beside the latents, and make tokens of both themselves."""

from __future__ import annotations

from typing import Any

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import CROSS, TEXT, Family, ForwardArguments, Part
from diffusers_linattn.models.grids import lengths_of_mask, patch_grid


def _omnigen(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    # Input images stand inside the causal prompt, where each of their tokens sees another part of it: as text.
    prompt = arguments.get("input_ids")
    time_token = 1
    return TokenLayout.joint(text=(0 if prompt is None else prompt.shape[1]) + time_token, grid=grid)


def _fibo2(model: Any, arguments: ForwardArguments) -> dict[str, TokenLayout]:
    latents = [arguments["hidden_states"], *(arguments.get("context_latents") or [])]
    grid, *references = (patch_grid(picture, model.config.patch_size) for picture in latents)
    pictures: list[Part] = [("image", grid), *(("reference", picture) for picture in references)]
    counts = _gist_counts(model.config, arguments)
    gist: Part = ("text", max(counts))
    # Padded gist tokens go last, so that the padding ends every row.
    joint = [gist, *pictures] if min(counts) == max(counts) else [*pictures, gist]
    return {"joint": TokenLayout.of(joint), "pictures": TokenLayout.of(pictures)}


def _gist_counts(config: Any, arguments: ForwardArguments) -> list[int]:
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count  # not in older releases

    if arguments.get("encoder_attention_mask") is None:
        lengths = [arguments["encoder_hidden_states"].shape[2]]
    else:
        lengths = arguments.read_once("encoder_attention_mask", lengths_of_mask)
    return compute_gist_count(
        lengths,
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )


INPUT_IMAGE_MODELS: dict[str, Family] = {
    "BriaFibo2Transformer2DModel": Family(
        _fibo2,
        {"layers.*.attention": "joint", "noise_refiner.*.attention": "pictures"},
        order="gist of the text, image, references; the gist goes last where it is padded",
        about="Bria Fibo 2, with and without context images",
        left={"layers.*.cross_attention": CROSS, "perceiver.*": TEXT},
    ),
    "OmniGenTransformer2DModel": Family(
        _omnigen,
        {"layers.*.self_attn": "joint"},
        order="text and input images, time, image",
        about="OmniGen; its input images count as text, which every image token sees whole",
    ),
}
