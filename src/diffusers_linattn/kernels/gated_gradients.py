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
    own,
    other,
    gate,
    factor,
    grad_totals,
    grad_weights,
    states,
    counts,
    grad_states,
    grad_counts,
    down,
    dgate,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_yb,
    stride_yh,
    stride_yn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_fb,
    stride_fh,
    stride_fn,
    stride_dxb,
    stride_dxh,
    stride_dxn,
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
    OF_KEY: tl.constexpr,
    COUNTED: tl.constexpr,
    FEATURES: tl.constexpr,
    OTHER_FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The query's gradient and its part of the gate's; with `OF_KEY` the key's, whose part is added to dgate.

    Grid (chunks, blocks of K, heads). own is the query, other the key, factor the output's gradient, states and counts
    as they are. With `OF_KEY`, own is the key, other the query, factor the value, and states and counts are their
    gradients. dgate has the gates' channels, or with `SCALAR` one per block of K, which the caller adds up.
    """
    chunk, slot, head = tl.program_id(0), tl.program_id(2).to(tl.int64), (first_head + tl.program_id(2)).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    own += head // heads * stride_xb + head % heads * stride_xh
    other += head // heads * stride_yb + head % heads * stride_yh
    gate += head // heads * stride_gb + head % heads * stride_gh
    factor += head // heads * stride_fb + head % heads * stride_fh
    down += head // heads * stride_dxb + head % heads * stride_dxh
    dgate += head // heads * stride_dgb + head % heads * stride_dgh
    dtype: tl.constexpr = states.dtype.element_ty
    GATE_DIM: tl.constexpr = 1 if SCALAR else KEY_DIM
    WIDTH: tl.constexpr = 1 if SCALAR else BLOCK_K
    # A query looks left along the path if there is one direction only, so that a key is seen from the right.
    LEFT: tl.constexpr = BOTH or not OF_KEY
    RIGHT: tl.constexpr = BOTH or OF_KEY
    row, column = tl.arange(0, HALF)[:, None], tl.arange(0, HALF)[None, :]
    grad_weights += (slot * chunks + chunk) * 4 * HALF * HALF
    left_half = tl.zeros([BLOCK_K], dtype=tl.float32)
    right_half = tl.zeros([BLOCK_K], dtype=tl.float32)
    for half in range(0, 2):
        is_right = half == 1
        token, valid = run_tokens(2 * chunk + half, length, inner, outer, backward, HALF, 0)
        x = load_features(own, token, valid, channel, stride_xn, KEY_DIM, FEATURES)
        y = load_features(other, token, valid, channel, stride_yn, KEY_DIM, OTHER_FEATURES)
        g = load_gate(gate, token, valid, channel, stride_gn, GATE_DIM, SCALAR)

        # Pairs inside this half. For the gates, `from_here` is summed from each token on, `up_to_here` up to it.
        near = grad_weights + half * (2 * HALF + 1) * HALF
        dw = tl.load(near + (column * 2 * HALF + row if OF_KEY else row * 2 * HALF + column))
        dx = tl.load(near + tl.arange(0, HALF) * (2 * HALF + 1)).to(tl.float32)[:, None] * y
        from_here = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
        up_to_here = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
        before, after = tl.zeros([HALF, WIDTH], dtype=tl.float32), tl.zeros([HALF, WIDTH], dtype=tl.float32)
        for LEVEL in tl.static_range(LEVELS):
            if not SCALAR:
                second = in_second_half(LEVEL, HALF)
                decay = tl.exp(tl.where(second, before, after))  # of a key; a query passes its own gate, too
                seen = tl.where(across_halves(LEVEL, HALF, BOTH, OF_KEY), dw, 0.0).to(dtype)
                if OF_KEY:
                    add = tl.dot(seen, (y * decay * tl.exp(g)).to(dtype), input_precision=PRECISION) * decay
                else:
                    add = tl.dot(seen, (y * decay).to(dtype), input_precision=PRECISION) * decay * tl.exp(g)
                dx += add
                add *= x
                if OF_KEY:
                    from_here -= tl.where(second, 0.0, add)
                    up_to_here -= tl.where(second, add, 0.0)
                else:
                    from_here += tl.where(second, add, 0.0)
                    up_to_here += tl.where(second, 0.0, add)
            before, after = double_blocks(before, after, g, LEVEL, HALF, WIDTH)
        if SCALAR:
            for TO_RIGHT in tl.static_range(2):
                if RIGHT if TO_RIGHT else LEFT:
                    seen = tl.where(row < column if TO_RIGHT else row > column, dw, 0.0)
                    seen = (seen * scalar_decays(g, HALF, LEVELS, BOTH, OF_KEY)).to(dtype)
                    add = tl.dot(seen, y.to(dtype), input_precision=PRECISION)
                    dx += add
                    if OF_KEY and TO_RIGHT:
                        from_here -= add * x
                    elif OF_KEY:
                        up_to_here -= add * x
                    elif TO_RIGHT:
                        up_to_here += add * x
                    else:
                        from_here += add * x

        # Pairs with the other half.
        far_token, far_valid = run_tokens(2 * chunk + 1 - half, length, inner, outer, backward, HALF, 0)
        y = load_features(other, far_token, far_valid, channel, stride_yn, KEY_DIM, OTHER_FEATURES)
        decay, far_total = gates_towards(
            gate,
            2 * chunk + 1 - half,
            is_right,
            length,
            inner,
            outer,
            backward,
            channel,
            stride_gn,
            GATE_DIM,
            SCALAR,
            HALF,
        )
        if OF_KEY:
            decay += load_gate(gate, far_token, far_valid, channel, stride_gn, GATE_DIM, SCALAR)
        # With one direction, queries of the left half see no key of the right one.
        seen = row + (1 - half if OF_KEY else half) * HALF >= (0 if BOTH else HALF)
        if OF_KEY:
            far = grad_weights + ((1 - half) * HALF + column) * 2 * HALF + half * HALF + row
        else:
            far = grad_weights + (half * HALF + row) * 2 * HALF + (1 - half) * HALF + column
        dw = tl.load(far, mask=seen, other=0.0)
        add = tl.dot(dw, (y * tl.exp(decay)).to(dtype), input_precision=PRECISION)
        add *= tl.exp(tl.where(is_right, before, after) + (0.0 if OF_KEY else g))
        dx += add
        add *= x
        if OF_KEY:
            from_here -= tl.where(is_right, 0.0, add)
            up_to_here -= tl.where(is_right, add, 0.0)
        else:
            from_here += tl.where(is_right, add, 0.0)
            up_to_here += tl.where(is_right, 0.0, add)

        # Pairs across the chunk's borders, to the left and to the right of it.
        to_left = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
        to_right = tl.zeros([HALF, BLOCK_K], dtype=tl.float32)
        through = tl.zeros([BLOCK_K], dtype=tl.float32)
        for block in range(0, (VALUE_DIM + BLOCK_V - 1) // BLOCK_V):
            col = block * BLOCK_V + tl.arange(0, BLOCK_V)
            f = load_tile(factor, token, valid, col, stride_fn, VALUE_DIM).to(dtype)
            if LEFT:
                state = load_state(states, 0, slot, chunks, chunk - 1, channel, col, KEY_DIM, VALUE_DIM)
                to_left = tl.dot(f, tl.trans(state), to_left, input_precision=PRECISION)
                if not OF_KEY:
                    grad_state = load_state(
                        grad_states, BOTH, slot, chunks, chunk + 1, channel, col, KEY_DIM, VALUE_DIM
                    )
                    through += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 1)
            if RIGHT:
                state = load_state(states, BOTH, slot, chunks, chunk + 1, channel, col, KEY_DIM, VALUE_DIM)
                to_right = tl.dot(f, tl.trans(state), to_right, input_precision=PRECISION)
                if not OF_KEY:
                    grad_state = load_state(grad_states, 0, slot, chunks, chunk - 1, channel, col, KEY_DIM, VALUE_DIM)
                    through += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 1)
        if COUNTED:
            dtotal = valid.to(tl.float32)[:, None]
            if not OF_KEY:
                dtotal = tl.load(grad_totals + head * length + token, mask=valid, other=0.0)[:, None]
            if LEFT:
                count = load_count(counts, 0, slot, chunks, chunk - 1, channel, KEY_DIM)
                to_left += dtotal * count[None, :]
                if not OF_KEY:
                    through += count * load_count(grad_counts, BOTH, slot, chunks, chunk + 1, channel, KEY_DIM)
            if RIGHT:
                count = load_count(counts, BOTH, slot, chunks, chunk + 1, channel, KEY_DIM)
                to_right += dtotal * count[None, :]
                if not OF_KEY:
                    through += count * load_count(grad_counts, 0, slot, chunks, chunk - 1, channel, KEY_DIM)
        before += tl.where(is_right, far_total, 0.0)[None, :]
        after += tl.where(is_right, 0.0, far_total)[None, :]
        to_left *= tl.exp(before + (0.0 if OF_KEY else g))
        to_right *= tl.exp(after + (0.0 if OF_KEY else g))
        dx += to_left + to_right
        store_tile(down, through_features(dx, x, FEATURES), token, valid, channel, stride_dxn, KEY_DIM)

        to_left *= x
        to_right *= x
        from_here += to_left
        up_to_here += to_right
        if OF_KEY:
            dg = -to_left - to_right  # a key's own gate is not between it and any query
        else:
            dg = through[None, :] * tl.exp(tl.sum(g, 0) + far_total)[None, :]
        dg += tl.cumsum(from_here, 0, reverse=True) + tl.cumsum(up_to_here, 0) + left_half[None, :]
        left_half = tl.sum(up_to_here, 0)
        right_half = tl.sum(from_here, 0)
        _add_gate(dgate, dg, token, valid, channel, stride_dgn, KEY_DIM, SCALAR, OF_KEY)

    # What the right half sums from its tokens on belongs to all gates of the left half.
    tl.debug_barrier()
    token, valid = run_tokens(2 * chunk, length, inner, outer, backward, HALF, 0)
    dg = tl.zeros([HALF, BLOCK_K], dtype=tl.float32) + right_half[None, :]
    _add_gate(dgate, dg, token, valid, channel, stride_dgn, KEY_DIM, SCALAR, True)


@triton.jit
def _add_gate(dgate, x, token, valid, channel, stride, DIM: tl.constexpr, SCALAR: tl.constexpr, ADD: tl.constexpr):
    """Write the gates' gradient, or add to what is there."""
    if SCALAR:
        place, x = dgate + token * stride + tl.program_id(1), tl.sum(x, 1)
        if ADD:
            x += tl.load(place, mask=valid, other=0.0)
        tl.store(place, x, mask=valid)
    else:
        if ADD:
            x += load_tile(dgate, token, valid, channel, stride, DIM)
        store_tile(dgate, x, token, valid, channel, stride, DIM)
