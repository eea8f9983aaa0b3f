"""All supported transformers by class name, those that are refused, and what to say of the others."""

from __future__ import annotations

import difflib

from torch import nn

from diffusers_linattn.models.family import Family
from diffusers_linattn.models.image import IMAGE_MODELS
from diffusers_linattn.models.image_shapes import IMAGE_SHAPE_MODELS
from diffusers_linattn.models.image_streams import IMAGE_STREAM_MODELS
from diffusers_linattn.models.input_images import INPUT_IMAGE_MODELS
from diffusers_linattn.models.position_ids import POSITION_ID_MODELS
from diffusers_linattn.models.video import VIDEO_MODELS
from diffusers_linattn.models.video_joint import VIDEO_JOINT_MODELS
from diffusers_linattn.models.video_packed import VIDEO_PACKED_MODELS


FAMILIES: dict[str, Family] = {
    **IMAGE_MODELS,
    **IMAGE_STREAM_MODELS,
    **POSITION_ID_MODELS,
    **IMAGE_SHAPE_MODELS,
    **INPUT_IMAGE_MODELS,
    **VIDEO_MODELS,
    **VIDEO_JOINT_MODELS,
    **VIDEO_PACKED_MODELS,
}

# Why a known transformer is not converted.
REFUSED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": (
        "it attends through FlexAttention under a causal mask of blocks, with a cache of keys, and not through "
        "scaled_dot_product_attention. AnyFlowTransformer3DModel can be converted."
    ),
    "Cosmos3OmniTransformer": (
        "it packs text, video, sound and actions into one sequence without a batch dimension, at positions that only "
        "index tensors give, with queries and projections of its own for each."
    ),
    "Kandinsky6SRTransformer3DModel": (
        "it attends through FlexAttention to chosen blocks of 8x8 tokens, and not through "
        "scaled_dot_product_attention."
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        "it refines a video block by block beside a cache of keys, and its arguments hold rotary embeddings but not "
        "the size of the video."
    ),
    "WanAnimate2Transformer3DModel": (
        "its frames attend through FlexAttention to themselves and to a cache of the reference's keys, and not "
        "through scaled_dot_product_attention. WanAnimateTransformer3DModel can be converted."
    ),
    "SanaTransformer2DModel": "its image self-attention is linear already.",
    "SanaVideoTransformer3DModel": "its video self-attention is linear already.",
    "SanaWMTransformer3DModel": "its video layers are gated linear attention already, and no attention processors.",
    "DreamLiteTransformer2DModel": "it is one block of a UNet, called anew at each of the UNet's resolutions.",
}


def supported_models() -> list[str]:
    """The class names of the transformers that [`linearize`] takes, sorted; subclasses of them count as well.

    Example:
        >>> from diffusers_linattn import supported_models
        >>> "FluxTransformer2DModel" in supported_models()
        True
    """
    return sorted(FAMILIES)


def find_family(model: nn.Module) -> Family | None:
    """The family of a model or of one of its base classes, by class name; `None` when there is none."""
    return FAMILIES.get(supported_class(model))


def supported_class(model: nn.Module) -> str:
    """The name of a model's class, or of the one in our tables that it is a subclass of."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((name for name in names if name in REFUSED or name in FAMILIES), names[0])


def unsupported_message(problem: str, *classes: type) -> str:
    """`problem`, or why one of the classes is refused; what is supported, a similar class, and how to add another."""
    for cls in classes:
        for base in cls.__mro__:
            if base.__name__ in REFUSED:
                return f"{cls.__name__} cannot be converted: {REFUSED[base.__name__]} See docs/models.md for what can."
    unets = [cls.__name__ for cls in classes if "UNet" in cls.__name__]
    if unets:
        return (
            f"{problem} {unets[0]} is a U-Net: diffusers_linattn converts diffusion transformers (FLUX, SD3, PixArt "
            "...), see docs/models.md."
        )
    similar = [name for cls in classes for name in difflib.get_close_matches(cls.__name__, FAMILIES, n=1, cutoff=0.8)]
    hint = f" The closest is {similar[0]}." if similar else ""
    return (
        f"{problem}{hint} Supported: {', '.join(supported_models())}. A new model is one function and one row of a "
        "table: see docs/adding_a_model.md."
    )
