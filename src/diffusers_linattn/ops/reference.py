"""The operators in plain PyTorch: the specification that every faster path is tested against.

Letters: B batch, H heads, N tokens, D head_dim, K the head_dim of query and key where it differs from the value's.
Memory is quadratic in N (the gated one is a loop over tokens): use these to understand and to test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from diffusers_linattn.layout import Segment, TokenLayout


FeatureMap = Callable[[torch.Tensor], torch.Tensor]

EPS = 1e-6

FEATURE_MAPS: dict[str, FeatureMap] = {
    # EPS as it stands: Dynamo (torch 2.13) takes a global for a symbol, and fails where recomputed parts have it, too.
    "relu": lambda x: torch.relu(x) + 1e-6,
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "softmax": lambda x: torch.softmax(x, dim=-1),
}


def window_mask(
    queries: Segment, keys: Segment, window: int, temporal_window: int | None, device: torch.device
) -> torch.Tensor:
    """Which key tokens of one grid each query token of another (or the same) grid sees: bool (queries, keys).

    Inside one grid: `(y - y')**2 + (x - x')**2 < window**2`, and `|t - t'| < temporal_window` for video (CLEAR, arXiv
    2412.16112). Across grids, the query's position is scaled to the key's grid and every frame is visible.
    """
    assert queries.grid is not None
    assert keys.grid is not None
    (qf, qh, qw), (kf, kh, kw) = queries.grid, keys.grid

    disc = in_disc(axis_offsets(qh, kh, device), axis_offsets(qw, kw, device), window)
    frames = torch.ones(qf, kf, dtype=torch.bool, device=device)
    if temporal_window is not None and queries == keys:
        frames = axis_offsets(qf, kf, device).values.abs() < temporal_window
    visible = frames[:, None, None, :, None, None] & disc[None, :, :, None]
    return visible.reshape(qf * qh * qw, kf * kh * kw)


class AxisOffsets(NamedTuple):
    """How far queries lie from keys along one axis, fp64 (queries, keys); so many units of it make a key token."""

    values: torch.Tensor
    unit: int


def axis_offsets(num_queries: int, num_keys: int, device: torch.device | str = "cpu") -> AxisOffsets:
    """How far the queries of one grid lie from the keys of another along one axis.

    The centre of token i lies at (i + 1/2) / size of its picture. Units are such that all offsets are whole numbers:
    in fractions, offsets that add up to the very radius would come out on either side of it.
    """
    queries, keys = (torch.arange(size, device=device, dtype=torch.float64) for size in (num_queries, num_keys))
    if num_queries == num_keys:
        return AxisOffsets(queries[:, None] - keys, 1)
    values = ((2 * queries + 1) * num_keys - num_queries)[:, None] - 2 * num_queries * keys
    return AxisOffsets(values, 2 * num_queries)


def in_disc(rows: AxisOffsets, columns: AxisOffsets, window: int) -> torch.Tensor:
    """Whether pairs lie within the radius `window`, strictly: bool (rows, columns, key rows, key columns)."""
    dy, dx = rows.values[:, None, :, None], columns.values[:, None, :]
    return (dy * columns.unit).square() + (dx * rows.unit).square() < (float(window) * rows.unit * columns.unit) ** 2


def local_mask(
    layout: TokenLayout, window: int, temporal_window: int | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The visibility matrix of [`local_attention`] over a whole sequence: bool (tokens, tokens)."""
    visible = torch.ones(layout.length, layout.length, dtype=torch.bool, device=device)
    for a in layout.grids:
        for b in layout.grids:
            block = window_mask(a, b, window, temporal_window, visible.device)
            visible[a.start : a.stop, b.start : b.stop] = block
    return visible


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    *,
    window: int,
    temporal_window: int | None = None,
    pooled_key: torch.Tensor | None = None,
    pooled_value: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention under [`local_mask`]; pooled keys are seen by grid queries only. All (B, H, N, D)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = torch.zeros(layout.length, layout.length, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill(~local_mask(layout, window, temporal_window, query.device), float("-inf"))
    if mask is not None:
        bias = bias + mask_bias(mask, query.dtype)
    if pooled_key is not None and pooled_value is not None:
        pooled_bias = bias.new_zeros(layout.length, pooled_key.shape[2])
        for segment in layout.text:
            pooled_bias[segment.start : segment.stop] = float("-inf")
        key, value = torch.cat([key, pooled_key], 2), torch.cat([value, pooled_value], 2)
        bias = torch.cat([bias, pooled_bias.expand(*bias.shape[:-1], -1)], -1)
    scores = query @ key.transpose(-1, -2) * scale + bias
    hidden = scores.isneginf().all(-1, keepdim=True)  # a row without a visible key gives 0, not NaN
    return torch.softmax(scores.masked_fill(hidden, 0), -1).masked_fill(hidden, 0) @ value


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    *,
    query_features: FeatureMap,
    key_features: FeatureMap,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Weights φ(q)·φ(k) between grid tokens (LiT, arXiv 2501.12976), exp(scale q·k) to text, one denominator.

    Text queries keep softmax over everything. `mask` is a key mask, (B|1, H|1, 1, N).
    """
    weights = query_features(query) @ key_features(key).transpose(-1, -2)
    return _blend_with_text(query, key, value, layout, weights, mask, scale)


def hybrid_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    *,
    far_weight: torch.Tensor,
    query_features: FeatureMap,
    key_features: FeatureMap,
    window: int,
    temporal_window: int | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """exp(scale q·k) where [`local_mask`] allows, plus λ φ(q)·φ(k) between all grid tokens, one denominator.

    λ is `far_weight`, (H,), non-negative. Text queries keep softmax over everything. A query whose weights are all 0
    gives 0.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-1, -2) * scale
    scores = scores.masked_fill(~local_mask(layout, window, temporal_window, query.device), float("-inf"))
    in_grid = torch.zeros(layout.length, dtype=torch.bool, device=query.device)
    for segment in layout.grids:
        in_grid[segment.start : segment.stop] = True
    far = far_weight[:, None, None] * (query_features(query) @ key_features(key).transpose(-1, -2))
    far = far * (in_grid[:, None] & in_grid)
    if mask is not None:
        bias = mask_bias(mask, query.dtype)
        scores, far = scores + bias, far * bias.exp()
    # Numerator and denominator are both scaled by exp(-peak); far below 0 the far weights would overflow.
    peak = scores.amax(-1, keepdim=True).clamp_min(-60)
    total = (scores - peak).exp() + far * (-peak).exp()
    denominator = total.sum(-1, keepdim=True)
    nothing = denominator == 0
    return (total @ value / denominator.masked_fill(nothing, 1)).masked_fill(nothing, 0)


