"""Video transformers that attend over text and video together."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import CROSS, DOUBLE_AND_SINGLE, TEXT, Family, ForwardArguments, Layouts
from diffusers_linattn.models.grids import Grid, lengths_of_mask, padded_grid, patch_grid, text_length


def _grid(model: Any, latents: torch.Tensor) -> Grid:
    """The grid of 5-dimensional latents for a model that has a `patch_size` and a `patch_size_t`."""
    patch = model.config.patch_size
    return patch_grid(latents, (model.config.patch_size_t or 1, patch, patch))


def _text_length(arguments: ForwardArguments, *names: str) -> int:
    return sum(text_length(arguments[name]) for name in names if arguments.get(name) is not None)


def _mochi(model: Any, arguments: ForwardArguments) -> list[TokenLayout]:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    # Each sample has an attention call of its own, without the padding of its text.
    lengths = arguments.read_once("encoder_attention_mask", lengths_of_mask)
    return [TokenLayout.joint(text=length, grid=grid, text_first=False) for length in lengths]


def _hunyuan(model: Any, arguments: ForwardArguments) -> TokenLayout:
    text = _text_length(arguments, "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return TokenLayout.joint(text=text, grid=_grid(model, arguments["hidden_states"]), text_first=False)


def _motif(model: Any, arguments: ForwardArguments) -> dict[str, Layouts]:
    video = _hunyuan(model, arguments)
    grid = _grid(model, arguments["hidden_states"])
    return {"joint": video, "decoder": TokenLayout.of([("image", grid), ("reference", grid)])}


def _motif_decoders(model: Any) -> dict[str, str]:
    num_layers, num_decoders = model.config.num_single_layers, model.config.num_decoder_layers
    return {f"single_transformer_blocks.{i}.attn": "decoder" for i in range(num_layers - num_decoders, num_layers)}


def _framepack(model: Any, arguments: ForwardArguments) -> TokenLayout:
    text = _text_length(arguments, "encoder_hidden_states", "image_embeds")
    if len(arguments["hidden_states"]) == 1:  # a single sample loses its padding, others have a mask
        lengths = arguments.read_once("encoder_attention_mask", lengths_of_mask)
        text = lengths[0] + _text_length(arguments, "image_embeds")
    history = [
        ("reference", padded_grid(arguments[f"latents_{name}"], (times, 2 * times, 2 * times)))
        for name, times in (("history_4x", 4), ("history_2x", 2), ("clean", 1))
        if arguments.get(f"latents_{name}") is not None and arguments.get(f"indices_latents_{name}") is not None
    ]
    return TokenLayout.of([*history, ("image", _grid(model, arguments["hidden_states"])), ("text", text)])


def _cogvideox(model: Any, arguments: ForwardArguments) -> TokenLayout:
    patch = model.config.patch_size
    patch_t = getattr(model.config, "patch_size_t", None) or 1  # CogVideoX 1.5
    grid = patch_grid(arguments["hidden_states"].transpose(1, 2), (patch_t, patch, patch))
    return TokenLayout.joint(text=_text_length(arguments, "encoder_hidden_states"), grid=grid)


def _easyanimate(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = patch_grid(arguments["hidden_states"], model.config.patch_size)
    text = _text_length(arguments, "encoder_hidden_states", "encoder_hidden_states_t5")
    return TokenLayout.joint(text=text, grid=grid)


_ATTN1 = {"transformer_blocks.*.attn1": "joint"}
_REFINER = {"context_embedder.*": TEXT}

VIDEO_JOINT_MODELS: dict[str, Family] = {
    "HunyuanVideoTransformer3DModel": Family(
        _hunyuan,
        DOUBLE_AND_SINGLE,
        order="video, text",
        about="HunyuanVideo, text or image to video; SkyReels-V1",
        left=_REFINER,
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        _hunyuan,
        {"transformer_blocks.*.attn": "joint"},
        order="video, text (picture, glyphs and prompt; padding last)",
        about="HunyuanVideo 1.5",
        left=_REFINER,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Family(
        _framepack,
        DOUBLE_AND_SINGLE,
        order="history (4x, 2x, full size), video, text",
        about="HunyuanVideo FramePack",
        left=_REFINER,
        shared=(
            "indices_latents",
            "indices_latents_clean",
            "indices_latents_history_2x",
            "indices_latents_history_4x",
        ),
    ),
    "CogVideoXTransformer3DModel": Family(
        _cogvideox,
        _ATTN1,
        order="text, video",
        about="CogVideoX and CogVideoX 1.5",
        shared=("image_rotary_emb",),
    ),
    "ConsisIDTransformer3DModel": Family(
        _cogvideox, _ATTN1, order="text, video", about="ConsisID", shared=("image_rotary_emb",)
    ),
    "MochiTransformer3DModel": Family(
        _mochi,
        _ATTN1,
        order="video, text; each sample has its own text length",
        about="Mochi 1",
    ),
    "MotifVideoTransformer3DModel": Family(
        _motif,
        DOUBLE_AND_SINGLE,
        order="video, text; in decoder layers video, encoded video",
        about="Motif-Video",
        left={"*.cross_attn": CROSS},
        scopes=_motif_decoders,
    ),
    "EasyAnimateTransformer3DModel": Family(_easyanimate, _ATTN1, order="text, video", about="EasyAnimate 5.1"),
}
