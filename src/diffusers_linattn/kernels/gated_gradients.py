"""The gradients of query, key and gate in gated linear attention, chunk by chunk.

What the gate of a token takes part in: the weights of all pairs that it lies between. Per channel these are the
products of a query with its gradient, summed from the token on, less those of the keys. So the sums of a chunk are
kept apart by direction and by whether the pair crosses its border.

Letters: C tokens of a chunk, K features, V value columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffusers_linattn.kernels.gated_path import (
    across_halves,
    double_blocks,
    gates_towards,
    in_second_half,
    load_count,
    load_features,
    load_gate,
    load_state,
    load_tile,
    run_tokens,
    scalar_decays,
    store_tile,
    through_features,
)


@triton.jit(do_not_specialize=["heads", "first_head", "chunks", "length", "inner", "outer", "backward"])
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
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the weights inside each chunk, (heads, chunks, C, C). Grid (chunks, 1, heads)."""
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    grad += head // heads * stride_ob + head % heads * stride_oh
    value += head // heads * stride_vb + head % heads * stride_vh
    dtype: tl.constexpr = grad_weights.dtype.element_ty
    token, valid = run_tokens(chunk, length, inner, outer, backward, CHUNK, 0)
    acc = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for block in range(0, (VALUE_DIM + BLOCK_V - 1) // BLOCK_V):
        column = block * BLOCK_V + tl.arange(0, BLOCK_V)
        do = load_tile(grad, token, valid, column, stride_on, VALUE_DIM).to(dtype)
        v = load_tile(value, token, valid, column, stride_vn, VALUE_DIM).to(dtype)
        acc = tl.dot(do, tl.trans(v), acc, input_precision=PRECISION)
    if COUNTED:
        acc += tl.load(grad_totals + head * length + token, mask=valid, other=0.0)[:, None]
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    tl.store(grad_weights + (slot * chunks + chunk) * CHUNK * CHUNK + row * CHUNK + column, acc.to(dtype))


@triton.jit(do_not_specialize=["heads", "first_head", "chunks", "length", "inner", "outer", "backward"])
def gradients_kernel(
    query,
    key,
    value,
    gate,
    grad,
    grad_totals,
    grad_weights,
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
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
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

    dgate has the gates' channels, or with `SCALAR` one per block of K, which the caller adds up.
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    query += head // heads * stride_qb + head % heads * stride_qh
    key += head // heads * stride_kb + head % heads * stride_kh
    value += head // heads * stride_vb + head % heads * stride_vh
    gate += head // heads * stride_gb + head % heads * stride_gh
    grad += head // heads * stride_ob + head % heads * stride_oh
    dquery += head // heads * stride_dqb + head % heads * stride_dqh
    dkey += head // heads * stride_dkb + head % heads * stride_dkh
    dgate += head // heads * stride_dgb + head % heads * stride_dgh
    dtype: tl.constexpr = states.dtype.element_ty
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM
    WIDTH: tl.constexpr = 1 if SCALAR else BLOCK_K
    # Gradients of states that run left lie in the second direction where there are two, else in the only one.
    LEFT: tl.constexpr = 1 if BOTH else 0
    row, column = tl.arange(0, HALF)[:, None], tl.arange(0, HALF)[None, :]
    grad_weights += (slot * chunks + chunk) * 4 * HALF * HALF
    left_half = tl.zeros([BLOCK_K], dtype=tl.float32)
    right_half = tl.zeros([BLOCK_K], dtype=tl.float32)
    for half in range(0, 2):
        is_right = half == 1
        token, valid = run_tokens(2 * chunk + half, length, inner, outer, backward, HALF, 0)

        # Pairs across the chunk's borders: queries with keys to the left of it, keys with queries to the right, ...
        query_left = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
        key_right = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
        through = tl.zeros([BLOCK_K], dtype=tl.float32)
        if BOTH:
            query_right = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
            key_left = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
        for block in range(0, (VALUE_DIM + BLOCK_V - 1) // BLOCK_V):
            col = block * BLOCK_V + tl.arange(0, BLOCK_V)
            do = load_tile(grad, token, valid, col, stride_on, VALUE_DIM).to(dtype)
            v = load_tile(value, token, valid, col, stride_vn, VALUE_DIM).to(dtype)
            state = load_state(states, 0, slot, chunks, chunk - 1, channel, col, KEY_DIM, VALUE_DIM)
            grad_state = load_state(grad_states, LEFT, slot, chunks, chunk + 1, channel, col, KEY_DIM, VALUE_DIM)
            query_left = tl.dot(do, tl.trans(state), query_left, input_precision=PRECISION)
            key_right = tl.dot(v, tl.trans(grad_state), key_right, input_precision=PRECISION)
            through += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 1)
            if BOTH:
                state = load_state(states, 1, slot, chunks, chunk + 1, channel, col, KEY_DIM, VALUE_DIM)
                grad_state = load_state(grad_states, 0, slot, chunks, chunk - 1, channel, col, KEY_DIM, VALUE_DIM)
                query_right = tl.dot(do, tl.trans(state), query_right, input_precision=PRECISION)
                key_left = tl.dot(v, tl.trans(grad_state), key_left, input_precision=PRECISION)
                through += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 1)
        if COUNTED:
            dtotal = tl.load(grad_totals + head * length + token, mask=valid, other=0.0)[:, None]
            count = load_count(counts, 0, slot, chunks, chunk - 1, channel, KEY_DIM)
            grad_count = load_count(grad_counts, LEFT, slot, chunks, chunk + 1, channel, KEY_DIM)
            query_left += dtotal * count[None, :]
            key_right += grad_count[None, :]
            through += count * grad_count
            if BOTH:
                count = load_count(counts, 1, slot, chunks, chunk + 1, channel, KEY_DIM)
                grad_count = load_count(grad_counts, 0, slot, chunks, chunk - 1, channel, KEY_DIM)
                query_right += dtotal * count[None, :]
                key_left += grad_count[None, :]
                through += count * grad_count

        # Pairs inside this half. `from_here` is summed from each token on, `up_to_here` up to it: the gates' gradients.
        q = load_features(query, token, valid, channel, stride_qn, KEY_DIM, QUERY_FEATURES)
        k = load_features(key, token, valid, channel, stride_kn, KEY_DIM, KEY_FEATURES)
        g = load_gate(gate, token, valid, channel, stride_gn, GATE_DIM, SCALAR)
        near = grad_weights + half * (2 * HALF + 1) * HALF
        own = tl.load(near + tl.arange(0, HALF) * (2 * HALF + 1)).to(tl.float32)[:, None]
        dq, dk = own * k, own * q
        from_here = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
        up_to_here = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
        before, after = tl.zeros([HALF, WIDTH], dtype=tl.float32), tl.zeros([HALF, WIDTH], dtype=tl.float32)
        for LEVEL in tl.static_range(LEVELS):
            if not SCALAR:
                second = in_second_half(LEVEL, HALF)
                of_key = tl.exp(tl.where(second, before, after))
                of_query = of_key * tl.exp(g)
                seen = across_halves(LEVEL, HALF, BOTH, False)
                dw = tl.load(near + row * 2 * HALF + column, mask=seen, other=0.0)
                add_q = tl.dot(dw, (k * of_key).to(dtype), input_precision=PRECISION) * of_query
                seen = across_halves(LEVEL, HALF, BOTH, True)
                dw = tl.load(near + column * 2 * HALF + row, mask=seen, other=0.0)
                add_k = tl.dot(dw, (q * of_query).to(dtype), input_precision=PRECISION) * of_key
                dq += add_q
                dk += add_k
                from_here += tl.where(second, add_q * q, -add_k * k)
                up_to_here += tl.where(second, -add_k * k, add_q * q)
            before, after = double_blocks(before, after, g, LEVEL, HALF, WIDTH)
        if SCALAR:
            for RIGHT in tl.static_range(2 if BOTH else 1):  # keys to the right of the query
                seen = row < column if RIGHT else row > column
                dw = tl.load(near + row * 2 * HALF + column, mask=seen, other=0.0)
                dw = dw * scalar_decays(g, HALF, LEVELS, BOTH, False)
                add_q = tl.dot(dw.to(dtype), k.to(dtype), input_precision=PRECISION)
                seen = row > column if RIGHT else row < column
                dw = tl.load(near + column * 2 * HALF + row, mask=seen, other=0.0)
                dw = dw * scalar_decays(g, HALF, LEVELS, BOTH, True)
                add_k = tl.dot(dw.to(dtype), q.to(dtype), input_precision=PRECISION)
                dq += add_q
                dk += add_k
                if RIGHT:
                    up_to_here += add_q * q - add_k * k
                else:
                    from_here += add_q * q - add_k * k

        # Pairs with the other half.
        far_token, far_valid = run_tokens(2 * chunk + 1 - half, length, inner, outer, backward, HALF, 0)
        far_q = load_features(query, far_token, far_valid, channel, stride_qn, KEY_DIM, QUERY_FEATURES)
        far_k = load_features(key, far_token, far_valid, channel, stride_kn, KEY_DIM, KEY_FEATURES)
        far_g = load_gate(gate, far_token, far_valid, channel, stride_gn, GATE_DIM, SCALAR)
        decay, far_total = gates_towards(
            gate, 2 * chunk + 1 - half, is_right, length, inner, outer, backward, channel, stride_gn, GATE_DIM, SCALAR,
            HALF,
        )
        of_key = tl.exp(tl.where(is_right, before, after))
        seen = row + half * HALF >= (0 if BOTH else HALF)
        dw = tl.load(grad_weights + (half * HALF + row) * 2 * HALF + (1 - half) * HALF + column, mask=seen, other=0.0)
        add_q = tl.dot(dw, (far_k * tl.exp(decay)).to(dtype), input_precision=PRECISION) * of_key * tl.exp(g)
        seen = row + (1 - half) * HALF >= (0 if BOTH else HALF)
        dw = tl.load(grad_weights + ((1 - half) * HALF + column) * 2 * HALF + half * HALF + row, mask=seen, other=0.0)
        add_k = tl.dot(dw, (far_q * tl.exp(decay + far_g)).to(dtype), input_precision=PRECISION) * of_key
        dq += add_q
        dk += add_k
        from_here += tl.where(is_right, add_q * q, -add_k * k)
        up_to_here += tl.where(is_right, -add_k * k, add_q * q)

        before += tl.where(is_right, far_total, 0.0)[None, :]
        after += tl.where(is_right, 0.0, far_total)[None, :]
        query_left *= tl.exp(before + g)
        key_right *= tl.exp(after)
        dq += query_left
        dk += key_right
        key_right *= k
        from_here += query_left * q
        up_to_here += key_right
        beside = key_right
        if BOTH:
            query_right *= tl.exp(after + g)
            key_left *= tl.exp(before)
            dq += query_right
            dk += key_left
            key_left *= k
            up_to_here += query_right * q
            from_here += key_left
            beside += key_left
        store_tile(dquery, through_features(dq, q, QUERY_FEATURES), token, valid, channel, stride_dqn, KEY_DIM)
        store_tile(dkey, through_features(dk, k, KEY_FEATURES), token, valid, channel, stride_dkn, KEY_DIM)

        # A key's own gate is not between it and any query.
        dg = tl.cumsum(from_here, 0, reverse=True) + tl.cumsum(up_to_here, 0) - beside
        dg += (left_half + through * tl.exp(tl.sum(g, 0) + far_total))[None, :]
        left_half = tl.sum(up_to_here, 0)
        right_half = tl.sum(from_here, 0)
        if SCALAR:
            tl.store(dgate + token * stride_dgn + tl.program_id(1), tl.sum(dg, 1), mask=valid)
        else:
            store_tile(dgate, dg, token, valid, channel, stride_dgn, KEY_DIM)

    # What the right half sums from its tokens on belongs to all gates of the left half.
    tl.debug_barrier()
    token, valid = run_tokens(2 * chunk, length, inner, outer, backward, HALF, 0)
    if SCALAR:
        place = dgate + token * stride_dgn + tl.program_id(1)
        tl.store(place, tl.load(place, mask=valid, other=0.0) + tl.sum(right_half, 0), mask=valid)
    else:
        dg = load_tile(dgate, token, valid, channel, stride_dgn, KEY_DIM) + right_half[None, :]
        store_tile(dgate, dg, token, valid, channel, stride_dgn, KEY_DIM)
