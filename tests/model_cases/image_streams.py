"""Image models whose image stream is more than one grid: references, padding, samples of several sizes."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch

from model_cases.case import Call, Case, randn, seeded, tokens
from model_cases.image_joint import COGVIEW, COGVIEW_LAYERS, cogview_call, first_sample_shorter


def glm_image() -> torch.nn.Module:
    return seeded(diffusers.GlmImageTransformer2DModel, **COGVIEW, prior_vq_quantizer_codebook_size=11)


def glm_image_call(height: int, width: int, text: int, batch: int, visible: int | None = None, **inputs: Any) -> Call:
    prior = torch.arange(batch * height * width // 4).reshape(batch, -1) % 11
    return cogview_call(
        height,
        width,
        text,
        batch,
        original_size=False,
        prior_token_id=prior,
        prior_token_drop=prior > 8,
        # As in CogView4, this mask hides nothing.
        attention_mask=None if visible is None else first_sample_shorter(batch, text, visible),
        **inputs,
    )


def glm_image_reference_call(
    height: int, width: int, text: int, batch: int, references: list[tuple[int, int]], known: bool = True
) -> Call:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    length = sum(map(math.prod, references))
    caches: Any = GlmImageKVCache(num_layers=2)
    for i, cache in enumerate(caches.caches):
        cache.store(randn(1, length, 2, 16, seed=10 + i), randn(1, length, 2, 16, seed=20 + i))
    caches.set_mode("read")
    if known:  # what our hook notes in the calls that fill the cache
        caches.reference_grids = {0: [(1, *size) for size in references]}
    call = glm_image_call(height, width, text, batch, kv_caches=caches)
    grid, row = (1, height // 2, width // 2), call.touched[1]  # type: ignore[index]
    cached: list[tuple[str, Any]] = [("memory", (1, *size)) for size in references] if known else [("memory", length)]
    call.tokens = {"joint": tokens(*cached, ("text", text), ("image", grid))}
    call.touched = (call.touched[0], length + row)  # type: ignore[index]
    call.asking = range(length, length + text + grid[1] * grid[2])
    return call


def hidream() -> torch.nn.Module:
    return seeded(
        diffusers.HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[12, 24],
        text_emb_dim=8,
        num_routed_experts=0,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(18, 18),
        llama_layers=[0, 1],
    )


def hidream_inputs(latents: torch.Tensor, t5: int, llama: int, **inputs: Any) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents,
        "timesteps": torch.tensor([3.0] * batch),
        "encoder_hidden_states_t5": randn(batch, t5, 12, seed=1),
        "encoder_hidden_states_llama3": randn(2, batch, llama, 24, seed=2),
        "pooled_embeds": randn(batch, 8, seed=3),
        "return_dict": False,
        **inputs,
    }


def hidream_call(height: int, width: int, t5: int, llama: int, batch: int) -> Call:
    grid = (1, height // 2, width // 2)
    padding = 0 if height == width else 9 * 9 - grid[1] * grid[2]
    return Call(
        hidream_inputs(randn(batch, 4, height, width), t5, llama),
        {"joint": tokens(("image", grid), ("padding", padding), ("text", t5 + 2 * llama))},
        touched=((slice(None), slice(None), 5, 8), 2 * grid[2] + 4),
    )


def hidream_packed_call(sizes: list[tuple[int, int]], length: int, as_tensor: bool = False) -> Call:
    batch = len(sizes)
    ids, mask = torch.zeros(batch, length, 3), torch.zeros(batch, length)
    for sample, (height, width) in enumerate(sizes):
        yx = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        ids[sample, : height * width, 1:] = yx.float()
        mask[sample, : height * width] = 1
    img_sizes = torch.tensor(sizes) if as_tensor else sizes
    return Call(
        hidream_inputs(randn(batch, length, 16), 5, 4, img_ids=ids, img_sizes=img_sizes, hidden_states_masks=mask),
        {"joint": [tokens(("image", (1, *size)), ("pad", length - math.prod(size)), ("text", 13)) for size in sizes]},
        touched=((0, 2 * sizes[0][1] + 4), 2 * sizes[0][1] + 4),
    )


def joy(name: str) -> torch.nn.Module:
    return seeded(
        getattr(diffusers, name),
        patch_size=[1, 2, 2],
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=24,
        mlp_width_ratio=1.0,
        num_layers=2,
        rope_dim_list=[4, 6, 6],
    )


def joy_call(pictures: int | None, height: int, width: int, text: int, batch: int) -> Call:
    """`pictures` in a dimension of their own, of which the last is made and the others are references."""
    grid = (1, height // 2, width // 2)
    references = [("reference", grid)] * ((pictures or 1) - 1)
    made: tuple[Any, ...] = (slice(None), slice(None), 0, 5, 8)
    return Call(
        {
            "hidden_states": randn(batch, *([] if pictures is None else [pictures]), 4, 1, height, width),
            "timestep": torch.tensor([3.0] * batch),
            "encoder_hidden_states": randn(batch, text, 24, seed=1),
            "return_dict": False,
        },
        {"joint": tokens(("image", grid), *references, ("text", text))},
        touched=(made if pictures is None else (slice(None), -1, *made[1:]), 2 * grid[2] + 4),
    )


def joy_plus_call(shapes: list[list[tuple[int, int, int]]], lengths: list[int] | None, text: int) -> Call:
    batch, stream = len(shapes), 2 + max(sum(map(math.prod, sample)) for sample in shapes)
    mask = None
    if lengths is not None:
        mask = torch.zeros(batch, text)
        for sample, length in enumerate(lengths):
            mask[sample, :length] = 1
    sequences = []
    for sample in shapes:
        padding = stream - sum(map(math.prod, sample))
        sequences.append(tokens(*(("picture", shape) for shape in sample), ("padding", padding), ("text", text)))
    row = 2 * shapes[0][0][2] + 1
    return Call(
        {
            "hidden_states": randn(batch, stream, 4, 1, 2, 2),
            "timestep": torch.tensor([3.0] * batch),
            "encoder_hidden_states": randn(batch, text, 24, seed=1),
            "encoder_hidden_states_mask": mask,
            "shape_list": shapes,
            "return_dict": False,
        },
        {"joint": sequences},
        touched=((0, row), row),
        hidden=None if lengths is None else ("encoder_hidden_states", (0, slice(lengths[0], None))),
    )


def z_image(**changes: Any) -> torch.nn.Module:
    config = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 32, 32],
    }
    return seeded(diffusers.ZImageTransformer2DModel, **{**config, **changes})


def to_32(length: int) -> int:
    return math.ceil(length / 32) * 32


def z_image_picture(kind: str, height: int, width: int) -> list[tuple[str, Any]]:
    grid = (1, height // 2, width // 2)
    return [(kind, grid), ("padding", to_32(grid[1] * grid[2]) - grid[1] * grid[2])]


def z_image_call(sizes: list[tuple[int, int]], lengths: list[int]) -> Call:
    streams = [z_image_picture("image", *size) for size in sizes]
    return Call(
        {
            "x": [randn(4, 1, *size, seed=i) for i, size in enumerate(sizes)],
            "t": torch.tensor([0.3] * len(sizes)),
            "cap_feats": [randn(length, 24, seed=9 + i) for i, length in enumerate(lengths)],
            "return_dict": False,
        },
        {
            "joint": [
                tokens(*stream, ("text", to_32(length))) for stream, length in zip(streams, lengths, strict=True)
            ],
            "image": [tokens(*stream) for stream in streams],
        },
        touched=((0, slice(None), 0, 5, 6), 2 * (sizes[0][1] // 2) + 3),
        latents="x",
    )


def z_image_omni_call(
    pictures: list[list[tuple[int, int] | None]], lengths: list[int], semantic: tuple[int, int] | None = None
) -> Call:
    """Samples of pictures, of which the last is made; each has a caption before it and perhaps what SigLIP saw."""
    joint, image = [], []
    for sample in pictures:
        parts: list[tuple[str, Any]] = []
        for size in sample:
            parts += [("padding", 32)] if size is None else z_image_picture("picture", *size)
        seen = [("siglip", to_32(math.prod(semantic))), ("siglip", 32)] if semantic else []
        joint.append(tokens(*(("text", to_32(length)) for length in lengths), *parts, *seen))
        image.append(tokens(*parts))
    first, made = pictures[0]
    before = 32 if first is None else to_32(first[0] * first[1] // 4)
    siglip = None if semantic is None else [randn(*semantic, 12, seed=7), None]
    assert made is not None
    return Call(
        {
            "x": [
                [None if size is None else randn(16, 1, *size, seed=i) for i, size in enumerate(sample)]
                for sample in pictures
            ],
            "t": torch.tensor([0.3] * len(pictures)),
            "cap_feats": [[randn(length, 24, seed=9) for length in lengths] for _ in pictures],
            "siglip_feats": [siglip for _ in pictures],
            "image_noise_mask": [[0, 1] for _ in pictures],
            "return_dict": False,
        },
        {"joint": joint, "image": image},
        touched=((0, 1, slice(None), 0, 5, 6), before + 2 * (made[1] // 2) + 3),
        latents="x",
    )


HIDREAM_LAYERS = {"double_stream_blocks.*.attn1": "joint", "single_stream_blocks.*.attn1": "joint"}
Z_IMAGE_LAYERS = {"layers.*.attention": "joint", "noise_refiner.*.attention": "image"}

IMAGE_STREAMS: dict[str, Case] = {
    "GlmImageTransformer2DModel": Case(
        glm_image,
        COGVIEW_LAYERS,
        [glm_image_call(12, 20, 7, 2, visible=4), glm_image_call(20, 12, 7, 2), glm_image_call(8, 24, 0, 1)],
    ),
    "GlmImageTransformer2DModel references": Case(
        glm_image,
        COGVIEW_LAYERS,
        [
            glm_image_reference_call(8, 12, 7, 2, [(5, 6)]),
            glm_image_reference_call(8, 12, 7, 2, [(5, 6)], known=False),
            glm_image_reference_call(12, 10, 5, 1, [(4, 4), (3, 7)]),
            glm_image_call(8, 12, 7, 2),
        ],
    ),
    "HiDreamImageTransformer2DModel": Case(
        hidream,
        HIDREAM_LAYERS,
        [
            hidream_call(12, 20, 5, 4, 2),
            hidream_call(20, 12, 5, 4, 2),
            hidream_call(12, 12, 5, 4, 2),
            hidream_call(8, 24, 3, 6, 1),
        ],
    ),
    "HiDreamImageTransformer2DModel packed": Case(
        lambda: hidream().train(),  # several sizes in a batch are for training
        HIDREAM_LAYERS,
        [
            hidream_packed_call([(5, 8), (9, 4)], 42),
            hidream_packed_call([(5, 8), (5, 8)], 40, as_tensor=True),
            hidream_packed_call([(3, 6)], 20),
        ],
    ),
    "JoyImageEditTransformer3DModel": Case(
        lambda: joy("JoyImageEditTransformer3DModel"),
        {"double_blocks.*.attn": "joint"},
        [
            joy_call(2, 8, 12, 7, 2),
            joy_call(3, 12, 10, 7, 1),
            joy_call(1, 10, 16, 12, 2),
            joy_call(None, 12, 20, 7, 1),
        ],
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        lambda: joy("JoyImageEditPlusTransformer3DModel"),
        {"double_blocks.*.attn": "joint"},
        [
            joy_plus_call([[(1, 4, 7), (1, 3, 5)], [(1, 6, 4), (1, 5, 3), (1, 3, 3)]], [4, 7], text=7),
            joy_plus_call([[(1, 4, 7), (1, 3, 5)], [(1, 4, 7), (1, 3, 5)]], None, text=7),
            joy_plus_call([[(1, 7, 6)]], [9], text=12),
        ],
    ),
    "ZImageTransformer2DModel": Case(
        z_image,
        Z_IMAGE_LAYERS,
        [
            z_image_call([(8, 12), (8, 12)], [7, 5]),
            z_image_call([(8, 12), (12, 8)], [7, 40]),
            z_image_call([(12, 20), (8, 8)], [7, 5]),
            z_image_call([(16, 8)], [33]),
        ],
    ),
    "ZImageTransformer2DModel Omni": Case(
        lambda: z_image(in_channels=16, siglip_feat_dim=12),
        Z_IMAGE_LAYERS,
        [
            z_image_omni_call([[(8, 6), (8, 12)], [(6, 8), (12, 8)]], [7, 5], semantic=(3, 4)),
            z_image_omni_call([[(12, 6), (12, 10)]], [3, 4]),
            z_image_omni_call([[None, (8, 12)], [(8, 12), (8, 12)]], [7, 5]),
        ],
    ),
}