def gated_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    layout: TokenLayout,
    *,
    query_features: FeatureMap,
    key_features: FeatureMap,
    direction: str = "bidirectional",
    order: str = "rows",
    normalize: bool = True,
    initial_state: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Weights Σ_d φ(q_i)_d φ(k_j)_d Π a_d over the gates a = exp(gate) passed on the scan from j to i (GLA).

    The recurrence of arXiv 2312.06635, `S_t = diag(a_t) S_{t-1} + k_t v_tᵀ`, applied to one unit of value per key. A
    scan stays inside its grid; across grids the gate is 1. `"bidirectional"` is forward + backward - diagonal.
    `initial_state` is S before the first token of the one grid, (B, H, K, D), with `normalize` (B, H, K, D + 1), whose
    last column is the sum of φ(k); with `"bidirectional"` two of them, (2, …), one for each way.
    """
    phi_q, phi_k = query_features(query), key_features(key)
    weights = phi_q @ phi_k.transpose(-1, -2)
    carried = None
    if initial_state is not None:
        (segment,) = layout.grids
        tokens = scan_order(segment, order, query.device)
        states = initial_state if direction == "bidirectional" else initial_state[None]
        carried = query.new_zeros(*query.shape[:3], states.shape[-1])
        for i, state in enumerate(states):
            visited = tokens.flip(0) if direction == "backward" or i == 1 else tokens
            read = _read_initial_state(phi_q[:, :, visited], gate[:, :, visited].exp(), state)
            carried = carried.index_add(2, visited, read)
        if mask is not None:
            carried = carried.masked_fill(mask_bias(mask, query.dtype).isneginf().all(-1, keepdim=True), 0)
    for segment in layout.grids:
        tokens = scan_order(segment, order, query.device)
        q, k, a = phi_q[:, :, tokens], phi_k[:, :, tokens], gate[:, :, tokens].exp()
        block = torch.zeros_like(weights[:, :, tokens][..., tokens])
        if direction in ("forward", "bidirectional"):
            block = block + _decayed_weights(q, k, a).tril()
        if direction in ("backward", "bidirectional"):
            block = block + _decayed_weights(q.flip(2), k.flip(2), a.flip(2)).tril().flip(2, 3)
        if direction == "bidirectional":
            block = block - torch.diag_embed((q * k).sum(-1))
        weights = weights.clone()
        weights[:, :, tokens[:, None], tokens] = block
    if normalize:
        return _blend_with_text(query, key, value, layout, weights, mask, scale, carried)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        weights = weights * mask_bias(mask, weights.dtype).exp()
    output = weights @ value
    return scale * (output if carried is None else output + carried)


def scan_order(segment: Segment, order: str, device: torch.device) -> torch.Tensor:
    """Positions of a grid's tokens in the order a scan visits them; frames are always the outermost loop."""
    assert segment.grid is not None
    tokens = torch.arange(segment.start, segment.stop, device=device).reshape(segment.grid)
    return (tokens if order == "rows" else tokens.transpose(1, 2)).reshape(-1)


