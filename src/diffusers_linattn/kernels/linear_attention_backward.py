"""The gradients of linear attention that are not themselves a state or a product with one.

With w = 1 / denominator, o the output, g its gradient and δ = g·o, the gradient of φ(q) is w (S g − δ z), and those
of the state S and the normalizer z are Σ w φ(q) g and −Σ w φ(q) δ: a state again. The keys, which have no denominator,
get S g + z: what queries get with δ = −1. A program of the text's gradients owns a block of text and walks its share
of the queries, with scores transposed, (text, queries), so that no product transposes a result.

Letters: M tokens of a block, K features, V value columns, both cut into blocks. Scores are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.linear_blocks import (
    SIZES,
    features,
    load_block,
    load_state,
    multiply,
    split,
    store_block,
    through_features,
)
from diffusers_linattn.kernels.vector_strides import head_offset


@triton.jit(do_not_specialize=SIZES)
def feature_gradient_kernel(
    query,
    grad,
    out,
    lse,
    state,
    normalizer,
    weights,
    text_key,
    text_value,
    text_bias,
    dquery,
    shrunk,
    minus_delta,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_ob,
    stride_oh,
    stride_on,
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
    stride_db,
    stride_dh,
    stride_dn,
    scale,
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
    WIDE_V: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
    NORMALIZED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks of features, shares of `share` tokens, batch * heads).

    Writes dquery and, normalized, the numbers of every query that the other gradients need, fp32
    (batch * heads, tokens): shrunk = w and minus_delta = −δ.
    """
    batch, head = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    COLUMN_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_V - 1) // BLOCK_V
    # Without text and with all features at hand, δ = w φ(q)·(S g), which needs no output.
    ALONE: tl.constexpr = FEATURES <= BLOCK_K and not HAS_TEXT
    feature = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.arange(0, BLOCK_V)
    query += head_offset(batch, head, stride_qb, stride_qh, FEATURES)
    grad += head_offset(batch, head, stride_gb, stride_gh, COLUMNS)
    out += head_offset(batch, head, stride_ob, stride_oh, COLUMNS)
    dquery += head_offset(batch, head, stride_db, stride_dh, FEATURES)
    weights += batch * stride_wb + head * stride_wh
    numbers = tl.program_id(2).to(tl.int64) * num_tokens
    state += tl.program_id(2).to(tl.int64) * FEATURES * COLUMNS
    normalizer += tl.program_id(2).to(tl.int64) * FEATURES
    if HAS_TEXT:
        text_key += head_offset(batch, head, stride_tkb, stride_tkh, FEATURES)
        text_value += head_offset(batch, head, stride_tvb, stride_tvh, COLUMNS)
        text_bias += batch * stride_bb + head * stride_bh
    if COLUMN_BLOCKS == 1:  # the state stays where it is for all blocks of tokens
        whole = load_state(state, feature, column, FEATURES, COLUMNS, True)
        high, low = split(whole, grad.dtype.element_ty, SPLIT, PRECISION)

    first = tl.program_id(1) * share
    last = tl.minimum(first + share, num_tokens)
    token = tl.arange(0, BLOCK_M)
    for token0 in range(first, last, BLOCK_M):
        valid = token0 + token < last
        acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        products = tl.zeros([BLOCK_M], dtype=tl.float32)
        if COLUMN_BLOCKS == 1:
            q = load_block(query, token0, stride_qn, valid, feature, FEATURES)  # arrives meanwhile
            g = load_block(grad, token0, stride_gn, valid, column, COLUMNS)
            acc = multiply(g, high, low, acc, SPLIT, PRECISION)
            if NORMALIZED and not ALONE:
                o = load_block(out, token0, stride_on, valid, column, COLUMNS)
                products = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        else:
            for block in range(COLUMN_BLOCKS):
                here = block * BLOCK_V + column
                g = load_block(grad, token0, stride_gn, valid, here, COLUMNS)
                part = load_state(state, feature, here, FEATURES, COLUMNS, True)
                high, low = split(part, grad.dtype.element_ty, SPLIT, PRECISION)
                acc = multiply(g, high, low, acc, SPLIT, PRECISION)
                if NORMALIZED and not ALONE:
                    o = load_block(out, token0, stride_on, valid, here, COLUMNS)
                    products += tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
            q = load_block(query, token0, stride_qn, valid, feature, FEATURES)
        # Read again for every block: kept, it would be too many registers.
        count = tl.load(normalizer + feature, mask=feature < FEATURES, other=0.0)
        if NORMALIZED:
            sums = tl.load(lse + numbers + token0 + token, mask=valid, other=float("inf"))
            w = tl.exp2(-sums)
            if ALONE:
                products = tl.sum(features(q, FEATURE_MAP).to(tl.float32) * acc, 1) * w
            acc = (acc - products[:, None] * count[None, :]) * w[:, None]
            written = valid
            if FEATURES > BLOCK_K:  # by the first block of features
                written = valid & (token >= tl.program_id(0) * BLOCK_M)
            tl.store(shrunk + numbers + token0 + token, w, mask=written)
            tl.store(minus_delta + numbers + token0 + token, -products, mask=written)
        else:
            acc += count[None, :]
            if WEIGHTED:
                acc *= tl.load(weights + token0 + token, mask=valid, other=0.0)[:, None]
        acc = through_features(acc, q, FEATURE_MAP)
        if HAS_TEXT:
            channel = tl.arange(0, WIDE_V)
            g = load_block(grad, token0, stride_gn, valid, channel, COLUMNS)
            acc = add_text_to_query_gradient(
                acc, q, g, sums, products, text_key, text_value, text_bias, stride_tkn, stride_tvn, feature, channel,
                scale, log2_scale, num_text, FEATURES, COLUMNS, BLOCK_T, HAS_BIAS, RAGGED, PRECISION,
            )  # fmt: skip
        store_block(dquery, token0, stride_dn, acc, valid, feature, FEATURES)


