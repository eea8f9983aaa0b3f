"""How a grid of queries is cut into tiles, and which keys each tile needs. Integers and small masks, no attention.

The tiles are put into blocks of neighbours whose keys lie at the same relative positions, so that one mask and one
batched call serve them all. Letters: B batch, H heads, N tokens, D head_dim, Q queries of a tile, K its keys.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from diffusers_linattn.layout import Segment, TokenLayout
from diffusers_linattn.ops.reference import AxisOffsets, axis_offsets, in_disc, mask_bias


# Queries of a tile along y and x. Measured for windows of 8, 16 and 32: larger tiles share more keys between queries,
# but look at as many more keys outside of the disc.
TILE = 8


@dataclass(frozen=True)
class Box:
    """Tokens of one grid: some frames, rows and columns. In the next tiles rows and columns lie `steps` further."""

    grid: Segment
    frames: slice
    rows: slice
    columns: slice
    steps: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        frames, rows, columns = (part.stop - part.start for part in (self.frames, self.rows, self.columns))
        return (frames, rows, columns)

    @property
    def size(self) -> int:
        frames, rows, columns = self.shape
        return frames * rows * columns

    def of(self, x: torch.Tensor, tiles: tuple[int, int]) -> torch.Tensor:
        """This box of `x` (B, H, N, D) in some rows and columns of tiles, a view.

        Its dimensions are (tile rows, tile columns, B, H, frames, rows, columns, D).
        """
        grid = x[:, :, self.grid.start : self.grid.stop].unflatten(2, self.grid.grid)
        (down, right), (_, height, width) = self.steps, self.shape
        rows = slice(self.rows.start, self.rows.stop + (tiles[0] - 1) * down)
        columns = slice(self.columns.start, self.columns.stop + (tiles[1] - 1) * right)
        area = grid[:, :, self.frames, rows, columns]
        return area.unfold(3, height, down).unfold(4, width, right).permute(3, 4, 0, 1, 2, 6, 7, 5)

    def shift(self, down: int, right: int) -> Box:
        """This box as seen from a tile so many tiles further down and to the right."""
        down, right = down * self.steps[0], right * self.steps[1]
        rows = slice(self.rows.start + down, self.rows.stop + down)
        columns = slice(self.columns.start + right, self.columns.stop + right)
        return replace(self, rows=rows, columns=columns)


@dataclass(frozen=True)
class Block:
    """Rows and columns of `tiles` with one mask: their queries, and their keys in each grid of the layout.

    `offsets` holds, for each box of keys, the `axis_offsets` along y, (tile rows, box rows), and along x.
    """

    tiles: tuple[int, int]
    queries: Box
    keys: tuple[Box, ...]
    offsets: tuple[tuple[AxisOffsets, AxisOffsets], ...]

    @property
    def count(self) -> int:
        return self.tiles[0] * self.tiles[1]

    @property
    def num_keys(self) -> int:
        return sum(box.size for box in self.keys)

    def split(self, count: int) -> Iterator[Block]:
        """The same tiles in blocks of at most `count`."""
        width = min(count, self.tiles[1])
        height = count // width
        for y in range(0, self.tiles[0], height):
            for x in range(0, self.tiles[1], width):
                tiles = (min(height, self.tiles[0] - y), min(width, self.tiles[1] - x))
                boxes = [box.shift(y, x) for box in (self.queries, *self.keys)]
                yield Block(tiles, boxes[0], tuple(boxes[1:]), self.offsets)

    def bias(self, window: int, num_shared: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The additive mask (Q, num_shared + K): 0 inside the disc and for shared keys, -inf outside."""
        parts = [torch.ones(self.queries.size, num_shared, dtype=torch.bool)]
        for box, (rows, columns) in zip(self.keys, self.offsets, strict=True):
            disc = in_disc(rows, columns, window)
            parts.append(disc.reshape(self.queries.size, 1, -1).expand(-1, box.shape[0], -1).flatten(1))
        return mask_bias(torch.cat(parts, 1).to(device), dtype)


@dataclass(frozen=True)
class Span:
    """One tile along one axis: its queries, the keys within reach, and the `axis_offsets` between them."""

    queries: slice
    keys: slice
    offsets: AxisOffsets


def _spans(num_queries: int, num_keys: int, window: int) -> list[Span]:
    """Cut one axis into tiles."""
    offsets, unit = axis_offsets(num_queries, num_keys)
    spans = []
    for start in range(0, num_queries, TILE):
        queries = slice(start, min(start + TILE, num_queries))
        near = (offsets[queries].abs() < float(window) * unit).any(0).nonzero()  # never empty
        keys = slice(int(near[0]), int(near[-1]) + 1)
        spans.append(Span(queries, keys, AxisOffsets(offsets[queries, keys], unit)))
    return spans


def _runs(axis: list[list[Span]]) -> Iterator[list[list[Span]]]:
    """Cut the spans of each grid along one axis into runs of neighbours whose offsets agree in every grid."""
    num_tiles, start = len(axis[0]), 0
    for i in range(1, num_tiles + 1):
        if i == num_tiles or not all(
            torch.equal(spans[start].offsets.values, spans[i].offsets.values) for spans in axis
        ):
            yield [spans[start:i] for spans in axis]
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
        for some_rows, some_columns in itertools.product(_runs(rows), _runs(columns)):
            for frame in range(frames):
                blocks.append(_block(layout, grid, frame, temporal_window, some_rows, some_columns))
    return tuple(blocks)


def _block(
    layout: TokenLayout,
    grid: Segment,
    frame: int,
    temporal_window: int | None,
    rows: list[list[Span]],
    columns: list[list[Span]],
) -> Block:
    keys = []
    for other, down, right in zip(layout.grids, rows, columns, strict=True):
        assert other.grid is not None
        frames = slice(0, other.grid[0])
        if temporal_window is not None and other == grid:
            frames = slice(max(0, frame - temporal_window + 1), min(other.grid[0], frame + temporal_window))
        # Equal offsets in equally spaced tiles: the boxes are equally spaced, too.
        steps = [spans[1].keys.start - spans[0].keys.start if len(spans) > 1 else 1 for spans in (down, right)]
        keys.append(Box(other, frames, down[0].keys, right[0].keys, (steps[0], steps[1])))
    queries = Box(grid, slice(frame, frame + 1), rows[0][0].queries, columns[0][0].queries, (TILE, TILE))
    offsets = tuple((down[0].offsets, right[0].offsets) for down, right in zip(rows, columns, strict=True))
    return Block((len(rows[0]), len(columns[0])), queries, tuple(keys), offsets)
