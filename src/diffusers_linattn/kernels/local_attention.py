"""Windowed attention in Triton as operators of `torch.library`: what is launched, with which tables.

The kernels read (batch, heads, tokens, head_dim) tensors of any strides as long as the channels are adjacent, so that
the transposed view of a (batch, tokens, heads, head_dim) tensor is not copied. Triton is imported by the first call.

Letters: B batch, H heads, N tokens, D head_dim, P pooled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffusers_linattn.kernels.cuda_graphs import keep_results
from diffusers_linattn.kernels.launching import (
    LOG2_E,
    SMALLEST_SCALE,
    adjacent,
    chip_of,
    empty_like,
    precision_of,
    run_kernel,
    strides_of,
)
from diffusers_linattn.kernels.tile_configurations import MOST_FRAMES, Tiles, block_dim, choose_configuration, plan
from diffusers_linattn.kernels.tile_lists import Shape, TileLists
from diffusers_linattn.layout import TokenLayout


MAX_HEAD_DIM = 256

# The tables of a first call outlive it. In CUDA graphs that torch.compile makes, nothing may: it leaves these out.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor pooled_key, Tensor pooled_value, Tensor? mask, "
    "SymInt[] layout, SymInt window, SymInt? temporal_window, float scale"
)


@torch.library.custom_op(
    "diffusers_linattn::local_attention_triton", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)", **_TAGS
)
def local_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    mask: torch.Tensor | None,
    layout: Sequence[int],
    window: int,
    temporal_window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.local_attention` on checked arguments, and the base-2 logarithm of each query's sum of exponentials.

    query is (B, H, N, D), key and value (B, key heads, N, D), pooled_key and pooled_value (B, key heads | H, P, D)
    with P = 0 where there are none, mask is added to the scores, fp32 (B | 1, H | 1, 1, N), `layout` is
    `TokenLayout.encode()`. The output is (B, H, N, D) in the memory order of (B, N, H, D), the second result fp32
    (B, H, N), +inf for queries that see nothing. Both have gradients.
    """
    from diffusers_linattn.kernels.local_attention_forward import forward_kernel

    call = _Call(query, key, value, pooled_key, pooled_value, mask, layout, window, temporal_window, scale)
    out, lse = empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    tiles, lists, queries, keys = call.plan(call.configuration.forward)
    _launch(
        forward_kernel,
        (len(lists.items) * query.shape[0] * query.shape[1],),
        tiles,
        [*call.tensors, call.bias, out, lse, *_tables(lists, query.device)],
        [*call.strides, *strides_of(out)],
        [scale * LOG2_E, *call.sizes, len(lists.visited), lists.text_items, len(lists.items)],
        [*call.dims, *queries, *keys, queries[0] * keys[0] > 1 and temporal_window is not None],
        [call.has_bias, call.num_pooled > 0, call.precision],
    )
    return out, lse


