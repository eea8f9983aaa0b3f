"""Image models that attend over text and image together, with the grid in the shape of the latents."""

from __future__ import annotations

import diffusers
import torch

from model_cases.case import Call, Case, randn, seeded, tokens


def sd3() -> torch.nn.Module:
    return seeded(
        diffusers.SD3Transformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=32,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def sd3_call(height: int, width: int, text: int, batch: int) -> Call:
    grid = (1, height // 2, width // 2)
    return Call(
        {
            "hidden_states": randn(batch, 4, height, width),
            "encoder_hidden_states": randn(batch, text, 24, seed=1),
            "pooled_projections": randn(batch, 20, seed=2),
            "timestep": torch.tensor([3.0] * batch),
            "return_dict": False,
        },
        {"joint": tokens(("image", grid), ("text", text)), "image": tokens(("image", grid))},
        touched=((slice(None), slice(None), 5, 8), 2 * grid[2] + 4),
    )


def lumina2() -> torch.nn.Module:
    return seeded(
        diffusers.Lumina2Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        ffn_dim_multiplier=None,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128),
        cap_feat_dim=8,
    )


def lumina2_call(height: int, width: int, lengths: list[int]) -> Call:
    grid, text = (1, height // 2, width // 2), max(lengths) + 2
    mask = torch.zeros(len(lengths), text, dtype=torch.long)
    for sample, length in enumerate(lengths):
        mask[sample, :length] = 1
    return Call(
        {
            "hidden_states": randn(len(lengths), 4, height, width),
            "timestep": torch.tensor([0.3] * len(lengths)),
            "encoder_hidden_states": randn(len(lengths), text, 8, seed=1),
            "encoder_attention_mask": mask,
            "return_dict": False,
        },
        {
            "joint": [tokens(("text", length), ("image", grid)) for length in lengths],
            "image": tokens(("image", grid)),
        },
        touched=((slice(None), slice(None), 5, 8), 2 * grid[2] + 4),
        hidden=("encoder_hidden_states", (0, slice(lengths[0], None))),
    )


IMAGE_JOINT: dict[str, Case] = {
    "SD3Transformer2DModel": Case(
        sd3,
        {"transformer_blocks.*.attn": "joint", "transformer_blocks.*.attn2": "image"},
        [sd3_call(12, 20, 7, 2), sd3_call(20, 12, 7, 2), sd3_call(8, 24, 77, 1)],
    ),
    "Lumina2Transformer2DModel": Case(
        lumina2,
        {"layers.*.attn": "joint", "noise_refiner.*.attn": "image"},
        [lumina2_call(12, 20, [7, 4]), lumina2_call(20, 12, [7, 7]), lumina2_call(8, 24, [5])],
    ),
}
