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
    as_operand,
    decayed_run,
    load_count,
    load_decay,
    load_state,
    load_tile,
    run_tokens,
    store_tile,
)


@triton.jit(do_not_specialize=["heads", "first_head", "chunks", "length", "inner", "outer", "backward"])
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

    decayed and decays as `weights_kernel` writes them; states (2 | 1, heads, chunks, K, V), counts the same without V.
    With `GRADIENT`, decayed are the queries, value is the output's gradient and the count of a token is its `weight`
    (all heads, tokens); else it is 1.
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    value_blocks: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM
    channel = tl.program_id(1) // value_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) % value_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    value += head // heads * stride_vb + head % heads * stride_vh
    weight += head * length

    dtype: tl.constexpr = states.dtype.element_ty
    for DIRECTION in tl.static_range(1 + BOTH):
        # Without both directions, states run right and their gradients left.
        LEFT = DIRECTION if BOTH else GRADIENT
        state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
        count = tl.zeros([BLOCK_K], dtype=tl.float32)
        for STEP in tl.static_range(2):
            run = 2 * chunk + (1 - STEP if LEFT else STEP)
            token, valid = run_tokens(run, length, inner, outer, backward, HALF)
            v = load_tile(value, token, valid, column, stride_vn, VALUE_DIM).to(tl.float32)
            pointers, exists = decayed_run(decayed, DIRECTION, slot, chunks, run, channel, KEY_DIM, HALF)
            x = tl.load(pointers, mask=exists, other=0.0)
            if STEP:
                decay = load_decay(decays, slot, chunks, run, channel, GATE_DIM, SCALAR)
                state, count = state * decay[:, None], count * decay
            state = tl.dot(tl.trans(x), as_operand(v, dtype, PRECISION), state, input_precision=PRECISION)
            if COUNTED:
                x = x.to(tl.float32)
                if GRADIENT:
                    x *= tl.load(weight + token, mask=valid, other=0.0)[:, None]
                count += tl.sum(x, 0)
        row = ((DIRECTION * tl.num_programs(2).to(tl.int64) + slot) * chunks + chunk) * KEY_DIM + channel
        pointers = states + row[:, None] * VALUE_DIM + column[None, :]
        tl.store(pointers, state.to(dtype), mask=(channel < KEY_DIM)[:, None] & (column < VALUE_DIM)[None, :])
        if COUNTED:
            if tl.program_id(1) % value_blocks == 0:
                tl.store(counts + row, count, mask=channel < KEY_DIM)


@triton.jit(do_not_specialize=["chunks", "left"])
def scan_kernel(
    states,
    counts,
    decays,
    chunks,
    left,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SCALAR: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Turn what each chunk adds to states and counts into what leaves it, in place.

    Grid (blocks of K times blocks of V, heads, 2 | 1). The first direction runs right unless `left` is 1, the second
    runs left.
    """
    column_blocks: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM
    row = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    runs_left = tl.maximum(tl.program_id(2), left)
    step = 1 - 2 * runs_left
    # Of the first chunk on the way.
    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * chunks + runs_left * (chunks - 1)
    states += place * KEY_DIM * VALUE_DIM + row[:, None] * VALUE_DIM + column[None, :]
    counts += place * KEY_DIM + row
    place = tl.program_id(1).to(tl.int64) * chunks + runs_left * (chunks - 1)
    decays += place * 2 * GATE_DIM + (row * 0 if SCALAR else row)
    state = tl.zeros([ROWS, BLOCK_V], dtype=tl.float32)
    count = tl.zeros([ROWS], dtype=tl.float32)
    exists = row < KEY_DIM
    there = exists[:, None] & (column < VALUE_DIM)[None, :]
    counting = row < tl.where(tl.program_id(0) % column_blocks == 0, KEY_DIM, 0)
    # Stages load some chunks ahead: nothing else hides their latency.
    for _ in tl.range(0, chunks, num_stages=4):
        added = tl.load(states, mask=there, other=0.0)
        decay = tl.load(decays, mask=exists, other=1.0) * tl.load(decays + GATE_DIM, mask=exists, other=1.0)
        state = state * decay[:, None] + added.to(tl.float32)
        tl.store(states, as_operand(state, states.dtype.element_ty, PRECISION), mask=there)
        if COUNTED:
            count = count * decay + tl.load(counts, mask=counting, other=0.0)
            tl.store(counts, count, mask=counting)
        states += step * KEY_DIM * VALUE_DIM
        counts += step * KEY_DIM
        decays += step * 2 * GATE_DIM


@triton.jit(do_not_specialize=["heads", "first_head", "chunks", "length", "inner", "outer", "backward"])
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

    Grid (chunks, blocks of V, heads). weights (heads, chunks, C, C), decayed queries. If `COUNTED`, also the sum of all
    weights of a query, totals (all heads, tokens). With `GRADIENT`, decayed are the keys, value the output's gradient,
    the states are their gradients, the weights are transposed and out is the value's gradient.
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    value += head // heads * stride_vb + head % heads * stride_vh
    out += head // heads * stride_ob + head % heads * stride_oh

    token, valid = run_tokens(chunk, length, inner, outer, backward, CHUNK)
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM
    row, other_row = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    weights += (slot * chunks + chunk) * CHUNK * CHUNK
    w = tl.load(weights + (row + other_row * CHUNK if GRADIENT else row * CHUNK + other_row))
    v = load_tile(value, token, valid, column, stride_vn, VALUE_DIM).to(tl.float32)
    acc = tl.dot(w, as_operand(v, w.dtype, PRECISION), input_precision=PRECISION)
    if COUNTED:
        total = tl.sum(w.to(tl.float32), 1)
    for block in range(0, (KEY_DIM + BLOCK_K - 1) // BLOCK_K):
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
                decay = load_decay(decays, slot, chunks, 2 * chunk + SIDE, channel, GATE_DIM, SCALAR)
                is_farther = row < CHUNK // 2 if SIDE else row >= CHUNK // 2
                x = as_operand(tl.where(is_farther, x * decay[None, :], x), w.dtype, PRECISION)
                state = load_state(states, direction, slot, chunks, entered, channel, column, KEY_DIM, VALUE_DIM)
                acc = tl.dot(x, state, acc, input_precision=PRECISION)
                if COUNTED:
                    count = load_count(counts, direction, slot, chunks, entered, channel, KEY_DIM)
                    total += tl.sum(x.to(tl.float32) * count[None, :], 1)
    store_tile(out, acc, token, valid, column, stride_on, VALUE_DIM)
    if COUNTED:
        if tl.program_id(1) == 0:
            tl.store(totals + head * length + token, total, mask=valid)
