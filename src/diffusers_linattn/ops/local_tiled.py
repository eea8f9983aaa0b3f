"""Windowed attention in plain PyTorch: tiles of queries against the keys around them, linear in time and memory.

Keys and values of a few neighbouring tiles are copied side by side into a buffer and go through one batched attention;
the next tiles reuse the buffer. The keys that all tiles share, the text and the pooled tokens, stand first in it. On a
CPU, without a mask, they are left out: all queries attend to them in large calls beforehand, and each tile's softmax
over its window is blended with the softmax over the shared keys in proportion to their denominators.

Letters: B batch, H heads, N tokens, D head_dim, S shared keys, Q queries of a tile, K its keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from diffusers_linattn.layout import Segment, TokenLayout
from diffusers_linattn.ops.reference import mask_bias
from diffusers_linattn.ops.tiles import TILE, Block, plan_tiles


# How many numbers the gathered keys, values and scores of one batched call may take: few enough for the caches of a
# CPU, many enough to fill another device.
_CPU_NUMBERS, _DEVICE_NUMBERS = 2**22, 2**26

# What `scaled_dot_product_attention` calls on a CPU; returns log Σ exp of every query's scores besides the output.
_cpu_sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ROWS = 1024  # queries in a call on shared keys; from 768 on, each takes a fifth less time than in a tile of 64


class _Tiles:
    """The blocks of one call, and how their keys get into a buffer and the gradients back out of it."""

    def __init__(
        self,
        layout: TokenLayout,
        window: int,
        temporal_window: int | None,
        mask: torch.Tensor | None,
        key: torch.Tensor,
        num_shared: int,
        backward: bool = False,
    ) -> None:
        self.layout, self.window, self.mask, self.dtype = layout, window, mask, key.dtype
        self.blocks = plan_tiles(layout, window, temporal_window)
        self.num_shared = num_shared
        self.max_keys = self.num_shared + max((block.num_keys for block in self.blocks), default=0)
        # Per key and head: the key, the value and the scores; in the backward pass their gradients, too.
        numbers = (2 * key.shape[3] + TILE**2) * (2 if backward else 1)
        limit = _CPU_NUMBERS if key.device.type == "cpu" else _DEVICE_NUMBERS
        self.count = max(1, limit // max(1, key.shape[0] * key.shape[1] * self.max_keys * numbers))

    def parts(self, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Block, torch.Tensor]]:
        """All tiles, at most `count` at a time, with their additive masks (count * B|1, H|1, Q, S + K)."""
        for block in self.blocks:
            disc = block.bias(self.window, self.num_shared, dtype, device)
            for part in block.split(self.count):
                yield part, disc if self.mask is None else disc + self._mask_bias(part, batch, dtype)

    def buffer(self, shared: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A buffer (count, B, H, S + K, D) for the keys of some tiles, with the shared ones in place."""
        count = min(self.count, max((block.count for block in self.blocks), default=1))
        buffer = shared.new_empty(count, *shared.shape[:2], self.max_keys, shared.shape[3], dtype=dtype)
        buffer[:, :, :, : self.num_shared] = shared
        return buffer

    def gather(self, buffer: torch.Tensor, x: torch.Tensor, part: Block) -> torch.Tensor:
        """The keys of some tiles, (count * B, H, S + K, D): a view of the buffer."""
        start = self.num_shared
        for box in part.keys:
            target = buffer[: part.count, :, :, start : start + box.size].unflatten(3, box.shape)
            target.unflatten(0, part.tiles).copy_(box.of(x, part.tiles))
            start += box.size
        return buffer[: part.count, :, :, :start].flatten(0, 1)

    def scatter(self, gathered: torch.Tensor, grad: torch.Tensor, shared: torch.Tensor, part: Block) -> None:
        """The transpose of `gather`: add the gradient of the gathered keys to that of all keys and of shared ones."""
        gathered = gathered.unflatten(0, (part.count, -1))
        shared += gathered[:, :, :, : self.num_shared].sum(0)
        for i, tile in enumerate(part.split(1)):  # one by one: neighbouring boxes overlap
            start = self.num_shared
            for box in tile.keys:
                box.of(grad, tile.tiles)[0, 0] += gathered[i, :, :, start : start + box.size].unflatten(2, box.shape)
                start += box.size

    def scatter_shared(self, shared: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Add the text's part of the shared keys' gradient to that of all keys; return the pooled tokens' part."""
        start = 0
        for segment in self.layout.text:
            grad[:, :, segment.start : segment.stop] += shared[:, :, start : start + segment.length]
            start += segment.length
        return shared[:, :, start:].contiguous()

    def _mask_bias(self, part: Block, batch: int, dtype: torch.dtype) -> torch.Tensor:
        """The caller's mask for some tiles: (count * B, H|1, Q|1, S + K), 0 for pooled keys."""
        assert self.mask is not None
        ids = torch.arange(self.layout.length, device=self.mask.device)
        text = torch.cat([ids[:0]] + [ids[segment.start : segment.stop] for segment in self.layout.text])
        ids = ids[None, None, :, None]
        boxes = [box.of(ids, part.tiles).reshape(part.count, -1) for box in part.keys]
        keys = torch.cat([text.expand(part.count, -1), *boxes], 1)
        queries = part.queries.of(ids, part.tiles).reshape(part.count, -1)
        if self.mask.shape[2] == 1:
            queries = queries.new_zeros(part.count, 1)
        bias = self.mask[:, :, queries[:, :, None], keys[:, None, :]]  # (B|1, H|1, n, Q|1, K)
        bias = mask_bias(bias, self.dtype).to(dtype)  # backward hides what the rounded mask hid forward
        pooled = bias.new_zeros(*bias.shape[:-1], self.num_shared - len(text))
        bias = torch.cat([bias[..., : len(text)], pooled, bias[..., len(text) :]], -1)
        return bias.permute(2, 0, 1, 3, 4).expand(-1, batch, -1, -1, -1).flatten(0, 1)


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor pooled_key, Tensor pooled_value, Tensor? mask, "
    "SymInt[] layout, SymInt window, SymInt? temporal_window, float scale"
)


