"""The two passes of linear attention: the state of all keys, then the queries' products with it.

A program of the first pass adds up φ(k)ᵀ v and φ(k) over its share of the tokens, for one block of the state; the
shares are added afterwards. A program of the second walks blocks of queries. The weights of the text, exp(s), are
added there by an online softmax that starts from a null score of 0, beside which φ(q)·Σφ(k) is a weight like another.

Letters: M tokens of a block, K features, V value columns, both cut into blocks. Scores are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.linear_blocks import (
    EPS,
    SIZES,
    features,
    load_block,
    load_state,
    multiply,
    round_for_products,
    split,
    store_block,
    weigh,
)
from diffusers_linattn.kernels.local_attention_forward import attend
from diffusers_linattn.kernels.vector_strides import head_offset


@triton.jit(do_not_specialize=SIZES)
def state_kernel(
    key,
    value,
    weights,
    counts,
    state,
    normalizer,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_wb,
    stride_wh,
    heads,
    num_tokens,
    share,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COUNTED: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks of the state, shares of `share` tokens, batch * heads).

    Writes state (shares, batch * heads, K, V) and normalizer (shares, batch * heads, K), fp32: Σ w φ(k) v and
    Σ w φ(k) c with the weights w and the counts c of the tokens, which are 1 where not given.
    """
    batch, head = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    COLUMN_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_V - 1) // BLOCK_V
    feature = tl.program_id(0) // COLUMN_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    key += head_offset(batch, head, stride_kb, stride_kh, FEATURES)
    value += head_offset(batch, head, stride_vb, stride_vh, COLUMNS)
    weights += batch * stride_wb + head * stride_wh
    counts += batch * stride_wb + head * stride_wh

    acc = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    count = tl.zeros([BLOCK_K], dtype=tl.float32)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, num_tokens)
    token = tl.arange(0, BLOCK_M)
    # Keys reach the product through registers, for φ: a block is fetched while the one before it is multiplied.
    k = load_block(key, first, stride_kn, first + token < last, feature, FEATURES)
    for token0 in range(first, last, BLOCK_M):
        valid = token0 + token < last
        phi = features(k, FEATURE_MAP)
        k = load_block(key, token0 + BLOCK_M, stride_kn, token0 + BLOCK_M + token < last, feature, FEATURES)
        v = load_block(value, token0, stride_vn, valid, column, COLUMNS)
        if WEIGHTED:
            phi = phi.to(tl.float32) * tl.load(weights + token0 + token, mask=valid, other=0.0)[:, None]
        counted = valid.to(tl.float32)
        if COUNTED:
            counted = tl.load(counts + token0 + token, mask=valid, other=0.0)
        if SPLIT:
            phi = tl.trans(phi.to(tl.bfloat16))
            acc = tl.dot(phi, v, acc)
        else:  # weights may be out of the range of fp16
            phi, v = tl.trans(round_for_products(phi, PRECISION)), round_for_products(v.to(tl.float32), PRECISION)
            acc = tl.dot(phi, v, acc, input_precision=PRECISION)
        count += weigh(phi, counted, SPLIT, PRECISION)

    place = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    pointers = state + place * FEATURES * COLUMNS + feature[:, None] * COLUMNS + column[None, :]
    tl.store(pointers, acc, mask=(feature < FEATURES)[:, None] & (column < COLUMNS)[None, :])
    first_columns = tl.arange(0, BLOCK_K) >= tl.program_id(0) % COLUMN_BLOCKS * BLOCK_K
    tl.store(normalizer + place * FEATURES + feature, count, mask=(feature < FEATURES) & first_columns)


