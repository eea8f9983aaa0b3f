"""What the library knows of each diffusers transformer: which layers convert, and where the token grid comes from.

A model costs one function (forward arguments to [`TokenLayout`]) and one row of a table; see `docs/adding_a_model.md`.
Nothing here knows an attention mechanism.
"""

from diffusers_linattn.models.family import Family, ForwardArguments, Layouts
from diffusers_linattn.models.supported import (
    FAMILIES,
    REFUSED,
    find_family,
    supported_class,
    supported_models,
    unsupported_message,
)


__all__ = [
    "FAMILIES",
    "REFUSED",
    "Family",
    "ForwardArguments",
    "Layouts",
    "find_family",
    "supported_class",
    "supported_models",
    "unsupported_message",
]