@torch.library.custom_op("diffusers_linattn::local_attention_tiled", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def local_attention_tiled(
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
) -> torch.Tensor:
    """`reference.local_attention` on checked arguments: as many key heads as query heads, a mask of 4 dimensions.

    `layout` is `TokenLayout.encode()`. Without pooled tokens the pooled tensors have none: (B, H, 0, D).
    """
    segments = TokenLayout.decode(layout)
    out = _empty_like(query, value.shape[3])
    for segment in segments.text:
        rows = slice(segment.start, segment.stop)
        out[:, :, rows] = masked_sdpa(query[:, :, rows], key, value, _rows(mask, rows), scale)
    shared = [_shared(segments, x, pooled) for x, pooled in ((key, pooled_key), (value, pooled_value))]
    blend = mask is None and shared[0].shape[2] > 0 and _fits_cpu_kernel(query, key, value)
    if blend:
        denominators = _attend_to_shared(out, segments, query, shared[0], shared[1], scale)
        shared = [x[:, :, :0] for x in shared]
    tiles = _Tiles(segments, window, temporal_window, mask, key, shared[0].shape[2])
    keys, values = (tiles.buffer(x, x.dtype) for x in shared)
    for part, bias in tiles.parts(len(query), query.dtype, query.device):
        q = _tokens(part.queries.of(query, part.tiles))
        k, v = tiles.gather(keys, key, part), tiles.gather(values, value, part)
        target = part.queries.of(out, part.tiles)
        if blend:
            result, near = _cpu_sdpa(q, k, v, attn_mask=bias, scale=scale)
            far = part.queries.of(denominators, part.tiles)
            weight = torch.sigmoid(near.reshape(far.shape) - far)
            target.lerp_(result.reshape(target.shape), weight.to(out.dtype))
        elif mask is None:  # every query sees itself
            target.copy_(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).reshape(target.shape))
        else:
            target.copy_(masked_sdpa(q, k, v, bias, scale).reshape(target.shape))
    return out


@local_attention_tiled.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return _empty_like(query, value.shape[3])


