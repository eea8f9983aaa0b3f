"""States of gated linear attention at the borders of chunks, and what the tokens of a chunk draw from them.

Forward, states are sums of decayed keys times values; backward, their gradients are sums of decayed queries times
gradients of the output: the same kernels with other tensors. States that run right along the path are those of the
scan forward (and the gradients of those of the scan backward), the others run left.

Letters: C tokens of a chunk, K features, V value columns. A state is (K, V), its count (K,) what it would hold for a
value of 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.gated_path import (
    SIZES,
    as_operand,
    decayed_run,
    load_count,
    load_decay,
    load_state,
    load_tile,
    run_tokens,
    state_row,
    store_tile,
)
from diffusers_linattn.kernels.vector_strides import head_offset


@triton.jit(do_not_specialize=SIZES)
def states_kernel(
    decayed,
    decays,
    value,
    weight,
    states,
    counts,
    stride_vb,
    stride_vh,
    stride_vn,
    heads,
    first_head,
    chunks,
    length,
    inner,
    outer,
    backward,
    COLUMNS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HALF: tl.constexpr,
    SCALAR: tl.constexpr,
    BOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each chunk adds to the states that leave it. Grid (chunks, blocks of K times blocks of V, heads).

    decayed and decays as `weights_kernel` writes them; states (2 | 1, heads, chunks + 2, K, V), as `state_row` says,
    counts the same without V. With `GRADIENT`, decayed are the queries, value is the output's gradient and the count
    of a token is its `weight` (all heads, tokens); else it is 1.
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    batch, own_head = head // heads, head % heads
    value_blocks: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    channel = tl.program_id(1) // value_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) % value_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    value += head_offset(batch, own_head, stride_vb, stride_vh, VALUE_DIM)
    weight += head * length

    dtype: tl.constexpr = states.dtype.element_ty
    token0, valid0 = run_tokens(2 * chunk, length, inner, outer, backward, HALF, COLUMNS)
    token1, valid1 = run_tokens(2 * chunk + 1, length, inner, outer, backward, HALF, COLUMNS)
    v0 = load_tile(value, token0, valid0, column, stride_vn, VALUE_DIM).to(tl.float32)
    v1 = load_tile(value, token1, valid1, column, stride_vn, VALUE_DIM).to(tl.float32)
    v0, v1 = as_operand(v0, dtype, PRECISION), as_operand(v1, dtype, PRECISION)
    for DIRECTION in tl.static_range(1 + BOTH):
        pointers, exists = decayed_run(decayed, DIRECTION, slot, chunks, 2 * chunk, channel, KEY_DIM, HALF)
        x0 = tl.load(pointers, mask=exists, other=0.0)
        pointers, exists = decayed_run(decayed, DIRECTION, slot, chunks, 2 * chunk + 1, channel, KEY_DIM, HALF)
        x1 = tl.load(pointers, mask=exists, other=0.0)
        # Without both directions, states run right and their gradients left. What enters first passes the other half.
        LEFT = DIRECTION if BOTH else GRADIENT
        decay = load_decay(decays, slot, chunks, 2 * chunk + 1 - LEFT, channel, KEY_DIM, SCALAR)
        if LEFT:
            state = tl.dot(tl.trans(x1), v1, input_precision=PRECISION) * decay[:, None]
            state = tl.dot(tl.trans(x0), v0, state, input_precision=PRECISION)
        else:
            state = tl.dot(tl.trans(x0), v0, input_precision=PRECISION) * decay[:, None]
            state = tl.dot(tl.trans(x1), v1, state, input_precision=PRECISION)
        row, exists = state_row(DIRECTION, slot, chunks, chunk, channel, KEY_DIM)
        pointers = states + row[:, None] * VALUE_DIM + column[None, :]
        tl.store(pointers, state.to(dtype), mask=exists[:, None] & (column < VALUE_DIM)[None, :])
        if COUNTED:
            if tl.program_id(1) % value_blocks == 0:
                counted0, counted1 = x0.to(tl.float32), x1.to(tl.float32)
                if GRADIENT:
                    counted0 *= tl.load(weight + token0, mask=valid0, other=0.0)[:, None]
                    counted1 *= tl.load(weight + token1, mask=valid1, other=0.0)[:, None]
                if LEFT:
                    count = tl.sum(counted0, 0) + tl.sum(counted1, 0) * decay
                else:
                    count = tl.sum(counted0, 0) * decay + tl.sum(counted1, 0)
                tl.store(counts + row, count, mask=exists)


@triton.jit(do_not_specialize=["chunks", "left"])
def scan_kernel(
    states,
    counts,
    decays,
    initial,
    chunks,
    left,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALAR: tl.constexpr,
    COUNTED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Turn what each chunk adds to states and counts into what leaves it, in place.

    Grid (blocks of K times blocks of V, heads, 2 | 1). The first direction runs right unless `left` is 1, the second
    runs left. They begin with 0, or with `HAS_INITIAL` with initial (2 | 1, heads, K, V), fp32, which if `COUNTED` has
    one column more, the count.
    """
    column_blocks: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    row = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    element = row[:, None] * VALUE_DIM + column[None, :]
    there = (row < KEY_DIM)[:, None] & (column < VALUE_DIM)[None, :]
    counting = row < tl.where(tl.program_id(0) % column_blocks == 0, KEY_DIM, 0)
    runs_left = tl.maximum(tl.program_id(2), left)
    slot = tl.program_id(1).to(tl.int64)
    own = tl.program_id(2) * tl.num_programs(1) + slot
    first_of_states = own * (chunks + 2) + 1
    state = tl.zeros([ROWS, BLOCK_V], dtype=tl.float32)
    count = tl.zeros([ROWS], dtype=tl.float32)
    if HAS_INITIAL:
        COLUMNS: tl.constexpr = VALUE_DIM + COUNTED
        initial += own * KEY_DIM * COLUMNS + row * COLUMNS
        state = tl.load(initial[:, None] + column[None, :], mask=there, other=0.0)
        if COUNTED:
            count = tl.load(initial + VALUE_DIM, mask=counting, other=0.0)
    outside = first_of_states - 1 + runs_left * (chunks + 1)
    first = as_operand(state, states.dtype.element_ty, PRECISION)
    tl.store(states + outside * KEY_DIM * VALUE_DIM + element, first, mask=there)
    if COUNTED:
        tl.store(counts + outside * KEY_DIM + row, count, mask=counting)
    # Stages load some chunks ahead: nothing else hides their latency.
    for step in tl.range(0, chunks, num_stages=8):
        chunk = step + runs_left * (chunks - 1 - 2 * step)
        place = first_of_states + chunk
        decay = load_decay(decays, slot, chunks, 2 * chunk, row, KEY_DIM, SCALAR)
        decay *= load_decay(decays, slot, chunks, 2 * chunk + 1, row, KEY_DIM, SCALAR)
        pointers = states + place * KEY_DIM * VALUE_DIM + element
        state = state * decay[:, None] + tl.load(pointers, mask=there, other=0.0).to(tl.float32)
        tl.store(pointers, as_operand(state, states.dtype.element_ty, PRECISION), mask=there)
        if COUNTED:
            pointers = counts + place * KEY_DIM + row
            count = count * decay + tl.load(pointers, mask=counting, other=0.0)
            tl.store(pointers, count, mask=counting)


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    weights,
    decayed,
    decays,
    value,
    states,
    counts,
    out,
    totals,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    heads,
    first_head,
    chunks,
    length,
    inner,
    outer,
    backward,
    COLUMNS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALAR: tl.constexpr,
    BOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights times values inside a chunk plus what its tokens draw from the states that enter it.

    Grid (chunks, blocks of V, heads). weights, decayed (the queries) and decays as `weights_kernel` writes them. If
    `COUNTED`, also the sum of all weights of a query, totals (all heads, tokens). With `GRADIENT`, decayed are the
    keys, value the output's gradient, the states are their gradients, the weights are transposed and out is the
    value's gradient.
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    batch, own_head = head // heads, head % heads
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    value += head_offset(batch, own_head, stride_vb, stride_vh, VALUE_DIM)
    out += head_offset(batch, own_head, stride_ob, stride_oh, VALUE_DIM)

    token, valid = run_tokens(chunk, length, inner, outer, backward, CHUNK, COLUMNS)
    dtype: tl.constexpr = states.dtype.element_ty
    row, other_row = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    acc = tl.zeros([CHUNK, BLOCK_V], dtype=tl.float32)
    total = tl.zeros([CHUNK], dtype=tl.float32)
    for block in tl.range(0, (KEY_DIM + BLOCK_K - 1) // BLOCK_K, num_stages=2):
        channel = block * BLOCK_K + tl.arange(0, BLOCK_K)
        for SIDE in tl.static_range(2):
            # From the left enters what runs right, met by what has decayed to the left end. Without both directions
            # queries look left alone, and keys right.
            if BOTH or SIDE == GRADIENT:
                entered = chunk + 2 * SIDE - 1
                direction = SIDE if BOTH else 0
                place = ((1 - SIDE if BOTH else 0) * tl.num_programs(2).to(tl.int64) + slot) * chunks + chunk
                pointers = decayed + place * CHUNK * KEY_DIM + row * KEY_DIM + channel[None, :]
                x = tl.load(pointers, mask=(channel < KEY_DIM)[None, :], other=0.0).to(tl.float32)
                # The half that lies farther from the border has the nearer one to pass.
                decay = load_decay(decays, slot, chunks, 2 * chunk + SIDE, channel, KEY_DIM, SCALAR)
                is_farther = row < CHUNK // 2 if SIDE else row >= CHUNK // 2
                x *= tl.where(is_farther, decay[None, :], 1.0)
                state = load_state(states, direction, slot, chunks, entered, channel, column, KEY_DIM, VALUE_DIM)
                acc = tl.dot(as_operand(x, dtype, PRECISION), state, acc, input_precision=PRECISION)
                if COUNTED:
                    if tl.program_id(1) == 0:
                        count = load_count(counts, direction, slot, chunks, entered, channel, KEY_DIM)
                        total += tl.sum(x * count[None, :], 1)
    weights += (slot * chunks + chunk) * CHUNK * CHUNK
    w = tl.load(weights + (row + other_row * CHUNK if GRADIENT else row * CHUNK + other_row))
    v = load_tile(value, token, valid, column, stride_vn, VALUE_DIM).to(tl.float32)
    acc = tl.dot(w, as_operand(v, dtype, PRECISION), acc, input_precision=PRECISION)
    store_tile(out, acc, token, valid, column, stride_on, VALUE_DIM)
    if COUNTED:
        if tl.program_id(1) == 0:
            tl.store(totals + head * length + token, total + tl.sum(w.to(tl.float32), 1), mask=valid)