@triton.jit(do_not_specialize=SIZES)
def product_kernel(
    query,
    state,
    normalizer,
    weights,
    text_key,
    text_value,
    text_bias,
    out,
    lse,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_wb,
    stride_wh,
    stride_tkb,
    stride_tkh,
    stride_tkn,
    stride_tvb,
    stride_tvh,
    stride_tvn,
    stride_bb,
    stride_bh,
    stride_ob,
    stride_oh,
    stride_on,
    log2_scale,
    heads,
    num_tokens,
    num_text,
    share,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDE_K: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    NORMALIZED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks of value columns, shares of `share` tokens, batch * heads).

    Normalized, writes the attention of the queries, out (batch, heads, tokens, V), and the base-2 logarithm of the
    denominator, lse (batch * heads, tokens). Otherwise writes w φ(q) S alone. `log2_scale` is the scale of the scores
    times log2(e), which the bias contains, fp32 (batch, heads, text tokens).
    """
    batch, head = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    FEATURE_BLOCKS: tl.constexpr = (FEATURES + BLOCK_K - 1) // BLOCK_K
    feature = tl.arange(0, BLOCK_K)
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    query += head_offset(batch, head, stride_qb, stride_qh, FEATURES)
    out += head_offset(batch, head, stride_ob, stride_oh, COLUMNS)
    lse += tl.program_id(2).to(tl.int64) * num_tokens
    weights += batch * stride_wb + head * stride_wh
    state += tl.program_id(2).to(tl.int64) * FEATURES * COLUMNS
    normalizer += tl.program_id(2).to(tl.int64) * FEATURES
    if HAS_TEXT:
        text_key += head_offset(batch, head, stride_tkb, stride_tkh, FEATURES)
        text_value += head_offset(batch, head, stride_tvb, stride_tvh, COLUMNS)
        text_bias += batch * stride_bb + head * stride_bh
    if FEATURE_BLOCKS == 1:  # the state stays where it is for all blocks of queries
        whole = load_state(state, feature, column, FEATURES, COLUMNS, False)
        high, low = split(whole, query.dtype.element_ty, SPLIT, PRECISION)
        count = tl.load(normalizer + feature, mask=feature < FEATURES, other=0.0)

    first = tl.program_id(1) * share
    last = tl.minimum(first + share, num_tokens)
    token = tl.arange(0, BLOCK_M)
    for token0 in range(first, last, BLOCK_M):
        valid = token0 + token < last
        acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
        if FEATURE_BLOCKS == 1:
            phi = features(load_block(query, token0, stride_qn, valid, feature, FEATURES), FEATURE_MAP)
            acc = multiply(phi, high, low, acc, SPLIT, PRECISION)
            total = weigh(phi, count, SPLIT, PRECISION)
        else:
            total = tl.zeros([BLOCK_M], dtype=tl.float32)
            for block in range(FEATURE_BLOCKS):
                here = block * BLOCK_K + feature
                phi = features(load_block(query, token0, stride_qn, valid, here, FEATURES), FEATURE_MAP)
                part = load_state(state, here, column, FEATURES, COLUMNS, False)
                high, low = split(part, query.dtype.element_ty, SPLIT, PRECISION)
                acc = multiply(phi, high, low, acc, SPLIT, PRECISION)
                count = tl.load(normalizer + here, mask=here < FEATURES, other=0.0)
                total += weigh(phi, count, False, PRECISION)
        if NORMALIZED:
            total += EPS
            peak = tl.zeros([BLOCK_M], dtype=tl.float32)
            if HAS_TEXT:
                channel = tl.arange(0, WIDE_K)
                q = load_block(query, token0, stride_qn, valid, channel, FEATURES)
                acc, total, peak = add_text(
                    acc, total, q, text_key, text_value, text_bias, stride_tkn, stride_tvn, channel, column,
                    log2_scale, num_text, FEATURES, COLUMNS, BLOCK_T, HAS_BIAS, RAGGED, PRECISION,
                )  # fmt: skip
            acc = acc * (1.0 / total)[:, None]
            tl.store(lse + token0 + token, peak + tl.log2(total), mask=valid & (token >= tl.program_id(0) * BLOCK_M))
        elif WEIGHTED:
            acc = acc * tl.load(weights + token0 + token, mask=valid, other=0.0)[:, None]
        store_block(out, token0, stride_on, acc, valid, column, COLUMNS)


@triton.jit
def add_text(
    acc,
    total,
    q,
    text_key,
    text_value,
    text_bias,
    stride_tkn,
    stride_tvn,
    feature,
    column,
    log2_scale,
    num_text,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the text to sums of values (M, columns) and of their weights (M,), in units of the null score's weight.

    The last result is the peak of the scores, (M,), by which both are divided.
    """
    text = tl.arange(0, BLOCK_T)
    peak = tl.zeros_like(total)
    for text0 in range(0, num_text, BLOCK_T):
        there = text0 + text < num_text
        k = load_block(text_key, text0, stride_tkn, there, feature, FEATURES, RAGGED)
        v = load_block(text_value, text0, stride_tvn, there, column, COLUMNS, RAGGED)
        bias, room = 0.0, tl.where(there, float("inf"), float("-inf"))[None, :]
        if HAS_BIAS:
            bias = tl.load(text_bias + text0 + text, mask=there, other=float("-inf"))[None, :]
        CUT: tl.constexpr = RAGGED and not HAS_BIAS
        acc, total, peak = attend(acc, total, peak, q, k, v, log2_scale, bias, room, HAS_BIAS, CUT, PRECISION)
    return acc, total, peak
