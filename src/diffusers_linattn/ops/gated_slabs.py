"""One slab of a gated scan, forward and backward: a few chunks at a time, in plain PyTorch.

Letters: S scans, n chunks, C tokens per chunk, K features, V value columns.

Gates per feature: inside a chunk the lower triangle of weights is cut into halves: the second half of a block of 2s
tokens looks at the first, then both halves are cut again, down to single tokens. Between a row i of the second half
and a key j of the first, the decay factors at the middle of the block into that from there to i and that from j to
there: products of numbers that are at most 1, never a quotient.

One gate for all features: the decay of a pair is a number, and the whole triangle one product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F


def scan_slab(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (S, n, C, V) of one slab of n chunks that is entered with `state`, and the state behind it.

    q and k are (S, n, C, K), v (S, n, C, V), g (S, n, C, K or 1), the state (S, K, V).
    """
    if g.shape[-1] == 1:
        output = (q @ k.transpose(-1, -2)).mul_(_pair_decays(g)) @ v
        before, after = _decays_around(g)
    else:
        output = torch.zeros_like(v)
        for size, before, after in _halves(g):
            if size == g.shape[2]:
                break
            rows = _split(q, size)[1] * _split(before, size)[1]
            keys = _split(k, size)[0] * _split(after, size)[0]
            _split(output, size)[1].add_(_weighted(rows @ keys.transpose(-1, -2), _split(v, size)[0]))
    states, state = _states(k * after, v, before[:, :, -1], state)
    output += q * before @ states
    return output, state


def scan_slab_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    grad: torch.Tensor,
    d_state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the four inputs of [`scan_slab`] and of the state that it is entered with."""
    if g.shape[-1] == 1:
        dq, dk, dv, dg = _pairs_backward(q, k, v, g, grad)
        before, after = _decays_around(g)
    else:
        dq, dk, dv, dg = (torch.zeros_like(x) for x in (q, k, v, g))
        for size, before, after in _halves(g):
            if size == g.shape[2]:
                break
            row_decay, key_decay = _split(before, size)[1], _split(after, size)[0]
            rows, keys = _split(q, size)[1] * row_decay, _split(k, size)[0] * key_decay
            row_grad = _split(grad, size)[1]
            d_weights = row_grad @ _split(v, size)[0].transpose(-1, -2)
            d_rows, d_keys = _weighted(d_weights, keys), _weighted(d_weights.transpose(-1, -2), rows)
            _split(dv, size)[0].add_(_weighted(keys @ rows.transpose(-1, -2), row_grad))
            _split(dq, size)[1].addcmul_(d_rows, row_decay)
            _split(dk, size)[0].addcmul_(d_keys, key_decay)
            _split(dg, size)[1].add_(_sum_from(d_rows * rows))
            _split(dg, size)[0].add_(_sum_before(d_keys * keys))

    decay, rows, keys = before[:, :, -1], q * before, k * after
    states, _ = _states(keys, v, decay, state)
    d_rows = grad @ states.transpose(-1, -2)
    d_states = rows.transpose(-1, -2) @ grad
    for n in reversed(range(d_states.shape[1])):  # d_states[:, n] becomes the gradient of the state behind chunk n
        preceding = torch.addcmul(d_states[:, n], decay[:, n, :, None], d_state)
        d_states[:, n] = d_state
        d_state = preceding
    d_keys = v @ d_states.transpose(-1, -2)
    dv += keys @ d_states
    dq.addcmul_(d_rows, before)
    dk.addcmul_(d_keys, after)
    d_before, d_after = d_rows.mul_(rows), d_keys.mul_(keys)
    d_decay = (states.mul_(d_states).sum(-1) * decay)[:, :, None]
    if g.shape[-1] == 1:
        d_before, d_after, d_decay = (x.sum(-1, keepdim=True) for x in (d_before, d_after, d_decay))
    dg += _sum_from(d_before) + _sum_before(d_after) + d_decay
    return dq, dk, dv, dg, d_state


def _pair_decays(g: torch.Tensor) -> torch.Tensor:
    """exp(g summed from behind the key to the row), (S, n, C, C), from (S, n, C, 1); 0 unless the key comes first."""
    passed = g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2)
    return passed.exp_().tril_(-1)


def _pairs_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of (q kᵀ · [`_pair_decays`]) v."""
    decays = _pair_decays(g)
    weights = (q @ k.transpose(-1, -2)).mul_(decays)
    d_weights = grad @ v.transpose(-1, -2)
    d_exponents = d_weights * weights
    d_weights.mul_(decays)
    dg = _sum_from(d_exponents).tril_(-1).sum(-1, keepdim=True)
    return d_weights @ k, d_weights.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad, dg


def _decays_around(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`_halves`] ends with: the decay from a chunk's start to each token, and from it to the end."""
    return g.cumsum(-2).exp_(), _sum_from(F.pad(g[:, :, 1:], (0, 0, 0, 1))).exp_()


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


def _halves(gate: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For blocks of 1, 2, 4, … C tokens: the decay, (S, n, C, K), around each token inside its block.

    The first runs from the start of the block to the token (what a row passes), the second from behind the token to
    the end of the block (what a key passes): products of one exp per token. The tensors are overwritten by the
    next step.
    """
    before, after = gate.exp(), torch.ones_like(gate)
    size = 1
    while True:
        yield size, before, after
        if size == gate.shape[2]:
            return
        first_before, second_before = _split(before, size)
        first_after, _ = _split(after, size)
        first_after *= second_before[:, -1:]
        second_before *= first_before[:, -1:]
        size *= 2


def _split(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second halves of all blocks of 2 · size tokens: two views (blocks, size, …)."""
    blocks = x.view(-1, 2, size, x.shape[-1])
    return blocks[:, 0], blocks[:, 1]


def _weighted(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`weights @ x`, (blocks, size, …); matrices below a certain size torch multiplies number by number, slowly."""
    size = weights.shape[-1]
    if size > 2:
        return weights @ x
    output = weights[..., :1] * x[:, :1]
    return output if size == 1 else output.addcmul_(weights[..., 1:], x[:, 1:])


def _sum_from(x: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of a block from each on: the gradient of the gates summed up to a token."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _sum_before(x: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of a block before each: the gradient of the gates summed behind a token."""
    return F.pad(x, (0, 0, 1, -1)).cumsum(-2)
