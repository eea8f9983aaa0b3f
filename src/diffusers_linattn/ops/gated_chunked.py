"""The scan of gated linear attention in chunks, forward and backward, as one custom operator.

The arithmetic is in `gated_slabs`.

Letters: B batch, H heads, L tokens of one scan, K features, V value columns, C tokens per chunk; S = 1 or 2 directions
times B times H. A state is the (K, V) matrix of the recurrence `S_t = diag(exp(g_t)) S_{t-1} + k_t v_tᵀ`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffusers_linattn.kernels.scan_paths import describe_path
from diffusers_linattn.ops.features import full_precision
from diffusers_linattn.ops.gated_slabs import scan_slab, scan_slab_backward
from diffusers_linattn.ops.reference import FEATURE_MAPS


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
    features: str = "none",
    counted: bool = False,
    weights: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ_j (Σ_d φ(q_i)_d φ(k_j)_d Π a_d) w_j v_j over the keys j up to i on the path, or from it on, a = exp(gate).

    Computed in fp32, or fp64 for fp64. The backward pass keeps the inputs as they are and a state per slab; what is
    made of them is made again.

    Args:
        query: (B, H, L, K), any floating dtype, tokens in raster order, like all of them.
        key: (B, H, L, K).
        value: (B, H, L, V).
        gate: (B, H, L, K), or (B, H, L, 1) for all features alike, ≤ 0.
        grid: (frames, height, width) with L tokens.
        both: Add the scan along the path and the one against it, in one pass; each token counts itself once.
        path: What [`scan_path`] gives. An integer rather than words, so that it can be a symbolic size and layers with
            different paths share one compiled block.
        features: φ: a name of `reference.FEATURE_MAPS`, or `"none"`.
        counted: Add a column with the sums of the weights.
        weights: w, (B | 1, H | 1, L, 1), without a gradient; `None` is 1.
        initial_state: What the scan begins with, (B, H, K, V), with `counted` a column more; with `both`
            (2, B, H, K, V), the second for the scan against the path. `None` is 0.

    Returns:
        (B, H, L, V), or V + 1 with `counted`.
    """
    settings = (features, counted, grid[1], grid[2], both, path)
    return _gated_scan(query, key, value, gate, weights, initial_state, *settings)[0]


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor gate, Tensor? weights"
_SETTINGS = "str features, bool counted, SymInt height, SymInt width, bool both, SymInt path"


@torch.library.custom_op(
    "diffusers_linattn::gated_scan",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? initial_state, {_SETTINGS}) -> (Tensor, Tensor)",
)
def _gated_scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    weights: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    features: str,
    counted: bool,
    height: int,
    width: int,
    both: bool,
    path: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the state at the start of every slab, which the backward pass starts from."""
    direction, order = describe_path(path, both)
    inputs = _Inputs.on_path(query, key, value, gate, weights, direction, order, height, width, features, counted)
    output = inputs.zeros(value.shape[3] + counted)
    state, starts = output.new_zeros(_num_scans(query, both), key.shape[3], output.shape[3]), []
    if initial_state is not None:
        state.copy_(initial_state.reshape(state.shape))
    for slab in _slabs(query.shape[2]):
        starts.append(state.clone())
        q, k, v, g = inputs.read(slab)
        slab_output, state = scan_slab(q, k, v, g, state)
        _add_own(slab_output, q, k, v, output.shape[0] * output.shape[1])
        _add(output, slab_output, slab, direction)
    return _from_path(output, order, height, width), torch.stack(starts, 1)


@_gated_scan.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    weights: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    features: str,
    counted: bool,
    height: int,
    width: int,
    both: bool,
    path: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    slabs, columns = (query.shape[2] + SLAB - 1) // SLAB, value.shape[-1] + counted
    output = query.new_empty(*query.shape[:3], columns, dtype=torch.promote_types(query.dtype, torch.float32))
    return output, output.new_empty(_num_scans(query, both), slabs, query.shape[-1], columns)


@torch.library.custom_op(
    "diffusers_linattn::gated_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor starts, {_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _gated_scan_backward(
    grad: torch.Tensor,
    starts: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    weights: torch.Tensor | None,
    features: str,
    counted: bool,
    height: int,
    width: int,
    both: bool,
    path: int,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value, gate and initial state, the latter fp32 or fp64 (S, K, V)."""
    with torch.autocast(query.device.type, enabled=False):  # a backward pass may run inside the user's autocast
        direction, order = describe_path(path, both)
        inputs = _Inputs.on_path(query, key, value, gate, weights, direction, order, height, width, features, counted)
        gradients = [inputs.zeros(x.shape[3]) for x in (query, key, grad, gate)]
        grad = _to_path(grad, order, height, width)
        d_state = torch.zeros_like(starts[:, 0])
        for index, slab in reversed(list(enumerate(_slabs(query.shape[2])))):
            q, k, v, g = inputs.read(slab)
            do = _in_chunks(_read(grad, slab, direction))
            dq, dk, dv, dg, d_state = scan_slab_backward(q, k, v, g, starts[:, index], do, d_state)
            _add_own_gradients(dq, dk, dv, q, k, v, do, grad.shape[0] * grad.shape[1])
            for gradient, slab_gradient in zip(gradients, (dq, dk, dv, dg), strict=True):
                _add(gradient, slab_gradient, slab, direction)
        dq, dk, dv, dg = (_from_path(gradient, order, height, width) for gradient in gradients)
        dk = dk if weights is None else dk.mul_(weights)
        results = (
            _features_backward(dq, query, features),
            _features_backward(dk, key, features),
            dv[..., : value.shape[3]],
            dg.masked_fill_(gate < LOWEST_GATE, 0),
        )
        like = (query, key, value, gate)
        return *(x.to(of.dtype).contiguous() for x, of in zip(results, like, strict=True)), d_state


