"""Weights of gated linear attention between the tokens of one chunk, and their gradients.

A chunk is cut into halves again and again: of a block of 2s tokens, each half looks at the other through the border
between them, to which the decay of a pair factors into that of the query and that of the key, both at most 1. One
product of matrices per level, of which the pairs across the halves count, for both directions at once.

Letters: C tokens of a chunk, S of half a chunk, K features, V value columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.gated_path import (
    across_halves,
    double_blocks,
    gates_towards,
    in_second_half,
    load_count,
    load_features,
    load_gate,
    run_tokens,
    scalar_decays,
)


@triton.jit(do_not_specialize=["heads", "first_head", "chunks", "length", "inner", "outer", "backward"])
def weights_kernel(
    query,
    key,
    gate,
    counts,
    weights,
    totals,
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
    KEY_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    LEVELS: tl.constexpr,
    SCALAR: tl.constexpr,
    BOTH: tl.constexpr,
    COUNTED: tl.constexpr,
    QUERY_FEATURES: tl.constexpr,
    KEY_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (chunks, 2 halves of the queries, heads). Writes weights (heads, chunks, C, C), the token's own included.

    If `COUNTED`, also the sum of all weights of a query, totals (all heads, tokens), from counts (2 | 1, heads,
    chunks, K), what a value of 1 leaves of the chunks around.
    """
    chunk, half = tl.program_id(0), tl.program_id(1)
    slot, head = tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    query += head // heads * stride_qb + head % heads * stride_qh
    key += head // heads * stride_kb + head % heads * stride_kh
    gate += head // heads * stride_gb + head % heads * stride_gh
    dtype: tl.constexpr = weights.dtype.element_ty
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM
    WIDTH: tl.constexpr = 1 if SCALAR else BLOCK_K
    is_right = half == 1

    token, valid = run_tokens(2 * chunk + half, length, inner, outer, backward, HALF, 0)
    far_token, far_valid = run_tokens(2 * chunk + 1 - half, length, inner, outer, backward, HALF, 0)
    near = tl.zeros([HALF, HALF], dtype=tl.float32)
    far = tl.zeros([HALF, HALF], dtype=tl.float32)
    own = tl.zeros([HALF], dtype=tl.float32)
    total = tl.zeros([HALF], dtype=tl.float32)
    for block in range(0, (KEY_DIM + BLOCK_K - 1) // BLOCK_K):
        channel = block * BLOCK_K + tl.arange(0, BLOCK_K)
        q = load_features(query, token, valid, channel, stride_qn, KEY_DIM, QUERY_FEATURES)
        k = load_features(key, token, valid, channel, stride_kn, KEY_DIM, KEY_FEATURES)
        g = load_gate(gate, token, valid, channel, stride_gn, GATE_DIM, SCALAR)
        before, after = tl.zeros([HALF, WIDTH], dtype=tl.float32), tl.zeros([HALF, WIDTH], dtype=tl.float32)
        if SCALAR:
            near = tl.dot(q.to(dtype), tl.trans(k.to(dtype)), near, input_precision=PRECISION)
        else:
            own += tl.sum(q * k, 1)
        for LEVEL in tl.static_range(LEVELS):
            if not SCALAR:
                of_key = tl.exp(tl.where(in_second_half(LEVEL, HALF), before, after))
                rows, keys = (q * of_key * tl.exp(g)).to(dtype), (k * of_key).to(dtype)
                products = tl.dot(rows, tl.trans(keys), input_precision=PRECISION)
                near += tl.where(across_halves(LEVEL, HALF, BOTH, False), products, 0.0)
            before, after = double_blocks(before, after, g, LEVEL, HALF, WIDTH)

        # The other half of the chunk, through the border between them.
        k = load_features(key, far_token, far_valid, channel, stride_kn, KEY_DIM, KEY_FEATURES)
        decay, far_total = gates_towards(
            gate,
            2 * chunk + 1 - half,
            is_right,
            length,
            inner,
            outer,
            backward,
            channel,
            stride_gn,
            GATE_DIM,
            SCALAR,
            HALF,
        )
        rows = (q * tl.exp(tl.where(is_right, before, after) + g)).to(dtype)
        far = tl.dot(rows, tl.trans((k * tl.exp(decay)).to(dtype)), far, input_precision=PRECISION)
        if COUNTED:
            count = load_count(counts, 0, slot, chunks, chunk - 1, channel, KEY_DIM)
            before += tl.where(is_right, far_total, 0.0)[None, :]
            total += tl.sum(q * tl.exp(before + g) * count[None, :], 1)
            if BOTH:
                count = load_count(counts, 1, slot, chunks, chunk + 1, channel, KEY_DIM)
                after += tl.where(is_right, 0.0, far_total)[None, :]
                total += tl.sum(q * tl.exp(after + g) * count[None, :], 1)

    row, column = tl.arange(0, HALF)[:, None], tl.arange(0, HALF)[None, :]
    if SCALAR:
        g = load_gate(gate, token, valid, tl.arange(0, 1), stride_gn, GATE_DIM, SCALAR)
        near *= scalar_decays(g, HALF, LEVELS, BOTH, False)
    else:
        near = tl.where(row == column, own[:, None], near)
    if not BOTH:
        far = tl.where(is_right, far, 0.0)
    weights += ((slot * chunks + chunk) * 2 + half) * HALF * 2 * HALF + row * 2 * HALF + column
    tl.store(weights + half * HALF, near.to(dtype))
    tl.store(weights + (1 - half) * HALF, far.to(dtype))
    if COUNTED:
        tl.store(totals + head * length + token, total + tl.sum(near, 1) + tl.sum(far, 1), mask=valid)