@torch.library.custom_op(
    "diffusers_linattn::local_attention_tiled_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def local_attention_tiled_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
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
    """The gradients of query, key, value, pooled_key and pooled_value, the attention weights recomputed."""
    with torch.autocast(query.device.type, enabled=False):  # a backward pass may run inside the user's autocast
        segments = TokenLayout.decode(layout)
        dtype = torch.promote_types(query.dtype, torch.float32)  # for the sums over many tiles
        grads = [_empty_like(x, x.shape[3], dtype).zero_() for x in (query, key, value)]
        for segment in segments.text:
            _add_text_grads(grads, segment, query, key, value, mask, out, grad, scale)
        shared = [_shared(segments, x, pooled) for x, pooled in ((key, pooled_key), (value, pooled_value))]
        tiles = _Tiles(segments, window, temporal_window, mask, key, shared[0].shape[2], backward=True)
        keys, values = (tiles.buffer(x, dtype) for x in shared)
        shared_grads = [torch.zeros_like(x, dtype=dtype) for x in shared]
        for part, bias in tiles.parts(len(query), dtype, query.device):
            q, o, g = (_tokens(part.queries.of(x, part.tiles)).to(dtype) for x in (query, out, grad))
            k, v = tiles.gather(keys, key, part), tiles.gather(values, value, part)
            dq, dk, dv = _attention_grads(q, k, v, bias, o, g, scale)
            target = part.queries.of(grads[0], part.tiles)
            target.copy_(dq.reshape(target.shape))
            tiles.scatter(dk, grads[1], shared_grads[0], part)
            tiles.scatter(dv, grads[2], shared_grads[1], part)
        pooled = [tiles.scatter_shared(x, y) for x, y in zip(shared_grads, grads[1:], strict=True)]
        return tuple(x.to(query.dtype) for x in (*grads, *pooled))


@local_attention_tiled_backward.register_fake
def _(
    grad: torch.Tensor,
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pooled_key: torch.Tensor,
    pooled_value: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    pooled = (x.new_empty(x.shape) for x in (pooled_key, pooled_value))
    return (*(_empty_like(x, x.shape[3]) for x in (query, key, value)), *pooled)


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, layout, window, temporal_window, scale = inputs
    ctx.save_for_backward(output, *tensors)
    ctx.settings = (layout, window, temporal_window, scale)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*local_attention_tiled_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None)


local_attention_tiled.register_autograd(_backward, setup_context=_setup_context)


def masked_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """`scaled_dot_product_attention` that gives 0 in rows without a visible key, on every device."""
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    if mask.dtype == torch.bool:  # without a bias of our own: fewer and smaller operations
        hidden = ~mask.any(-1, keepdim=True)
        mask = mask | hidden
    else:
        mask = mask_bias(mask, query.dtype)
        hidden = mask.isneginf().all(-1, keepdim=True)
        mask = mask.masked_fill(hidden, 0)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.masked_fill(hidden, 0)


def _fits_cpu_kernel(*tensors: torch.Tensor) -> bool:
    """Whether query, key and value meet the conditions under which PyTorch takes `_cpu_sdpa`."""
    dims = {x.shape[3] for x in tensors}
    return len(dims) == 1 and all(x.device.type == "cpu" and x.numel() and x.stride(3) == 1 for x in tensors)


def _attend_to_shared(
    out: torch.Tensor,
    layout: TokenLayout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Put the attention of all grid queries to the shared keys into `out`; return log Σ exp, (B, H, N, 1)."""
    denominators = query.new_empty(*query.shape[:3], 1, dtype=torch.promote_types(query.dtype, torch.float32))
    for segment in layout.grids:
        for start in range(segment.start, segment.stop, _CPU_ROWS):
            rows = slice(start, min(start + _CPU_ROWS, segment.stop))
            out[:, :, rows], denominators[:, :, rows, 0] = _cpu_sdpa(query[:, :, rows], key, value, scale=scale)
    return denominators


def _attention_grads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of one softmax attention, all (B, H, tokens, D)."""
    query = query * scale
    scores = query @ key.transpose(-1, -2)
    if bias is not None:
        hidden = bias.isneginf().all(-1, keepdim=True)
        scores += bias.masked_fill(hidden, 0)
        grad = grad.masked_fill(hidden, 0)
    weights = torch.softmax(scores, -1)
    grad_value = weights.transpose(-1, -2) @ grad
    # The weights' inner product with their gradient is that of the output with its own.
    torch.matmul(grad, value.transpose(-1, -2), out=scores)
    scores -= (out * grad).sum(-1, keepdim=True)
    scores *= weights
    return scores @ key * scale, scores.transpose(-1, -2) @ query, grad_value


def _add_text_grads(
    grads: list[torch.Tensor],
    segment: Segment,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
) -> None:
    """Add the gradients of a text segment's queries, which see all tokens, a few heads and queries at a time."""
    batch, heads, tokens, _ = key.shape
    limit = (_CPU_NUMBERS if key.device.type == "cpu" else _DEVICE_NUMBERS) // max(1, 2 * batch * tokens)
    num_heads = max(1, min(heads, limit // max(1, segment.length)))
    num_rows = max(16, limit // num_heads)
    for first in range(0, heads, num_heads):
        some = slice(first, first + num_heads)
        k, v = (x[:, some].to(grads[0].dtype) for x in (key, value))
        for start in range(segment.start, segment.stop, num_rows):
            rows = slice(start, min(start + num_rows, segment.stop))
            q, o, g = (x[:, some, rows].to(grads[0].dtype) for x in (query, out, grad))
            bias = _rows(mask, rows)
            if bias is not None:
                bias = mask_bias(bias if bias.shape[1] == 1 else bias[:, some], query.dtype).to(grads[0].dtype)
            dq, dk, dv = _attention_grads(q, k, v, bias, o, g, scale)
            grads[0][:, some, rows] = dq
            grads[1][:, some] += dk
            grads[2][:, some] += dv


def _empty_like(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(B, H, N, D) in the memory order of (B, N, H, D), which callers transpose back for free."""
    batch, heads, tokens, _ = x.shape
    return x.new_empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)


def _shared(layout: TokenLayout, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """The keys or values that all grid queries see: text and pooled tokens, (B, H, S, D)."""
    return torch.cat([*(x[:, :, segment.start : segment.stop] for segment in layout.text), pooled], 2)


def _rows(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """What `Box.of` gives, as (tiles * B, H, Q, D)."""
    return x.flatten(4, 6).flatten(0, 2)