@_gated_scan_backward.register_fake
def _(
    grad: torch.Tensor,
    starts: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    like = (query, key, value, gate, starts[:, 0])
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.settings = inputs[6:]
    ctx.save_for_backward(output[1], *inputs[:6])


def _backward(ctx, grad, _grad_starts):  # type: ignore[no-untyped-def]
    *saved, initial_state = ctx.saved_tensors
    *gradients, d_state = _gated_scan_backward(grad, *saved, *ctx.settings)
    d_state = None if initial_state is None else d_state.reshape(initial_state.shape).to(initial_state.dtype)
    return *gradients, None, d_state, *[None] * 6


_gated_scan.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a scan in the order of its path, in their own dtypes."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor
    weights: torch.Tensor | None
    direction: str
    features: str
    counted: bool

    @classmethod
    def on_path(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gate: torch.Tensor,
        weights: torch.Tensor | None,
        direction: str,
        order: str,
        height: int,
        width: int,
        features: str,
        counted: bool,
    ) -> _Inputs:
        q, k, v, g = (_to_path(x, order, height, width) for x in (query, key, value, gate))
        if weights is not None:
            weights = _to_path(weights.expand(*key.shape[:3], 1), order, height, width)
        return cls(q, k, v, g, weights, direction, features, counted)

    def zeros(self, channels: int) -> torch.Tensor:
        return self.query.new_zeros(
            *self.query.shape[:3], channels, dtype=torch.promote_types(self.query.dtype, torch.float32)
        )

    def read(self, slab: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """φ(q), φ(k) w, v with a column of ones, which adds up the weights, and the gate, in fp32 or fp64."""
        q, k = (_features(_read(x, slab, self.direction), self.features) for x in (self.query, self.key))
        if self.weights is not None:
            k = k * _read(self.weights, slab, self.direction)
        v, g = (_read(x, slab, self.direction).to(q.dtype) for x in (self.value, self.gate))
        v = F.pad(v, (0, 1), value=1.0) if self.counted else v
        return _in_chunks(q), _in_chunks(k), _in_chunks(v), _in_chunks(g.clamp(min=LOWEST_GATE))


def _features(x: torch.Tensor, name: str) -> torch.Tensor:
    x = full_precision(x)
    return x if name == "none" else FEATURE_MAPS[name](x)


def _features_backward(grad: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
    """The gradient of `x` from that of φ(x), which is overwritten."""
    if name == "relu":
        return grad.masked_fill_(x <= 0, 0)
    if name == "elu":
        return grad.mul_(_features(x, name).clamp_(max=1))
    if name == "softmax":
        phi = _features(x, name)
        return grad.sub_((grad * phi).sum(-1, keepdim=True)).mul_(phi)
    return grad


def _add_own(output: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scans: int) -> None:
    """Add what tokens read of themselves, which a scan leaves out, to the first of the scans: once in either case."""
    q, k, v = (x[:scans] for x in (q, k, v))
    output[:scans].addcmul_((q * k).sum(-1, keepdim=True), v)


def _add_own_gradients(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    scans: int,
) -> None:
    q, k, v, grad = (x[:scans] for x in (q, k, v, grad))
    own = (grad * v).sum(-1, keepdim=True)
    dq[:scans].addcmul_(own, k)
    dk[:scans].addcmul_(own, q)
    dv[:scans].addcmul_((q * k).sum(-1, keepdim=True), grad)


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
    """A slab of (B, H, L, …) as (S, tokens, …): every direction is a scan of its own that runs forward."""
    scans = []
    if direction != "backward":
        scans.append(x[:, :, slab].flatten(0, 1))
    if direction != "forward":
        scans.append(x[:, :, _mirrored(slab, x.shape[2])].flatten(0, 1).flip(1))
    return torch.cat(scans)


def _in_chunks(tokens: torch.Tensor) -> torch.Tensor:
    """(S, tokens, …) as (S, chunks, C, …)."""
    # Zeros at the end change nothing: keys of 0, and no query to see them.
    return F.pad(tokens, (0, 0, 0, -tokens.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK))


def _add(output: torch.Tensor, x: torch.Tensor, slab: slice, direction: str) -> None:
    """Add (S, chunks, C, …) to the tokens of (B, H, L, …) that [`_read`] takes it from."""
    scans = x.flatten(1, 2)[:, : slab.stop - slab.start].split(output.shape[0] * output.shape[1])
    output = output.flatten(0, 1)
    if direction != "backward":
        output[:, slab] += scans[0]
    if direction != "forward":
        output[:, _mirrored(slab, output.shape[1])] += scans[-1].flip(1)
