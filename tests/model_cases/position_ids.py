"""Models that take packed tokens with their grid in position ids beside them: FLUX and its kin."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

import tiny
from model_cases.case import Call, Case, randn, seeded, tokens


Size = tuple[int, int]
FLUX_LAYERS = {"transformer_blocks.*.attn": "joint", "single_transformer_blocks.*.attn": "joint"}
SMALL: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 4, 2),
}


def flux_call(
    height: int, width: int, text: int, batch: int, reference: Size | None = None, channels: int = 16
) -> Call:
    parts: list = [("text", text), ("image", (1, height, width))]
    if reference is not None:
        parts.append(("reference", (1, *reference)))
    return Call(
        tiny.flux_inputs(height, width, text, batch, reference, channels),
        {"joint": tokens(*parts)},
        touched=((slice(None), 2 * width + 1), text + 2 * width + 1),
    )


def picture_ids(size: Size, first: float = 0, last: float | None = None, start: int = 0, step: float = 1):
    """(tokens, 3 or 4) ids: picture, y, x, and in FLUX.2 and 3 a fourth."""
    ids = tiny.flux_ids(*size, picture=0)
    ids = ids * step + start
    ids[:, 0] = first
    return ids if last is None else torch.cat([ids, torch.full((len(ids), 1), float(last))], 1)


def like_flux_call(size: Size, text: int, batch: int, references: tuple[Size, ...] = (), **inputs: Any) -> Call:
    """A call of a model that has FLUX's arguments; the first column counts the references."""
    ids = torch.cat([picture_ids(picture, i) for i, picture in enumerate((size, *references))])
    parts = [("text", text), ("image", (1, *size)), *(("reference", (1, *picture)) for picture in references)]
    return Call(
        {
            "hidden_states": randn(batch, len(ids), 8),
            "encoder_hidden_states": randn(batch, text, 12, seed=1),
            "timestep": torch.tensor([0.3] * batch),
            "img_ids": ids,
            "txt_ids": torch.zeros(text, 3),
            "return_dict": False,
            **inputs,
        },
        {"joint": tokens(*parts)},
        touched=((slice(None), 2 * size[1] + 1), text + 2 * size[1] + 1),
    )


