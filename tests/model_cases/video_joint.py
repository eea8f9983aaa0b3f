"""Video models that attend over text and video together."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from model_cases.case import Call, Case, Token, randn, seeded, tokens
from model_cases.video import LONG, TALL, WIDE, Grid, touch


HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "text_embed_dim": 16,
    "rope_axes_dim": (2, 4, 4),
}


def ragged(lengths: list[int], text: int) -> torch.Tensor:
    return (torch.arange(text) < torch.tensor(lengths)[:, None]).long()


def joint_call(grid: Grid, lengths: list[int], text: int = 8, **extra: Any) -> Call:
    """A call with prompts of these lengths, padded to `text` tokens, which stand behind the video."""
    frames, height, width = grid
    return Call(
        {
            "hidden_states": randn(len(lengths), 4, frames, 2 * height, 2 * width),
            "encoder_hidden_states": randn(len(lengths), text, 16, seed=1),
            "timestep": torch.tensor([3.0] * len(lengths)),
            "encoder_attention_mask": ragged(lengths, text),
            "return_dict": False,
            **extra,
        },
        {"joint": tokens(("image", grid), ("text", text))},
        touched=touch(grid),
        hidden=("encoder_hidden_states", (0, slice(lengths[0], None))),
    )


def hunyuan_call(grid: Grid, lengths: list[int], **extra: Any) -> Call:
    batch = len(lengths)
    pooled, guidance = randn(batch, 8, seed=2), torch.tensor([1000.0] * batch)
    return joint_call(grid, lengths, pooled_projections=pooled, guidance=guidance, **extra)


def hunyuan(**config: Any) -> torch.nn.Module:
    return seeded(
        diffusers.HunyuanVideoTransformer3DModel, **HUNYUAN, num_refiner_layers=1, pooled_projection_dim=8, **config
    )


def hunyuan15() -> torch.nn.Module:
    config = {name: value for name, value in HUNYUAN.items() if name != "num_single_layers"}
    return seeded(
        diffusers.HunyuanVideo15Transformer3DModel,
        **{**config, "num_layers": 2},
        num_refiner_layers=1,
        text_embed_2_dim=12,
        image_embed_dim=6,
    )


def hunyuan15_call(grid: Grid, lengths: list[int], picture: bool) -> Call:
    batch = len(lengths)
    call = joint_call(
        grid,
        lengths,
        encoder_hidden_states_2=randn(batch, 5, 12, seed=2),
        encoder_attention_mask_2=ragged([3] * batch, 5),
        image_embeds=randn(batch, 4, 6, seed=3) * picture,
    )
    call.tokens = {"joint": tokens(("image", grid), ("text", 8 + 5 + 4))}
    return call


def framepack() -> torch.nn.Module:
    return seeded(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        **HUNYUAN,
        num_refiner_layers=1,
        pooled_projection_dim=8,
        has_image_proj=True,
        image_proj_dim=6,
        has_clean_x_embedder=True,
    )


def framepack_call(grid: Grid, lengths: list[int]) -> Call:
    frames, height, width = grid
    batch, past = len(lengths), {"clean": 2, "history_2x": 3, "history_4x": 5}
    extra: dict[str, Any] = {"indices_latents": torch.arange(10, 10 + frames)}
    for seed, (name, length) in enumerate(past.items()):
        extra[f"latents_{name}"] = randn(batch, 4, length, 2 * height, 2 * width, seed=seed + 5)
        extra[f"indices_latents_{name}"] = torch.arange(length)
    call = hunyuan_call(grid, lengths, image_embeds=randn(batch, 4, 6, seed=3), **extra)
    halves, quarters = ((-(-height // n), -(-width // n)) for n in (2, 4))
    parts = (("4x", (2, *quarters)), ("2x", (2, *halves)), ("clean", (2, height, width)))
    text = 4 + (lengths[0] if batch == 1 else 8)  # a single prompt is cut to its length
    call.tokens = {"joint": tokens(*parts, ("image", grid), ("text", text))}
    call.touched = touch(grid, before=sum(len(tokens(part)) for part in parts))
    return call


def cogvideox(cls: str = "CogVideoXTransformer3DModel", **config: Any) -> torch.nn.Module:
    return seeded(
        getattr(diffusers, cls),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=6,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        max_text_seq_length=8,
        **config,
    )


def cogvideox_call(
    grid: Grid, batch: int, patch_t: int = 1, text: int = 8, rotary: bool = False, **extra: Any
) -> Call:
    frames, height, width = grid
    index, row = touch(grid, before=text, frames_axis=1)
    if rotary:
        angles = randn(frames * height * width, 8, seed=3)
        extra["image_rotary_emb"] = (angles.cos(), angles.sin())
    return Call(
        {
            "hidden_states": randn(batch, frames * patch_t, 4, 2 * height, 2 * width),
            "encoder_hidden_states": randn(batch, text, 16, seed=1),
            "timestep": torch.tensor([3.0] * batch),
            "return_dict": False,
            **extra,
        },
        {"joint": tokens(("text", text), ("image", grid))},
        touched=((index[0], patch_t, *index[2:]), row),
    )


def consisid() -> torch.nn.Module:
    return cogvideox(
        "ConsisIDTransformer3DModel",
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=4,
        cross_attn_num_heads=1,
        LFE_id_dim=4,
        LFE_vit_dim=4,
        LFE_depth=2,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=10,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )


def consisid_call(grid: Grid, batch: int) -> Call:
    face = {"id_cond": randn(batch, 4, seed=2), "id_vit_hidden": [randn(batch, 3, 4, seed=3)]}
    return cogvideox_call(grid, batch, **face)


def mochi() -> torch.nn.Module:
    return seeded(
        diffusers.MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )


def mochi_call(grid: Grid, lengths: list[int]) -> Call:
    call = joint_call(grid, lengths, text=12)
    call.inputs["encoder_attention_mask"] = call.inputs["encoder_attention_mask"].bool()
    call.tokens = {"joint": [tokens(("image", grid), ("text", length)) for length in lengths]}
    return call


def motif() -> torch.nn.Module:
    return seeded(
        diffusers.MotifVideoTransformer3DModel,
        **{**HUNYUAN, "num_single_layers": 3},
        num_decoder_layers=2,
        image_embed_dim=6,
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )


def motif_call(grid: Grid, lengths: list[int], picture: int = 0) -> Call:
    extra = {"image_embeds": randn(len(lengths), picture, 6, seed=2)} if picture else {}
    call = joint_call(grid, lengths, **extra)
    decoder: list[Token] = tokens(("image", grid), ("encoded", grid))
    call.tokens = {"joint": tokens(("image", grid), ("text", 8 + picture)), "decoder": decoder}
    return call


def easyanimate() -> torch.nn.Module:
    return seeded(
        diffusers.EasyAnimateTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        time_embed_dim=6,
        text_embed_dim=16,
        text_embed_dim_t5=12,
        num_layers=2,
        mmdit_layers=1,
    )


def easyanimate_call(grid: Grid, batch: int, t5: int = 0) -> Call:
    call = joint_call(grid, [8] * batch)
    del call.inputs["encoder_attention_mask"]
    call.hidden = None
    if t5:
        call.inputs["encoder_hidden_states_t5"] = randn(batch, t5, 12, seed=2)
    call.tokens = {"joint": tokens(("text", 8 + t5), ("image", grid))}
    call.touched = touch(grid, before=8 + t5)
    return call


LAYERS = {"transformer_blocks.*.attn": "joint", "single_transformer_blocks.*.attn": "joint"}
ATTN1 = {"transformer_blocks.*.attn1": "joint"}

VIDEO_JOINT: dict[str, Case] = {
    "HunyuanVideoTransformer3DModel": Case(
        hunyuan, LAYERS, [hunyuan_call(WIDE, [7, 4]), hunyuan_call(TALL, [8, 8]), hunyuan_call(LONG, [5])]
    ),
    "HunyuanVideoTransformer3DModel token_replace": Case(
        lambda: hunyuan(image_condition_type="token_replace"),
        LAYERS,
        [hunyuan_call(WIDE, [7, 4]), hunyuan_call(TALL, [5])],
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        hunyuan15,
        {"transformer_blocks.*.attn": "joint"},
        [
            hunyuan15_call(WIDE, [7, 4], picture=True),
            hunyuan15_call(TALL, [7, 4], picture=False),
            hunyuan15_call(LONG, [5], picture=True),
        ],
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        framepack, LAYERS, [framepack_call(WIDE, [7, 4]), framepack_call(TALL, [6]), framepack_call(LONG, [8, 8])]
    ),
    "CogVideoXTransformer3DModel": Case(
        cogvideox,
        ATTN1,
        [cogvideox_call(WIDE, 2), cogvideox_call(TALL, 2), cogvideox_call(LONG, 1)],
    ),
    "CogVideoXTransformer3DModel 1.5": Case(
        lambda: cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
        ATTN1,
        [
            cogvideox_call(WIDE, 2, patch_t=2, rotary=True),
            cogvideox_call(TALL, 2, patch_t=2, rotary=True, text=5),
            cogvideox_call(LONG, 1, patch_t=2, rotary=True),
        ],
    ),
    "ConsisIDTransformer3DModel": Case(
        consisid, ATTN1, [consisid_call(WIDE, 2), consisid_call(TALL, 2), consisid_call(LONG, 1)]
    ),
    "MochiTransformer3DModel": Case(
        mochi, ATTN1, [mochi_call(WIDE, [7, 4]), mochi_call(TALL, [7, 7]), mochi_call(LONG, [5])]
    ),
    "MotifVideoTransformer3DModel": Case(
        motif,
        {
            "transformer_blocks.*.attn": "joint",
            "single_transformer_blocks.0.attn": "joint",
            "single_transformer_blocks.[12].attn": "decoder",
        },
        [motif_call(WIDE, [7, 4], picture=3), motif_call(TALL, [8, 8]), motif_call(LONG, [5])],
    ),
    "EasyAnimateTransformer3DModel": Case(
        easyanimate,
        ATTN1,
        [easyanimate_call(WIDE, 2, t5=5), easyanimate_call(TALL, 2), easyanimate_call(LONG, 1, t5=3)],
    ),
}
