"""What the kernels of gated linear attention share: where the tokens of a chunk lie, features, and sums of gates.

Letters: S tokens of a run, in the order of the path; W gates per token that a program works on, or 1 where all
channels share one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.linear_blocks import EPS, features, round_for_products
from diffusers_linattn.kernels.vector_strides import vector_stride


# Arguments that no kernel along a path is compiled anew for.
SIZES = (
    *("heads", "first_head", "chunks", "length", "inner", "outer", "backward"),
    *("stride_gb", "stride_gh", "stride_dgb", "stride_dgh"),
)

LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST_GATE = tl.constexpr(-1e4)  # 2 to that power is 0, and sums of it stay finite


@triton.jit
def run_tokens(run, length, inner, outer, backward, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """The tokens of the path's run of SIZE tokens (a chunk, or half of one), (SIZE,) int64, and which of them exist.

    The path goes through the tokens in their order, or, with `COLUMNS`, through planes of inner x outer tokens:
    `outer` tokens apart for `inner` steps, then on from the next token of the plane's first row. `backward` is 0 or 1.
    """
    position = run * SIZE + tl.arange(0, SIZE)
    valid = position < length
    token = position + backward * (length - 1 - 2 * position)
    if COLUMNS:
        in_plane = token % (inner * outer)
        token += in_plane % inner * outer + in_plane // inner - in_plane
    return token.to(tl.int64), valid


@triton.jit
def load_tile(pointer, token, valid, channel, stride, DIM: tl.constexpr):
    """(S, channels) of a tensor whose channels are adjacent, 0 where a token or channel does not exist."""
    stride = vector_stride(stride, DIM)
    return tl.load(
        pointer + token[:, None] * stride + channel[None, :], mask=valid[:, None] & (channel < DIM)[None, :], other=0.0
    )


@triton.jit
def store_tile(pointer, x, token, valid, channel, stride, DIM: tl.constexpr):
    """The inverse of `load_tile`, in the pointer's dtype."""
    stride = vector_stride(stride, DIM)
    tl.store(
        pointer + token[:, None] * stride + channel[None, :],
        x.to(pointer.dtype.element_ty),
        mask=valid[:, None] & (channel < DIM)[None, :],
    )


