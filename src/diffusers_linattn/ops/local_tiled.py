"""Windowed attention in plain PyTorch: tiles of queries against the keys around them, linear in time and memory.

A row of query tiles is cut into blocks of neighbouring tiles whose keys lie at the same relative positions, so that one
mask and one batched call serve them all. Keys and values of a block are copied side by side into a buffer whose head
holds the text and the pooled tokens; the buffer is reused by every block.

Letters: B batch, H heads, N tokens, D head_dim, P pooled tokens, n tiles of a block, Q queries of a tile, K its keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from diffusers_linattn.layout import Segment, TokenLayout
from diffusers_linattn.ops.reference import mask_bias


# Numbers in one buffer on the CPU, where the caches set the pace.
MAX_NUMBERS = {"cpu": 2**21}
TILE = None


@dataclass(frozen=True)
class _Box:
    """Tokens of one grid: some frames, rows and columns. In the next tile the columns lie `step` further."""

    grid: Segment
    frames: slice
    rows: slice
    left: int
    width: int
    step: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.frames.stop - self.frames.start, self.rows.stop - self.rows.start, self.width)

    @property
    def size(self) -> int:
        frames, rows, columns = self.shape
        return frames * rows * columns

    def of(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """This box of `x` (B, H, N, D) in `count` neighbouring tiles: a (count, B, H, frames, rows, columns, D) view."""
        grid = x[:, :, self.grid.start : self.grid.stop].unflatten(2, self.grid.grid)
        right = self.left + self.width + (count - 1) * self.step
        area = grid[:, :, self.frames, self.rows, self.left : right]
        return area.unfold(4, self.width, self.step).permute(4, 0, 1, 2, 3, 6, 5)


@dataclass(frozen=True)
class _Block:
    """`count` neighbouring tiles with one mask: their queries, and their keys in each grid of the layout.

    `distances` holds, for each box of keys, the squared distances of the queries along y (tile rows, box rows) and x.
    """

    count: int
    queries: _Box
    keys: tuple[_Box, ...]
    distances: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def num_keys(self) -> int:
        return sum(box.size for box in self.keys)

    def split(self, count: int) -> Iterator[_Block]:
        """The same tiles in blocks of at most `count`."""
        for first in range(0, self.count, count):
            boxes = [replace(box, left=box.left + first * box.step) for box in (self.queries, *self.keys)]
            yield _Block(min(count, self.count - first), boxes[0], tuple(boxes[1:]), self.distances)

    def bias(self, window: int, num_text: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The additive mask (Q, num_text + K): 0 inside the disc and for text, -inf outside."""
        parts = [torch.ones(self.queries.size, num_text, dtype=torch.bool)]
        for box, (dy, dx) in zip(self.keys, self.distances, strict=True):
            disc = dy[:, None, :, None] + dx[:, None, :] < window**2  # (tile rows, tile columns, box rows, box columns)
            parts.append(disc.reshape(self.queries.size, 1, -1).expand(-1, box.shape[0], -1).flatten(1))
        return mask_bias(torch.cat(parts, 1).to(like.device), dtype)


@dataclass(frozen=True)
class _Span:
    """One tile along one axis: its queries, the keys within reach, and their squared distances."""

    queries: slice
    keys: slice
    distances: torch.Tensor


def _spans(num_queries: int, num_keys: int, tile: int, window: int) -> list[_Span]:
    """Cut one axis into tiles. Positions are computed as in the reference, so that ties fall the same way."""
    positions = (torch.arange(num_queries, dtype=torch.float64) + 0.5) * num_keys / num_queries - 0.5
    spans = []
    for start in range(0, num_queries, tile):
        queries = slice(start, min(start + tile, num_queries))
        distances = (positions[queries, None] - torch.arange(num_keys, dtype=torch.float64)).square()
        near = (distances < window**2).any(0).nonzero()  # never empty: some key is at most half a token away
        keys = slice(int(near[0]), int(near[-1]) + 1)
        spans.append(_Span(queries, keys, distances[:, keys]))
    return spans


def _runs(columns: list[list[_Span]]) -> Iterator[range]:
    """Ranges of neighbouring tiles whose distances agree in every grid; `columns` holds the spans of each grid."""
    num_tiles, start = len(columns[0]), 0
    for i in range(1, num_tiles + 1):
        if i == num_tiles or not all(torch.equal(spans[start].distances, spans[i].distances) for spans in columns):
            yield range(start, i)
            start = i


