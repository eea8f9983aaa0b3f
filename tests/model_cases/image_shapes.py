"""Models that take packed tokens with a list of picture shapes beside them: Qwen-Image and its kin."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from model_cases.case import Call, Case, randn, seeded, tokens


Shape = tuple[int, int, int]
LAYERS = {"transformer_blocks.*.attn": "joint"}


def count(shapes: list[Shape]) -> int:
    return sum(frames * height * width for frames, height, width in shapes)


def text_mask(text: int, lengths: list[int]) -> torch.Tensor:
    return torch.arange(text) < torch.tensor(lengths)[:, None]


def qwen(**config: Any) -> torch.nn.Module:
    return seeded(
        diffusers.QwenImageTransformer2DModel,
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 4, 2),
        **config,
    )


def qwen_call(shapes: list[Shape], text: int, lengths: list[int], grids: list[Shape] | None = None, **inputs) -> Call:
    """`shapes` is what the pipeline passes, `grids` what the tokens are, if that is not the same."""
    batch, width = len(lengths), shapes[0][2]
    pictures = [("reference" if i else "image", grid) for i, grid in enumerate(grids or shapes)]
    call = Call(
        {
            "hidden_states": randn(batch, count(shapes), 8),
            "encoder_hidden_states": randn(batch, text, 12, seed=1),
            "timestep": torch.tensor([0.3] * batch),
            "img_shapes": [shapes] * batch,
            "return_dict": False,
            **inputs,
        },
        {"joint": tokens(("text", text), *pictures)},
        touched=((slice(None), 2 * width + 1), text + 2 * width + 1),
    )
    if min(lengths) < text:
        call.inputs["encoder_hidden_states_mask"] = text_mask(text, lengths)
        call.hidden = ("encoder_hidden_states", (0, slice(lengths[0], None)))
    return call


def qwen_controlnet_call(shape: Shape, text: int, lengths: list[int]) -> Call:
    call = qwen_call([shape], text, lengths)
    call.inputs["img_shapes"] = [shape] * len(lengths)
    call.inputs["controlnet_block_samples"] = [randn(len(lengths), count([shape]), 16, seed=4)]
    return call


def layered_call(layers: int, size: tuple[int, int], condition: tuple[int, int], lengths: list[int]) -> Call:
    shapes = [(1, *size)] * layers + [(1, *condition)]
    return qwen_call(
        shapes,
        7,
        lengths,
        [(layers, *size), (1, *condition)],
        additional_t_cond=torch.zeros(len(lengths), dtype=torch.long),
    )


def image_alone(model: Any, args: Any, inputs: dict[str, Any], output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What the pipeline takes of the output: what comes out at the prefix has no meaning."""
    return (output[0][:, -count(inputs["img_shapes"][0][-1:]) :],)


def qwen21() -> torch.nn.Module:
    model = seeded(
        diffusers.QwenImage21Transformer2DModel,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        context_in_dim=12,
        axes_dims_rope=(2, 4, 2),
    )
    model.register_forward_hook(image_alone, with_kwargs=True)
    return model


