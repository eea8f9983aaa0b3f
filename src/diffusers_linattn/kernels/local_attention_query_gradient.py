"""The gradient of queries of windowed attention; see `local_attention_key_gradients` for keys and values.

A program owns a tile of queries and walks their keys as the forward pass does. Letters: M queries of a tile, N keys of
a tile, D channels of a head. Scores are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.local_attention_forward import SIZES
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


@triton.jit
def _query_step(
    dq,
    q,
    dout,
    k,
    v,
    lse,
    delta,
    scale,
    bias,
    room,
    HAS_BIAS: tl.constexpr,
    CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add N keys' part to the gradient of the queries, (M, D); bias and room as in `attend`."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_BIAS:
        scores += bias
    scores -= lse[:, None]
    if CUT:
        scores = tl.minimum(scores, room, propagate_nan=tl.PropagateNan.ALL)
    weights = tl.exp2(scores)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dscores = weights * (dweights - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _query_tiles(
    dq,
    q,
    dout,
    lse,
    delta,
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
    """The tiles of keys of entries `first` to `last`, all of one segment."""
    start, stop, frame_tokens, row_tokens, height, width = load_segment(key_segments, segment)
    frame, row, column = tile_coordinates(KEY_FRAMES, KEY_ROWS, KEY_COLUMNS)
    dim = tl.arange(0, BLOCK_DIM)
    token = frame * frame_tokens + row * row_tokens + column
    key_offsets = token[:, None] * stride_kn + dim[None, :]
    value_offsets = token[:, None] * stride_vn + dim[None, :]
    denominator_y, denominator_x = tl.load(pair + 1), tl.load(pair + 4)
    row_unit, column_unit, frames, limit = load_scales(pair)
    place = tl.load(places + first)
    for i in range(first, last):
        visited = place
        place = tl.load(places + i + 1)
        k, v, added, room = visit_keys(
            visited, key, value, bias, key_offsets, value_offsets, stride_kn, stride_vn, start, stop, frame_tokens,
            row_tokens, height, width, query_frame, query_row, query_column, denominator_y, denominator_x, row_unit,
            column_unit, frames, limit, HEAD_DIM, BLOCK_DIM, KEY_FRAMES, KEY_ROWS, KEY_COLUMNS, CUT, TIMED, HAS_BIAS,
        )  # fmt: skip
        dq = _query_step(dq, q, dout, k, v, lse, delta, scale, added, room, HAS_BIAS, CUT, PRECISION)
    return dq


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    query,
    key,
    value,
    pooled_key,
    pooled_value,
    bias,
    out,
    dout,
    lse,
    minus_grad_lse,
    delta,
    dquery,
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
    stride_gb,
    stride_gh,
    stride_gn,
    stride_db,
    stride_dh,
    stride_dn,
    scale,
    log2_scale,
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

    Writes dquery and delta: each output's inner product with its gradient, plus minus_grad_lse.
    """
    BLOCK_N: tl.constexpr = KEY_FRAMES * KEY_ROWS * KEY_COLUMNS
    stride_qn = vector_stride(stride_qn, HEAD_DIM)
    stride_kn = vector_stride(stride_kn, HEAD_DIM)
    stride_vn = vector_stride(stride_vn, HEAD_DIM)
    stride_pkn = vector_stride(stride_pkn, HEAD_DIM)
    stride_pvn = vector_stride(stride_pvn, HEAD_DIM)
    stride_on = vector_stride(stride_on, HEAD_DIM)
    stride_gn = vector_stride(stride_gn, HEAD_DIM)
    stride_dn = vector_stride(stride_dn, HEAD_DIM)
    item, head_of_all = item_and_head(text_items, num_items)
    batch, head = (head_of_all // heads).to(tl.int64), (head_of_all % heads).to(tl.int64)
    key += head_offset(batch, head // groups, stride_kb, stride_kh, HEAD_DIM)
    value += head_offset(batch, head // groups, stride_vb, stride_vh, HEAD_DIM)
    if HAS_BIAS:
        bias += batch * stride_bb + head * stride_bh

    segment, first_run, last_run, is_grid = load_runs(items, item)
    token0, token, valid, frame, row, column = own_tile(
        items, item, query_segments, QUERY_FRAMES, QUERY_ROWS, QUERY_COLUMNS
    )
    dim = tl.arange(0, BLOCK_DIM)
    query += head_offset(batch, head, stride_qb, stride_qh, HEAD_DIM) + token0 * stride_qn
    out += head_offset(batch, head, stride_ob, stride_oh, HEAD_DIM) + token0 * stride_on
    dout += head_offset(batch, head, stride_gb, stride_gh, HEAD_DIM) + token0 * stride_gn
    numbers = head_of_all.to(tl.int64) * num_tokens + token0
    q = load_rows(query + token[:, None] * stride_qn + dim[None, :], valid, HEAD_DIM, BLOCK_DIM)
    o = load_rows(out + token[:, None] * stride_on + dim[None, :], valid, HEAD_DIM, BLOCK_DIM)
    g = load_rows(dout + token[:, None] * stride_gn + dim[None, :], valid, HEAD_DIM, BLOCK_DIM)
    products = tl.load(minus_grad_lse + numbers + token, mask=valid, other=0.0)
    products += tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + numbers + token, products, mask=valid)
    sums = tl.load(lse + numbers + token, mask=valid, other=float("inf"))

    dq = tl.zeros([QUERY_FRAMES * QUERY_ROWS * QUERY_COLUMNS, BLOCK_DIM], dtype=tl.float32)
    for run in range(first_run, last_run):
        key_segment = tl.load(runs + 4 * run)
        first, cut, last = tl.load(runs + 4 * run + 1), tl.load(runs + 4 * run + 2), tl.load(runs + 4 * run + 3)
        pair = pairs + 8 * (segment * num_segments + key_segment)
        query_row = query_position(row, tl.load(pair), tl.load(pair + 1))
        query_column = query_position(column, tl.load(pair + 3), tl.load(pair + 4))
        for CUT in tl.static_range(2):
            dq = _query_tiles(
                dq,
                q,
                g,
                sums,
                products,
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
                log2_scale,
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
                dq = _query_step(dq, q, g, k, v, sums, products, log2_scale, 0.0, room, False, CUT, PRECISION)

    token0, token, valid, _, _, _ = own_tile(items, item, query_segments, QUERY_FRAMES, QUERY_ROWS, QUERY_COLUMNS)
    dquery += head_offset(batch, head, stride_db, stride_dh, HEAD_DIM) + token0 * stride_dn
    store_rows(dquery + token[:, None] * stride_dn + dim[None, :], dq * scale, valid, HEAD_DIM, BLOCK_DIM)
