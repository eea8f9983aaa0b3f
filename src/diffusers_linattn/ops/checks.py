"""What the public operators check of their arguments before they choose an implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from diffusers_linattn.layout import TokenLayout


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Wider than any grid; its square fits into 64 bits.
MAX_WINDOW = 2**24


def check_window(name: str, value: object) -> int:
    """`value` if it is a radius that can be computed with, else a ValueError that names the argument."""
    window = check_positive_int(name, value)
    if window > MAX_WINDOW:
        raise ValueError(f"{name} must be at most {MAX_WINDOW}, got {value}.")
    return window


def check_positive_int(name: str, value: object, minimum: int = 1) -> int:
    """`value` if it is an integer of at least `minimum`, else a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
    return value


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError that lists the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}: expected one of {', '.join(map(repr, choices))}.")


def check_tensor(name: str, x: object, query: torch.Tensor) -> None:
    """Raise a ValueError unless `x` is a tensor on the query's device."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}, expected a tensor.")
    if x.device != query.device:
        raise ValueError(f"{name} is on {x.device} and query on {query.device}: move it there.")


def broadcasts(size: int, other: int) -> bool:
    """Whether a side of that size broadcasts to one of the `other` size.

    Not `size in (1, other)`: Dynamo finds no number in a tuple that holds it as a symbolic size (torch 2.13).
    """
    return size == 1 or size == other


def refuse_tangents(impl: str, *tensors: torch.Tensor) -> None:
    """Raise a ValueError under `torch.func.jvp`, whose tangents operators of `torch.library` drop without a word."""
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise ValueError(f"impl={impl!r} has no forward-mode derivative (torch.func.jvp): use impl='reference'.")


def check_attention_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    mask: torch.Tensor | None = None,
    enable_gqa: bool = False,
) -> None:
    """Check tensors against each other and against the layout."""
    if not isinstance(layout, TokenLayout):
        raise ValueError(
            f"layout is {layout!r}, expected a TokenLayout such as TokenLayout.image((1, height, width))."
        )
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x, query)
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}, expected {', '.join(map(str, DTYPES))}: cast it.")
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise ValueError(
            "Expected (batch, heads, tokens, head_dim) tensors, got "
            f"{tuple(query.shape)=}, {tuple(key.shape)=}, {tuple(value.shape)=}."
        )
    if query.shape[2] != layout.length or key.shape[2] != layout.length or value.shape[2] != layout.length:
        raise ValueError(
            f"The layout ({layout}) has {layout.length} tokens, but query has {query.shape[2]}, key {key.shape[2]} "
            f"and value {value.shape[2]}. Build the TokenLayout for the tokens of this call."
        )
    if query.shape[0] != key.shape[0] or key.shape[:2] != value.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            "query, key and value do not fit each other: "
            f"{tuple(query.shape)=}, {tuple(key.shape)=}, {tuple(value.shape)=}."
        )
    if not min(query.shape[1], query.shape[3], key.shape[1], value.shape[3]):
        raise ValueError(
            "Expected at least one head and one channel, got "
            f"{tuple(query.shape)=}, {tuple(key.shape)=}, {tuple(value.shape)=}."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must share a dtype: {query.dtype=}, {key.dtype=}, {value.dtype=}.")
    if mask is not None:
        check_tensor("mask", mask, query)
        if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
            raise ValueError(f"mask is {mask.dtype}, expected bool (True = visible) or floating: pass mask.bool().")
        # Two comparisons rather than a loop over broadcasting rules, so that symbolic shapes stay symbolic.
        if (
            not mask.ndim
            or mask.shape[-1] != layout.length
            or (mask.ndim > 1 and not broadcasts(mask.shape[-2], layout.length))
        ):
            raise ValueError(
                f"The mask {tuple(mask.shape)} does not broadcast to (batch, heads, {layout.length}, {layout.length}) "
                f"with {layout.length} as its last side."
            )
        while mask.ndim < 4:
            mask = mask[None]
        if mask.ndim > 4 or not all(map(broadcasts, mask.shape[:2], query.shape[:2])):
            raise ValueError(
                f"The mask {tuple(mask.shape)} does not broadcast to the {query.shape[0]} x {query.shape[1]} "
                "(batch, heads) of query."
            )
    if query.shape[1] != key.shape[1]:
        if not enable_gqa or query.shape[1] % key.shape[1]:
            raise ValueError(
                f"query has {query.shape[1]} heads and key {key.shape[1]}: pass enable_gqa=True and a number of query "
                "heads that is a multiple of the key heads."
            )


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`x` with that many heads, each of its own repeated; itself where it has them already."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
