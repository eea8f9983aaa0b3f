"""Sums over image keys divided by their weights, with the text keys added to both, and the gradients of that.

Forward, the online softmax over the text starts from the sums, whose weights stand for a null score of 0. Backward,
with w = 1 / denominator, o the output, g its gradient and δ = g·o, the gradient of the sums is w g, that of their
weights −w δ; those of the text are made by `linear_attention_backward.text_gradients_kernel`.

Letters: M tokens of a block, K features, V value columns. Scores are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.linear_attention_backward import add_text_to_query_gradient
from diffusers_linattn.kernels.linear_attention_forward import add_text
from diffusers_linattn.kernels.linear_blocks import EPS, SIZES, load_block, store_block
from diffusers_linattn.kernels.vector_strides import head_offset


@triton.jit(do_not_specialize=SIZES)
def blend_kernel(
    query,
    value,
    counts,
    text_key,
    text_value,
    text_bias,
    out,
    lse,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_vb,
    stride_vh,
    stride_vn,
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
    HAS_TEXT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks of value columns, shares of `share` tokens, batch * heads).

    value are the sums, fp32 (batch, heads, tokens, V), counts the sums of their weights, fp32 (batch * heads, tokens).
    Writes out (batch, heads, tokens, V) and the base-2 logarithm of the denominator, lse (batch * heads, tokens).
    """
    batch, head = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    column, feature = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_K)
    query += head_offset(batch, head, stride_qb, stride_qh, FEATURES)
    value += head_offset(batch, head, stride_vb, stride_vh, COLUMNS)
    out += head_offset(batch, head, stride_ob, stride_oh, COLUMNS)
    counts += tl.program_id(2).to(tl.int64) * num_tokens
    lse += tl.program_id(2).to(tl.int64) * num_tokens
    if HAS_TEXT:
        text_key += head_offset(batch, head, stride_tkb, stride_tkh, FEATURES)
        text_value += head_offset(batch, head, stride_tvb, stride_tvh, COLUMNS)
        text_bias += batch * stride_bb + head * stride_bh

    first = tl.program_id(1) * share
    last = tl.minimum(first + share, num_tokens)
    token = tl.arange(0, BLOCK_M)
    for token0 in range(first, last, BLOCK_M):
        valid = token0 + token < last
        acc = load_block(value, token0, stride_vn, valid, column, COLUMNS)
        total = tl.load(counts + token0 + token, mask=valid, other=0.0) + EPS
        peak = tl.zeros([BLOCK_M], dtype=tl.float32)
        if HAS_TEXT:
            q = load_block(query, token0, stride_qn, valid, feature, FEATURES)
            acc, total, peak = add_text(
                acc, total, q, text_key, text_value, text_bias, stride_tkn, stride_tvn, feature, column,
                log2_scale, num_text, FEATURES, COLUMNS, BLOCK_T, HAS_BIAS, RAGGED, PRECISION,
            )  # fmt: skip
        tl.store(lse + token0 + token, peak + tl.log2(total), mask=valid & (token >= tl.program_id(0) * BLOCK_M))
        store_block(out, token0, stride_on, acc * (1.0 / total)[:, None], valid, column, COLUMNS)


@triton.jit(do_not_specialize=SIZES)
def blend_gradients_kernel(
    query,
    grad,
    out,
    lse,
    text_key,
    text_value,
    text_bias,
    dquery,
    dsums,
    dcounts,
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
    stride_sb,
    stride_sh,
    stride_sn,
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
    HAS_TEXT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (1, shares of `share` tokens, batch * heads).

    Writes dsums, dcounts, beside text dquery, and minus_delta = −δ (batch * heads, tokens), fp32.
    """
    batch, head = (tl.program_id(2) // heads).to(tl.int64), (tl.program_id(2) % heads).to(tl.int64)
    feature = tl.arange(0, BLOCK_K)
    query += head_offset(batch, head, stride_qb, stride_qh, FEATURES)
    grad += head_offset(batch, head, stride_gb, stride_gh, COLUMNS)
    out += head_offset(batch, head, stride_ob, stride_oh, COLUMNS)
    dquery += head_offset(batch, head, stride_db, stride_dh, FEATURES)
    dsums += head_offset(batch, head, stride_sb, stride_sh, COLUMNS)
    numbers = tl.program_id(2).to(tl.int64) * num_tokens
    if HAS_TEXT:
        text_key += head_offset(batch, head, stride_tkb, stride_tkh, FEATURES)
        text_value += head_offset(batch, head, stride_tvb, stride_tvh, COLUMNS)
        text_bias += batch * stride_bb + head * stride_bh

    first = tl.program_id(1) * share
    last = tl.minimum(first + share, num_tokens)
    token = tl.arange(0, BLOCK_M)
    for token0 in range(first, last, BLOCK_M):
        valid = token0 + token < last
        sums = tl.load(lse + numbers + token0 + token, mask=valid, other=float("inf"))
        w = tl.exp2(-sums)
        products = tl.zeros([BLOCK_M], dtype=tl.float32)
        for block in range((COLUMNS + BLOCK_V - 1) // BLOCK_V):
            column = block * BLOCK_V + tl.arange(0, BLOCK_V)
            g = load_block(grad, token0, stride_gn, valid, column, COLUMNS).to(tl.float32)
            o = load_block(out, token0, stride_on, valid, column, COLUMNS).to(tl.float32)
            products += tl.sum(g * o, 1)
            store_block(dsums, token0, stride_sn, g * w[:, None], valid, column, COLUMNS)
        tl.store(dcounts + numbers + token0 + token, -products * w, mask=valid)
        tl.store(minus_delta + numbers + token0 + token, -products, mask=valid)
        if HAS_TEXT:
            q = load_block(query, token0, stride_qn, valid, feature, FEATURES)
            g = load_block(grad, token0, stride_gn, valid, tl.arange(0, BLOCK_V), COLUMNS)
            acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
            acc = add_text_to_query_gradient(
                acc, q, g, sums, products, text_key, text_value, text_bias, stride_tkn, stride_tvn, feature,
                tl.arange(0, BLOCK_V), scale, log2_scale, num_text, FEATURES, COLUMNS, BLOCK_T, HAS_BIAS, RAGGED,
                PRECISION,
            )  # fmt: skip
            store_block(dquery, token0, stride_dn, acc, valid, feature, FEATURES)
