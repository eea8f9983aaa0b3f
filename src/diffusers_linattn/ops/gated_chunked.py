"""The scan of gated linear attention in chunks, forward and backward, as one custom operator.

Letters: B batch, H heads, L tokens of one scan, K features, V value columns, C tokens per chunk; S = 1 or 2 directions
times B times H. A state is the (K, V) matrix of the recurrence `S_t = diag(exp(g_t)) S_{t-1} + k_t v_tᵀ`.

Inside a chunk the lower triangle of weights is cut into halves: the second half of a block of 2s tokens looks at
the first, then both halves are cut again, down to single tokens. Between a row i of the second half and a key j of the
first, the decay factors at the middle of the block into exp(g summed over the rows up to i) times exp(g summed over
the keys after j). Every exponent is a sum of gates, hence ≤ 0, and never a difference of two large sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


CHUNK = 64  # a power of two
SLAB = 512  # tokens worked on at a time, whole chunks: bounds the memory and keeps the work in the cache

DIRECTIONS = ("forward", "backward", "bidirectional")
ORDERS = ("rows", "columns")

# Traced as a size: 0 and 1 are never symbolic, and a size that another dimension has, too, is taken for that one.
_FIRST_PATH = 1_000_003


def scan_path(direction: str, order: str) -> int:
    """Order and direction of a scan as one integer, for [`gated_scan`]."""
    return _FIRST_PATH + 2 * ORDERS.index(order) + (direction == "backward")


def describe_path(path: int, both: bool) -> tuple[str, str]:
    """The inverse of [`scan_path`]: direction and order."""
    columns, backward = divmod(path - _FIRST_PATH, 2)
    return "bidirectional" if both else DIRECTIONS[backward], ORDERS[columns]


def gated_scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    grid: tuple[int, int, int],
    both: bool,
    path: int,
) -> torch.Tensor:
    """Σ_j (Σ_d q_id k_jd Π a_d) v_j over the keys j ≠ i before i on the path, or after it, a = exp(gate) from j to i.

    Args:
        query: (B, H, L, K), fp32 or fp64, tokens in raster order, like all of them.
        key: (B, H, L, K).
        value: (B, H, L, V).
        gate: (B, H, L, K), ≤ 0.
        grid: (frames, height, width) with L tokens.
        both: Add the scan along the path and the one against it, in one pass.
        path: What [`scan_path`] gives. An integer rather than words, so that it can be a symbolic size and layers with
            different paths share one compiled block.

    Returns:
        (B, H, L, V). Memory is linear in L, with autograd as well.
    """
    return _gated_scan(query, key, value, gate, grid[1], grid[2], both, path)[0]


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor gate"
_PATH = "SymInt height, SymInt width, bool both, SymInt path"


@torch.library.custom_op(
    "diffusers_linattn::gated_scan", mutates_args=(), schema=f"({_INPUTS}, {_PATH}) -> (Tensor, Tensor)"
)
def _gated_scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    height: int,
    width: int,
    both: bool,
    path: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the state at the start of every slab, which the backward pass starts from."""
    direction, order = describe_path(path, both)
    query, key, value, gate = (_to_path(x, order, height, width) for x in (query, key, value, gate))
    output, starts = torch.zeros_like(value, memory_format=torch.contiguous_format), []
    state = query.new_zeros(_num_scans(query, both), query.shape[-1], value.shape[-1])
    for slab in _slabs(query.shape[2]):
        starts.append(state.clone())
        q, k, v, g = (_read(x, slab, direction) for x in (query, key, value, gate))
        slab_output, state = _scan_slab(q, k, v, g, state)
        _add(output, slab_output, slab, direction)
    return _from_path(output, order, height, width), torch.stack(starts, 1)


@_gated_scan.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    height: int,
    width: int,
    both: bool,
    path: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    slabs = (query.shape[2] + SLAB - 1) // SLAB
    starts = query.new_empty(_num_scans(query, both), slabs, query.shape[-1], value.shape[-1])
    return torch.empty_like(value, memory_format=torch.contiguous_format), starts


