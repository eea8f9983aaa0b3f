"""The scan of gated linear attention in chunks, forward and backward, as one custom operator.

The arithmetic is in `gated_slabs`.

Letters: B batch, H heads, L tokens of one scan, K features, V value columns, C tokens per chunk; S = 1 or 2 directions
times B times H. A state is the (K, V) matrix of the recurrence `S_t = diag(exp(g_t)) S_{t-1} + k_t v_tᵀ`.
"""

from __future__ import annotations

import torch

from diffusers_linattn.kernels.scan_paths import describe_path
from diffusers_linattn.ops.gated_slabs import scan_slab, scan_slab_backward


CHUNK = 64  # a power of two
SLAB = 512  # tokens worked on at a time, whole chunks: bounds the memory and keeps the work in the cache

LOWEST_GATE = -1e4  # exp of it is 0 in every dtype, and sums of it stay finite


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
        gate: (B, H, L, K), or (B, H, L, 1) for all features alike, ≤ 0.
        grid: (frames, height, width) with L tokens.
        both: Add the scan along the path and the one against it, in one pass.
        path: What [`scan_path`] gives. An integer rather than words, so that it can be a symbolic size and layers with
            different paths share one compiled block.

    Returns:
        (B, H, L, V). Memory is linear in L, with autograd as well.
    """
    gate = gate.clamp(min=LOWEST_GATE)
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
        slab_output, state = scan_slab(q, k, v, g, state)
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
            *slab_gradients, d_state = scan_slab_backward(q, k, v, g, starts[:, index], do, d_state)
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
    return tokens.unflatten(1, (-1, CHUNK))


def _add(output: torch.Tensor, x: torch.Tensor, slab: slice, direction: str) -> None:
    """Add (S, chunks, C, …) to the tokens of (B, H, L, …) that [`_read`] takes it from."""
    scans = x.flatten(1, 2)[:, : slab.stop - slab.start].split(output.shape[0] * output.shape[1])
    output = output.flatten(0, 1)
    if direction != "backward":
        output[:, slab] += scans[0]
    if direction != "forward":
        output[:, _mirrored(slab, output.shape[1])] += scans[-1].flip(1)
