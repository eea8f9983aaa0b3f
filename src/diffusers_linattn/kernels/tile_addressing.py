"""Where the tokens of a tile lie in memory and which pairs of them the window joins; shared by the Triton kernels.

The tables are those of `TileLists`. Letters: M tokens of a tile; where two meet, M queries and N keys, D channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.masked_loads import load_existing
from diffusers_linattn.kernels.tile_lists import PLACE_BITS


_BITS = tl.constexpr(PLACE_BITS)
_MASK = tl.constexpr(2**PLACE_BITS - 1)
_FAR = tl.constexpr(2.0**86)


@triton.jit
def tile_coordinates(FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Frame, row and column within the tile of each of its tokens, (M,) each."""
    token = tl.arange(0, FRAMES * ROWS * COLUMNS)
    return token // (ROWS * COLUMNS), token // COLUMNS % ROWS, token % COLUMNS


@triton.jit
def load_segment(segments, index):
    """Start, stop, tokens per frame, tokens per row, rows and columns of a segment."""
    row = segments + 6 * index
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)


@triton.jit
def item_and_head(text_items, num_items):
    """Item and head, of all samples, of a program in a grid of all of them.

    Programs start in the order of their numbers: first those of segments that see everything, of all heads, since each
    takes as long as many others and would be waited for at the end; then the grids' head by head, whose neighbours
    read the same keys.
    """
    heads, grid_items = tl.num_programs(0) // num_items, tl.maximum(num_items - text_items, 1)
    in_text = tl.program_id(0)
    in_grids = in_text - text_items * heads
    item = tl.where(in_grids < 0, in_text // heads, text_items + in_grids % grid_items)
    return item, tl.where(in_grids < 0, in_text % heads, in_grids // grid_items)


@triton.jit
def load_runs(items, index):
    """Segment, first run, last run + 1 and whether the item lies in a grid."""
    item = items + 8 * index
    return tl.load(item), tl.load(item + 4), tl.load(item + 5), tl.load(item + 7)


@triton.jit
def own_slot(items, index):
    """Where the item's partial result goes, -1 without one; loaded late, see `own_tile`."""
    return tl.load(items + 8 * index + 6, volatile=True)


@triton.jit
def own_tile(items, index, segments, FRAMES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of an item: its first token (int64), the others counted from it (M,), which exist, frame, row, column.

    Kernels call this before and after their loops instead of keeping the result, which costs registers. The loads are
    volatile so that the compiler does not keep it either.
    """
    item = items + 8 * index
    row = segments + 6 * tl.load(item, volatile=True)
    frame0, row0, column0 = (
        tl.load(item + 1, volatile=True),
        tl.load(item + 2, volatile=True),
        tl.load(item + 3, volatile=True),
    )
    start, stop = tl.load(row, volatile=True), tl.load(row + 1, volatile=True)
    frame_tokens, row_tokens = tl.load(row + 2, volatile=True), tl.load(row + 3, volatile=True)
    height, width = tl.load(row + 4, volatile=True), tl.load(row + 5, volatile=True)
    frame, row, column = tile_coordinates(FRAMES, ROWS, COLUMNS)
    token0 = start + frame0 * frame_tokens + row0 * row_tokens + column0
    token = frame * frame_tokens + row * row_tokens + column
    valid = (row0 + row < height) & (column0 + column < width) & (token0 + token < stop)
    return token0.to(tl.int64), token, valid, frame0 + frame, row0 + row, column0 + column


@triton.jit
def unpack_place(place):
    """Frame, row and column of a visited tile's first token."""
    return (place >> (2 * _BITS)).to(tl.int32), ((place >> _BITS) & _MASK).to(tl.int32), (place & _MASK).to(tl.int32)


@triton.jit
def locate_tile(place, start, stop, frame_tokens, row_tokens, height, width, token, row, column, FRAMES: tl.constexpr):
    """Frame, row, column and token that a place's tile begins with, and which of its rows and columns exist, (M,).

    token, row and column are those of the tile's tokens within it; the others are of `load_segment`.
    """
    frame0, row0, column0 = unpack_place(place)
    token0 = start + frame0 * frame_tokens + row0 * row_tokens + column0
    in_rows, in_columns = row < height - row0, column < width - column0
    if FRAMES > 1:
        in_rows &= token < stop - token0
    return frame0, row0, column0, token0, in_rows, in_columns


@triton.jit
def load_rows(pointers, there, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr = True):
    """(M, BLOCK_DIM) vectors, 0 where a token or a channel does not exist; without MASKED all tokens do."""
    return load_existing(pointers, there, tl.arange(0, BLOCK_DIM), HEAD_DIM, MASKED)


@triton.jit
def store_rows(pointers, x, valid, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The inverse of `load_rows`, in the pointers' dtype."""
    dim = tl.arange(0, BLOCK_DIM)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=valid[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def query_position(token, numerator, denominator):
    """Twice the denominator times the position in the key's grid, an integer in fp32: see `_pair_row`.

    That of `token + start` is `key_position(start, numerator)` more.
    """
    return (2 * token + 1).to(tl.float32) * numerator - denominator


@triton.jit
def key_position(token, denominator):
    """Twice the denominator times the position."""
    return (2 * token).to(tl.float32) * denominator


@triton.jit
def load_scales(pair):
    """What `room_in_window` compares with: row unit, column unit, temporal window, limit."""
    return tl.load(pair + 2), tl.load(pair + 5), tl.load(pair + 6), tl.load(pair + 7)


@triton.jit
def room_in_window(dy, dx, frames_apart, row_unit, column_unit, frames, limit, TIMED: tl.constexpr):
    """How far a pair of tokens is from not seeing each other, times 2^86: negative where it does not.

    A number rather than a condition, since a minimum with it costs less than a choice: there are few registers for
    conditions. Tokens that do not exist are infinitely far away. A score of NaN stays NaN, hidden or not, as in the
    reference.
    """
    room = limit * _FAR - dx * (dx * (column_unit * _FAR)) - dy * (dy * (row_unit * _FAR))
    if TIMED:
        room = tl.minimum(room, (frames - 0.5 - tl.abs(frames_apart).to(tl.float32)) * _FAR)
    return room


@triton.jit
def visit_keys(
    place,
    key,
    value,
    bias,
    key_offsets,
    value_offsets,
    stride_kn,
    stride_vn,
    start,
    stop,
    frame_tokens,
    row_tokens,
    height,
    width,
    query_frame,
    query_row,
    query_column,
    denominator_y,
    denominator_x,
    row_unit,
    column_unit,
    frames,
    limit,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    FRAMES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CUT: tl.constexpr,
    TIMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Keys and values (N, D) of the tile at a place, their bias (1, N) and the queries' room (M, N).

    Without HAS_BIAS and without CUT, the last two are 0 and not to be used.
    """
    frame, row, column = tile_coordinates(FRAMES, ROWS, COLUMNS)
    token = frame * frame_tokens + row * row_tokens + column
    frame0, row0, column0, token0, in_rows, in_columns = locate_tile(
        place, start, stop, frame_tokens, row_tokens, height, width, token, row, column, FRAMES
    )
    there = in_rows & in_columns
    k = load_rows(key + token0.to(tl.int64) * stride_kn + key_offsets, there, HEAD_DIM, BLOCK_DIM, CUT)
    v = load_rows(value + token0.to(tl.int64) * stride_vn + value_offsets, there, HEAD_DIM, BLOCK_DIM, CUT)
    added = 0.0
    if HAS_BIAS:
        added = tl.load(bias + token0 + token, mask=there, other=0.0)[None, :]
    room = 0.0
    if CUT:
        key_row = tl.where(in_rows, key_position(row, denominator_y), float("inf"))
        key_column = tl.where(in_columns, key_position(column, denominator_x), float("inf"))
        room = room_in_window(
            (query_row - key_position(row0, denominator_y))[:, None] - key_row[None, :],
            (query_column - key_position(column0, denominator_x))[:, None] - key_column[None, :],
            query_frame[:, None] - (frame0 + frame)[None, :],
            row_unit,
            column_unit,
            frames,
            limit,
            TIMED,
        )
    return k, v, added, room