@triton.jit
def add_text_to_query_gradient(
    acc,
    q,
    g,
    sums,
    products,
    text_key,
    text_value,
    text_bias,
    stride_tkn,
    stride_tvn,
    feature,
    channel,
    scale,
    log2_scale,
    num_text,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to acc (M, features) what the text gives to the queries' gradient: `sums` are the base-2 logarithms of their
    denominators and `products` their δ, both (M,)."""
    text = tl.arange(0, BLOCK_T)
    for text0 in range(0, num_text, BLOCK_T):
        there = text0 + text < num_text
        k = load_block(text_key, text0, stride_tkn, there, feature, FEATURES, RAGGED)
        v = load_block(text_value, text0, stride_tvn, there, channel, COLUMNS, RAGGED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
        if HAS_BIAS:
            scores += tl.load(text_bias + text0 + text, mask=there, other=float("-inf"))[None, :]
        elif RAGGED:
            scores = tl.where(there[None, :], scores, float("-inf"))
        p = tl.exp2(scores - sums[:, None])
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - products[:, None]) * scale
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=SIZES)
def narrow_gradients_kernel(
    key,
    value,
    state,
    normalizer,
    weights,
    dkey,
    dvalue,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_wb,
    stride_wh,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
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
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (1, shares of `share` tokens, batch * heads).

    Writes dkey and dvalue from the gradients of state and normalizer, for heads that are one block: what two launches
    would write, with key and value read once.
    """
    batch, head = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    feature, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    key += head_offset(batch, head, stride_kb, stride_kh, FEATURES)
    value += head_offset(batch, head, stride_vb, stride_vh, COLUMNS)
    weights += batch * stride_wb + head * stride_wh
    dkey += head_offset(batch, head, stride_dkb, stride_dkh, FEATURES)
    dvalue += head_offset(batch, head, stride_dvb, stride_dvh, COLUMNS)
    state += tl.program_id(2).to(tl.int64) * FEATURES * COLUMNS
    normalizer += tl.program_id(2).to(tl.int64) * FEATURES
    whole = load_state(state, feature, column, FEATURES, COLUMNS, False)
    high, low = split(whole, key.dtype.element_ty, SPLIT, PRECISION)
    count = tl.load(normalizer + feature, mask=feature < FEATURES, other=0.0)

    first = tl.program_id(1) * share
    last = tl.minimum(first + share, num_tokens)
    token = tl.arange(0, BLOCK_M)
    for token0 in range(first, last, BLOCK_M):
        valid = token0 + token < last
        k = load_block(key, token0, stride_kn, valid, feature, FEATURES)
        v = load_block(value, token0, stride_vn, valid, column, COLUMNS)
        dv = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
        dv = multiply(features(k, FEATURE_MAP), high, low, dv, SPLIT, PRECISION)
        dk = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        dk = multiply(v, tl.trans(high), tl.trans(low), dk, SPLIT, PRECISION) + count[None, :]
        if WEIGHTED:
            w = tl.load(weights + token0 + token, mask=valid, other=0.0)
            dk, dv = dk * w[:, None], dv * w[:, None]
        store_block(dkey, token0, stride_dkn, through_features(dk, k, FEATURE_MAP), valid, feature, FEATURES)
        store_block(dvalue, token0, stride_dvn, dv, valid, column, COLUMNS)


@triton.jit(do_not_specialize=SIZES)
def text_gradients_kernel(
    query,
    grad,
    lse,
    minus_delta,
    text_key,
    text_value,
    text_bias,
    dkey,
    dvalue,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_tkb,
    stride_tkh,
    stride_tkn,
    stride_tvb,
    stride_tvh,
    stride_tvn,
    stride_bb,
    stride_bh,
    scale,
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
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks of text, shares of `share` queries, batch * heads).

    Writes dkey (shares, batch * heads, text tokens, K) and dvalue (…, V), fp32.
    """
    batch, head = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    feature, column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    query += head_offset(batch, head, stride_qb, stride_qh, FEATURES)
    grad += head_offset(batch, head, stride_gb, stride_gh, COLUMNS)
    numbers = tl.program_id(2).to(tl.int64) * num_tokens
    text_key += head_offset(batch, head, stride_tkb, stride_tkh, FEATURES)
    text_value += head_offset(batch, head, stride_tvb, stride_tvh, COLUMNS)
    text0 = tl.program_id(0) * BLOCK_T
    text = text0 + tl.arange(0, BLOCK_T)
    there = text < num_text
    k = load_block(text_key, text0, stride_tkn, there, feature, FEATURES)
    v = load_block(text_value, text0, stride_tvn, there, column, COLUMNS)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(text_bias + batch * stride_bb + head * stride_bh + text, mask=there, other=0.0)[:, None]

    dk = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    dv = tl.zeros([BLOCK_T, BLOCK_V], dtype=tl.float32)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, num_tokens)
    token = tl.arange(0, BLOCK_M)
    whole = first + (last - first) // BLOCK_M * BLOCK_M
    for CUT in tl.static_range(2):
        for token0 in range(whole if CUT else first, last if CUT else whole, BLOCK_M):
            valid = token0 + token < last
            q = load_block(query, token0, stride_qn, valid, feature, FEATURES, CUT)
            g = load_block(grad, token0, stride_gn, valid, column, COLUMNS, CUT)
            # Numbers of the block's first query for those that are not there, whose weight is 0.
            number = numbers + token0 + (tl.where(valid, token, 0) if CUT else token)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2_scale
            if HAS_BIAS:
                scores += bias
            scores -= tl.load(lse + number)[None, :]
            if CUT:
                scores = tl.where(valid[None, :], scores, float("-inf"))
            p = tl.exp2(scores)
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
            ds = p * (dp + tl.load(minus_delta + number)[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    place = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    dkey += place * num_text * FEATURES
    dvalue += place * num_text * COLUMNS
    store_block(dkey, text0, FEATURES, dk * scale, there, feature, FEATURES)
    store_block(dvalue, text0, COLUMNS, dv, there, column, COLUMNS)
