"""Weights of gated linear attention between the tokens of one chunk, and queries and keys decayed to the chunk's ends.

A chunk is cut into halves again and again: of a block of 2s tokens, each half looks at the other through the border
between them, to which the decay of a pair factors into that of the query and that of the key, both at most 1. One
product of matrices per level, of which the pairs across the halves count, for both directions at once.

Letters: C tokens of a chunk, S of half a chunk, K features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.gated_path import (
    SIZES,
    across_halves,
    as_operand,
    decayed_run,
    double_blocks,
    in_second_half,
    load_features,
    load_gate,
    run_tokens,
    scalar_decays,
)
from diffusers_linattn.kernels.vector_strides import head_offset


@triton.jit(do_not_specialize=SIZES)
def weights_kernel(
    query,
    key,
    gate,
    weights,
    decayed_queries,
    decayed_keys,
    decays,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_gb,
    stride_gh,
    stride_gn,
    heads,
    first_head,
    chunks,
    length,
    inner,
    outer,
    backward,
    COLUMNS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALAR: tl.constexpr,
    BOTH: tl.constexpr,
    QUERY_FEATURES: tl.constexpr,
    KEY_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (chunks, 1, heads of this launch).

    Writes the weights (heads, chunks, C, C), the token's own included; the queries and keys decayed to the right and
    to the left end of their run, which is half a chunk, (2, heads, 2 * chunks, S, K) each, or with one direction the
    keys to the right and the queries to the left alone; and the decay over each run, decays (heads, 2 * chunks,
    K | 1).
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    batch, own_head = head // heads, head % heads
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM
    query += head_offset(batch, own_head, stride_qb, stride_qh, KEY_DIM)
    key += head_offset(batch, own_head, stride_kb, stride_kh, KEY_DIM)
    gate += head_offset(batch, own_head, stride_gb, stride_gh, GATE_DIM)
    dtype: tl.constexpr = weights.dtype.element_ty
    LEFT: tl.constexpr = 1 if BOTH else 0  # where what has decayed to the left lies among `decayed_queries`

    token0, valid0 = run_tokens(2 * chunk, length, inner, outer, backward, HALF, COLUMNS)
    token1, valid1 = run_tokens(2 * chunk + 1, length, inner, outer, backward, HALF, COLUMNS)
    # Queries of the first half by keys of the first, and so on.
    weights00 = tl.zeros([HALF, HALF], dtype=tl.float32)
    weights11 = tl.zeros([HALF, HALF], dtype=tl.float32)
    weights01 = tl.zeros([HALF, HALF], dtype=tl.float32)
    weights10 = tl.zeros([HALF, HALF], dtype=tl.float32)
    own0 = tl.zeros([HALF], dtype=tl.float32)
    own1 = tl.zeros([HALF], dtype=tl.float32)
    for block in range(0, (KEY_DIM + BLOCK_K - 1) // BLOCK_K):
        channel = block * BLOCK_K + tl.arange(0, BLOCK_K)
        q = load_features(query, token0, valid0, channel, stride_qn, KEY_DIM, QUERY_FEATURES)
        k = load_features(key, token0, valid0, channel, stride_kn, KEY_DIM, KEY_FEATURES)
        g = load_gate(gate, token0, valid0, channel, stride_gn, GATE_DIM, SCALAR)
        own0 += tl.sum(q * k, 1)
        weights00, before, after, total = _add_pairs(weights00, q, k, g, LEVELS, SCALAR, BOTH, dtype, PRECISION)
        _store_total(decays, total, slot, chunks, 2 * chunk, channel, KEY_DIM, SCALAR)
        q, before, after = q * tl.exp2(g), tl.exp2(before), tl.exp2(after)
        keys0 = _store(decayed_keys, 0, k * after, slot, chunks, 2 * chunk, channel, KEY_DIM, PRECISION)
        if BOTH:
            queries0 = _store(decayed_queries, 0, q * after, slot, chunks, 2 * chunk, channel, KEY_DIM, PRECISION)
            _store(decayed_keys, 1, k * before, slot, chunks, 2 * chunk, channel, KEY_DIM, PRECISION)
        _store(decayed_queries, LEFT, q * before, slot, chunks, 2 * chunk, channel, KEY_DIM, PRECISION)

        q = load_features(query, token1, valid1, channel, stride_qn, KEY_DIM, QUERY_FEATURES)
        k = load_features(key, token1, valid1, channel, stride_kn, KEY_DIM, KEY_FEATURES)
        g = load_gate(gate, token1, valid1, channel, stride_gn, GATE_DIM, SCALAR)
        own1 += tl.sum(q * k, 1)
        weights11, before, after, total = _add_pairs(weights11, q, k, g, LEVELS, SCALAR, BOTH, dtype, PRECISION)
        _store_total(decays, total, slot, chunks, 2 * chunk + 1, channel, KEY_DIM, SCALAR)
        q, before, after = q * tl.exp2(g), tl.exp2(before), tl.exp2(after)
        queries1 = _store(decayed_queries, LEFT, q * before, slot, chunks, 2 * chunk + 1, channel, KEY_DIM, PRECISION)
        if BOTH:
            keys1 = _store(decayed_keys, 1, k * before, slot, chunks, 2 * chunk + 1, channel, KEY_DIM, PRECISION)
            _store(decayed_queries, 0, q * after, slot, chunks, 2 * chunk + 1, channel, KEY_DIM, PRECISION)
        _store(decayed_keys, 0, k * after, slot, chunks, 2 * chunk + 1, channel, KEY_DIM, PRECISION)

        # Between the halves, through the border that both have decayed to.
        weights10 = tl.dot(queries1, tl.trans(keys0), weights10, input_precision=PRECISION)
        if BOTH:
            weights01 = tl.dot(queries0, tl.trans(keys1), weights01, input_precision=PRECISION)

    row, column = tl.arange(0, HALF)[:, None], tl.arange(0, HALF)[None, :]
    if SCALAR:
        g0 = load_gate(gate, token0, valid0, tl.arange(0, 1), stride_gn, GATE_DIM, SCALAR)
        g1 = load_gate(gate, token1, valid1, tl.arange(0, 1), stride_gn, GATE_DIM, SCALAR)
        weights00 *= scalar_decays(g0, HALF, LEVELS, BOTH, False)
        weights11 *= scalar_decays(g1, HALF, LEVELS, BOTH, False)
    else:
        weights00 = tl.where(row == column, own0[:, None], weights00)
        weights11 = tl.where(row == column, own1[:, None], weights11)
    weights += (slot * chunks + chunk) * 4 * HALF * HALF + row * 2 * HALF + column
    tl.store(weights, as_operand(weights00, dtype, PRECISION))
    tl.store(weights + HALF, as_operand(weights01, dtype, PRECISION))
    tl.store(weights + 2 * HALF * HALF, as_operand(weights10, dtype, PRECISION))
    tl.store(weights + 2 * HALF * HALF + HALF, as_operand(weights11, dtype, PRECISION))


@triton.jit
def _add_pairs(
    weights,
    q,
    k,
    g,
    LEVELS: tl.constexpr,
    SCALAR: tl.constexpr,
    BOTH: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the weights of the pairs inside a run of S tokens, without each token's own; sums of the gates before and
    after each and of all.

    Where all channels share a gate, products without decays, the own ones included.
    """
    SIZE: tl.constexpr = q.shape[0]
    before, after, total = g * 0, g * 0, g
    passed = q * tl.exp2(g)  # a query passes its own gate, a key does not
    if SCALAR:
        rows, keys = as_operand(q, dtype, PRECISION), as_operand(k, dtype, PRECISION)
        weights = tl.dot(rows, tl.trans(keys), weights, input_precision=PRECISION)
    for LEVEL in tl.static_range(LEVELS):
        if not SCALAR:
            decay = tl.exp2(tl.where(in_second_half(LEVEL, SIZE), before, after)) if LEVEL else 1.0
            rows, keys = as_operand(passed * decay, dtype, PRECISION), as_operand(k * decay, dtype, PRECISION)
            added = tl.dot(rows, tl.trans(keys), weights, input_precision=PRECISION)
            weights = tl.where(across_halves(LEVEL, SIZE, BOTH, False), added, weights)
        before, after, total = double_blocks(before, after, total, LEVEL, SIZE, g.shape[1])
    return weights, before, after, total


@triton.jit
def _store(decayed, direction, x, slot, chunks, run, channel, KEY_DIM: tl.constexpr, PRECISION: tl.constexpr):
    """Write decayed queries or keys (S, channels) of a run; as operand of products."""
    x = as_operand(x, decayed.dtype.element_ty, PRECISION)
    pointers, exists = decayed_run(decayed, direction, slot, chunks, run, channel, KEY_DIM, x.shape[0])
    tl.store(pointers, x, mask=exists)
    return x


@triton.jit
def _store_total(decays, total, slot, chunks, run, channel, KEY_DIM: tl.constexpr, SCALAR: tl.constexpr):
    """Write the decay over a run, from the sums of its gates (S, W), which are all alike."""
    is_first = tl.arange(0, total.shape[0])[:, None] == 0
    place = slot * chunks * 2 + run
    if SCALAR:
        tl.store(decays + place + tl.zeros_like(total).to(tl.int32), tl.exp2(total), mask=is_first)
    else:
        pointers = decays + place * KEY_DIM + channel[None, :] + tl.zeros_like(total).to(tl.int32)
        tl.store(pointers, tl.exp2(total), mask=is_first & (channel < KEY_DIM)[None, :])
