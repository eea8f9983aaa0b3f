"""Image models that attend over text and image together, with the grid in the shape of the latents."""

from __future__ import annotations

from typing import Any

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


def first_sample_shorter(batch: int, text: int, visible: int) -> torch.Tensor:
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[0, visible:] = 0
    return mask


def auraflow() -> torch.nn.Module:
    return seeded(
        diffusers.AuraFlowTransformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )


def auraflow_call(height: int, width: int, text: int, batch: int) -> Call:
    grid = (1, height // 2, width // 2)
    return Call(
        {
            "hidden_states": randn(batch, 4, height, width),
            "encoder_hidden_states": randn(batch, text, 24, seed=1),
            "timestep": torch.tensor([0.3] * batch),
            "return_dict": False,
        },
        {"joint": tokens(("registers", 8), ("text", text), ("image", grid))},
        touched=((slice(None), slice(None), 5, 8), 8 + text + 2 * grid[2] + 4),
    )


COGVIEW = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": 24,
    "time_embed_dim": 8,
    "condition_dim": 4,
}


def cogview_call(height: int, width: int, text: int, batch: int, original_size: bool = True, **inputs: Any) -> Call:
    grid = (1, height // 2, width // 2)
    sizes = torch.tensor([[float(height), float(width)]] * batch)
    return Call(
        {
            "hidden_states": randn(batch, 4, height, width),
            "encoder_hidden_states": randn(batch, text, 24, seed=1),
            "timestep": torch.tensor([3.0] * batch),
            **({"original_size": sizes} if original_size else {}),
            "target_size": sizes,
            "crop_coords": torch.zeros(batch, 2),
            "return_dict": False,
            **inputs,
        },
        {"joint": tokens(("text", text), ("image", grid))},
        touched=((slice(None), slice(None), 5, 8), text + 2 * grid[2] + 4),
    )


def cogview4_call(height: int, width: int, text: int, batch: int, visible: int | None = None) -> Call:
    mask = None if visible is None else first_sample_shorter(batch, text, visible)
    # Nothing is hidden: diffusers adds this mask of ones and zeros to the scores.
    return cogview_call(height, width, text, batch, attention_mask=mask)


def cogview4_for_training() -> torch.nn.Module:
    from diffusers.models.transformers.transformer_cogview4 import CogView4TrainingAttnProcessor

    model: Any = seeded(diffusers.CogView4Transformer2DModel, **COGVIEW)
    for block in model.transformer_blocks:
        block.attn1.set_processor(CogView4TrainingAttnProcessor())
    return model


def cogview4_training_call(height: int, width: int, text: int, batch: int, visible: int) -> Call:
    mask = first_sample_shorter(batch, text, visible).to(torch.int32)
    call = cogview_call(height, width, text, batch, attention_kwargs={"text_attn_mask": mask})
    call.hidden = ("encoder_hidden_states", (0, slice(visible, None)))
    return call


def ernie() -> torch.nn.Module:
    return seeded(
        diffusers.ErnieImageTransformer2DModel,
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=24,
        rope_axes_dim=(4, 6, 6),
    )


def ernie_call(height: int, width: int, lengths: list[int]) -> Call:
    grid, text, batch = (1, height // 2, width // 2), max(lengths), len(lengths)
    return Call(
        {
            "hidden_states": randn(batch, 4, height, width),
            "timestep": torch.tensor([3.0] * batch),
            "text_bth": randn(batch, text, 24, seed=1),
            "text_lens": torch.tensor(lengths),
            "return_dict": False,
        },
        {"joint": tokens(("image", grid), ("text", text))},
        touched=((slice(None), slice(None), 5, 8), 2 * grid[2] + 4),
        hidden=("text_bth", (-1, slice(lengths[-1], None))),
    )


def hunyuan_image(**changes: Any) -> torch.nn.Module:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 1.0,
        "patch_size": (2, 2),
        "text_embed_dim": 24,
        "rope_axes_dim": (8, 8),
    }
    return seeded(diffusers.HunyuanImageTransformer2DModel, **{**config, **changes})


def hunyuan_image_call(sides: tuple[int, ...], text: int, batch: int, visible: int, glyphs: int = 0) -> Call:
    frames = sides[0] if len(sides) == 3 else 1
    grid = (frames, sides[-2] // 2, sides[-1] // 2)
    inputs = {
        "hidden_states": randn(batch, 4, *sides),
        "timestep": torch.tensor([3.0] * batch),
        "encoder_hidden_states": randn(batch, text, 24, seed=1),
        "encoder_attention_mask": first_sample_shorter(batch, text, visible),
        "return_dict": False,
    }
    if glyphs:
        inputs["encoder_hidden_states_2"] = randn(batch, glyphs, 12, seed=2)
        inputs["encoder_attention_mask_2"] = first_sample_shorter(batch, glyphs, glyphs - 1)
    row = (frames - 1) * grid[1] * grid[2] + 2 * grid[2] + 4
    return Call(
        inputs,
        {"joint": tokens(("image", grid), ("text", text + glyphs))},
        touched=((..., *((frames - 1,) if len(sides) == 3 else ()), 5, 8), row),
        hidden=("encoder_hidden_states", (0, slice(visible, None))),
    )


def prx() -> torch.nn.Module:
    return seeded(
        diffusers.PRXTransformer2DModel,
        in_channels=4,
        patch_size=2,
        context_in_dim=24,
        hidden_size=32,
        mlp_ratio=1.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
        resolution_embeds=True,
    )


def prx_call(height: int, width: int, text: int, batch: int, visible: int | None = None) -> Call:
    grid = (1, height // 2, width // 2)
    return Call(
        {
            "hidden_states": randn(batch, 4, height, width),
            "timestep": torch.tensor([0.3] * batch),
            "encoder_hidden_states": randn(batch, text, 24, seed=1),
            "attention_mask": None if visible is None else first_sample_shorter(batch, text, visible),
            "return_dict": False,
        },
        {"joint": tokens(("text", text), ("image", grid))},
        touched=((slice(None), slice(None), 5, 8), text + 2 * grid[2] + 4),
        hidden=None if visible is None else ("encoder_hidden_states", (0, slice(visible, None))),
    )


JOINT_AND_SINGLE = {"transformer_blocks.*.attn": "joint", "single_transformer_blocks.*.attn": "joint"}
COGVIEW_LAYERS = {"transformer_blocks.*.attn1": "joint"}

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
    "AuraFlowTransformer2DModel": Case(
        auraflow,
        {"joint_transformer_blocks.*.attn": "joint", "single_transformer_blocks.*.attn": "joint"},
        [auraflow_call(12, 20, 7, 2), auraflow_call(20, 12, 7, 2), auraflow_call(8, 24, 12, 1)],
    ),
    "CogView3PlusTransformer2DModel": Case(
        lambda: seeded(diffusers.CogView3PlusTransformer2DModel, **COGVIEW, pos_embed_max_size=16, sample_size=16),
        COGVIEW_LAYERS,
        [cogview_call(12, 20, 7, 2), cogview_call(20, 12, 7, 2), cogview_call(8, 24, 12, 1)],
    ),
    "CogView4Transformer2DModel": Case(
        lambda: seeded(diffusers.CogView4Transformer2DModel, **COGVIEW),
        COGVIEW_LAYERS,
        [cogview4_call(12, 20, 7, 2, visible=4), cogview4_call(20, 12, 7, 2), cogview4_call(8, 24, 12, 1)],
    ),
    "CogView4Transformer2DModel training": Case(
        cogview4_for_training,
        COGVIEW_LAYERS,
        [cogview4_training_call(12, 20, 7, 2, 4), cogview4_training_call(20, 12, 8, 1, 5)],
    ),
    "ErnieImageTransformer2DModel": Case(
        ernie,
        {"layers.*.self_attention": "joint"},
        [ernie_call(12, 20, [7, 4]), ernie_call(20, 12, [7, 7]), ernie_call(8, 24, [12])],
    ),
    "HunyuanImageTransformer2DModel": Case(
        hunyuan_image,
        JOINT_AND_SINGLE,
        [
            hunyuan_image_call((12, 20), 7, 2, visible=4),
            hunyuan_image_call((20, 12), 7, 2, visible=7),
            hunyuan_image_call((8, 24), 12, 1, visible=9),
        ],
    ),
    "HunyuanImageTransformer2DModel ByT5": Case(
        lambda: hunyuan_image(text_embed_2_dim=12),
        JOINT_AND_SINGLE,
        [
            hunyuan_image_call((12, 20), 7, 2, visible=4, glyphs=5),
            hunyuan_image_call((20, 12), 7, 2, visible=7),
            hunyuan_image_call((8, 24), 12, 1, visible=9, glyphs=3),
        ],
    ),
    "HunyuanImageTransformer2DModel refiner": Case(
        lambda: hunyuan_image(patch_size=(1, 2, 2), rope_axes_dim=(4, 6, 6)),
        JOINT_AND_SINGLE,
        [hunyuan_image_call((3, 8, 12), 7, 2, visible=4), hunyuan_image_call((1, 12, 20), 7, 2, visible=7)],
    ),
    "PRXTransformer2DModel": Case(
        prx,
        {"blocks.*.attention": "queries"},
        [prx_call(12, 20, 7, 2, visible=4), prx_call(20, 12, 7, 2), prx_call(8, 24, 12, 1)],
    ),
}