@local_attention_triton.register_fake
def _(query: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "diffusers_linattn::local_attention_triton_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor grad_lse, Tensor out, Tensor lse, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    **_TAGS,
)
def local_attention_triton_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    mask: torch.Tensor | None,
    layout: Sequence[int],
    window: int,
    temporal_window: int | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value, pooled_key and pooled_value; the same bits in every run."""
    from diffusers_linattn.kernels.local_attention_query_gradient import query_gradient_kernel

    call = _Call(query, key, value, pooled_key, pooled_value, mask, layout, window, temporal_window, scale)
    grad, dquery = adjacent(grad), empty_like(query)
    # Both sums are of weights times a number per query, to which the kernel adds the output's part.
    minus_grad_lse = grad_lse.mul(-LOG2_E).contiguous()
    delta = torch.empty_like(minus_grad_lse)
    tiles, lists, queries, keys = call.plan(call.configuration.query_gradient)
    _launch(
        query_gradient_kernel,
        (len(lists.items) * query.shape[0] * query.shape[1],),
        tiles,
        [*call.tensors, call.bias, out, grad, lse, minus_grad_lse, delta, dquery, *_tables(lists, query.device)],
        [*call.strides, *strides_of(out), *strides_of(grad), *strides_of(dquery)],
        [scale, scale * LOG2_E, *call.sizes, len(lists.visited), lists.text_items, len(lists.items)],
        [*call.dims, *queries, *keys, queries[0] * keys[0] > 1 and temporal_window is not None],
        [call.has_bias, call.num_pooled > 0, call.precision],
    )
    _, key, value, pooled_key, pooled_value = call.tensors
    dkey, dvalue = call.key_gradients(key, value, grad, lse, delta, pooled=False)
    if not call.num_pooled:
        return dquery, dkey, dvalue, empty_like(pooled_key), empty_like(pooled_value)
    return dquery, dkey, dvalue, *call.key_gradients(pooled_key, pooled_value, grad, lse, delta, pooled=True)


@local_attention_triton_backward.register_fake
def _(
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    return tuple(empty_like(x) for x in (query, key, value, pooled_key, pooled_value))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, layout, window, temporal_window, scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.settings = (layout, window, temporal_window, scale)


def _backward(ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = local_attention_triton_backward(grad, grad_lse, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, None, None, None, None, None)


local_attention_triton.register_autograd(_backward, setup_context=_setup_context)


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pooled_key: torch.Tensor,
        pooled_value: torch.Tensor,
        mask: torch.Tensor | None,
        layout: Sequence[int],
        window: int,
        temporal_window: int | None,
        scale: float,
    ) -> None:
        if mask is None and scale < SMALLEST_SCALE:
            mask = query.new_zeros(1, 1, 1, query.shape[2], dtype=torch.float32)
        self.tensors = [adjacent(x) for x in (query, key, value, pooled_key, pooled_value)]
        self.window = (TokenLayout.decode(layout), window, temporal_window)
        _check_reach(self.window[0], max(x.stride(2) for x in self.tensors))
        self.scale, self.num_pooled = scale, pooled_key.shape[2]
        self.has_bias = mask is not None
        self.bias, bias_strides = query, [0, 0]  # not read without a mask
        if mask is not None:
            # In units of log 2; kernels step from key to key by 1.
            self.bias = (mask[:, :, 0] * LOG2_E).contiguous().expand(*query.shape[:2], -1)
            bias_strides = list(self.bias.stride()[:2])
        self.bias_strides = bias_strides
        self.strides = [stride for x in self.tensors for stride in strides_of(x)] + bias_strides
        heads = query.shape[1]
        self.sizes = [heads, heads // key.shape[1], heads // pooled_key.shape[1], query.shape[2], self.num_pooled]
        self.dims = [query.shape[3], block_dim(query.shape[3])]
        self.precision = precision_of(query)
        self.configuration = choose_configuration(query.shape[3], query.dtype, chip_of(query.device))

    def plan(self, tiles: Tiles) -> tuple[Tiles, TileLists, Shape, Shape]:
        """The launch of a kernel whose programs own queries."""
        if self.has_bias or self.num_pooled:
            tiles = replace(tiles, wide=0)
        return plan(*self.window, tiles)

    def key_gradients(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        grad: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        *,
        pooled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the keys and values of the sequence, or of the pooled ones."""
        from diffusers_linattn.kernels.local_attention_key_gradients import key_gradients_kernel

        query, (batch, heads) = self.tensors[0], key.shape[:2]
        layout, window, temporal_window = self.window
        num_pooled = self.num_pooled if pooled else 0
        tiles, lists, keys, queries = plan(
            *self.window, self.configuration.key_gradients, owners_are_keys=True, num_pooled=num_pooled
        )
        has_bias = self.has_bias and not pooled
        dkey, dvalue = empty_like(key), empty_like(value)
        shape = (2, batch, heads, lists.slots, tiles.owner, self.dims[1])
        partial = query.new_empty(shape, dtype=torch.float32)
        inputs = [query, key, value, self.bias, grad, lse, delta, dkey, dvalue, partial]
        bias_strides = self.bias_strides if has_bias else [0, 0]
        strides = [*strides_of(query), *strides_of(key), *strides_of(value), *bias_strides]
        _launch(
            key_gradients_kernel,
            (len(lists.items), heads, batch),
            tiles,
            [*inputs, *_tables(lists, query.device)],
            [*strides, *strides_of(grad), *strides_of(dkey), *strides_of(dvalue)],
            [self.scale, self.scale * LOG2_E, heads, query.shape[1] // heads, query.shape[2]],
            [len(lists.visited), lists.slots, *self.dims, *keys, *queries],
            [queries[0] * keys[0] > 1 and temporal_window is not None, has_bias, self.precision],
        )
        if lists.slots:
            text = [(0, num_pooled)] if pooled else [(segment.start, segment.length) for segment in layout.text]
            for target, sums in zip((dkey, dvalue), partial, strict=True):
                _add_parts(target, sums, lists.parts, text)
        return dkey, dvalue


def _check_reach(layout: TokenLayout, stride: int) -> None:
    """Kernels count the elements between the vectors of one tile, which may span several frames, in 32 bits."""
    for frames, rows, columns in (segment.grid for segment in layout.grids if segment.grid):
        if (min(frames, MOST_FRAMES) - 1) * rows * columns * stride >= 2**31:
            raise ValueError(
                f"Got frames of {rows} x {columns} tokens, each {stride} elements from the next: over {MOST_FRAMES} "
                "frames that is more than impl='triton' can address. Use impl='tiled'."
            )


def _add_parts(target: torch.Tensor, partial: torch.Tensor, parts: int, text: Sequence[tuple[int, int]]) -> None:
    """Add the partial results (B, H, slots, tile, block) of each tile and write them to the segments seen by all."""
    sums = partial.unflatten(2, (-1, parts)).sum(3)[..., : target.shape[3]]
    tile, first = sums.shape[3], 0
    for start, length in text:
        tiles = -(-length // tile)
        target[:, :, start : start + length] = sums[:, :, first : first + tiles].flatten(2, 3)[:, :, :length]
        first += tiles


def _launch(kernel: Any, grid: tuple[int, ...], tiles: Tiles, *arguments: list[Any]) -> None:
    if 0 not in grid:
        flat = [x for group in arguments for x in group]
        run_kernel(kernel, grid, flat[0].device, *flat, num_warps=tiles.warps, num_stages=tiles.stages)


_tables = keep_results(TileLists.to, 64)