def _plan(layout: TokenLayout, window: int, temporal_window: int | None, tile: int) -> Iterator[_Block]:
    """Every grid query of the layout, once, in blocks."""
    for grid in layout.grids:
        assert grid.grid is not None
        frames, height, width = grid.grid
        sizes = [other.grid for other in layout.grids if other.grid is not None]
        rows = [_spans(height, size[1], tile, window) for size in sizes]
        columns = [_spans(width, size[2], tile, window) for size in sizes]
        runs = list(_runs(columns))
        for y in range(len(rows[0])):
            for run in runs:
                for t in range(frames):
                    yield _block(layout, grid, t, temporal_window, [spans[y] for spans in rows], columns, run)


def _block(
    layout: TokenLayout,
    grid: Segment,
    frame: int,
    temporal_window: int | None,
    rows: list[_Span],
    columns: list[list[_Span]],
    run: range,
) -> _Block:
    first = columns[0][run[0]].queries
    width = first.stop - first.start
    keys = []
    for other, row, spans in zip(layout.grids, rows, columns, strict=True):
        assert other.grid is not None
        frames = slice(0, other.grid[0])
        if temporal_window is not None and other == grid:
            frames = slice(max(0, frame - temporal_window + 1), min(other.grid[0], frame + temporal_window))
        cols = spans[run[0]].keys
        # Equal distances in equally spaced tiles: the boxes are equally spaced, too.
        step = spans[run[1]].keys.start - cols.start if len(run) > 1 else 1
        keys.append(_Box(other, frames, row.keys, cols.start, cols.stop - cols.start, step))
    queries = _Box(grid, slice(frame, frame + 1), rows[0].queries, first.start, width, width)
    distances = tuple((row.distances, spans[run[0]].distances) for row, spans in zip(rows, columns, strict=True))
    return _Block(len(run), queries, tuple(keys), distances)


