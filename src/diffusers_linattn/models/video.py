"""Video transformers that attend over the video alone; the prompt comes through cross-attention."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import CROSS, TEXT, Family, ForwardArguments
from diffusers_linattn.models.grids import padded_grid, patch_grid


def _video(model: Any, arguments: ForwardArguments) -> TokenLayout:
    return TokenLayout.image(patch_grid(arguments["hidden_states"], model.config.patch_size))


def _frames_first(model: Any, arguments: ForwardArguments) -> TokenLayout:
    return TokenLayout.image(patch_grid(arguments["hidden_states"].transpose(1, 2), model.config.patch_size))


def _after_a_reference(model: Any, arguments: ForwardArguments) -> TokenLayout:
    # The first frame of the latents is the character's picture.
    frames, height, width = patch_grid(arguments["hidden_states"], model.config.patch_size)
    return TokenLayout.of([("reference", (1, height, width)), ("image", (frames - 1, height, width))])


def _skyreels(model: Any, arguments: ForwardArguments) -> TokenLayout:
    if model.config.num_frame_per_block > 1:
        raise ValueError(
            f"Autoregressive SkyReels-V2 (num_frame_per_block={model.config.num_frame_per_block}) attends under a "
            "causal mask over pairs of tokens, which has quadratic cost. Use synchronous generation "
            "(causal_block_size=1), or restore(model) the original attention."
        )
    return _video(model, arguments)


def _each_frame(model: Any, arguments: ForwardArguments) -> TokenLayout:
    # Frames are folded into the batch.
    _, height, width = patch_grid(arguments["hidden_states"], model.config.patch_size)
    return TokenLayout.image((1, height, width))


def _allegro(model: Any, arguments: ForwardArguments) -> TokenLayout:
    patch = model.config.patch_size
    return TokenLayout.image(patch_grid(arguments["hidden_states"], (model.config.patch_size_t, patch, patch)))


def _kandinsky6(model: Any, arguments: ForwardArguments) -> TokenLayout:
    frames, height, width = patch_grid(arguments["hidden_states"].movedim(-1, 1), model.config.patch_size)
    num_references = 0
    if arguments.get("visual_token_type_ids") is not None:  # 1 for the frames of a reference, behind the video
        num_references = arguments.read_once("visual_token_type_ids", _num_ones)
    if not num_references:
        return TokenLayout.image((frames, height, width))
    video = (frames - num_references, height, width)
    return TokenLayout.of([("image", video), ("reference", (num_references, height, width))])


@torch.compiler.disable
def _num_ones(types: torch.Tensor) -> int:
    return int((types[0] == 1).sum())


def _helios(model: Any, arguments: ForwardArguments) -> TokenLayout:
    patch = model.config.patch_size
    # The older the history, the larger its patches.
    history = [
        ("reference", padded_grid(arguments[f"latents_history_{term}"], [times * size for size in patch]))
        for term, times in (("long", 4), ("mid", 2), ("short", 1))
        if arguments.get(f"latents_history_{term}") is not None
        and arguments.get(f"indices_latents_history_{term}") is not None
    ]
    return TokenLayout.of([*history, ("image", patch_grid(arguments["hidden_states"], patch))])


_WAN_LAYERS = {"blocks.*.attn1": "image"}
_WAN_LEFT = {"blocks.*.attn2": CROSS}
_ATTN1 = {"transformer_blocks.*.attn1": "image"}
_ATTN2 = {"transformer_blocks.*.attn2": CROSS}

VIDEO_MODELS: dict[str, Family] = {
    "WanTransformer3DModel": Family(
        _video,
        _WAN_LAYERS,
        order="video",
        about="Wan 2.1 and 2.2, text or image to video",
        left=_WAN_LEFT,
    ),
    "ChronoEditTransformer3DModel": Family(_video, _WAN_LAYERS, order="video", about="ChronoEdit", left=_WAN_LEFT),
    "WanVACETransformer3DModel": Family(
        _video,
        {**_WAN_LAYERS, "vace_blocks.*.attn1": "image"},
        order="video; reference pictures are its first frames",
        about="Wan VACE",
        left={**_WAN_LEFT, "vace_blocks.*.attn2": CROSS},
        shared=("control_hidden_states_scale",),
    ),
    "WanAnimateTransformer3DModel": Family(
        _after_a_reference,
        {"blocks.*.attn1": "joint"},
        order="reference (the character), video",
        about="Wan 2.2 Animate",
        left={**_WAN_LEFT, "face_adapter.*": CROSS},
    ),
    "SkyReelsV2Transformer3DModel": Family(
        _skyreels,
        _WAN_LAYERS,
        order="video",
        about="SkyReels-V2, also diffusion forcing; not its autoregressive mode",
        left=_WAN_LEFT,
    ),
    "AnyFlowTransformer3DModel": Family(_frames_first, _WAN_LAYERS, order="video", about="AnyFlow", left=_WAN_LEFT),
    "HeliosTransformer3DModel": Family(
        _helios,
        {"blocks.*.attn1": "joint"},
        order="history (long, mid and short term, in coarser patches the older it is), video",
        about="Helios",
        left=_WAN_LEFT,
        shared=("indices_hidden_states", *(f"indices_latents_history_{term}" for term in ("short", "mid", "long"))),
    ),
    "AllegroTransformer3DModel": Family(
        _allegro, _ATTN1, order="video", about="Allegro", left=_ATTN2, shared=("image_rotary_emb",)
    ),
    "CosmosTransformer3DModel": Family(
        _video, _ATTN1, order="video", about="Cosmos 1, Predict2, Predict2.5, Transfer2.5", left=_ATTN2
    ),
    "LatteTransformer3DModel": Family(
        _each_frame,
        _ATTN1,
        order="one frame; frames are samples of the batch",
        about="Latte",
        left={**_ATTN2, "temporal_transformer_blocks.*": "attends over the frames of one place"},
    ),
    "Kandinsky6Transformer3DModel": Family(
        _kandinsky6,
        {"visual_transformer_blocks.*.video_dec_block.self_attention": "joint"},
        order="video, reference",
        about="Kandinsky 6",
        left={
            "visual_transformer_blocks.*.audio_dec_block.self_attention": "attends over sound alone",
            "visual_transformer_blocks.*cross_attention": CROSS,
            "*_text_transformer_blocks.*": TEXT,
        },
        shared=("visual_rope_pos",),
    ),
}
