"""The gradients of query, key and gate in gated linear attention, chunk by chunk.

What the gate of a token takes part in: the weights of all pairs that it lies between. Per channel these are the
products of a query with its gradient, summed from the token on, less those of the keys. So the sums of a chunk are
kept apart by direction and by whether the pair crosses its border.

Letters: C tokens of a chunk, S of half a chunk, K features, V value columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.gated_path import (
    SIZES,
    across_halves,
    as_operand,
    decayed_run,
    double_blocks,
    in_second_half,
    load_count,
    load_decay,
    load_features,
    load_gate,
    load_state,
    load_tile,
    run_tokens,
    scalar_decays,
    store_tile,
    through_features,
)
from diffusers_linattn.kernels.vector_strides import head_offset


@triton.jit(do_not_specialize=SIZES)
def weight_gradients_kernel(
    grad,
    value,
    grad_totals,
    grad_weights,
    stride_ob,
    stride_oh,
    stride_on,
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
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the weights inside each chunk, (heads, chunks, C, C). Grid (chunks, 1, heads)."""
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    batch, own_head = head // heads, head % heads
    grad += head_offset(batch, own_head, stride_ob, stride_oh, VALUE_DIM)
    value += head_offset(batch, own_head, stride_vb, stride_vh, VALUE_DIM)
    dtype: tl.constexpr = grad_weights.dtype.element_ty
    token, valid = run_tokens(chunk, length, inner, outer, backward, CHUNK, COLUMNS)
    acc = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for block in range(0, (VALUE_DIM + BLOCK_V - 1) // BLOCK_V):
        column = block * BLOCK_V + tl.arange(0, BLOCK_V)
        do = load_tile(grad, token, valid, column, stride_on, VALUE_DIM).to(tl.float32)
        v = load_tile(value, token, valid, column, stride_vn, VALUE_DIM).to(tl.float32)
        do, v = as_operand(do, dtype, PRECISION), as_operand(v, dtype, PRECISION)
        acc = tl.dot(do, tl.trans(v), acc, input_precision=PRECISION)
    if COUNTED:
        acc += tl.load(grad_totals + head * length + token, mask=valid, other=0.0)[:, None]
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    grad_weights += (slot * chunks + chunk) * CHUNK * CHUNK + row * CHUNK + column
    tl.store(grad_weights, as_operand(acc, dtype, PRECISION))


@triton.jit(do_not_specialize=SIZES)
def gradients_kernel(
    query,
    key,
    gate,
    value,
    grad,
    grad_totals,
    grad_weights,
    decayed_queries,
    decayed_keys,
    decays,
    states,
    counts,
    grad_states,
    grad_counts,
    dquery,
    dkey,
    dgate,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_dqb,
    stride_dqh,
    stride_dqn,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dgb,
    stride_dgh,
    stride_dgn,
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
    LEVELS: tl.constexpr,
    SCALAR: tl.constexpr,
    BOTH: tl.constexpr,
    COUNTED: tl.constexpr,
    QUERY_FEATURES: tl.constexpr,
    KEY_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (chunks, blocks of K, heads).

    States, their gradients and what `weights_kernel` writes as they are. dgate has the gates' channels, or with
    `SCALAR` one per block of K, which the caller adds up.
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    batch, own_head = head // heads, head % heads
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM
    query += head_offset(batch, own_head, stride_qb, stride_qh, KEY_DIM)
    key += head_offset(batch, own_head, stride_kb, stride_kh, KEY_DIM)
    gate += head_offset(batch, own_head, stride_gb, stride_gh, GATE_DIM)
    value += head_offset(batch, own_head, stride_vb, stride_vh, VALUE_DIM)
    grad += head_offset(batch, own_head, stride_ob, stride_oh, VALUE_DIM)
    dquery += head_offset(batch, own_head, stride_dqb, stride_dqh, KEY_DIM)
    dkey += head_offset(batch, own_head, stride_dkb, stride_dkh, KEY_DIM)
    dgate += head_offset(batch, own_head, stride_dgb, stride_dgh, GATE_DIM)
    grad_totals += head * length
    grad_weights += (slot * chunks + chunk) * 4 * HALF * HALF
    LEFT: tl.constexpr = 1 if BOTH else 0  # where what has decayed to the left lies among `decayed_queries`
    row, column = tl.arange(0, HALF)[:, None], tl.arange(0, HALF)[None, :]
    by_query, by_key = row * 2 * HALF + column, column * 2 * HALF + row
    through = _through_chunk(
        chunk,
        slot,
        chunks,
        channel,
        states,
        counts,
        grad_states,
        grad_counts,
        VALUE_DIM,
        KEY_DIM,
        BLOCK_V,
        BOTH,
        COUNTED,
    )
    through *= load_decay(decays, slot, chunks, 2 * chunk, channel, KEY_DIM, SCALAR)
    through *= load_decay(decays, slot, chunks, 2 * chunk + 1, channel, KEY_DIM, SCALAR)

    first_dg, dg = tl.zeros([HALF, BLOCK_K], dtype=tl.float32), tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
    of_first_half, of_second_half = tl.zeros([BLOCK_K], dtype=tl.float32), tl.zeros([BLOCK_K], dtype=tl.float32)
    for half in range(0, 2):
        token, valid = run_tokens(2 * chunk + half, length, inner, outer, backward, HALF, COLUMNS)
        q = load_features(query, token, valid, channel, stride_qn, KEY_DIM, QUERY_FEATURES)
        k = load_features(key, token, valid, channel, stride_kn, KEY_DIM, KEY_FEATURES)
        g = load_gate(gate, token, valid, channel, stride_gn, GATE_DIM, SCALAR)

        # Pairs inside this half. For the gates, `from_here` is summed from each token on, `up_to_here` up to it.
        near = grad_weights + half * (2 * HALF + 1) * HALF
        own = tl.load(near + tl.arange(0, HALF) * (2 * HALF + 1)).to(tl.float32)[:, None]
        dq, dk, from_here, up_to_here, before, after = _inside_a_half(
            own, tl.load(near + by_query), tl.load(near + by_key), q, k, g, LEVELS, SCALAR, BOTH, PRECISION
        )
        before, after, passed = tl.exp2(before), tl.exp2(after), tl.exp2(g)  # from sums of gates to decays

        # Pairs with the other half, which has decayed to the border between them: its right end, if it is the first.
        is_second = half == 1
        to_middle = tl.where(is_second, before, after)
        far = tl.load(grad_weights + (2 * half * HALF + 1 - half) * HALF + by_query)
        place, exists = decayed_run(
            decayed_keys, (1 - half) * LEFT, slot, chunks, 2 * chunk + 1 - half, channel, KEY_DIM, HALF
        )
        x = tl.dot(far, tl.load(place, mask=exists, other=0.0), input_precision=PRECISION) * to_middle * passed
        far = tl.load(grad_weights + (2 * (1 - half) * HALF + half) * HALF + by_key)
        place, exists = decayed_run(
            decayed_queries, (1 - half) * LEFT, slot, chunks, 2 * chunk + 1 - half, channel, KEY_DIM, HALF
        )
        y = tl.dot(far, tl.load(place, mask=exists, other=0.0), input_precision=PRECISION) * to_middle
        if not BOTH:  # the first half's queries do not see the second half's keys
            x, y = tl.where(is_second, x, 0.0), tl.where(is_second, 0.0, y)
        dq, dk = dq + x, dk + y
        x, y = x * q, y * k
        from_here += tl.where(is_second, x, -y)
        up_to_here += tl.where(is_second, -y, x)

        # Pairs across the chunk's borders, to which the other half may lie between.
        over = load_decay(decays, slot, chunks, 2 * chunk + 1 - half, channel, KEY_DIM, SCALAR)[None, :]
        to_left, to_right = tl.where(is_second, before * over, before), tl.where(is_second, after, after * over)
        x_left, x_right = _draw(
            grad, token, valid, stride_on, states, slot, chunks, chunk, channel, KEY_DIM, VALUE_DIM, BLOCK_V,
            BOTH, True, BOTH, PRECISION,
        )  # fmt: skip
        y_left, y_right = _draw(
            value, token, valid, stride_vn, grad_states, slot, chunks, chunk, channel, KEY_DIM, VALUE_DIM, BLOCK_V,
            BOTH, BOTH, True, PRECISION,
        )  # fmt: skip
        if COUNTED:
            dtotal = tl.load(grad_totals + token, mask=valid, other=0.0)[:, None]
            x_left += dtotal * load_count(counts, 0, slot, chunks, chunk - 1, channel, KEY_DIM)[None, :]
            y_right += load_count(grad_counts, LEFT, slot, chunks, chunk + 1, channel, KEY_DIM)[None, :]
            if BOTH:
                x_right += dtotal * load_count(counts, 1, slot, chunks, chunk + 1, channel, KEY_DIM)[None, :]
                y_left += load_count(grad_counts, 0, slot, chunks, chunk - 1, channel, KEY_DIM)[None, :]
        x_left, x_right = x_left * to_left * passed, x_right * to_right * passed
        y_left, y_right = y_left * to_left, y_right * to_right
        dq, dk = dq + x_left + x_right, dk + y_left + y_right
        y_left, y_right = y_left * k, y_right * k
        from_here += x_left * q + y_left
        up_to_here += x_right * q + y_right
        store_tile(dquery, through_features(dq, q, QUERY_FEATURES), token, valid, channel, stride_dqn, KEY_DIM)
        store_tile(dkey, through_features(dk, k, KEY_FEATURES), token, valid, channel, stride_dkn, KEY_DIM)

        # A key's own gate is not between it and any query.
        first_dg = dg
        dg = tl.cumsum(from_here, 0, reverse=True) + tl.cumsum(up_to_here, 0) - y_left - y_right + through[None, :]
        of_first_half, of_second_half = of_second_half, tl.sum(tl.where(is_second, from_here, up_to_here), 0)

    # What is summed from the second half's tokens on belongs to all gates of the first, and the other way round.
    token0, valid0 = run_tokens(2 * chunk, length, inner, outer, backward, HALF, COLUMNS)
    token1, valid1 = run_tokens(2 * chunk + 1, length, inner, outer, backward, HALF, COLUMNS)
    _store_gate(dgate, first_dg + of_second_half[None, :], token0, valid0, channel, stride_dgn, KEY_DIM, SCALAR)
    _store_gate(dgate, dg + of_first_half[None, :], token1, valid1, channel, stride_dgn, KEY_DIM, SCALAR)


@triton.jit
def _store_gate(dgate, x, token, valid, channel, stride, DIM: tl.constexpr, SCALAR: tl.constexpr):
    if SCALAR:
        tl.store(dgate + token * stride + tl.program_id(1), tl.sum(x, 1), mask=valid)
    else:
        store_tile(dgate, x, token, valid, channel, stride, DIM)


@triton.jit
def _inside_a_half(
    own,
    dw,
    dw_by_key,
    q,
    k,
    g,
    LEVELS: tl.constexpr,
    SCALAR: tl.constexpr,
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What pairs of one run of S tokens give to the gradients of queries and keys and to the sums for the gates, from
    each token on and up to it; and the sums of gates before and after each token.

    own (S, 1) and dw (S, S) are the gradients of weights, dw_by_key the same transposed.
    """
    SIZE: tl.constexpr = q.shape[0]
    dtype: tl.constexpr = dw.dtype
    q_passed = q * tl.exp2(g)  # a query passes its own gate, a key does not
    dq, dk = tl.zeros_like(q), own * q
    from_here, up_to_here = tl.zeros_like(q), tl.zeros_like(q)
    before, after, total = g * 0, g * 0, g
    for LEVEL in tl.static_range(LEVELS):
        if not SCALAR:
            second = in_second_half(LEVEL, SIZE)
            decay = tl.exp2(tl.where(second, before, after)) if LEVEL else 1.0
            seen = tl.where(across_halves(LEVEL, SIZE, BOTH, False), dw, 0.0).to(dtype)
            x = tl.dot(seen, as_operand(k * decay, dtype, PRECISION), input_precision=PRECISION) * decay
            seen = tl.where(across_halves(LEVEL, SIZE, BOTH, True), dw_by_key, 0.0).to(dtype)
            y = tl.dot(seen, as_operand(q_passed * decay, dtype, PRECISION), input_precision=PRECISION) * decay
            dq, dk = dq + x, dk + y
            x, y = x * q_passed, y * k
            from_here += tl.where(second, x, -y)
            up_to_here += tl.where(second, -y, x)
        before, after, total = double_blocks(before, after, total, LEVEL, SIZE, g.shape[1])
    if SCALAR:
        row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
        dw *= scalar_decays(g, SIZE, LEVELS, BOTH, False)
        dw_by_key *= scalar_decays(g, SIZE, LEVELS, BOTH, True)
        for TO_RIGHT in tl.static_range(2):  # of the key
            if BOTH or not TO_RIGHT:
                seen = tl.where(row < column if TO_RIGHT else row > column, dw, 0.0)
                x = tl.dot(
                    as_operand(seen, dtype, PRECISION), as_operand(k, dtype, PRECISION), input_precision=PRECISION
                )
                seen = tl.where(row > column if TO_RIGHT else row < column, dw_by_key, 0.0)
                y = tl.dot(
                    as_operand(seen, dtype, PRECISION), as_operand(q, dtype, PRECISION), input_precision=PRECISION
                )
                dq, dk = dq + x, dk + y
                if TO_RIGHT:
                    up_to_here += x * q - y * k
                else:
                    from_here += x * q - y * k
    if not SCALAR:
        dq *= tl.exp2(g)
    return dq + own * k, dk, from_here, up_to_here, before, after


@triton.jit
def _draw(
    x,
    token,
    valid,
    stride,
    states,
    slot,
    chunks,
    chunk,
    channel,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BOTH: tl.constexpr,
    FROM_LEFT: tl.constexpr,
    FROM_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of x (S, V) times the transposed states that enter the chunk from the left and the right; 0 without."""
    left = tl.zeros([token.shape[0], channel.shape[0]], dtype=tl.float32)
    right = tl.zeros([token.shape[0], channel.shape[0]], dtype=tl.float32)
    for block in range(0, (VALUE_DIM + BLOCK_V - 1) // BLOCK_V):
        column = block * BLOCK_V + tl.arange(0, BLOCK_V)
        rows = load_tile(x, token, valid, column, stride, VALUE_DIM).to(tl.float32)
        rows = as_operand(rows, states.dtype.element_ty, PRECISION)
        if FROM_LEFT:
            state = load_state(states, 0, slot, chunks, chunk - 1, channel, column, KEY_DIM, VALUE_DIM)
            left = tl.dot(rows, tl.trans(state), left, input_precision=PRECISION)
        if FROM_RIGHT:
            direction = 1 if BOTH else 0
            state = load_state(states, direction, slot, chunks, chunk + 1, channel, column, KEY_DIM, VALUE_DIM)
            right = tl.dot(rows, tl.trans(state), right, input_precision=PRECISION)
    return left, right


@triton.jit
def _through_chunk(
    chunk,
    slot,
    chunks,
    channel,
    states,
    counts,
    grad_states,
    grad_counts,
    VALUE_DIM: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BOTH: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """States that enter the chunk times the gradients of states that enter from the other side, summed, (K,)."""
    through = tl.zeros([channel.shape[0]], dtype=tl.float32)
    for SIDE in tl.static_range(1 + BOTH):
        entered, opposite = chunk + 2 * SIDE - 1, chunk + 1 - 2 * SIDE
        other = 1 - SIDE if BOTH else 0
        for block in range(0, (VALUE_DIM + BLOCK_V - 1) // BLOCK_V):
            column = block * BLOCK_V + tl.arange(0, BLOCK_V)
            x = load_state(states, SIDE, slot, chunks, entered, channel, column, KEY_DIM, VALUE_DIM)
            y = load_state(grad_states, other, slot, chunks, opposite, channel, column, KEY_DIM, VALUE_DIM)
            through += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
        if COUNTED:
            count = load_count(counts, SIDE, slot, chunks, entered, channel, KEY_DIM)
            through += count * load_count(grad_counts, other, slot, chunks, opposite, channel, KEY_DIM)
    return through
