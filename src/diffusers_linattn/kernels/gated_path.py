"""What the kernels of gated linear attention share: where the tokens of a chunk lie, features, and sums of gates.

Letters: S tokens of a run, in the order of the path; W gates per token that a program works on, or 1 where all
channels share one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.linear_blocks import EPS, features


_LOWEST_GATE = tl.constexpr(-1e4)  # exp of it is 0, and sums of it stay finite


@triton.jit
def run_tokens(run, length, inner, outer, backward, SIZE: tl.constexpr, SHIFT: tl.constexpr):
    """The tokens of the path's run of SIZE tokens (a chunk, or half of one), (SIZE,) int64, and which of them exist.

    With `SHIFT`, those that many steps on inside the run. The path goes through planes of inner x outer tokens:
    `outer` tokens apart for `inner` steps, then on from the next token of the plane's first row. inner = 1 is the
    raster order. `backward` is 0 or 1.
    """
    step = tl.arange(0, SIZE) + SHIFT
    position = run * SIZE + step
    valid = (step >= 0) & (step < SIZE) & (position < length)
    position += backward * (length - 1 - 2 * position)
    in_plane = position % (inner * outer)
    token = position - in_plane + in_plane % inner * outer + in_plane // inner
    return token.to(tl.int64), valid


@triton.jit
def load_tile(pointer, token, valid, channel, stride, DIM: tl.constexpr):
    """(S, channels) of a tensor whose channels are adjacent, 0 where a token or channel does not exist."""
    return tl.load(
        pointer + token[:, None] * stride + channel[None, :], mask=valid[:, None] & (channel < DIM)[None, :], other=0.0
    )


@triton.jit
def store_tile(pointer, x, token, valid, channel, stride, DIM: tl.constexpr):
    """The inverse of `load_tile`, in the pointer's dtype."""
    tl.store(
        pointer + token[:, None] * stride + channel[None, :],
        x.to(pointer.dtype.element_ty),
        mask=valid[:, None] & (channel < DIM)[None, :],
    )


@triton.jit
def load_gate(pointer, token, valid, channel, stride, DIM: tl.constexpr, SCALAR: tl.constexpr):
    """Logarithms of the decay in fp32, (S, W), 0 where there is none."""
    if SCALAR:
        gate = tl.load(pointer + token * stride, mask=valid, other=0.0)[:, None]
    else:
        gate = load_tile(pointer, token, valid, channel, stride, DIM)
    return tl.maximum(gate.to(tl.float32), _LOWEST_GATE)


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
def double_blocks(before, after, gate, LEVEL: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of the gates before and after each token in its block of 2^LEVEL tokens, (S, W), to those in twice that.

    Only sums of gates, never a difference: a weak gate next to strong ones keeps its digits.
    """
    total = tl.reshape(before + gate + after, [SIZE >> (LEVEL + 1), 2, 1 << LEVEL, WIDTH])
    is_second = tl.arange(0, 2)[None, :, None, None] == 1
    of_first = tl.sum(tl.where(is_second, 0.0, total), 1, keep_dims=True)
    of_second = tl.sum(tl.where(is_second, total, 0.0), 1, keep_dims=True)
    other = tl.reshape(tl.where(is_second, of_first, of_second), [SIZE, WIDTH])
    second = in_second_half(LEVEL, SIZE)
    return tl.where(second, before + other, before), tl.where(second, after, after + other)


@triton.jit
def scalar_decays(gate, SIZE: tl.constexpr, LEVELS: tl.constexpr, BOTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The decay between each query and key of a run from gates (S, 1), (S, S); 0 where the query does not see it."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    exponent = tl.zeros([SIZE, SIZE], dtype=tl.float32)
    before, after = gate * 0, gate * 0
    for LEVEL in tl.static_range(LEVELS):
        of_key = tl.where(in_second_half(LEVEL, SIZE), before, after)
        of_query = of_key + gate  # a query passes its own gate
        if TRANSPOSED:
            passed = of_key + tl.trans(of_query)
        else:
            passed = of_query + tl.trans(of_key)
        exponent = tl.where(across_halves(LEVEL, SIZE, True, False), passed, exponent)
        before, after = double_blocks(before, after, gate, LEVEL, SIZE, 1)
    if BOTH:
        return tl.exp(exponent)
    return tl.where(row <= column if TRANSPOSED else row >= column, tl.exp(exponent), 0.0)


@triton.jit
def _state_row(direction, slot, chunks, chunk, channel, KEY_DIM: tl.constexpr):
    """Rows (K,) of the state that leaves a chunk, and which of them exist: none outside of the path."""
    row = ((direction * tl.num_programs(2).to(tl.int64) + slot) * chunks + chunk) * KEY_DIM + channel
    return row, channel < tl.where((chunk >= 0) & (chunk < chunks), KEY_DIM, 0)


@triton.jit
def load_state(
    states, direction, slot, chunks, chunk, channel, column, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr
):
    """The state (K, V) that leaves a chunk, of states (directions, heads of the launch, chunks, K, V)."""
    row, exists = _state_row(direction, slot, chunks, chunk, channel, KEY_DIM)
    pointers = states + row[:, None] * VALUE_DIM + column[None, :]
    return tl.load(pointers, mask=exists[:, None] & (column < VALUE_DIM)[None, :], other=0.0)


@triton.jit
def load_count(counts, direction, slot, chunks, chunk, channel, KEY_DIM: tl.constexpr):
    """What the state (K,) that leaves a chunk holds for a value of 1."""
    row, exists = _state_row(direction, slot, chunks, chunk, channel, KEY_DIM)
    return tl.load(counts + row, mask=exists, other=0.0)


@triton.jit
def running_sums(x, REVERSE: tl.constexpr):
    """Sums of (S, W) over the tokens up to each, or from each on."""
    if x.shape[1] == 1:  # Triton 3.6 crashes on a scan of one column
        sums = tl.cumsum(tl.reshape(x, [x.shape[0]]), 0, reverse=REVERSE)[:, None]
    else:
        sums = tl.cumsum(x, 0, reverse=REVERSE)
    return sums


@triton.jit
def gates_towards(
    gate,
    run,
    to_right,
    length,
    inner,
    outer,
    backward,
    channel,
    stride,
    DIM: tl.constexpr,
    SCALAR: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Sums of the gates from behind each token of a run to its right (or left) end, (S, W), and of all, (W,)."""
    token, valid = run_tokens(run, length, inner, outer, backward, SIZE, 1)
    after = running_sums(load_gate(gate, token, valid, channel, stride, DIM, SCALAR), True)
    token, valid = run_tokens(run, length, inner, outer, backward, SIZE, -1)
    before = running_sums(load_gate(gate, token, valid, channel, stride, DIM, SCALAR), False)
    token, valid = run_tokens(run, length, inner, outer, backward, SIZE, 0)
    total = tl.sum(load_gate(gate, token, valid, channel, stride, DIM, SCALAR), 0)
    return tl.where(to_right, after, before), total