@triton.jit
def load_gate(pointer, token, valid, channel, stride, DIM: tl.constexpr, SCALAR: tl.constexpr):
    """Base-2 logarithms of the decay in fp32, (S, W), 0 where there is none."""
    if SCALAR:
        gate = tl.load(pointer + token * stride, mask=valid, other=0.0)[:, None]
    else:
        gate = load_tile(pointer, token, valid, channel, stride, DIM)
    return tl.maximum(gate.to(tl.float32) * LOG2_E, _LOWEST_GATE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_features(pointer, token, valid, channel, stride, DIM: tl.constexpr, FEATURES: tl.constexpr):
    """φ of a tile in fp32, 0 where there is no token or channel."""
    x = load_tile(pointer, token, valid, channel, stride, DIM).to(tl.float32)
    if FEATURES != "none":
        x = tl.where(valid[:, None] & (channel < DIM)[None, :], features(x, FEATURES), 0.0)
    return x


@triton.jit
def through_features(gradient, phi, FEATURES: tl.constexpr):
    """The gradient of what φ was taken of, from that of φ and φ itself."""
    if FEATURES == "relu":
        gradient = tl.where(phi > EPS, gradient, 0.0)
    elif FEATURES == "elu":
        gradient = gradient * tl.minimum(phi, 1.0)
    return gradient


@triton.jit
def in_second_half(LEVEL: tl.constexpr, SIZE: tl.constexpr):
    """Which tokens lie in the second half of their block of 2 · 2^LEVEL tokens, (S, 1)."""
    return ((tl.arange(0, SIZE) >> LEVEL) & 1 == 1)[:, None]


@triton.jit
def across_halves(LEVEL: tl.constexpr, SIZE: tl.constexpr, BOTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which (query, key) lie in different halves of one block of 2 · 2^LEVEL tokens, (S, S); the key first unless both
    directions count. `TRANSPOSED` for (key, query)."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    across = (row ^ column) >> LEVEL == 1
    if not BOTH:
        across = across & (row < column if TRANSPOSED else row > column)
    return across


@triton.jit
def double_blocks(before, after, total, LEVEL: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of the gates before and after each token in its block of 2^LEVEL tokens and in the whole block, (S, W), to
    those in twice that.

    Only sums of gates, never a difference: a weak gate next to strong ones keeps its digits.
    """
    # What the neighbouring block has: of its bits and the own ones as integers, a sum and a difference lose nothing.
    bits = tl.reshape(total.to(tl.int32, bitcast=True), [SIZE >> (LEVEL + 1), 2, 1 << LEVEL, WIDTH])
    other = (tl.sum(bits, 1, keep_dims=True) - bits).to(tl.int64).to(tl.int32)  # the interpreter sums in 64 bits
    other = tl.reshape(other.to(tl.float32, bitcast=True), [SIZE, WIDTH])
    second = in_second_half(LEVEL, SIZE)
    return tl.where(second, before + other, before), tl.where(second, after, after + other), total + other


@triton.jit
def scalar_decays(gate, SIZE: tl.constexpr, LEVELS: tl.constexpr, BOTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The decay between each query and key of a run from gates (S, 1), (S, S); 0 where the query does not see it."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    exponent = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    before, after, total = gate * 0, gate * 0, gate
    for LEVEL in tl.static_range(LEVELS):
        of_key = tl.where(in_second_half(LEVEL, SIZE), before, after)
        of_query = of_key + gate  # a query passes its own gate
        if TRANSPOSED:
            passed = of_key + tl.trans(of_query)
        else:
            passed = of_query + tl.trans(of_key)
        exponent = tl.where(across_halves(LEVEL, SIZE, True, False), passed, exponent)
        before, after, total = double_blocks(before, after, total, LEVEL, SIZE, 1)
    if BOTH:
        return tl.exp2(exponent)
    return tl.where(row <= column if TRANSPOSED else row >= column, tl.exp2(exponent), 0.0)


@triton.jit
def as_operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """fp32 `x` as products take it."""
    return round_for_products(x, PRECISION).to(dtype)


@triton.jit
def decayed_run(
    pointer,
    direction,
    slot,
    chunks,
    run,
    channel,
    KEY_DIM: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Where the decayed queries or keys (S, channels) of a run lie, and which of the channels exist.

    pointer (directions, heads of the launch, 2 * chunks, S, K): a run is half of a chunk.
    """
    place = ((direction * tl.num_programs(2).to(tl.int64) + slot) * chunks * 2 + run) * SIZE
    pointers = pointer + (place + tl.arange(0, SIZE))[:, None] * KEY_DIM + channel[None, :]
    return pointers, (channel < KEY_DIM)[None, :]


@triton.jit
def load_decay(decays, slot, chunks, run, channel, KEY_DIM: tl.constexpr, SCALAR: tl.constexpr):
    """The decay over a run for each channel, (K,), of decays (heads of the launch, 2 * chunks, K | 1)."""
    place = slot * chunks * 2 + run
    pointers = decays + place + channel * 0 if SCALAR else decays + place * KEY_DIM + channel
    return tl.load(pointers, mask=channel < KEY_DIM, other=1.0)


@triton.jit
def state_row(direction, slot, chunks, chunk, channel, KEY_DIM: tl.constexpr):
    """Rows (K,) of the state that leaves a chunk, and which of them exist.

    Outside of the path there are chunks -1 and `chunks`: the one that a direction begins behind leaves what it begins
    with, the other is neither written nor read.
    """
    row = ((direction * tl.num_programs(2).to(tl.int64) + slot) * (chunks + 2) + chunk + 1) * KEY_DIM + channel
    # Later chunks are never asked for, but compilers that are told so keep fewer numbers in local memory.
    return row, channel < tl.where(chunk <= chunks, KEY_DIM, 0)


@triton.jit
def load_state(
    states, direction, slot, chunks, chunk, channel, column, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr
):
    """The state (K, V) that leaves a chunk, of states (directions, heads of the launch, chunks + 2, K, V)."""
    row, exists = state_row(direction, slot, chunks, chunk, channel, KEY_DIM)
    pointers = states + row[:, None] * VALUE_DIM + column[None, :]
    return tl.load(pointers, mask=exists[:, None] & (column < VALUE_DIM)[None, :], other=0.0)


@triton.jit
def load_count(counts, direction, slot, chunks, chunk, channel, KEY_DIM: tl.constexpr):
    """What the state (K,) that leaves a chunk holds for a value of 1."""
    row, exists = state_row(direction, slot, chunks, chunk, channel, KEY_DIM)
    return tl.load(counts + row, mask=exists, other=0.0)
