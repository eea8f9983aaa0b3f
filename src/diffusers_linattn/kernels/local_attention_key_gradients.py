"""The gradients of keys and values of windowed attention; see `local_attention_query_gradient` for queries.

A program owns a tile of keys and walks the queries that see it, with scores transposed, (keys, queries), so that no
product has to transpose a result first; in some versions of Triton that also gives wrong numbers on Hopper. The keys
that every query sees have long lists: these are split over several programs, whose partial sums are added afterwards
in a fixed order. Without atomics, every run gives the same bits.

Heads and batch are axes of the grid, and offsets before the loops are summed up early: what a program would keep
over its loops besides the two gradients does not fit into the registers of every compiler.

Letters: M queries of a tile, N keys of a tile, D channels of a head. Scores are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.local_attention_forward import SIZES
from diffusers_linattn.kernels.tile_addressing import (
    key_position,
    load_rows,
    load_runs,
    load_scales,
    load_segment,
    locate_tile,
    own_slot,
    own_tile,
    query_position,
    room_in_window,
    store_rows,
    tile_coordinates,
)
from diffusers_linattn.kernels.vector_strides import head_offset, offset_along, vector_stride


@triton.jit
def _key_tiles(
    dk,
    dv,
    k,
    v,
    bias,
    key_frame,
    key_row,
    key_column,
    first,
    last,
    query,
    dout,
    lse,
    delta,
    places,
    query_segments,
    segment,
    pair,
    stride_qn,
    stride_gn,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    QUERY_FRAMES: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    CUT: tl.constexpr,
    TIMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the queries of entries `first` to `last`, all of one segment, to the gradients dk, dv (N, D)."""
    start, stop, frame_tokens, row_tokens, height, width = load_segment(query_segments, segment)
    frame, row, column = tile_coordinates(QUERY_FRAMES, QUERY_ROWS, QUERY_COLUMNS)
    dim = tl.arange(0, BLOCK_DIM)
    token = frame * frame_tokens + row * row_tokens + column
    query_offsets = token[:, None] * stride_qn + dim[None, :]
    dout_offsets = token[:, None] * stride_gn + dim[None, :]
    numerator_y, denominator_y = tl.load(pair), tl.load(pair + 1)
    numerator_x, denominator_x = tl.load(pair + 3), tl.load(pair + 4)
    row_unit, column_unit, frames, limit = load_scales(pair)
    place = tl.load(places + first)
    for i in range(first, last):
        frame0, row0, column0, token0, in_rows, in_columns = locate_tile(
            place, start, stop, frame_tokens, row_tokens, height, width, token, row, column, QUERY_FRAMES
        )
        place = tl.load(places + i + 1)
        there = in_rows & in_columns
        q = load_rows(query + token0.to(tl.int64) * stride_qn + query_offsets, there, HEAD_DIM, BLOCK_DIM, CUT)
        # Numbers of the tile's first query for those that do not exist: cheaper than a mask, and they get no weight.
        numbers = token0 + (tl.where(there, token, 0) if CUT else token)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if HAS_BIAS:
            scores += bias[:, None]
        scores -= tl.load(lse + numbers)[None, :]
        if CUT:
            query_row = tl.where(in_rows, query_position(row, numerator_y, denominator_y), float("inf"))
            query_column = tl.where(in_columns, query_position(column, numerator_x, denominator_x), float("inf"))
            room = room_in_window(
                query_row[None, :] - (key_row - key_position(row0, numerator_y))[:, None],
                query_column[None, :] - (key_column - key_position(column0, numerator_x))[:, None],
                (frame0 + frame)[None, :] - key_frame[:, None],
                row_unit,
                column_unit,
                frames,
                limit,
                TIMED,
            )
            scores = tl.minimum(scores, room, propagate_nan=tl.PropagateNan.ALL)
        weights = tl.exp2(scores)
        g = load_rows(dout + token0.to(tl.int64) * stride_gn + dout_offsets, there, HEAD_DIM, BLOCK_DIM, CUT)
        dv = tl.dot(weights.to(g.dtype), g, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        dscores = weights * (dweights - tl.load(delta + numbers)[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=(*SIZES, "slots"))
def key_gradients_kernel(
    query,
    key,
    value,
    bias,
    dout,
    lse,
    delta,
    dkey,
    dvalue,
    partial,
    items,
    runs,
    places,
    key_segments,
    query_segments,
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
    stride_bb,
    stride_bh,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    scale,
    log2_scale,
    heads,
    groups,
    num_tokens,
    num_segments,
    slots,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KEY_FRAMES: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    QUERY_FRAMES: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    TIMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (items, key heads, batch); `heads` counts those of the keys, each read by `groups` heads of queries.

    Writes dkey and dvalue, or where the queries of a tile are split over items the sum over this item's queries to
    partial (2, batch * key heads, slots, N, BLOCK_DIM), fp32.
    """
    BLOCK_N: tl.constexpr = KEY_FRAMES * KEY_ROWS * KEY_COLUMNS
    stride_qn = vector_stride(stride_qn, HEAD_DIM)
    stride_kn = vector_stride(stride_kn, HEAD_DIM)
    stride_vn = vector_stride(stride_vn, HEAD_DIM)
    stride_gn = vector_stride(stride_gn, HEAD_DIM)
    stride_dkn = vector_stride(stride_dkn, HEAD_DIM)
    stride_dvn = vector_stride(stride_dvn, HEAD_DIM)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)

    segment, first_run, last_run, _ = load_runs(items, tl.program_id(0))
    token0, token, valid, frame, row, column = own_tile(
        items, tl.program_id(0), key_segments, KEY_FRAMES, KEY_ROWS, KEY_COLUMNS
    )
    dim = tl.arange(0, BLOCK_DIM)
    key += head_offset(batch, head, stride_kb, stride_kh, HEAD_DIM) + token0 * stride_kn
    value += head_offset(batch, head, stride_vb, stride_vh, HEAD_DIM) + token0 * stride_vn
    k = load_rows(key + token[:, None] * stride_kn + dim[None, :], valid, HEAD_DIM, BLOCK_DIM)
    v = load_rows(value + token[:, None] * stride_vn + dim[None, :], valid, HEAD_DIM, BLOCK_DIM)

    dk = tl.zeros([BLOCK_N, BLOCK_DIM], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DIM], dtype=tl.float32)
    first_head = head * groups
    query += head_offset(batch, first_head, stride_qb, stride_qh, HEAD_DIM)
    dout += head_offset(batch, first_head, stride_gb, stride_gh, HEAD_DIM)
    numbers = (batch * heads * groups + first_head) * num_tokens
    lse += numbers
    delta += numbers
    for i in range(groups):
        group = tl.cast(i, tl.int64)
        added = 0.0
        if HAS_BIAS:
            biases = bias + batch * stride_bb + (first_head + group) * stride_bh + token0 + token
            added = tl.load(biases, mask=valid, other=0.0)
        for run in range(first_run, last_run):
            query_segment = tl.load(runs + 4 * run)
            first, cut, last = tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2), tl.load(runs + 4 * run + 3)
            pair = pairs + 8 * (segment * num_segments + query_segment)
            for CUT in tl.static_range(2):
                dk, dv = _key_tiles(
                    dk,
                    dv,
                    k,
                    v,
                    added,
                    frame,
                    key_position(row, tl.load(pair + 1)),
                    key_position(column, tl.load(pair + 4)),
                    cut if CUT else first,
                    last if CUT else cut,
                    query + offset_along(group, stride_qh, HEAD_DIM),
                    dout + offset_along(group, stride_gh, HEAD_DIM),
                    lse + group * num_tokens,
                    delta + group * num_tokens,
                    places,
                    query_segments,
                    query_segment,
                    pair,
                    stride_qn,
                    stride_gn,
                    log2_scale,
                    HEAD_DIM,
                    BLOCK_DIM,
                    QUERY_FRAMES,
                    QUERY_ROWS,
                    QUERY_COLUMNS,
                    CUT == 1,
                    TIMED,
                    HAS_BIAS,
                    PRECISION,
                )

    token0, token, valid, frame, row, column = own_tile(
        items, tl.program_id(0), key_segments, KEY_FRAMES, KEY_ROWS, KEY_COLUMNS
    )
    slot = own_slot(items, tl.program_id(0))
    if slot >= 0:
        place = ((tl.program_id(2) * heads + tl.program_id(1)).to(tl.int64) * slots + slot) * BLOCK_N * BLOCK_DIM
        offsets = tl.arange(0, BLOCK_N)[:, None] * BLOCK_DIM + dim[None, :]
        tl.store(partial + place + offsets, dk * scale)
        second = (tl.num_programs(2) * heads).to(tl.int64) * slots * BLOCK_N * BLOCK_DIM
        tl.store(partial + second + place + offsets, dv)
    else:
        dkey += head_offset(batch, head, stride_dkb, stride_dkh, HEAD_DIM) + token0 * stride_dkn
        dvalue += head_offset(batch, head, stride_dvb, stride_dvh, HEAD_DIM) + token0 * stride_dvn
        store_rows(dkey + token[:, None] * stride_dkn + dim[None, :], dk * scale, valid, HEAD_DIM, BLOCK_DIM)
        store_rows(dvalue + token[:, None] * stride_dvn + dim[None, :], dv, valid, HEAD_DIM, BLOCK_DIM)
