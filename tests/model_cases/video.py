"""Video models."""

from __future__ import annotations

import diffusers
import torch

from model_cases.case import Call, Case, randn, seeded, tokens


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


def mochi_call(frames: int, height: int, width: int, lengths: list[int]) -> Call:
    grid, text = (frames, height // 2, width // 2), 12
    mask = torch.zeros(len(lengths), text, dtype=torch.bool)
    for sample, length in enumerate(lengths):
        mask[sample, :length] = True
    return Call(
        {
            "hidden_states": randn(len(lengths), 4, frames, height, width),
            "encoder_hidden_states": randn(len(lengths), text, 16, seed=1),
            "timestep": torch.tensor([3.0] * len(lengths)),
            "encoder_attention_mask": mask,
            "return_dict": False,
        },
        {"joint": [tokens(("image", grid), ("text", length)) for length in lengths]},
        touched=((slice(None), slice(None), 1, 5, 8), grid[1] * grid[2] + 2 * grid[2] + 4),
    )


VIDEO: dict[str, Case] = {
    "MochiTransformer3DModel": Case(
        mochi,
        {"transformer_blocks.*.attn1": "joint"},
        [mochi_call(2, 12, 20, [7, 4]), mochi_call(3, 20, 12, [7, 7]), mochi_call(2, 8, 24, [5])],
    ),
}
