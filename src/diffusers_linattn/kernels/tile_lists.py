"""Which tiles of keys each tile of queries has to visit, and the other way round: integers on the CPU, no attention.

A tile is a box (frames, rows, columns) of a grid's tokens, read where they lie in raster order. Text is a grid, too,
one whose tiles are runs of consecutive tokens. A kernel's program gets one *item*, a tile of the side it owns (queries
in the forward pass, keys for the gradients of keys and values), and walks the item's *runs*: lists of the other side's
tiles in one segment, first those that exist and lie inside the disc as a whole, which need no test per pair, then
those that the disc or the end of the segment cuts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusers_linattn.layout import Segment, TokenLayout


Shape = tuple[int, int, int]  # frames, rows and columns of a tile

# A tile's place (frame, row, column of its first token) travels in one 64-bit integer.
PLACE_BITS = 21
# The limit of segments that are seen by all and see all, and of windows wider than 2^20 tokens: kernels multiply it.
_EVERYTHING = 2.0**40
# Long lists, those of keys that every query sees, are cut for parallelism: not finer than this many tiles, into few
# enough parts that the partial sums stay small, and not at all where there are that many programs anyway.
_SHORTEST_PART, _MOST_PARTS, _ENOUGH_TILES = 64, 16, 64


@dataclass(frozen=True, eq=False)
class TileLists:
    """The work of one kernel launch.

    Args:
        items: int32 (items, 8): segment, frame, row, column of the tile; first run, last run + 1; slot for a partial
            result or -1; whether the segment is a grid.
        runs: int32 (runs, 4): segment visited; first entry, first entry of the tiles that are cut, last entry + 1.
        places: int64 (entries + 1,): the tiles visited, see `PLACE_BITS`. Kernels read one ahead.
        owners: int32 (segments, 6): of the items' side: start, stop, tokens per frame, per row, rows, columns.
        visited: The same of the side that is visited, its text in pieces, see `_pieces`.
        pairs: fp32 (owner segments * visited segments, 8): how positions are compared, see `_pair_row`.
        text_items: How many items are of segments seen by all; these come first.
        slots: How many partial results there are, all of the segments without a grid.
        parts: How many of them belong to one tile.
        num_pairs: Token pairs that are computed, padding of tiles included.
    """

    items: torch.Tensor
    runs: torch.Tensor
    places: torch.Tensor
    owners: torch.Tensor
    visited: torch.Tensor
    pairs: torch.Tensor
    text_items: int
    slots: int
    parts: int
    num_pairs: int

    def to(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The tables in the order of the kernels' arguments."""
        tables = (self.items, self.runs, self.places, self.owners, self.visited, self.pairs)
        return tuple(table.to(device) for table in tables)