def mask_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean (True = visible) or additive attention mask as an additive one, -inf where it hides."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device) if mask.dtype == torch.bool else mask.to(dtype)
    return bias.masked_fill(hidden_by(mask), float("-inf"))


def hidden_by(mask: torch.Tensor) -> torch.Tensor:
    """What a boolean or additive mask hides, bool of its shape; often the lowest finite number stands for -inf."""
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min


def _decayed_weights(q: torch.Tensor, k: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """w_tj = Σ_d q_td k_jd a_(j+1)d … a_td for j ≤ t, one token at a time."""
    state, rows = torch.zeros_like(k), []  # state[j] = k_j ∘ a_(j+1) … a_t
    for t in range(q.shape[2]):
        now = (torch.arange(k.shape[2], device=k.device) == t)[:, None]
        state = torch.where(now, k, state * a[:, :, t : t + 1])
        rows.append((q[:, :, t : t + 1] * state).sum(-1))
    return torch.stack(rows, 2)


def _read_initial_state(q: torch.Tensor, a: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """o_t = q_tᵀ diag(a_1 … a_t) S, one token at a time."""
    rows = []
    for t in range(q.shape[2]):
        state = a[:, :, t, :, None] * state
        rows.append((q[:, :, t, None] @ state).squeeze(2))
    return torch.stack(rows, 2)


def _blend_with_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    weights: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    carried: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `carried` holds, (B, H, N, D + 1), is added to the weighted values, its last column to the denominator."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-1, -2) * scale
    is_text = torch.zeros(layout.length, dtype=torch.bool, device=query.device)
    for segment in layout.text:
        is_text[segment.start : segment.stop] = True
    if mask is not None:
        bias = mask_bias(mask, query.dtype)
        scores, weights = scores + bias, weights * bias.exp()
    # Numerator and denominator are both scaled by exp(-peak), which keeps the text's exponentials finite.
    text_scores = scores.masked_fill(~is_text, float("-inf"))
    peak = text_scores.amax(-1, keepdim=True).clamp_min(0)
    total = torch.where(is_text, (text_scores - peak).exp(), weights * (-peak).exp())
    output, count = total @ value, total.sum(-1, keepdim=True)
    if carried is not None:
        output, count = output + carried[..., :-1] * (-peak).exp(), count + carried[..., -1:] * (-peak).exp()
    blended = output / (count + EPS * (-peak).exp())
    hidden = scores.isneginf().all(-1, keepdim=True)
    softmax = torch.softmax(scores.masked_fill(hidden, 0), -1).masked_fill(hidden, 0) @ value
    return torch.where(is_text[:, None], softmax, blended)
