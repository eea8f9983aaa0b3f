"""Image models that attend over the image alone; the prompt comes through cross-attention or not at all."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

import tiny
from model_cases.case import Call, Case, randn, seeded, tokens


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


def hunyuan_dit() -> torch.nn.Module:
    return seeded(
        diffusers.HunyuanDiT2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=6,
        text_len_t5=5,
        use_style_cond_and_image_meta_size=False,
    )


def hunyuan_dit_call(height: int, width: int, batch: int) -> Call:
    grid = (1, height // 2, width // 2)
    angles = randn(grid[1] * grid[2], 8, seed=3)
    mask = torch.ones(batch, 6)
    mask[0, 4:] = 0
    return Call(
        {
            "hidden_states": randn(batch, 4, height, width),
            "timestep": torch.tensor([3.0] * batch),
            "encoder_hidden_states": randn(batch, 6, 16, seed=1),
            "text_embedding_mask": mask,
            "encoder_hidden_states_t5": randn(batch, 5, 16, seed=2),
            "text_embedding_mask_t5": torch.ones(batch, 5),
            "image_rotary_emb": (angles.cos(), angles.sin()),
            "return_dict": False,
        },
        {"image": tokens(("image", grid))},
        touched=((slice(None), slice(None), 5, 6), 2 * grid[2] + 3),
        hidden=("encoder_hidden_states", (0, slice(4, None))),
    )


def lumina_next() -> torch.nn.Module:
    model: Any = seeded(
        diffusers.LuminaNextDiT2DModel,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=24,
    )
    with torch.no_grad():
        for layer in model.layers:
            layer.gate.normal_()  # of the cross-attention, which starts at zero
    return model


def lumina_next_call(height: int, width: int, text: int, batch: int) -> Call:
    grid = (1, height // 2, width // 2)
    mask = torch.ones(batch, text)
    mask[0, text // 2 :] = 0
    angles = randn(16, 16, 4, seed=3)
    return Call(
        {
            "hidden_states": randn(batch, 4, height, width),
            "timestep": torch.tensor([0.3] * batch),
            "encoder_hidden_states": randn(batch, text, 24, seed=1),
            "encoder_mask": mask,
            "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
            "cross_attention_kwargs": {},
            "return_dict": False,
        },
        {"image": tokens(("image", grid))},
        touched=((slice(None), slice(None), 5, 6), 2 * grid[2] + 3),
        hidden=("encoder_hidden_states", (0, slice(text // 2, None))),
    )


def kandinsky5() -> torch.nn.Module:
    return seeded(
        diffusers.Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=12,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        # The model rounds query and key to bfloat16: in a second block the last bit of an fp32 number may decide.
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
    )


def kandinsky5_call(frames: int, height: int, width: int, text: int, batch: int) -> Call:
    grid = (frames, height // 2, width // 2)
    return Call(
        {
            "hidden_states": randn(batch, frames, height, width, 4),
            "encoder_hidden_states": randn(batch, text, 24, seed=1),
            "timestep": torch.tensor([3.0] * batch),
            "pooled_projections": randn(batch, 12, seed=2),
            "visual_rope_pos": [torch.arange(size) for size in grid],
            "text_rope_pos": torch.arange(text),
            "return_dict": False,
        },
        {"image": tokens(("image", grid))},
        touched=((slice(None), frames - 1, 5, 6), (frames - 1) * grid[1] * grid[2] + 2 * grid[2] + 3),
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
    "HunyuanDiT2DModel": Case(
        hunyuan_dit,
        {"blocks.*.attn1": "image"},
        [hunyuan_dit_call(12, 20, 2), hunyuan_dit_call(20, 12, 2), hunyuan_dit_call(8, 24, 1)],
    ),
    "LuminaNextDiT2DModel": Case(
        lumina_next,
        {"layers.*.attn1": "image"},
        [lumina_next_call(12, 20, 8, 2), lumina_next_call(20, 12, 8, 2), lumina_next_call(8, 24, 12, 1)],
    ),
    "Kandinsky5Transformer3DModel image": Case(
        kandinsky5,
        {"visual_transformer_blocks.*.self_attention": "image"},
        [kandinsky5_call(1, 12, 20, 7, 2), kandinsky5_call(1, 20, 12, 7, 2), kandinsky5_call(1, 8, 24, 12, 1)],
    ),
    "Kandinsky5Transformer3DModel video": Case(
        kandinsky5,
        {"visual_transformer_blocks.*.self_attention": "image"},
        [kandinsky5_call(3, 8, 12, 7, 2), kandinsky5_call(2, 12, 8, 12, 1)],
    ),
}