def padded_text(call: Call, lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The (batch, tokens) mask of a joint sequence whose text has these lengths."""
    batch, text, _ = call.inputs["encoder_hidden_states"].shape
    mask = torch.ones(batch, text + call.inputs["hidden_states"].shape[1], dtype=dtype)
    for sample, length in enumerate(lengths):
        mask[sample, length:text] = 0
    return mask


def chroma() -> torch.nn.Module:
    return seeded(
        diffusers.ChromaTransformer2DModel,
        **SMALL,
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )


def chroma_call(size: Size, text: int, lengths: list[int], dtype: torch.dtype = torch.bool) -> Call:
    call = like_flux_call(size, text, len(lengths))
    call.inputs["attention_mask"] = padded_text(call, lengths, dtype)
    if dtype == torch.bool:  # a mask of floats is added to the scores, so that it hides nothing
        call.hidden = ("encoder_hidden_states", (0, slice(lengths[0], None)))
    return call


def fibo() -> torch.nn.Module:
    return seeded(diffusers.BriaFiboTransformer2DModel, **SMALL, text_encoder_dim=12)


def fibo_call(size: Size, text: int, lengths: list[int], references: tuple[Size, ...] = ()) -> Call:
    layers = [randn(len(lengths), text, 12, seed=2 + i) for i in range(2)]
    call = like_flux_call(size, text, len(lengths), references, text_encoder_layers=layers)
    if min(lengths) < text:
        mask = padded_text(call, lengths, torch.bool)[:, None, None]
        call.inputs["joint_attention_kwargs"] = {"attention_mask": mask}
        call.hidden = ("encoder_hidden_states", (0, slice(lengths[0], None)))
    return call


def longcat_call(size: Size, text: int, batch: int, reference: Size | None = None) -> Call:
    call = like_flux_call(size, text, batch, () if reference is None else (reference,))
    ids = [picture_ids(size, 1, start=text)]
    if reference is not None:
        ids.append(picture_ids(reference, 2, start=text))
    call.inputs["img_ids"] = torch.cat(ids)
    return call


def flux2(kv_cache: bool = False) -> torch.nn.Module:
    config = {**SMALL, "axes_dims_rope": (2, 2, 2, 2)}
    model: Any = seeded(diffusers.Flux2Transformer2DModel, **config, timestep_guidance_channels=8)
    if kv_cache:
        from diffusers.models.transformers import transformer_flux2 as source

        for block in model.transformer_blocks:
            block.attn.set_processor(source.Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(source.Flux2KVParallelSelfAttnProcessor())
    return model


def flux2_call(size: Size, text: int, batch: int, references: tuple[Size, ...] = ()) -> Call:
    call = like_flux_call(size, text, batch, references)
    ids = [picture_ids(picture, 10 * i, 0) for i, picture in enumerate((size, *references))]
    call.inputs["img_ids"] = torch.cat(ids).expand(batch, -1, -1)
    call.inputs["txt_ids"] = torch.zeros(batch, text, 4)
    call.inputs["guidance"] = torch.tensor([2.0] * batch)
    return call


def flux2_kv_call(size: Size, text: int, batch: int, reference: Size, cached: bool = False) -> Call:
    """The references stand first and see themselves alone; later steps have their keys and values in a cache."""
    call = flux2_call(size, text, batch)
    length, image = reference[0] * reference[1], text + reference[0] * reference[1]
    row = 2 * size[1] + 1
    call.tokens = {"joint": tokens(("text", text), ("memory", length), ("image", (1, *size)))}
    call.asking = [*range(text), *range(image, image + size[0] * size[1])]
    call.touched = ((slice(None), row), image + row)
    if cached:
        from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

        cache = Flux2KVCache(1, 1)
        cache.num_ref_tokens = length
        for i, layer in enumerate(cache.double_block_caches + cache.single_block_caches):
            layer.store(randn(batch, length, 2, 8, seed=5 + i), randn(batch, length, 2, 8, seed=7 + i))
        call.inputs |= {"kv_cache": cache, "kv_cache_mode": "cached"}
    else:
        ids = torch.cat([picture_ids(reference, 10, 0), picture_ids(size, 0, 0)])
        call.inputs |= {
            "img_ids": ids.expand(batch, -1, -1),
            "hidden_states": randn(batch, len(ids), 8),
            "kv_cache_mode": "extract",
            "num_ref_tokens": length,
        }
        call.touched = ((slice(None), length + row), image + row)
    return call


def flux3() -> torch.nn.Module:
    config = {**SMALL, "axes_dims_rope": (2, 2, 2, 2)}
    return seeded(diffusers.Flux3Transformer2DModel, **config, cond_in_channels=8, timestep_channels=8)


def flux3_call(size: Size, text: int, batch: int, references: tuple[Size, ...] = ()) -> Call:
    call = like_flux_call(size, text, batch)
    call.inputs["img_ids"] = picture_ids(size, 0, 0, step=1.7)
    call.inputs["txt_ids"] = torch.zeros(text, 4)
    images: list = [("image", (1, *size)), *(("reference", (1, *picture)) for picture in references)]
    call.tokens = {"joint": tokens(("text", text), *images), "image": tokens(images[0])}
    call.touched = ((slice(None), 2 * size[1] + 1), 2 * size[1] + 1)
    if references:
        ids = torch.cat([picture_ids(picture, 0, -1 - i, step=1.7) for i, picture in enumerate(references)])
        call.inputs |= {"image_cond_ids": ids, "image_cond_hidden_states": randn(batch, len(ids), 8, seed=3)}
        call.tokens["references"] = tokens(*images[1:])
    return call


FLUX3_LAYERS = {
    "mode_blocks.image.*.attn": "image",
    "mode_blocks.image_cond.*.attn": "references",
    "single_transformer_blocks.*.attn": "joint",
}


def krea2() -> torch.nn.Module:
    return seeded(
        diffusers.Krea2Transformer2DModel,
        in_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=8,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=8,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(2, 4, 2),
    )


def krea2_call(size: Size, text: int, lengths: list[int]) -> Call:
    batch = len(lengths)
    call = Call(
        {
            "hidden_states": randn(batch, size[0] * size[1], 8),
            "encoder_hidden_states": randn(batch, text, 2, 8, seed=1),
            "timestep": torch.tensor([0.3] * batch),
            "position_ids": torch.cat([torch.zeros(text, 3), picture_ids(size)]),
            "return_dict": False,
        },
        {"joint": tokens(("text", text), ("image", (1, *size)))},
        touched=((slice(None), 2 * size[1] + 1), text + 2 * size[1] + 1),
    )
    if min(lengths) < text:
        call.inputs["encoder_attention_mask"] = padded_text(call_with_flat_text(call), lengths, torch.bool)[:, :text]
        call.hidden = ("encoder_hidden_states", (0, slice(lengths[0], None)))
    return call


def call_with_flat_text(call: Call) -> Call:
    flat = call.inputs["encoder_hidden_states"].flatten(2)
    return Call({**call.inputs, "encoder_hidden_states": flat}, call.tokens)


def ideogram4() -> torch.nn.Module:
    return seeded(
        diffusers.Ideogram4Transformer2DModel,
        in_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        intermediate_size=16,
        adaln_dim=8,
        llm_features_dim=12,
        mrope_section=(2, 1, 1),
    )


def ideogram4_call(size: Size, text: int, lengths: list[int]) -> Call:
    """[padding, text, image] in each row, as the pipeline packs them."""
    batch, length = len(lengths), text + size[0] * size[1]
    ids = torch.zeros(batch, length, 3, dtype=torch.long)
    segments, roles = torch.full((batch, length), -1), torch.zeros(batch, length, dtype=torch.long)
    ids[:, text:] = picture_ids(size).long() + 65536
    for sample, number in enumerate(lengths):
        ids[sample, text - number : text] = torch.arange(number)[:, None]
        segments[sample, text - number :] = 1
        roles[sample, text - number : text], roles[sample, text:] = 3, 2
    row = text + 2 * size[1] + 1
    return Call(
        {
            "hidden_states": randn(batch, length, 8),
            "timestep": torch.tensor([0.3] * batch),
            "encoder_hidden_states": randn(batch, length, 12, seed=1),
            "position_ids": ids,
            "segment_ids": segments,
            "indicator": roles,
            "return_dict": False,
        },
        {"joint": tokens(("text", text), ("image", (1, *size)))},
        touched=((slice(None), row), row),
        hidden=("encoder_hidden_states", (0, slice(0, text - lengths[0]))) if text > lengths[0] else None,
    )


POSITION_IDS: dict[str, Case] = {
    "FluxTransformer2DModel": Case(
        tiny.flux,
        FLUX_LAYERS,
        [flux_call(6, 9, 7, 2), flux_call(9, 6, 7, 2), flux_call(5, 3, 77, 1), flux_call(4, 5, 0, 3)],
    ),
    "FluxTransformer2DModel Kontext": Case(
        tiny.flux,
        FLUX_LAYERS,
        [flux_call(6, 9, 7, 2, (4, 5)), flux_call(6, 9, 7, 2), flux_call(3, 7, 1, 1, (6, 6))],
    ),
    "FluxTransformer2DModel Fill": Case(
        lambda: tiny.flux(in_channels=32, out_channels=16), FLUX_LAYERS, [flux_call(4, 6, 7, 2, channels=32)]
    ),
    "ChromaTransformer2DModel": Case(
        chroma,
        FLUX_LAYERS,
        [
            chroma_call((4, 6), 7, [4, 7]),
            chroma_call((6, 4), 5, [2]),
            chroma_call((4, 6), 7, [4, 7], torch.float32),
            like_flux_call((3, 7), 5, 3),
        ],
    ),
    "BriaTransformer2DModel": Case(
        lambda: seeded(diffusers.BriaTransformer2DModel, **SMALL),
        FLUX_LAYERS,
        [like_flux_call((4, 6), 7, 2), like_flux_call((6, 4), 5, 1), like_flux_call((5, 3), 5, 3)],
    ),
    "BriaFiboTransformer2DModel": Case(
        fibo, FLUX_LAYERS, [fibo_call((4, 6), 7, [4, 7]), fibo_call((6, 4), 5, [5]), fibo_call((5, 3), 7, [7, 2, 1])]
    ),
    "BriaFiboTransformer2DModel Edit": Case(
        fibo,
        FLUX_LAYERS,
        [
            fibo_call((4, 6), 7, [4, 7], ((3, 5), (2, 2))),
            fibo_call((6, 4), 5, [5], ((3, 5),)),
            fibo_call((6, 4), 5, [5]),
        ],
    ),
    "OvisImageTransformer2DModel": Case(
        lambda: seeded(diffusers.OvisImageTransformer2DModel, **SMALL),
        FLUX_LAYERS,
        [like_flux_call((4, 6), 7, 2), like_flux_call((6, 4), 5, 1), like_flux_call((5, 3), 5, 3)],
    ),
    "LongCatImageTransformer2DModel": Case(
        lambda: seeded(diffusers.LongCatImageTransformer2DModel, **SMALL, pooled_projection_dim=12),
        FLUX_LAYERS,
        [longcat_call((4, 6), 7, 2), longcat_call((6, 4), 5, 1), longcat_call((5, 3), 5, 3)],
    ),
    "LongCatImageTransformer2DModel Edit": Case(
        lambda: seeded(diffusers.LongCatImageTransformer2DModel, **SMALL, pooled_projection_dim=12),
        FLUX_LAYERS,
        [longcat_call((4, 6), 7, 2, (3, 5)), longcat_call((6, 4), 5, 1), longcat_call((5, 3), 5, 1, (4, 4))],
    ),
    "Flux2Transformer2DModel": Case(
        flux2, FLUX_LAYERS, [flux2_call((4, 6), 7, 2), flux2_call((6, 4), 5, 1), flux2_call((5, 3), 5, 3)]
    ),
    "Flux2Transformer2DModel references": Case(
        flux2,
        FLUX_LAYERS,
        [flux2_call((4, 6), 7, 2, ((3, 5), (4, 4))), flux2_call((6, 4), 5, 1, ((2, 2),)), flux2_call((6, 4), 5, 1)],
    ),
    "Flux2Transformer2DModel KV cache": Case(
        lambda: flux2(kv_cache=True),
        FLUX_LAYERS,
        [
            flux2_kv_call((4, 6), 7, 2, (3, 5)),
            flux2_kv_call((4, 6), 7, 2, (3, 5), cached=True),
            flux2_call((4, 6), 7, 2),
            flux2_kv_call((6, 4), 6, 1, (2, 3)),
            flux2_kv_call((6, 4), 6, 1, (2, 3), cached=True),
        ],
    ),
    "Flux3Transformer2DModel": Case(
        flux3, FLUX3_LAYERS, [flux3_call((4, 6), 7, 2, ((3, 5),)), flux3_call((6, 4), 5, 1, ((3, 3), (2, 5)))]
    ),
    "Krea2Transformer2DModel": Case(
        krea2,
        {"transformer_blocks.*.attn": "joint"},
        [krea2_call((4, 6), 7, [4, 7]), krea2_call((6, 4), 5, [5]), krea2_call((5, 3), 7, [7, 2, 1])],
    ),
    "Ideogram4Transformer2DModel": Case(
        ideogram4,
        {"layers.*.attention": "joint"},
        [
            ideogram4_call((4, 6), 7, [4, 7]),
            ideogram4_call((4, 6), 0, [0, 0]),
            ideogram4_call((6, 4), 5, [5]),
            ideogram4_call((5, 3), 7, [7, 2, 1]),
        ],
    ),
}
