"""All supported transformers by class name, those that are refused, and what to say of the others."""

from __future__ import annotations

import difflib

from torch import nn

from diffusers_linattn.models.family import Family
from diffusers_linattn.models.image import IMAGE_MODELS
from diffusers_linattn.models.position_ids import POSITION_ID_MODELS
from diffusers_linattn.models.video import VIDEO_MODELS


FAMILIES: dict[str, Family] = {**IMAGE_MODELS, **POSITION_ID_MODELS, **VIDEO_MODELS}

# Why a known transformer is not converted.
REFUSED: dict[str, str] = {}


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
    for cls in type(model).__mro__:
        if cls.__name__ in REFUSED:
            return None
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    return None


def unsupported_message(problem: str, *classes: type) -> str:
    """`problem`, or why one of the classes is refused; the supported classes, the closest, and how to add another."""
    for cls in classes:
        for base in cls.__mro__:
            if base.__name__ in REFUSED:
                return f"{cls.__name__} cannot be converted: {REFUSED[base.__name__]}"
    scores = [(difflib.SequenceMatcher(None, cls.__name__, name).ratio(), name) for cls in classes for name in FAMILIES]
    closest = f" The closest is {max(scores)[1]}." if scores else ""
    return (
        f"{problem}{closest} Supported: {', '.join(supported_models())}. A new model is one function and one row of a "
        "table: see docs/adding_a_model.md."
    )
