"""The forward pass of windowed attention: one program per tile of queries and head, one online softmax over all keys.

Letters: M queries of a tile, N keys of a tile, D channels of a head (a power of two, zeros beyond `HEAD_DIM`). Scores
are kept in units of log 2. A kernel walks the runs of its item: in each a loop over tiles that need no test per pair
and one over tiles that the window cuts. Nothing in these loops is conditional, so that the compiler overlaps the loads
of the next tiles with the products of this one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.tile_addressing import (
    item_and_head,
    load_rows,
    load_runs,
    load_scales,
    load_segment,
    own_tile,
    query_position,
    store_rows,
    tile_coordinates,
    visit_keys,
)
from diffusers_linattn.kernels.vector_strides import head_offset, vector_stride


# Arguments that no kernel is compiled anew for, as Triton otherwise does for 1 and for multiples of 16.
SIZES = (
    "heads",
    "groups",
    "pooled_groups",
    "num_tokens",
    "num_pooled",
    "num_segments",
    "text_items",
    "num_items",
    "stride_bb",
    "stride_bh",
)

# Below every score that counts: a mask below it hides. With a mask, it is above all that `room_in_window` hides;
# without one every query sees itself, and what was hidden before that shrinks to nothing. Finite: a difference of two
# is not NaN.
_LOWEST = tl.constexpr(-1.0e18)


@triton.jit
def attend(
    acc, total, peak, q, k, v, scale, bias, room, HAS_BIAS: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr
):
    """One step of the online softmax over N keys.

    acc is (M, D), total and peak (M,), bias (1, N) is added to the scores; with CUT, room (M, N) or (1, N) bounds them
    from above, see `room_in_window`. Without a bias the scale has to be positive.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_BIAS:
        scores = scores * scale + bias
        scale = 1.0
    if CUT:
        scores = tl.minimum(scores, room, propagate_nan=tl.PropagateNan.ALL)
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])  # one instruction before the power
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit
def _attend_tiles(
    acc,
    total,
    peak,
    q,
    query_frame,
    query_row,
    query_column,
    first,
    last,
    key,
    value,
    bias,
    places,
    key_segments,
    segment,
    pair,
    stride_kn,
    stride_vn,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KEY_FRAMES: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    CUT: tl.constexpr,
    TIMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tiles of entries `first` to `last`, all of one segment; with CUT not all pairs of them see each other."""
    start, stop, frame_tokens, row_tokens, height, width = load_segment(key_segments, segment)
    frame, row, column = tile_coordinates(KEY_FRAMES, KEY_ROWS, KEY_COLUMNS)
    dim = tl.arange(0, BLOCK_DIM)
    token = frame * frame_tokens + row * row_tokens + column
    key_offsets = token[:, None] * stride_kn + dim[None, :]
    value_offsets = token[:, None] * stride_vn + dim[None, :]
    denominator_y, denominator_x = tl.load(pair + 1), tl.load(pair + 4)
    row_unit, column_unit, frames, limit = load_scales(pair)
    place = tl.load(places + first)  # one ahead: where a tile lies has to be known before its loads can start
    for i in range(first, last):
        visited = place
        place = tl.load(places + i + 1)
        k, v, added, room = visit_keys(
            visited, key, value, bias, key_offsets, value_offsets, stride_kn, stride_vn, start, stop, frame_tokens,
            row_tokens, height, width, query_frame, query_row, query_column, denominator_y, denominator_x, row_unit,
            column_unit, frames, limit, HEAD_DIM, BLOCK_DIM, KEY_FRAMES, KEY_ROWS, KEY_COLUMNS, CUT, TIMED, HAS_BIAS,
        )  # fmt: skip
        acc, total, peak = attend(acc, total, peak, q, k, v, scale, added, room, HAS_BIAS, CUT, PRECISION)
    return acc, total, peak


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query,
    key,
    value,
    pooled_key,
    pooled_value,
    bias,
    out,
    lse,
    items,
    runs,
    places,
    query_segments,
    key_segments,
    pairs,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_pkb,
    stride_pkh,
    stride_pkn,
    stride_pvb,
    stride_pvh,
    stride_pvn,
    stride_bb,
    stride_bh,
    stride_ob,
    stride_oh,
    stride_on,
    scale,
    heads,
    groups,
    pooled_groups,
    num_tokens,
    num_pooled,
    num_segments,
    text_items,
    num_items,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    QUERY_FRAMES: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    KEY_FRAMES: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    TIMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POOLED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (items * batch * heads), see `item_and_head`.

    Writes out (batch, heads, tokens, head_dim) and the log2-sum-exp2 of the scores.

    `scale` is that of the scores times log2(e), as is `bias`, fp32 (batch, heads, tokens). A query that sees nothing
    gets 0 and +inf.
    """
    BLOCK_M: tl.constexpr = QUERY_FRAMES * QUERY_ROWS * QUERY_COLUMNS
    BLOCK_N: tl.constexpr = KEY_FRAMES * KEY_ROWS * KEY_COLUMNS
    stride_qn = vector_stride(stride_qn, HEAD_DIM)
    stride_kn = vector_stride(stride_kn, HEAD_DIM)
    stride_vn = vector_stride(stride_vn, HEAD_DIM)
    stride_pkn = vector_stride(stride_pkn, HEAD_DIM)
    stride_pvn = vector_stride(stride_pvn, HEAD_DIM)
    stride_on = vector_stride(stride_on, HEAD_DIM)
    item, head_of_all = item_and_head(text_items, num_items)
    batch, head = (head_of_all // heads).to(tl.int64), (head_of_all % heads).to(tl.int64)
    query += head_offset(batch, head, stride_qb, stride_qh, HEAD_DIM)
    key += head_offset(batch, head // groups, stride_kb, stride_kh, HEAD_DIM)
    value += head_offset(batch, head // groups, stride_vb, stride_vh, HEAD_DIM)
    if HAS_BIAS:
        bias += batch * stride_bb + head * stride_bh

    segment, first_run, last_run, is_grid = load_runs(items, item)
    token0, token, valid, frame, row, column = own_tile(
        items, item, query_segments, QUERY_FRAMES, QUERY_ROWS, QUERY_COLUMNS
    )
    dim = tl.arange(0, BLOCK_DIM)
    q = load_rows(query + token0 * stride_qn + token[:, None] * stride_qn + dim[None, :], valid, HEAD_DIM, BLOCK_DIM)

    acc = tl.zeros([BLOCK_M, BLOCK_DIM], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], _LOWEST, dtype=tl.float32)
    for run in range(first_run, last_run):
        key_segment = tl.load(runs + 4 * run)
        first, cut, last = tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2), tl.load(runs + 4 * run + 3)
        pair = pairs + 8 * (segment * num_segments + key_segment)
        query_row = query_position(row, tl.load(pair), tl.load(pair + 1))
        query_column = query_position(column, tl.load(pair + 3), tl.load(pair + 4))
        for CUT in tl.static_range(2):
            acc, total, peak = _attend_tiles(
                acc,
                total,
                peak,
                q,
                frame,
                query_row,
                query_column,
                cut if CUT else first,
                last if CUT else cut,
                key,
                value,
                bias,
                places,
                key_segments,
                key_segment,
                pair,
                stride_kn,
                stride_vn,
                scale,
                HEAD_DIM,
                BLOCK_DIM,
                KEY_FRAMES,
                KEY_ROWS,
                KEY_COLUMNS,
                CUT == 1,
                TIMED,
                HAS_BIAS,
                PRECISION,
            )

    if HAS_POOLED:
        pooled_key += head_offset(batch, head // pooled_groups, stride_pkb, stride_pkh, HEAD_DIM)
        pooled_value += head_offset(batch, head // pooled_groups, stride_pvb, stride_pvh, HEAD_DIM)
        cell = tl.arange(0, BLOCK_N)
        blocks = tl.cdiv(num_pooled, BLOCK_N) * is_grid
        whole = num_pooled // BLOCK_N * is_grid
        for CUT in tl.static_range(2):
            for i in range(whole if CUT else 0, blocks if CUT else whole):
                there = i * BLOCK_N + cell < num_pooled
                k_pointers = pooled_key + i * BLOCK_N * stride_pkn + cell[:, None] * stride_pkn + dim[None, :]
                v_pointers = pooled_value + i * BLOCK_N * stride_pvn + cell[:, None] * stride_pvn + dim[None, :]
                k = load_rows(k_pointers, there, HEAD_DIM, BLOCK_DIM, CUT)
                v = load_rows(v_pointers, there, HEAD_DIM, BLOCK_DIM, CUT)
                room = tl.where(there, float("inf"), float("-inf"))[None, :]
                acc, total, peak = attend(acc, total, peak, q, k, v, scale, 0.0, room, HAS_BIAS, CUT, PRECISION)

    sees = total > 0
    total = tl.where(sees, total, 1.0)
    acc = acc / total[:, None]
    token0, token, valid, _, _, _ = own_tile(items, item, query_segments, QUERY_FRAMES, QUERY_ROWS, QUERY_COLUMNS)
    out += head_offset(batch, head, stride_ob, stride_oh, HEAD_DIM) + token0 * stride_on
    store_rows(out + token[:, None] * stride_on + dim[None, :], acc, valid, HEAD_DIM, BLOCK_DIM)
    lse += head_of_all.to(tl.int64) * num_tokens + token0
    tl.store(lse + token, tl.where(sees, peak + tl.log2(total), float("inf")), mask=valid)
