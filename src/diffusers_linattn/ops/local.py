"""Windowed softmax attention over a sequence of text and image tokens."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from diffusers_linattn.kernels.cuda_graphs import keep_results
from diffusers_linattn.kernels.local_attention import local_attention_triton
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.checks import (
    check_attention_inputs,
    check_choice,
    check_tensor,
    check_window,
    refuse_tangents,
    repeat_heads,
)
from diffusers_linattn.ops.local_choice import choose_impl, why_not_triton, window_covers
from diffusers_linattn.ops.local_tiled import local_attention_tiled, masked_sdpa


IMPLS = ("triton", "tiled", "dense", "reference")


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    *,
    window: int,
    temporal_window: int | None = None,
    pooled_key: torch.Tensor | None = None,
    pooled_value: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Softmax attention in which an image token sees the text and a disc of image tokens around it.

    Grid queries (images and references) see every token without a grid, the keys of their own grid with
    `(y - y')**2 + (x - x')**2 < window**2`, the disc around their scaled position in every other grid, and all pooled
    keys. Text queries see the whole sequence and no pooled key. The disc is cut at borders, never shifted. This is
    CLEAR (arXiv 2412.16112); `ops.reference.local_attention` is its specification.

    Args:
        query: (batch, heads, tokens, head_dim), any floating dtype, which key, value and the output share.
        key: (batch, key heads, tokens, head_dim).
        value: (batch, key heads, tokens, value_dim); value_dim is usually head_dim.
        layout: What the tokens are; its length is the number of tokens.
        window: Radius of the disc in tokens, at least 1; strict, so 1 means the token itself.
        temporal_window: In a grid's own frames, see those with `|t - t'| < temporal_window`; `None` sees all.
        pooled_key: (batch, key heads or heads, pooled tokens, head_dim), further keys that all grid queries see.
        pooled_value: (batch, key heads or heads, pooled tokens, value_dim), given together with `pooled_key`.
        mask: Boolean (`True` = visible) or additive, broadcastable to (batch, heads, tokens, tokens); it does not
            apply to pooled keys. The form (batch, 1, 1, tokens) keeps memory linear. The lowest number of its dtype
            hides as -inf does, and a query without any visible key gives 0. No gradient flows to it.
        scale: Factor of the scores; `None` is `head_dim**-0.5`.
        enable_gqa: Allow fewer key heads than query heads, each shared by a group of query heads.
        impl: `"triton"` (one kernel on an NVIDIA GPU; masks of keys only, value_dim equal to head_dim, both at most
            256), `"tiled"` (PyTorch on every device; like `"triton"` linear in the grid in time and memory),
            `"dense"` (one `scaled_dot_product_attention`, with the window as a mask of all pairs where it leaves
            keys out) or `"reference"`. `None` takes `"dense"` where the window covers everything, else `"tiled"`, and
            on a GPU that `"triton"` runs on, `"triton"` where [`window_wins`], `"dense"` where not.

    Returns:
        (batch, heads, tokens, value_dim) in the dtype of query, computed in it whatever autocast says. `"triton"` and
        `"tiled"` lay it out in memory as (batch, tokens, heads, value_dim), so that merging the heads afterwards
        copies nothing.

    Raises:
        ValueError: Shapes or dtypes that do not fit each other or the layout; a window below 1; only one of
            `pooled_key` and `pooled_value`; a mask that requires a gradient; an unknown `impl`, or one that cannot
            answer this call or runs on another device; `torch.func.jvp`, which `"reference"` alone knows.

    Example:
        >>> import torch
        >>> from diffusers_linattn import TokenLayout
        >>> from diffusers_linattn.ops.local import local_attention
        >>> layout = TokenLayout.joint(text=7, grid=(1, 12, 20))
        >>> query, key, value = torch.randn(3, 1, 2, layout.length, 16)
        >>> local_attention(query, key, value, layout, window=4).shape
        torch.Size([1, 2, 247, 16])
    """
    check_choice("impl", impl, (None, *IMPLS))
    check_window("window", window)
    if temporal_window is not None:
        check_window("temporal_window", temporal_window)
    check_attention_inputs(query, key, value, layout, mask, enable_gqa)
    if mask is not None and mask.requires_grad:
        raise ValueError("The mask requires a gradient, which local_attention does not compute: pass mask.detach().")
    pooled_key, pooled_value = _check_pooled(query, key, value, pooled_key, pooled_value)
    while mask is not None and mask.ndim < 4:
        mask = mask[None]
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    if impl is None:
        impl = choose_impl(query, value, layout, window, temporal_window, mask)
    if impl == "triton":
        tensors = (query, key, value, pooled_key, pooled_value)
        return attend_in_kernel(*tensors, mask, layout, window, temporal_window, scale)[0]
    heads = query.shape[1]
    key, value, pooled_key, pooled_value = (repeat_heads(x, heads) for x in (key, value, pooled_key, pooled_value))
    with _without_autocast(query.device.type):
        if impl == "tiled":
            refuse_tangents(impl, query, key, value, pooled_key, pooled_value)
            settings = (layout.encode(), window, temporal_window, scale)
            return local_attention_tiled(query, key, value, pooled_key, pooled_value, mask, *settings)
        if impl == "reference":
            return reference.local_attention(
                query,
                key,
                value,
                layout,
                window=window,
                temporal_window=temporal_window,
                pooled_key=pooled_key,
                pooled_value=pooled_value,
                mask=mask,
                scale=scale,
            )
        if not window_covers(layout, window, temporal_window):
            mask = _with_window(mask, _window_mask(layout, window, temporal_window, query.device))
        return _dense(query, key, value, layout, pooled_key, pooled_value, mask, scale)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    # Entering torch.autocast costs as much as checking all arguments, also where there is nothing to switch off.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def attend_in_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    mask: torch.Tensor | None,
    layout: TokenLayout,
    window: int,
    temporal_window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `local_attention_triton` gives, or a ValueError that says why it cannot; a mask has 4 dimensions."""
    reason = why_not_triton(query, value, mask)
    if reason is not None:
        raise ValueError(f"impl='triton' cannot answer this call: {reason}.")
    refuse_tangents("triton", query, key, value, pooled_key, pooled_value)
    bias = None if mask is None else reference.mask_bias(mask, torch.float32)
    settings = (layout.encode(), window, temporal_window, scale)
    return local_attention_triton(query, key, value, pooled_key, pooled_value, bias, *settings)


def _window_mask(layout: TokenLayout, window: int, temporal_window: int | None, device: torch.device) -> torch.Tensor:
    """The window as a boolean mask of all pairs, (tokens, tokens)."""
    # Sizes are symbolic while a compiled block is traced; elsewhere every layer asks for the same mask, or for one of
    # two windows and two lengths of text.
    mask = reference.local_mask if torch.compiler.is_compiling() else _kept_mask
    return mask(layout, window, temporal_window, device)


_kept_mask = keep_results(reference.local_mask, 4)


def _with_window(mask: torch.Tensor | None, visible: torch.Tensor) -> torch.Tensor:
    """A boolean or additive mask, 4 dimensions, with what the window leaves out hidden as well."""
    if mask is None:
        return visible[None, None]
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, float("-inf"))


def _check_pooled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor | None,
    pooled_value: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled keys and values that fit the others; without any, tensors of 0 tokens."""
    if (pooled_key is None) != (pooled_value is None):
        raise ValueError("Pass both pooled_key and pooled_value or neither: got only one of them.")
    if pooled_key is None or pooled_value is None:
        batch, heads = key.shape[:2]
        return query.new_empty(batch, heads, 0, key.shape[3]), query.new_empty(batch, heads, 0, value.shape[3])
    check_tensor("pooled_key", pooled_key, query)
    check_tensor("pooled_value", pooled_value, query)
    if not pooled_key.ndim == pooled_value.ndim == 4 or pooled_key.shape[:3] != pooled_value.shape[:3]:
        raise ValueError(
            "Expected (batch, heads, pooled tokens, head_dim) tensors, got "
            f"{tuple(pooled_key.shape)=}, {tuple(pooled_value.shape)=}."
        )
    if (pooled_key.shape[0], pooled_key.shape[3], pooled_value.shape[3]) != (
        query.shape[0],
        query.shape[3],
        value.shape[3],
    ):
        raise ValueError(
            "pooled_key and pooled_value do not fit query, key and value: "
            f"{tuple(pooled_key.shape)=}, {tuple(pooled_value.shape)=}, {tuple(query.shape)=}, {tuple(value.shape)=}."
        )
    if not query.dtype == pooled_key.dtype == pooled_value.dtype:
        raise ValueError(
            f"All tensors must share a dtype: {query.dtype=}, {pooled_key.dtype=}, {pooled_value.dtype=}."
        )
    if pooled_key.shape[1] != key.shape[1] and pooled_key.shape[1] != query.shape[1]:
        raise ValueError(f"key has {key.shape[1]} heads and pooled_key {pooled_key.shape[1]}: expected as many.")
    return pooled_key, pooled_value


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """One attention over all keys and the pooled ones, which are hidden from text queries."""
    num_pooled = pooled_key.shape[2]
    if num_pooled:
        bias = query.new_zeros(1, 1, layout.length, num_pooled)
        for segment in layout.text:
            bias[:, :, segment.start : segment.stop] = float("-inf")
        seen = query.new_zeros(1, 1, 1, layout.length) if mask is None else reference.mask_bias(mask, query.dtype)
        batch, heads = seen.shape[:2]
        mask = torch.cat(
            [seen.expand(-1, -1, layout.length, -1), bias.expand(batch, heads, -1, -1)],
            dim=-1,
        )
        key, value = torch.cat([key, pooled_key], 2), torch.cat([value, pooled_value], 2)
    return masked_sdpa(query, key, value, mask, scale)
