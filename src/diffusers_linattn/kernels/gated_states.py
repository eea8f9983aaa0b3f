"""States of gated linear attention at the borders of chunks, and what the queries of a chunk draw from them.

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
    load_features,
    load_gate,
    load_state,
    load_tile,
    run_tokens,
    running_sums,
    store_tile,
)


@triton.jit(do_not_specialize=["heads", "first_head", "chunks", "length", "inner", "outer", "backward"])
def states_kernel(
    key,
    value,
    gate,
    weight,
    states,
    counts,
    decays,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
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
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    SCALAR: tl.constexpr,
    BOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    COUNTED: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each chunk adds to the states that leave it, and the decay over the chunk (only forward).

    Grid (chunks, blocks of K times blocks of V, heads of this launch). states (2 | 1, heads, chunks, K, V), counts the
    same without V, decays (heads, chunks, K | 1). With `GRADIENT`, key is the query, value the output's gradient and
    `weight` (all heads, tokens) that of the denominator; else it is 1.
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    value_blocks: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    block = tl.program_id(1) // value_blocks
    channel = block * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(1) % value_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    key += head // heads * stride_kb + head % heads * stride_kh
    value += head // heads * stride_vb + head % heads * stride_vh
    gate += head // heads * stride_gb + head % heads * stride_gh
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM

    token, valid = run_tokens(chunk, length, inner, outer, backward, CHUNK, 0)
    k = load_features(key, token, valid, channel, stride_kn, KEY_DIM, FEATURES)
    v = load_tile(value, token, valid, column, stride_vn, VALUE_DIM).to(states.dtype.element_ty)
    g = load_gate(gate, token, valid, channel, stride_gn, GATE_DIM, SCALAR)
    if COUNTED:
        if GRADIENT:
            w = tl.load(weight + head * length + token, mask=valid, other=0.0)
        else:
            w = valid.to(tl.float32)
    row = (slot * tl.num_programs(0) + chunk) * KEY_DIM
    there = (channel < KEY_DIM)[:, None] & (column < VALUE_DIM)[None, :]
    for LEFT in tl.static_range(2):
        # Without both directions, states run right and their gradients left.
        if BOTH or LEFT == GRADIENT:
            passed = g
            if not GRADIENT:  # a key does not pass its own gate
                other, exists = run_tokens(chunk, length, inner, outer, backward, CHUNK, -1 if LEFT else 1)
                passed = load_gate(gate, other, exists, channel, stride_gn, GATE_DIM, SCALAR)
            decayed = k * tl.exp(running_sums(passed, LEFT == 0))
            state = tl.dot(tl.trans(decayed.to(v.dtype)), v, input_precision=PRECISION)
            direction = row + (LEFT if BOTH else 0) * tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * KEY_DIM
            pointers = states + (direction + channel)[:, None] * VALUE_DIM + column[None, :]
            tl.store(pointers, state.to(v.dtype), mask=there)
            if COUNTED:
                if tl.program_id(1) % value_blocks == 0:
                    tl.store(counts + direction + channel, tl.sum(decayed * w[:, None], 0), mask=channel < KEY_DIM)
    if not GRADIENT:
        if tl.program_id(1) % value_blocks == 0:
            decay = tl.exp(tl.sum(g, 0))
            if SCALAR:
                tl.store(decays + slot * tl.num_programs(0) + chunk + tl.arange(0, 1), decay)
            else:
                tl.store(decays + row + channel, decay, mask=channel < KEY_DIM)


@triton.jit(do_not_specialize=["chunks", "left"])
def scan_kernel(
    states,
    decays,
    chunks,
    left,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SCALAR: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Turn what each chunk adds to the state, (2 | 1, heads, chunks, K, V), into the state that leaves it, in place.

    Grid (blocks of K · V, heads, 2 | 1). The first direction runs right unless `left` is 1, the second runs left.
    """
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = element < KEY_DIM * VALUE_DIM
    head = tl.program_id(1).to(tl.int64)
    states += (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head) * chunks * KEY_DIM * VALUE_DIM + element
    if SCALAR:
        decays += head * chunks + element * 0
    else:
        decays += head * chunks * KEY_DIM + element // VALUE_DIM
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM
    runs_left = tl.maximum(tl.program_id(2), left)
    step = tl.arange(0, STEPS)
    state = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, chunks, STEPS):
        chunk = (first + step + runs_left * (chunks - 1 - 2 * (first + step))).to(tl.int64)
        mask = (first + step < chunks)[:, None] & there[None, :]
        # All loads of some chunks before the first use: nothing else hides their latency.
        decay = tl.load(decays[None, :] + chunk[:, None] * GATE_DIM, mask=mask, other=1.0)
        pointers = states[None, :] + chunk[:, None] * KEY_DIM * VALUE_DIM
        added = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        leaving = added
        for i in tl.static_range(STEPS):
            now = (step == i)[:, None]
            state = state * tl.sum(tl.where(now, decay, 0.0), 0) + tl.sum(tl.where(now, added, 0.0), 0)
            leaving = tl.where(now, state[None, :], leaving)
        tl.store(pointers, leaving.to(states.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads", "first_head", "chunks", "length", "inner", "outer", "backward"])
def output_kernel(
    query,
    value,
    gate,
    weights,
    states,
    out,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
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
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights times values inside a chunk plus the states that enter it. Grid (chunks, blocks of V, heads).

    weights (heads, chunks, C, C). With `GRADIENT`, query is the key, value the output's gradient, the states are their
    gradients, the weights are transposed and out is the value's gradient.
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    query += head // heads * stride_qb + head % heads * stride_qh
    value += head // heads * stride_vb + head % heads * stride_vh
    gate += head // heads * stride_gb + head % heads * stride_gh
    out += head // heads * stride_ob + head % heads * stride_oh
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM

    token, valid = run_tokens(chunk, length, inner, outer, backward, CHUNK, 0)
    row, other_row = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    weights += (slot * chunks + chunk) * CHUNK * CHUNK
    w = tl.load(weights + (row + other_row * CHUNK if GRADIENT else row * CHUNK + other_row))
    v = load_tile(value, token, valid, column, stride_vn, VALUE_DIM).to(w.dtype)
    acc = tl.dot(w, v, input_precision=PRECISION)
    for block in range(0, (KEY_DIM + BLOCK_K - 1) // BLOCK_K):
        channel = block * BLOCK_K + tl.arange(0, BLOCK_K)
        q = load_features(query, token, valid, channel, stride_qn, KEY_DIM, FEATURES)
        g = load_gate(gate, token, valid, channel, stride_gn, GATE_DIM, SCALAR)
        for LEFT in tl.static_range(2):
            if BOTH or LEFT == GRADIENT:
                passed = g
                if GRADIENT:  # a key does not pass its own gate
                    other, exists = run_tokens(chunk, length, inner, outer, backward, CHUNK, 1 if LEFT else -1)
                    passed = load_gate(gate, other, exists, channel, stride_gn, GATE_DIM, SCALAR)
                decayed = q * tl.exp(running_sums(passed, LEFT == 1))
                # The state that leaves the chunk before, or the one after for states that run left.
                entered = chunk + 1 if LEFT else chunk - 1
                direction = LEFT if BOTH else 0
                state = load_state(states, direction, slot, chunks, entered, channel, column, KEY_DIM, VALUE_DIM)
                acc = tl.dot(decayed.to(w.dtype), state, acc, input_precision=PRECISION)
    store_tile(out, acc, token, valid, column, stride_on, VALUE_DIM)