@torch.library.custom_op(
    "diffusers_linattn::gated_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor starts, {_PATH}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _gated_scan_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    starts: torch.Tensor,
    height: int,
    width: int,
    both: bool,
    path: int,
) -> tuple[torch.Tensor, ...]:
    with torch.autocast(query.device.type, enabled=False):  # a backward pass may run inside the user's autocast
        direction, order = describe_path(path, both)
        grad, *inputs = (_to_path(x, order, height, width) for x in (grad, query, key, value, gate))
        gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
        d_state = torch.zeros_like(starts[:, 0])
        for index, slab in reversed(list(enumerate(_slabs(query.shape[2])))):
            q, k, v, g, do = (_read(x, slab, direction) for x in (*inputs, grad))
            *slab_gradients, d_state = _scan_slab_backward(q, k, v, g, starts[:, index], do, d_state)
            for gradient, slab_gradient in zip(gradients, slab_gradients, strict=True):
                _add(gradient, slab_gradient, slab, direction)
        return tuple(_from_path(gradient, order, height, width) for gradient in gradients)


@_gated_scan_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, gate))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, height, width, both, path = inputs
    ctx.settings = (height, width, both, path)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad, _grad_starts):  # type: ignore[no-untyped-def]
    return *_gated_scan_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


_gated_scan.register_autograd(_backward, setup_context=_setup_context)


def _to_path(x: torch.Tensor, order: str, height: int, width: int) -> torch.Tensor:
    """(B, H, L, …) from raster order to the order that the path visits; frames are always the outermost loop."""
    if order == "rows":
        return x
    return x.unflatten(2, (-1, height, width)).transpose(3, 4).flatten(2, 4)


def _from_path(x: torch.Tensor, order: str, height: int, width: int) -> torch.Tensor:
    """The inverse of [`_to_path`]."""
    return _to_path(x, order, width, height).contiguous()


def _num_scans(query: torch.Tensor, both: bool) -> int:
    return query.shape[0] * query.shape[1] * (2 if both else 1)


def _slabs(length: int) -> list[slice]:
    return [slice(start, min(start + SLAB, length)) for start in range(0, length, SLAB)]


def _mirrored(slab: slice, length: int) -> slice:
    return slice(length - slab.stop, length - slab.start)


def _read(x: torch.Tensor, slab: slice, direction: str) -> torch.Tensor:
    """A slab of (B, H, L, …) as (S, chunks, C, …): every direction is a scan of its own that runs forward."""
    x, scans = x.flatten(0, 1), []
    if direction != "backward":
        scans.append(x[:, slab])
    if direction != "forward":
        scans.append(x[:, _mirrored(slab, x.shape[1])].flip(1))
    tokens = torch.cat(scans)
    # Zeros at the end change nothing: keys of 0, and no query to see them.
    tokens = torch.nn.functional.pad(tokens, (0, 0, 0, -tokens.shape[1] % CHUNK))
    return tokens.reshape(tokens.shape[0], -1, CHUNK, tokens.shape[-1])


def _add(output: torch.Tensor, x: torch.Tensor, slab: slice, direction: str) -> None:
    """Add (S, chunks, C, …) to the tokens of (B, H, L, …) that [`_read`] takes it from."""
    scans = x.flatten(1, 2)[:, : slab.stop - slab.start].split(output.shape[0] * output.shape[1])
    output = output.flatten(0, 1)
    if direction != "backward":
        output[:, slab] += scans[0]
    if direction != "forward":
        output[:, _mirrored(slab, output.shape[1])] += scans[-1].flip(1)


