"""Video models that attend over the video alone."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from model_cases.case import Call, Case, randn, seeded, tokens


Grid = tuple[int, int, int]

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}


def touch(grid: Grid, before: int = 0, frames_axis: int = 2) -> tuple[tuple[Any, ...], int]:
    """One latent of the second frame, in patches of 2x2, and its row behind `before` other tokens."""
    _, height, width = grid
    index: list[Any] = [slice(None)] * 5
    index[frames_axis], index[3], index[4] = 1, 5, 8
    return tuple(index), before + (height + 2) * width + 4


def wan_call(
    grid: Grid, batch: int, text: int = 12, channels: int = 4, timestep: torch.Tensor | None = None, **extra: Any
) -> Call:
    frames, height, width = grid
    return Call(
        {
            "hidden_states": randn(batch, channels, frames, 2 * height, 2 * width),
            "timestep": torch.tensor([3.0] * batch) if timestep is None else timestep,
            "encoder_hidden_states": randn(batch, text, 16, seed=1),
            "return_dict": False,
            **extra,
        },
        {"image": tokens(("image", grid))},
        touched=touch(grid),
    )


def image_to_video_call(grid: Grid, batch: int) -> Call:
    # Stock processors take all but the last 512 text tokens for those of the picture.
    return wan_call(grid, batch, text=512, encoder_hidden_states_image=randn(batch, 5, 8, seed=2))


def vace_call(grid: Grid, batch: int) -> Call:
    frames, height, width = grid
    control = randn(batch, 8, frames, 2 * height, 2 * width, seed=3)
    return wan_call(grid, batch, control_hidden_states=control, control_hidden_states_scale=torch.tensor([1.0, 0.5]))


def animate() -> torch.nn.Module:
    return seeded(
        diffusers.WanAnimateTransformer3DModel,
        **{**WAN, "in_channels": 12, "latent_channels": 4},
        image_dim=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def animate_call(grid: Grid, batch: int) -> Call:
    frames, height, width = grid
    call = wan_call(
        (frames + 1, height, width),
        batch,
        channels=12,
        pose_hidden_states=randn(batch, 4, frames, 2 * height, 2 * width, seed=3),
        face_pixel_values=randn(batch, 3, 4 * frames - 3, 16, 16, seed=4),
    )
    call.tokens = {"joint": tokens(("reference", (1, height, width)), ("image", grid))}
    return call


def forcing_call(grid: Grid, batch: int) -> Call:
    timestep = torch.arange(batch * grid[0]).reshape(batch, -1)
    return wan_call(grid, batch, timestep=timestep, enable_diffusion_forcing=True)


def anyflow_call(grid: Grid, batch: int) -> Call:
    timestep = torch.full((batch, grid[0]), 3.0)
    call = wan_call(grid, batch, timestep=timestep, r_timestep=timestep / 2)
    call.inputs["hidden_states"] = call.inputs["hidden_states"].transpose(1, 2).contiguous()
    call.touched = touch(grid, frames_axis=1)
    return call


def helios() -> torch.nn.Module:
    return seeded(diffusers.HeliosTransformer3DModel, **WAN, rope_dim=(4, 4, 4))


def helios_call(grid: Grid, batch: int, history: bool = True) -> Call:
    frames, height, width = grid
    if not history:
        call = wan_call(grid, batch)
        call.tokens = {"joint": tokens(("image", grid))}
        return call
    lengths = {"short": 2, "mid": 3, "long": 5}
    extra = {}
    for seed, (term, length) in enumerate(lengths.items()):
        extra[f"latents_history_{term}"] = randn(batch, 4, length, 2 * height, 2 * width, seed=seed + 5)
        extra[f"indices_latents_history_{term}"] = torch.arange(length).expand(batch, -1)
    call = wan_call(grid, batch, indices_hidden_states=torch.arange(10, 10 + frames).expand(batch, -1), **extra)
    halves, quarters = ((-(-height // n), -(-width // n)) for n in (2, 4))
    parts = (("long", (2, *quarters)), ("mid", (2, *halves)), ("short", (2, height, width)))
    call.tokens = {"joint": tokens(*parts, ("image", grid))}
    call.touched = touch(grid, before=sum(len(tokens(part)) for part in parts))
    return call


def allegro() -> torch.nn.Module:
    return seeded(
        diffusers.AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_width=16,
        sample_height=16,
        sample_frames=8,
        caption_channels=16,
    )


def allegro_call(grid: Grid, batch: int) -> Call:
    frames, height, width = grid
    call = wan_call(grid, batch, encoder_attention_mask=torch.ones(batch, 12))
    call.inputs["encoder_attention_mask"][0, 7:] = 0
    call.inputs["attention_mask"] = torch.ones(batch, frames, 2 * height, 2 * width)
    call.inputs["attention_mask"][-1, :, :, -4:] = 0
    call.hidden = ("encoder_hidden_states", (0, slice(7, None)))
    return call


def cosmos(**config: Any) -> torch.nn.Module:
    return seeded(
        diffusers.CosmosTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,  # that takes torchvision
        **config,
    )


def cosmos_call(grid: Grid, batch: int) -> Call:
    call = wan_call(grid, batch, fps=30, attention_mask=torch.ones(batch, 12, dtype=torch.bool))
    call.inputs["attention_mask"][0, 7:] = False
    call.hidden = ("encoder_hidden_states", (0, slice(7, None)))
    return call


def cosmos_image_call(grid: Grid, batch: int) -> Call:
    call = wan_call(grid, batch)
    call.inputs["encoder_hidden_states"] = (call.inputs["encoder_hidden_states"], randn(batch, 5, 8, seed=2))
    return call


def latte() -> torch.nn.Module:
    return seeded(
        diffusers.LatteTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        patch_size=2,
        sample_size=16,
        cross_attention_dim=16,
        caption_channels=16,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=3,
    )


def latte_call(height: int, width: int, batch: int, frames: int = 3) -> Call:
    call = wan_call((frames, height, width), batch)
    call.tokens = {"image": tokens(("image", (1, height, width)))}
    index, _ = touch((frames, height, width))
    call.touched = ((*index[:2], 0, *index[3:]), 2 * width + 4)
    return call


def kandinsky6() -> torch.nn.Module:
    return seeded(
        diffusers.Kandinsky6Transformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )


def kandinsky6_call(grid: Grid, batch: int, sound: int = 0, reference: bool = False) -> Call:
    frames, height, width = grid
    call = wan_call((frames + reference, height, width), batch, pooled_projections=randn(batch, 8, seed=2))
    call.inputs["hidden_states"] = call.inputs["hidden_states"].movedim(1, -1).contiguous()
    parts: list[tuple[str, Grid]] = [("image", grid)]
    if sound:
        call.inputs["audio_hidden_states"] = randn(batch, sound, 4, seed=3)
    if reference:
        times = torch.tensor([*range(frames), 0])
        call.inputs["visual_rope_pos"] = (times, torch.arange(height), torch.arange(width))
        call.inputs["visual_token_type_ids"] = torch.tensor([0] * frames + [1]).expand(batch, -1)
        parts.append(("reference", (1, height, width)))
    call.tokens = {"joint": tokens(*parts)}
    call.touched = ((slice(None), 1, 5, 8), (height + 2) * width + 4)
    return call


WAN_LAYERS = {"blocks.*.attn1": "image"}
JOINT_LAYERS = {"blocks.*.attn1": "joint"}
ATTN1 = {"transformer_blocks.*.attn1": "image"}
WIDE, TALL, LONG = (2, 6, 9), (3, 9, 6), (4, 4, 7)

VIDEO: dict[str, Case] = {
    "WanTransformer3DModel": Case(
        lambda: seeded(diffusers.WanTransformer3DModel, **WAN),
        WAN_LAYERS,
        [
            wan_call(WIDE, 2),
            wan_call(TALL, 2, text=7),
            wan_call(LONG, 1, timestep=torch.arange(112.0)[None]),  # Wan 2.2 5B: a timestep for each token
        ],
    ),
    "WanTransformer3DModel I2V": Case(
        lambda: seeded(diffusers.WanTransformer3DModel, **WAN, image_dim=8, added_kv_proj_dim=24),
        WAN_LAYERS,
        [image_to_video_call(WIDE, 2), image_to_video_call(TALL, 1)],
    ),
    "ChronoEditTransformer3DModel": Case(
        lambda: seeded(diffusers.ChronoEditTransformer3DModel, **WAN, image_dim=8, added_kv_proj_dim=24),
        WAN_LAYERS,
        [image_to_video_call(WIDE, 2), image_to_video_call(TALL, 2), image_to_video_call(LONG, 1)],
    ),
    "WanVACETransformer3DModel": Case(
        lambda: seeded(diffusers.WanVACETransformer3DModel, **WAN, vace_layers=[0, 1], vace_in_channels=8),
        {**WAN_LAYERS, "vace_blocks.*.attn1": "image"},
        [vace_call(WIDE, 2), vace_call(TALL, 2), vace_call(LONG, 1)],
    ),
    "WanAnimateTransformer3DModel": Case(
        animate, JOINT_LAYERS, [animate_call(WIDE, 2), animate_call(TALL, 2), animate_call(LONG, 1)]
    ),
    "SkyReelsV2Transformer3DModel": Case(
        lambda: seeded(diffusers.SkyReelsV2Transformer3DModel, **WAN),
        WAN_LAYERS,
        [wan_call(WIDE, 2), forcing_call(TALL, 2), wan_call(LONG, 1, text=7)],
    ),
    "AnyFlowTransformer3DModel": Case(
        lambda: seeded(diffusers.AnyFlowTransformer3DModel, **WAN),
        WAN_LAYERS,
        [anyflow_call(WIDE, 2), anyflow_call(TALL, 2), anyflow_call(LONG, 1)],
    ),
    "HeliosTransformer3DModel": Case(
        helios, JOINT_LAYERS, [helios_call(WIDE, 2), helios_call(TALL, 2), helios_call(LONG, 1, history=False)]
    ),
    "AllegroTransformer3DModel": Case(
        allegro, ATTN1, [allegro_call(WIDE, 2), allegro_call(TALL, 2), allegro_call(LONG, 1)]
    ),
    "CosmosTransformer3DModel": Case(
        cosmos, ATTN1, [cosmos_call(WIDE, 2), cosmos_call(TALL, 2), cosmos_call(LONG, 1)]
    ),
    "CosmosTransformer3DModel Predict2.5": Case(
        lambda: cosmos(img_context_dim_in=8, img_context_dim_out=24, img_context_num_tokens=5),
        ATTN1,
        [cosmos_image_call(WIDE, 2), cosmos_image_call(TALL, 1)],
    ),
    "LatteTransformer3DModel": Case(
        latte, ATTN1, [latte_call(6, 9, 2), latte_call(9, 6, 2), latte_call(4, 7, 1, frames=1)]
    ),
    "Kandinsky6Transformer3DModel": Case(
        kandinsky6,
        {"visual_transformer_blocks.*.video_dec_block.self_attention": "joint"},
        [
            kandinsky6_call(WIDE, 2),
            kandinsky6_call(TALL, 2, reference=True),
            kandinsky6_call(LONG, 1, sound=7, reference=True),
        ],
    ),
}