@functools.lru_cache(maxsize=64)  # every layer of a model asks for the same few
def list_tiles(
    layout: TokenLayout,
    window: int,
    temporal_window: int | None,
    owner: Shape,
    other: Shape,
    owners_are_keys: bool = False,
    num_pooled: int = 0,
) -> TileLists:
    """The tiles that every tile of the owning side visits.

    Args:
        layout: What the tokens are.
        window: Radius of the disc, strict.
        temporal_window: In a grid's own frames, those with `|t - t'| < temporal_window`; `None` is all.
        owner: Tile shape of the side that owns the programs.
        other: Tile shape of the side that is visited.
        owners_are_keys: Whether keys own the programs and visit the queries that see them.
        num_pooled: If not 0, this many pooled keys own the programs, and they are seen by the grids only.

    Example:
        >>> layout = TokenLayout.image((1, 16, 16))
        >>> lists = list_tiles(layout, 4, None, (1, 16, 8), (1, 8, 8))
        >>> len(lists.items), lists.num_pairs // (128 * 64)  # each 16 x 8 tile visits all four 8 x 8 tiles
        (2, 8)
    """
    segments = [segment for segment in (*layout.text, *layout.grids) if segment.length]
    if num_pooled:
        owners, visited = [Segment("text", 0, num_pooled)], [segment for segment in segments if segment.grid]
    else:
        owners = visited = segments
    visited = [piece for segment in visited for piece in _pieces(segment, other)]
    runs = _Runs(visited, other)
    items, slots, parts = [], 0, 0
    for index, segment in enumerate(owners):
        if segment.grid is None:
            whole = [(i, *runs.whole(i)) for i in range(len(visited))]
            tiles = _num_tiles(segment, owner)
            total = sum(stop - first for _, first, _, stop in whole)
            split = 1
            if owners_are_keys:
                all_tiles = sum(_num_tiles(s, owner) for s in owners if s.grid is None)
                split = max(1, min(_MOST_PARTS, total // _SHORTEST_PART, -(-_ENOUGH_TILES // all_tiles)))
                parts = max(parts, split)
            for tile in range(tiles):
                for part in range(split):
                    begin, end = total * part // split, total * (part + 1) // split
                    slot = slots if owners_are_keys and split > 1 else -1
                    items.append([index, tile * owner[0], 0, 0, *runs.add(_cut(whole, begin, end)), slot, 0])
                    slots += slot >= 0
            continue
        lists = [
            (i, _window_lists(segment, other_segment, window, temporal_window, owner, other, owners_are_keys))
            for i, other_segment in enumerate(visited)
            if other_segment.grid is not None
        ]
        whole = [(i, *runs.whole(i)) for i, text in enumerate(visited) if text.grid is None]
        starts = [(i, runs.extend(places), counts) for i, (places, counts) in lists]
        for tile, place in enumerate(_places(segment, owner)):
            own = list(whole)
            for i, start, (inside, cut) in starts:
                first, middle, last = start + inside[tile], start + cut[tile], start + inside[tile + 1]
                if first < last:
                    own.append((i, first, middle, last))
            items.append([index, *place, *runs.add(own), -1, 1])
    rows = [_pair_row(a, b, window, temporal_window, owners_are_keys) for a in owners for b in visited]
    tokens = math.prod(owner) * math.prod(other)
    entries = sum(runs.table[i][3] - runs.table[i][1] for item in items for i in range(item[4], item[5]))
    return TileLists(
        torch.tensor(items, dtype=torch.int32).reshape(-1, 8),
        torch.tensor(runs.table, dtype=torch.int32).reshape(-1, 4),
        torch.cat([*runs.places, torch.zeros(1, dtype=torch.int64)]),
        torch.tensor([_segment_row(segment, owner) for segment in owners], dtype=torch.int32),
        torch.tensor([_segment_row(segment, other) for segment in visited], dtype=torch.int32),
        torch.tensor(rows, dtype=torch.float32),
        sum(not is_grid for *_, is_grid in items),
        slots,
        parts,
        entries * tokens,
    )


class _Runs:
    """Collects the lists of places and the runs over them."""

    def __init__(self, visited: Sequence[Segment], shape: Shape) -> None:
        self.visited, self.shape = visited, shape
        self.table: list[tuple[int, int, int, int]] = []
        self.places: list[torch.Tensor] = []
        self.size = 0
        self._whole: dict[int, tuple[int, int, int]] = {}

    def extend(self, places: torch.Tensor) -> int:
        """Append a list of places and return where it starts."""
        start = self.size
        self.places.append(places)
        self.size += len(places)
        return start

    def whole(self, index: int) -> tuple[int, int, int]:
        """First, first cut and last + 1 entry of the list of all tiles of a segment, which all that see it share."""
        if index not in self._whole:
            places = _places(self.visited[index], self.shape)
            fits = _fits(self.visited[index], self.shape, places)
            start = self.extend(_pack(torch.cat([places[fits], places[~fits]])))
            self._whole[index] = (start, start + int(fits.sum()), self.size)
        return self._whole[index]

    def add(self, runs: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
        """Append runs and return the first and the last + 1."""
        first = len(self.table)
        self.table += runs
        return first, len(self.table)


def _cut(whole: Sequence[tuple[int, int, int, int]], begin: int, end: int) -> list[tuple[int, int, int, int]]:
    """Entries `begin` to `end` of several whole lists laid end to end, as runs."""
    runs = []
    for i, first, cut, stop in whole:
        low, high = first + max(begin, 0), min(first + end, stop)
        if low < high:
            runs.append((i, low, min(max(low, cut), high), high))
        begin, end = begin - (stop - first), end - (stop - first)
    return runs


def _pieces(segment: Segment, shape: Shape) -> list[Segment]:
    """A text cut into whole tiles, whole rows of a tile and the rest, whichever of them are not empty.

    So the tokens of a tile that exist are a rectangle, as in a grid, which costs the kernels less to test. Tiles of
    several frames are tested by the number of tokens as well.
    """
    if segment.grid is not None or shape[0] > 1:
        return [segment]
    ends = [segment.start, *(segment.stop - segment.length % size for size in (shape[1] * shape[2], shape[2], 1))]
    return [Segment("text", a, b - a) for a, b in itertools.pairwise(ends) if a < b]


def _num_tiles(segment: Segment, shape: Shape) -> int:
    if segment.grid is None:
        return -(-segment.length // math.prod(shape))
    return math.prod(-(-size // tile) for size, tile in zip(segment.grid, shape, strict=True))


def _places(segment: Segment, shape: Shape) -> torch.Tensor:
    """(tiles, 3): frame, row and column of the first token of every tile, int64."""
    if segment.grid is None:
        frames = torch.arange(0, _num_tiles(segment, shape) * shape[0], shape[0])
        return torch.stack([frames, torch.zeros_like(frames), torch.zeros_like(frames)], 1)
    axes = [torch.arange(0, size, tile) for size, tile in zip(segment.grid, shape, strict=True)]
    return torch.cartesian_prod(*axes)


def _fits(segment: Segment, shape: Shape, places: torch.Tensor) -> torch.Tensor:
    """Whether all tokens of the tiles at these places exist, bool (tiles,)."""
    if segment.grid is None:
        return (places[:, 0] // shape[0] + 1) * math.prod(shape) <= segment.length
    return (places + torch.tensor(shape) <= torch.tensor(segment.grid)).all(1)


def _pack(places: torch.Tensor) -> torch.Tensor:
    return (places[:, 0] << 2 * PLACE_BITS) | (places[:, 1] << PLACE_BITS) | places[:, 2]


def _segment_row(segment: Segment, shape: Shape) -> list[int]:
    if segment.grid is None:
        # Tokens lie in the order in which a tile's are counted. A piece of less than a tile: see `_pieces`.
        rows, columns = min(shape[1], -(-segment.length // shape[2])), min(shape[2], segment.length)
        return [segment.start, segment.stop, shape[1] * shape[2], shape[2], rows, columns]
    _, height, width = segment.grid
    return [segment.start, segment.stop, height * width, width, height, width]


def _pair_row(owner: Segment, other: Segment, window: int, temporal_window: int | None, keys_own: bool) -> list[float]:
    """How the kernels compare the positions of two grids, exactly as long as sides stay below some thousand tokens.

    Query row y of H lies at ((y + 1/2) H'/H - 1/2) of H' key rows. With H'/H = a/b in lowest terms, twice b times its
    distance from key row y' is the integer (2y + 1) a - b - 2b y'. The row holds a and b of the rows, 1/(4 b²), those
    of the columns, the temporal window and the limit of the squared distance, which lies between the last value inside
    and the strict radius.
    """
    query, key = (other, owner) if keys_own else (owner, other)
    if query.grid is None or key.grid is None:
        # The owner's tokens count as one place, and those visited as near, so that only what does not exist is hidden.
        axis = [0.0, 0.0 if keys_own else 1.0, 2.0**-20]
        return [*axis, *axis, _EVERYTHING, _EVERYTHING]
    row: list[float] = []
    for q, k in zip(query.grid[1:], key.grid[1:], strict=True):
        divisor = math.gcd(q, k)
        row += [k // divisor, q // divisor, 0.25 / (q // divisor) ** 2]
    same = query == key
    frames = temporal_window if same and temporal_window is not None else _EVERYTHING
    limit = window**2 - 0.5 if same else window**2 * (1 - 1e-6)
    return [*row, frames, min(limit, _EVERYTHING)]


def _reach(owner: int, other: int, owner_tile: int, other_tile: int, keys_own: bool) -> tuple[torch.Tensor, ...]:
    """Smallest and largest squared distance between the tiles along one axis, (owner tiles, other tiles), fp64."""
    ends = []
    for size, tile, is_key in ((owner, owner_tile, keys_own), (other, other_tile, not keys_own)):
        first = torch.arange(0, size, tile, dtype=torch.float64)
        last = (first + tile - 1).clamp(max=size - 1)
        if not is_key:
            keys = owner if keys_own else other
            first, last = ((x + 0.5) * keys / size - 0.5 for x in (first, last))
        ends.append((first, last))
    (a, b), (c, d) = ends
    below, above = c[None, :] - b[:, None], a[:, None] - d[None, :]
    nearest = torch.maximum(below, above).clamp(min=0)
    farthest = torch.maximum(d[None, :] - a[:, None], b[:, None] - c[None, :])
    return nearest.square(), farthest.square()


def _window_lists(
    owner: Segment,
    other: Segment,
    window: int,
    temporal_window: int | None,
    owner_shape: Shape,
    other_shape: Shape,
    keys_own: bool,
) -> tuple[torch.Tensor, tuple[list[int], list[int]]]:
    """Packed places of the tiles visited by each tile of a grid, and where each one's whole and cut tiles start."""
    assert owner.grid is not None
    assert other.grid is not None
    sizes = zip(owner.grid, other.grid, owner_shape, other_shape, strict=True)
    frames, rows, columns = (_reach(a, b, s, t, keys_own) for a, b, s, t in sizes)
    reach = math.inf if temporal_window is None or owner != other else temporal_window**2
    places = _places(other, other_shape)
    fits = _fits(other, other_shape, places).reshape(frames[0].shape[1], rows[0].shape[1], columns[0].shape[1])
    places = places.reshape(*fits.shape, 3)
    packed, counts = [], []
    for t in range(len(frames[0])):
        near = (frames[0][t] < reach).nonzero()[:, 0]
        for y in range(len(rows[0])):
            beside = (rows[0][y] < window**2).nonzero()[:, 0]
            # (tiles in this row of tiles, frames of the other side, rows, columns)
            distance = rows[0][y, beside][:, None] + columns[0][:, None, None, :]
            visited = (distance < window**2).expand(-1, len(near), -1, -1)
            farthest = rows[1][y, beside][:, None] + columns[1][:, None, None, :]
            whole = (frames[1][t, near] < reach)[:, None, None] & (farthest < window**2 * (1 - 1e-6))
            whole = whole & fits[near][:, beside]
            index = visited.nonzero()
            order = torch.argsort(2 * index[:, 0] + ~whole[visited], stable=True)
            tile, i, j, k = index[order].unbind(1)
            packed.append(_pack(places[near[i], beside[j], k]))
            counts.append(torch.stack([(visited & whole).sum((1, 2, 3)), visited.sum((1, 2, 3))], 1))
    inside, total = torch.cat(counts).unbind(1)
    starts = torch.cat([total.new_zeros(1), total.cumsum(0)])
    return torch.cat(packed), (starts.tolist(), (starts[:-1] + inside).tolist())
