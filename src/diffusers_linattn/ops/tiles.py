"""How a grid of queries is cut into tiles, and which keys each tile needs. Integers and small masks, no attention.

A row of tiles is cut into blocks of neighbours whose keys lie at the same relative positions, so that one mask and one
batched call serve them all. Letters: B batch, H heads, N tokens, D head_dim, Q queries of a tile, K its keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from diffusers_linattn.layout import Segment, TokenLayout
from diffusers_linattn.ops.reference import mask_bias


# Queries of a tile along y and x. Measured for windows of 8, 16 and 32: larger tiles share more keys between queries,
# but look at as many more keys outside of the disc.
TILE = 8


@dataclass(frozen=True)
class Box:
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
        """This box of `x` (B, H, N, D) in each of `count` tiles: (count, B, H, frames, rows, columns, D), a view."""
        grid = x[:, :, self.grid.start : self.grid.stop].unflatten(2, self.grid.grid)
        right = self.left + self.width + (count - 1) * self.step
        area = grid[:, :, self.frames, self.rows, self.left : right]
        return area.unfold(4, self.width, self.step).permute(4, 0, 1, 2, 3, 6, 5)


@dataclass(frozen=True)
class Block:
    """`count` neighbouring tiles with one mask: their queries, and their keys in each grid of the layout.

    `distances` holds, for each box of keys, the squared distances of the queries along y (tile rows, box rows) and x.
    """

    count: int
    queries: Box
    keys: tuple[Box, ...]
    distances: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def num_keys(self) -> int:
        return sum(box.size for box in self.keys)

    def split(self, count: int) -> Iterator[Block]:
        """The same tiles in blocks of at most `count`."""
        for first in range(0, self.count, count):
            boxes = [replace(box, left=box.left + first * box.step) for box in (self.queries, *self.keys)]
            yield Block(min(count, self.count - first), boxes[0], tuple(boxes[1:]), self.distances)

    def bias(self, window: int, num_text: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The additive mask (Q, num_text + K): 0 inside the disc and for text, -inf outside."""
        parts = [torch.ones(self.queries.size, num_text, dtype=torch.bool)]
        for box, (dy, dx) in zip(self.keys, self.distances, strict=True):
            # (tile rows, tile columns, box rows, box columns)
            disc = dy[:, None, :, None] + dx[:, None, :] < window**2
            parts.append(disc.reshape(self.queries.size, 1, -1).expand(-1, box.shape[0], -1).flatten(1))
        return mask_bias(torch.cat(parts, 1).to(device), dtype)


@dataclass(frozen=True)
class Span:
    """One tile along one axis: its queries, the keys within reach, and their squared distances."""

    queries: slice
    keys: slice
    distances: torch.Tensor


def _spans(num_queries: int, num_keys: int, window: int) -> list[Span]:
    """Cut one axis into tiles. Positions are computed as in the reference, so that ties fall the same way."""
    positions = (torch.arange(num_queries, dtype=torch.float64) + 0.5) * num_keys / num_queries - 0.5
    spans = []
    for start in range(0, num_queries, TILE):
        queries = slice(start, min(start + TILE, num_queries))
        distances = (positions[queries, None] - torch.arange(num_keys, dtype=torch.float64)).square()
        near = (distances < window**2).any(0).nonzero()  # never empty: some key is at most half a token away
        keys = slice(int(near[0]), int(near[-1]) + 1)
        spans.append(Span(queries, keys, distances[:, keys]))
    return spans


def _runs(columns: list[list[Span]]) -> Iterator[range]:
    """Ranges of neighbouring tiles whose distances agree in every grid; `columns` holds the spans of each grid."""
    num_tiles, start = len(columns[0]), 0
    for i in range(1, num_tiles + 1):
        if i == num_tiles or not all(torch.equal(spans[start].distances, spans[i].distances) for spans in columns):
            yield range(start, i)
            start = i


@functools.lru_cache(maxsize=16)  # every layer of a model asks for the same one
def plan_tiles(layout: TokenLayout, window: int, temporal_window: int | None) -> tuple[Block, ...]:
    """Every grid query of the layout, once, in blocks."""
    blocks = []
    for grid in layout.grids:
        assert grid.grid is not None
        frames, height, width = grid.grid
        sizes = [other.grid for other in layout.grids if other.grid is not None]
        rows = [_spans(height, size[1], window) for size in sizes]
        columns = [_spans(width, size[2], window) for size in sizes]
        runs = list(_runs(columns))
        for y in range(len(rows[0])):
            for run in runs:
                for t in range(frames):
                    blocks.append(_block(layout, grid, t, temporal_window, [spans[y] for spans in rows], columns, run))
    return tuple(blocks)


def _block(
    layout: TokenLayout,
    grid: Segment,
    frame: int,
    temporal_window: int | None,
    rows: list[Span],
    columns: list[list[Span]],
    run: range,
) -> Block:
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
        keys.append(Box(other, frames, row.keys, cols.start, cols.stop - cols.start, step))
    queries = Box(grid, slice(frame, frame + 1), rows[0].queries, first.start, width, width)
    distances = tuple((row.distances, spans[run[0]].distances) for row, spans in zip(rows, columns, strict=True))
    return Block(len(run), queries, tuple(keys), distances)