def qwen21_call(parts: list[int | Shape], lengths: list[int], cache: str | None = None) -> Call:
    """`parts` are text tokens and shapes in their order; the last is the image, the others are in its prefix."""
    shapes = [part for part in parts if not isinstance(part, int)]
    batch, (_, _, width) = len(lengths), shapes[-1]
    runs = [[False] * part if isinstance(part, int) else [True] * (count([part]) // 4) for part in parts]
    slots = torch.tensor([slot for run in runs for slot in run])
    text, target = len(slots) - count(shapes[-1:]) // 4, count(shapes[-1:])
    joint = tokens(*(("text" if isinstance(part, int) else "memory", part) for part in parts))
    prefix, row = len(joint) - target, 2 * width + 1
    call = Call(
        {
            "hidden_states": randn(batch, count(shapes), 8),
            "encoder_hidden_states": randn(batch, text, 12, seed=1),
            "timestep": torch.tensor([0.3] * batch),
            "img_shapes": [shapes] * batch,
            "img_mask": slots.expand(batch, -1),
            "return_dict": False,
        },
        {"joint": joint},
        touched=((slice(None), count(shapes[:-1]) + row), prefix + row),
        asking=range(prefix, len(joint)),
    )
    if cache is not None and hasattr(diffusers, "QwenImage21Transformer2DModel"):  # not in older releases
        from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

        kept = QwenImage21KVCache(2)
        for i in range(2):
            kept.get_layer(i).store(randn(batch, prefix, 2, 8, seed=5 + i), randn(batch, prefix, 2, 8, seed=7 + i))
        call.inputs |= {"kv_cache": kept, "kv_cache_mode": cache}
    if min(lengths) < text:
        call.inputs["encoder_hidden_states_mask"] = text_mask(text, lengths)
        if cache is None:
            call.hidden = ("encoder_hidden_states", (0, slice(lengths[0], None)))
    return call


def nucleus() -> torch.nn.Module:
    model = seeded(
        diffusers.NucleusMoEImageTransformer2DModel,
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 4, 2),
        mlp_ratio=8.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=8,
        capacity_factors=2.0,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:  # diffusers leaves them as they are in memory
                parameter.normal_(0, 0.1)
    return model


def nucleus_call(shape: Shape, text: int, lengths: list[int]) -> Call:
    call = qwen_call([shape], text, lengths)
    call.inputs["img_shapes"] = [shape] * len(lengths)
    call.tokens = {"joint": tokens(("image", shape), ("text", text))}
    call.touched = ((slice(None), 2 * shape[2] + 1), 2 * shape[2] + 1)
    return call


IMAGE_SHAPES: dict[str, Case] = {
    "QwenImageTransformer2DModel": Case(
        qwen,
        LAYERS,
        [
            qwen_call([(1, 4, 6)], 7, [4, 7]),
            qwen_call([(1, 6, 4)], 5, [5]),
            qwen_call([(1, 5, 3)], 7, [7, 2, 1]),
            qwen_controlnet_call((1, 4, 6), 7, [7, 5]),
        ],
    ),
    "QwenImageTransformer2DModel Edit": Case(
        lambda: qwen(zero_cond_t=True),
        LAYERS,
        [
            qwen_call([(1, 4, 6), (1, 3, 5)], 7, [4, 7]),
            qwen_call([(1, 6, 4), (1, 2, 2), (1, 4, 3)], 5, [5]),
            qwen_call([(1, 4, 6), (1, 4, 6)], 7, [7, 7]),
        ],
    ),
    "QwenImageTransformer2DModel Layered": Case(
        lambda: qwen(use_layer3d_rope=True, use_additional_t_cond=True),
        LAYERS,
        [
            layered_call(3, (4, 6), (4, 6), [4, 7]),
            layered_call(2, (5, 3), (4, 4), [7]),
            layered_call(1, (4, 6), (4, 6), [7]),
        ],
    ),
    "QwenImage21Transformer2DModel": Case(
        qwen21,
        {"transformer_blocks.*.attn": "queries"},
        [
            qwen21_call([7, (1, 4, 6)], [4, 7]),
            qwen21_call([7, (1, 4, 6)], [7, 7], cache="extract"),
            qwen21_call([7, (1, 4, 6)], [7, 7], cache="cached"),
            qwen21_call([5, (1, 6, 4)], [5]),
        ],
    ),
    "QwenImage21Transformer2DModel Edit": Case(
        qwen21,
        {"transformer_blocks.*.attn": "queries"},
        [
            qwen21_call([3, (1, 4, 4), 4, (1, 4, 6)], [8, 11]),
            qwen21_call([3, (1, 4, 4), 4, (1, 4, 6)], [11, 11], cache="extract"),
            qwen21_call([3, (1, 4, 4), 4, (1, 4, 6)], [11, 11], cache="cached"),
            qwen21_call([2, (1, 4, 2), (1, 2, 4), 3, (1, 6, 4)], [9]),
        ],
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        nucleus,
        {"transformer_blocks.*.attn": "queries"},
        [nucleus_call((1, 4, 6), 7, [4, 7]), nucleus_call((1, 6, 4), 5, [5]), nucleus_call((1, 5, 3), 7, [7, 2, 1])],
    ),
}