def _halves(gate: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For s = 1, 2, 4 … CHUNK: s and the gates of (S, n, C, K) summed inside blocks of s tokens.

    The first sum runs from the start of the block to the token (what a row passes), the second from behind the token
    to the end of the block (what a key passes). The tensors are overwritten by the next step.
    """
    before, after = gate.clone(), torch.zeros_like(gate)
    size = 1
    while True:
        yield size, before, after
        if size == CHUNK:
            return
        first_before, second_before = _split(before, size)
        first_after, _ = _split(after, size)
        first_after += second_before[:, -1:]
        second_before += first_before[:, -1:]
        size *= 2


def _split(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second halves of all blocks of 2 · size tokens: two views (blocks, size, …)."""
    blocks = x.view(-1, 2, size, x.shape[-1])
    return blocks[:, 0], blocks[:, 1]


def _scan_slab(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (S, n, C, V) of one slab of n chunks that is entered with `state`, and the state behind it."""
    output = torch.zeros_like(v)
    for size, before, after in _halves(g):
        if size == CHUNK:
            break
        rows = _split(q, size)[1] * _split(before, size)[1].exp()
        keys = _split(k, size)[0] * _split(after, size)[0].exp()
        _split(output, size)[1].add_(rows @ keys.transpose(-1, -2) @ _split(v, size)[0])
    states, state = _states(k * after.exp(), v, before[:, :, -1].exp(), state)
    output += q * before.exp() @ states
    return output, state


def _states(
    keys: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that each chunk is entered with, (S, n, K, V), and the one behind the last: the sequential part."""
    states = keys.transpose(-1, -2) @ v
    for n in range(states.shape[1]):
        following = torch.addcmul(states[:, n], decay[:, n, :, None], state)
        states[:, n] = state
        state = following
    return states, state


def _scan_slab_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    grad: torch.Tensor,
    d_state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the four inputs of [`_scan_slab`] and of the state that it is entered with."""
    dq, dk, dv, dg = (torch.zeros_like(x) for x in (q, k, v, g))
    for size, before, after in _halves(g):
        if size == CHUNK:
            break
        row_decay, key_decay = _split(before, size)[1].exp(), _split(after, size)[0].exp()
        rows, keys = _split(q, size)[1] * row_decay, _split(k, size)[0] * key_decay
        row_grad = _split(grad, size)[1]
        d_weights = row_grad @ _split(v, size)[0].transpose(-1, -2)
        d_rows, d_keys = d_weights @ keys, d_weights.transpose(-1, -2) @ rows
        _split(dv, size)[0].add_(keys @ rows.transpose(-1, -2) @ row_grad)
        _split(dq, size)[1].addcmul_(d_rows, row_decay)
        _split(dk, size)[0].addcmul_(d_keys, key_decay)
        _split(dg, size)[1].add_(_sum_from(d_rows * rows))
        _split(dg, size)[0].add_(_sum_before(d_keys * keys))

    row_decay, key_decay, decay = before.exp(), after.exp(), before[:, :, -1].exp()
    rows, keys = q * row_decay, k * key_decay
    states, _ = _states(keys, v, decay, state)
    d_rows = grad @ states.transpose(-1, -2)
    d_states = rows.transpose(-1, -2) @ grad
    for n in reversed(range(d_states.shape[1])):  # d_states[:, n] becomes the gradient of the state behind chunk n
        preceding = torch.addcmul(d_states[:, n], decay[:, n, :, None], d_state)
        d_states[:, n] = d_state
        d_state = preceding
    d_keys = v @ d_states.transpose(-1, -2)
    dv += keys @ d_states
    dq.addcmul_(d_rows, row_decay)
    dk.addcmul_(d_keys, key_decay)
    d_decay = (states.mul_(d_states).sum(-1) * decay)[:, :, None]
    dg += _sum_from(d_rows.mul_(rows)) + _sum_before(d_keys.mul_(keys)) + d_decay
    return dq, dk, dv, dg, d_state


def _sum_from(x: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of a block from each on: the gradient of the gates summed up to a token."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _sum_before(x: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of a block before each: the gradient of the gates summed behind a token."""
    return torch.nn.functional.pad(x, (0, 0, 1, -1)).cumsum(-2)