class _Tiles:
    """The blocks of one call, and how their keys get into a buffer and the gradients back out of it."""

    def __init__(
        self,
        layout: TokenLayout,
        window: int,
        temporal_window: int | None,
        pooled: int,
        mask: torch.Tensor | None,
        tile: int,
    ) -> None:
        self.layout, self.window, self.mask = layout, window, mask
        self.blocks = list(_plan(layout, window, temporal_window, tile))
        self.head = layout.num_text + pooled
        self.max_keys = self.head + max((block.num_keys for block in self.blocks), default=0)

    def parts(self, like: torch.Tensor, per_key: int, dtype: torch.dtype) -> Iterator[tuple[_Block, torch.Tensor]]:
        """The blocks cut to the size of the buffers, with their additive masks (count * B|1, H|1, Q, text + P + K)."""
        count = self.count(like, per_key)
        for block in self.blocks:
            disc = block.bias(self.window, self.head, like, dtype)
            for part in block.split(count):
                yield part, disc if self.mask is None else disc + self._mask_bias(part, len(like), dtype)

    def count(self, like: torch.Tensor, per_key: int) -> int:
        """How many tiles one call handles, if it needs `per_key` numbers for each key of each head."""
        limit = MAX_NUMBERS.get(like.device.type, 2**26)
        return max(1, limit // (like.shape[0] * like.shape[1] * self.max_keys * per_key))

    def buffer(self, x: torch.Tensor, pooled: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer (count, B, H, text + P + K, D) for the keys of `count` tiles, with text and pooled in place."""
        count = min(count, max(block.count for block in self.blocks))
        buffer = x.new_empty(count, *x.shape[:2], self.max_keys, x.shape[3], dtype=dtype)
        text = [x[:, :, segment.start : segment.stop] for segment in self.layout.text]
        buffer[:, :, :, : self.head] = torch.cat([*text, pooled], 2)
        return buffer

    def gather(self, buffer: torch.Tensor, x: torch.Tensor, part: _Block) -> torch.Tensor:
        """The keys of some tiles, (count * B, H, text + P + K, D): a view of the buffer."""
        start = self.head
        for box in part.keys:
            target = buffer[: part.count, :, :, start : start + box.size].unflatten(3, box.shape)
            target.copy_(box.of(x, part.count))
            start += box.size
        return buffer[: part.count, :, :, :start].flatten(0, 1)

    def scatter(self, gathered: torch.Tensor, grad: torch.Tensor, head: torch.Tensor, part: _Block) -> None:
        """The transpose of `gather`: add the gradient of the gathered keys to that of all keys and of the head."""
        gathered = gathered.unflatten(0, (part.count, -1))
        head += gathered[:, :, :, : self.head].sum(0)
        for i, tile in enumerate(part.split(1)):  # one by one: neighbouring boxes overlap
            start = self.head
            for box in tile.keys:
                box.of(grad, 1)[0] += gathered[i, :, :, start : start + box.size].unflatten(2, box.shape)
                start += box.size

    def scatter_head(self, head: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Add the text's part of the head's gradient to that of all keys; return the pooled tokens' part."""
        start = 0
        for segment in self.layout.text:
            grad[:, :, segment.start : segment.stop] += head[:, :, start : start + segment.length]
            start += segment.length
        return head[:, :, start:]

    def _mask_bias(self, part: _Block, batch: int, dtype: torch.dtype) -> torch.Tensor:
        """The caller's mask for some tiles: (count * B, H|1, Q|1, text + P + K)."""
        assert self.mask is not None
        ids = torch.arange(self.layout.length, device=self.mask.device)
        text = torch.cat([ids[:0]] + [ids[segment.start : segment.stop] for segment in self.layout.text])
        ids = ids[None, None, :, None]
        boxes = [box.of(ids, part.count).reshape(part.count, -1) for box in part.keys]
        keys = torch.cat([text.expand(part.count, -1), *boxes], 1)
        queries = part.queries.of(ids, part.count).reshape(part.count, -1)
        if self.mask.shape[2] == 1:
            queries = queries.new_zeros(part.count, 1)
        bias = mask_bias(self.mask[:, :, queries[:, :, None], keys[:, None, :]], dtype)  # (B|1, H|1, n, Q|1, K)
        pooled = bias.new_zeros(*bias.shape[:-1], self.head - len(text))
        bias = torch.cat([bias[..., : len(text)], pooled, bias[..., len(text) :]], -1)
        return bias.permute(2, 0, 1, 3, 4).expand(-1, batch, -1, -1, -1).flatten(0, 1)


def masked_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """`scaled_dot_product_attention` that gives 0 in rows without a visible key, on every device."""
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    bias = mask_bias(mask, query.dtype)
    hidden = bias.isneginf().all(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.masked_fill(hidden, 0), scale=scale)
    return out.masked_fill(hidden, 0)


def _attention_grads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of softmax attention, its weights recomputed; all (B, H, tokens, D)."""
    scores = query * scale @ key.transpose(-1, -2)
    if bias is not None:
        hidden = bias.isneginf().all(-1, keepdim=True)
        scores += bias.masked_fill(hidden, 0)
        grad = grad.masked_fill(hidden, 0)
    weights = torch.softmax(scores, -1, out=scores)
    grad_value = weights.transpose(-1, -2) @ grad
    # d softmax: the inner product of the weights with their gradient is that of the output with its gradient.
    grad_scores = grad @ value.transpose(-1, -2)
    grad_scores -= (out * grad).sum(-1, keepdim=True)
    grad_scores *= weights
    return grad_scores @ key * scale, grad_scores.transpose(-1, -2) @ query * scale, grad_value


@torch.library.custom_op("diffusers_linattn::local_attention_tiled", mutates_args=())
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

    `layout` is `TokenLayout.encode()`; no pooled tokens are pooled tensors (B, H, 0, D).
    """
    parts = TokenLayout.decode(layout)
    out = _empty(query, value.shape[-1])
    for segment in parts.text:
        rows = slice(segment.start, segment.stop)
        out[:, :, rows] = masked_sdpa(query[:, :, rows], key, value, _rows(mask, rows), scale)
    if not parts.grids:
        return out
    tiles = _Tiles(parts, window, temporal_window, pooled_key.shape[2], mask, _tile(window))
    count = tiles.count(query, query.shape[-1])
    keys, values = (tiles.buffer(x, p, count, x.dtype) for x, p in ((key, pooled_key), (value, pooled_value)))
    for part, bias in tiles.parts(query, query.shape[-1], query.dtype):
        q = _tokens(part.queries.of(query, part.count))
        k, v = tiles.gather(keys, key, part), tiles.gather(values, value, part)
        target = part.queries.of(out, part.count)
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale) if mask is None else masked_sdpa(q, k, v, bias, scale)
        target.copy_(result.reshape(target.shape))
    return out


@local_attention_tiled.register_fake
def _(query, key, value, pooled_key, pooled_value, mask, layout, window, temporal_window, scale):
    return _empty(query, value.shape[-1])


@torch.library.custom_op("diffusers_linattn::local_attention_tiled_backward", mutates_args=())
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, pooled key and pooled value."""
    parts = TokenLayout.decode(layout)
    dtype = torch.promote_types(query.dtype, torch.float32)  # sums over many tiles
    grads = [_empty(x, x.shape[-1], dtype).zero_() for x in (query, key, value)]
    for segment in parts.text:
        _text_grads(segment, grads, query, key, value, mask, out, grad, scale)
    if not parts.grids:
        return grads[0].to(query.dtype), grads[1].to(query.dtype), grads[2].to(query.dtype), torch.zeros_like(pooled_key), torch.zeros_like(pooled_value)
    tile = _tile(window, backward=True)
    tiles = _Tiles(parts, window, temporal_window, pooled_key.shape[2], mask, tile)
    per_key = max(query.shape[-1], tile * tile)
    count = tiles.count(query, per_key)
    keys, values = (tiles.buffer(x, p, count, dtype) for x, p in ((key, pooled_key), (value, pooled_value)))
    heads = [x.new_zeros(*x.shape[:2], tiles.head, x.shape[-1], dtype=dtype) for x in (key, value)]
    for part, bias in tiles.parts(query, per_key, dtype):
        q, o, g = (_tokens(part.queries.of(x, part.count)).to(dtype) for x in (query, out, grad))
        k, v = tiles.gather(keys, key, part), tiles.gather(values, value, part)
        dq, dk, dv = _attention_grads(q, k, v, bias, o, g, scale)
        target = part.queries.of(grads[0], part.count)
        target.copy_(dq.reshape(target.shape))
        tiles.scatter(dk, grads[1], heads[0], part)
        tiles.scatter(dv, grads[2], heads[1], part)
    pooled = [tiles.scatter_head(head, x).to(query.dtype).contiguous() for head, x in zip(heads, grads[1:], strict=True)]
    dq, dk, dv = (x.to(query.dtype) for x in grads)
    return dq, dk, dv, pooled[0], pooled[1]


@local_attention_tiled_backward.register_fake
def _(grad, out, query, key, value, pooled_key, pooled_value, mask, layout, window, temporal_window, scale):
    dq, dk, dv = (_empty(x, x.shape[-1]) for x in (query, key, value))
    return dq, dk, dv, torch.empty_like(pooled_key, memory_format=torch.contiguous_format), torch.empty_like(pooled_value, memory_format=torch.contiguous_format)


def _text_grads(segment, grads, query, key, value, mask, out, grad, scale):
    """Add the gradients of one text segment's queries, which see all tokens, in chunks of heads and queries."""
    dtype = grads[0].dtype
    batch, heads, tokens, _ = key.shape
    limit = MAX_NUMBERS.get(query.device.type, 2**26) // (batch * tokens)
    num_heads = min(max(1, limit // max(1, segment.length)), heads)
    step = max(16, limit // num_heads)
    for h in range(0, heads, num_heads):
        some = slice(h, h + num_heads)
        k, v = (x[:, some].to(dtype) for x in (key, value))
        for start in range(segment.start, segment.stop, step):
            rows = slice(start, min(start + step, segment.stop))
            q, o, g = (x[:, some, rows].to(dtype) for x in (query, out, grad))
            m = _rows(mask, rows)
            if m is not None:
                m = mask_bias(m if m.shape[1] == 1 else m[:, some], dtype)
            dq, dk, dv = _attention_grads(q, k, v, m, o, g, scale)
            grads[0][:, some, rows] = dq
            grads[1][:, some] += dk
            grads[2][:, some] += dv


def _setup_context(ctx, inputs, output):
    *tensors, layout, window, temporal_window, scale = inputs
    ctx.save_for_backward(output, *tensors)
    ctx.settings = (layout, window, temporal_window, scale)


def _backward(ctx, grad):
    return *local_attention_tiled_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


local_attention_tiled.register_autograd(_backward, setup_context=_setup_context)


def _tile(window: int, backward: bool = False) -> int:
    return TILE or 8


def _empty(like: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(B, H, N, D) in the memory order of (B, N, H, D), which callers transpose back for free."""
    batch, heads, tokens, _ = like.shape
    return like.new_empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)


def _rows(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """Tiles (n, B, H, frames, rows, columns, D) as (n * B, H, Q, D)."""
    return x.flatten(3, 5).flatten(0, 1)
