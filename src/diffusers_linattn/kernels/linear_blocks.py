"""Blocks of tokens, their features and products with the state; shared by the Triton kernels of linear attention.

Letters: M tokens of a block, BLOCK channels of a block, of which those from SIZE on do not exist.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.masked_loads import existing, load_existing
from diffusers_linattn.kernels.vector_strides import vector_stride


EPS = tl.constexpr(1e-6)  # that of `ops.reference`
# Arguments that no kernel is compiled anew for, as Triton otherwise does for 1 and for multiples of 16.
SIZES = ("heads", "num_tokens", "num_text", "share", "stride_wb", "stride_wh", "stride_bb", "stride_bh")


@triton.jit
def load_block(pointer, token0, stride, valid, channel, SIZE: tl.constexpr, MASKED: tl.constexpr = True):
    """(M, BLOCK) of the tokens from `token0` on, 0 where a token or a channel does not exist.

    Without MASKED all tokens do.
    """
    token = tl.arange(0, valid.shape[0])
    stride = vector_stride(stride, SIZE)
    pointers = pointer + tl.cast(token0, tl.int64) * stride + token[:, None] * stride + channel[None, :]
    return load_existing(pointers, valid, channel, SIZE, MASKED)


@triton.jit
def store_block(pointer, token0, stride, x, valid, channel, SIZE: tl.constexpr):
    """The inverse of `load_block`, in the pointer's dtype."""
    token = tl.arange(0, valid.shape[0])
    stride = vector_stride(stride, SIZE)
    pointers = pointer + tl.cast(token0, tl.int64) * stride + token[:, None] * stride + channel[None, :]
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=existing(valid, channel, SIZE))


@triton.jit
def load_state(state, feature, column, FEATURES: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A block of the state (FEATURES, COLUMNS), or of its transpose, 0 beyond its sides."""
    if TRANSPOSED:
        pointers = state + feature[None, :] * COLUMNS + column[:, None]
        return tl.load(pointers, mask=(feature < FEATURES)[None, :] & (column < COLUMNS)[:, None], other=0.0)
    else:
        pointers = state + feature[:, None] * COLUMNS + column[None, :]
        return tl.load(pointers, mask=(feature < FEATURES)[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def features(x, FEATURE_MAP: tl.constexpr):
    """φ, of bf16 in bf16, else in fp32; also of channels that do not exist, where the state is 0. NaN stays NaN."""
    dtype: tl.constexpr = tl.bfloat16 if x.dtype == tl.bfloat16 else tl.float32
    if FEATURE_MAP == "elu":
        x = x.to(tl.float32)
        return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))).to(dtype)
    x = x.to(dtype)
    if FEATURE_MAP == "relu":
        # Triton 3.6 takes maxima of bf16 in fp32.
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype) + EPS
    return x


@triton.jit
def through_features(gradient, x, FEATURE_MAP: tl.constexpr):
    """The gradient of x from that of φ(x)."""
    x = x.to(tl.float32)
    if FEATURE_MAP == "relu":
        gradient = tl.where(x > 0, gradient, 0.0)
    elif FEATURE_MAP == "elu":
        gradient = gradient * tl.exp(tl.minimum(x, 0.0))
    return gradient


@triton.jit
def round_for_products(x, PRECISION: tl.constexpr):
    """fp32 `x` as products with it take it: in tf32 rounded, since tensor cores cut digits off, which shrinks sums."""
    if PRECISION == "tf32":
        rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # the bits of NaN may run over
    return x


@triton.jit
def split(state, dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """The fp32 state as two summands in the dtype of the tokens, with which products in bf16 lose next to nothing."""
    if SPLIT:
        high = state.to(dtype)
        return high, (state - high.to(tl.float32)).to(dtype)
    else:
        state = round_for_products(state, PRECISION)
        return state, state


@triton.jit
def weigh(phi, count, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """φ (M, A) · count (A,), fp32 (M,).

    Split, as a product with the two summands as columns of 16: a sum would want φ in a layout of its own.
    """
    if SPLIT:
        high, low = split(count, phi.dtype, SPLIT, PRECISION)
        column = tl.arange(0, 16)[None, :]
        columns = tl.where(column == 0, high[:, None], tl.where(column == 1, low[:, None], 0.0))
        return tl.sum(tl.dot(phi, columns), 1)
    else:
        return tl.sum(phi.to(tl.float32) * count[None, :], 1)


@triton.jit
def multiply(x, high, low, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x (M, A) @ state (A, B), the state as `split` gives it."""
    if SPLIT:
        acc = tl.dot(x.to(high.dtype), high, acc)
        return tl.dot(x.to(high.dtype), low, acc)
    else:
        return tl.dot(round_for_products(x.to(tl.float32), PRECISION), high, acc, input_precision=PRECISION)
