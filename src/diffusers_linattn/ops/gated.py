"""Gated linear attention: linear attention whose weights decay along a scan of the grid.

Letters: B batch, H heads, N tokens, D head_dim, K features per head; G tokens in grids, T text tokens, G + T = N.
"""

from __future__ import annotations

import torch

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.checks import check_attention_inputs, check_choice
from diffusers_linattn.ops.features import FeatureMapArgument, full_precision, resolve_feature_map
from diffusers_linattn.ops.gated_chunked import DIRECTIONS, ORDERS, describe_path, gated_scan, scan_path
from diffusers_linattn.ops.linear import blend_with_text, with_text_queries
from diffusers_linattn.ops.masks import reduce_to_key_mask, take


IMPLEMENTATIONS = (None, "chunked", "reference")
_LOWEST_GATE = -1e4  # exp of it is 0 in every dtype, and sums of it stay finite


def gated_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    layout: TokenLayout,
    *,
    direction: str = "bidirectional",
    order: str = "rows",
    feature_map: FeatureMapArgument | None = "relu",
    normalize: bool = True,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str | None = None,
    path: int | None = None,
) -> torch.Tensor:
    """Linear attention that forgets along a scan of the grid (GLA, arXiv 2312.06635; DiG, arXiv 2405.18428).

    The weight of key j for query i is Σ_d φ(q_i)_d φ(k_j)_d Π a_d with a = exp(gate) of the tokens passed on the scan
    from j to i. A scan stays inside its grid; the tokens of other grids enter without decay, the text by
    exp(scale q·k) under the same denominator, and text queries attend to everything by softmax. With gates of 0,
    `"bidirectional"` equals [`linear_attention`]. Time and memory are linear in the grid tokens.

    Args:
        query: (batch, heads, tokens, head_dim), any floating dtype.
        key: (batch, heads, tokens, head_dim); fewer heads with `enable_gqa`.
        value: (batch, heads, tokens, value_dim), as many heads as key.
        gate: Logarithm of the decay, ≤ 0, (batch, heads, tokens, head_dim), with as many heads as query or key; with
            a learned feature map as many channels as that has features. Any dtype, used in fp32 or fp64. What stands
            at text positions is ignored.
        layout: What the tokens are. Text, padding and references of unknown grid are text.
        direction: `"forward"`, `"backward"` or `"bidirectional"` (both, each token counted once).
        order: `"rows"` or `"columns"`: what the scan walks along. Frames of a video follow one another in both.
        feature_map: As in [`linear_attention`]; `None` (identity) only with `normalize=False`.
        normalize: Divide by the sum of the weights. Without (as in DiG), the output is multiplied by `scale`, there
            is no text, and `feature_map=None` is allowed.
        mask: As in [`linear_attention`]. A hidden key adds nothing, its gate still decays the others.
        scale: Softmax scale for the text, or the factor of `normalize=False`; `None` is `head_dim ** -0.5`.
        enable_gqa: Whether key and value may have fewer heads than query.
        impl: `"chunked"`, or `"reference"` (quadratic, token by token, for tests); `None` chooses.
        path: For layers that alternate between paths under `torch.compile`: what `gated_chunked.scan_path` gives, in
            place of `order` and of the choice between `"forward"` and `"backward"`.

    Returns:
        (batch, heads, tokens, value_dim) in the value's dtype, computed in fp32, or fp64 for fp64.

    Raises:
        ValueError: Shapes that do not fit each other or the layout, an unknown `direction`, `order`, `feature_map` or
            `impl`, a mask that shows different keys to different queries, `feature_map=None` with a denominator, or
            text without one.

    Example:
        >>> import torch
        >>> from diffusers_linattn.layout import TokenLayout
        >>> layout = TokenLayout.joint(text=7, grid=(1, 4, 6))
        >>> query, key, value, gate = torch.randn(4, 1, 2, layout.length, 16).unbind()
        >>> gate = torch.nn.functional.logsigmoid(gate) / 16
        >>> gated_linear_attention(query, key, value, gate, layout, order="columns").shape
        torch.Size([1, 2, 31, 16])
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("order", order, ORDERS)
    if normalize and feature_map is None:
        raise ValueError(
            "feature_map=None gives negative weights, which cannot be normalized: pass a feature map, or "
            "normalize=False."
        )
    if not normalize and layout.num_text:
        raise ValueError(
            f"normalize=False has no denominator to share with text, but the layout is {layout}: use normalize=True, "
            "or a layout of image tokens alone."
        )
    key_heads = key.shape[1] if key.ndim == 4 else 0
    key, value = check_attention_inputs(query, key, value, layout, mask, enable_gqa)
    of_query, of_key = (full_precision, full_precision) if feature_map is None else resolve_feature_map(feature_map)
    phi_q, phi_k = of_query(query), of_key(key)
    gate = _check_gate(gate, phi_k, key_heads).to(phi_k.dtype)
    if not layout.grids:
        return with_text_queries(None, query, key, value, layout, mask, scale)
    key_mask = reduce_to_key_mask(mask, layout, query.dtype)
    both = direction == "bidirectional"
    path = scan_path(direction, order) if path is None else path

    with torch.autocast(query.device.type, enabled=False):
        if impl == "reference":
            direction, order = describe_path(path, both)
            output = reference.gated_linear_attention(
                full_precision(query),
                full_precision(key),
                full_precision(value),
                gate,
                layout,
                query_features=lambda _: phi_q,
                key_features=lambda _: phi_k,
                direction=direction,
                order=order,
                normalize=normalize,
                mask=None if key_mask is None else key_mask.bias,
                scale=scale,
            )
            grid = take(output, layout.grids)
        else:
            if key_mask is not None:
                phi_k = phi_k * key_mask.weights()
            values = full_precision(value)
            if not normalize:
                scale = query.shape[-1] ** -0.5 if scale is None else scale
                grid = scale * _sum_over_grids(phi_q, phi_k, values, gate, layout, both, path)
            else:
                values = torch.cat([values, torch.ones_like(values[..., :1])], -1)  # a value of 1 adds up the weights
                sums = _sum_over_grids(phi_q, phi_k, values, gate, layout, both, path)
                grid = blend_with_text(query, key, value, layout, sums[..., :-1], sums[..., -1:], key_mask, scale)
        grid = grid if key_mask is None else key_mask.zero_hidden(grid)
    return with_text_queries(grid, query, key, value, layout, mask, scale)


def _sum_over_grids(
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    layout: TokenLayout,
    both: bool,
    path: int,
) -> torch.Tensor:
    """Weights times values for the grid queries, (B, H, G, V): gated inside each grid, ungated across grids."""
    gate = gate.clamp(min=_LOWEST_GATE)
    outputs = []
    for segment in layout.grids:
        q, k, v, g = (take(x, [segment]) for x in (phi_q, phi_k, value, gate))
        assert segment.grid is not None
        output = gated_scan(q, k, v, g, segment.grid, both, path)
        outputs.append(output + (q * k).sum(-1, keepdim=True) * v)  # the scan leaves out the token itself
    if len(outputs) == 1:
        return outputs[0]
    states = [take(phi_k, [segment]).transpose(-1, -2) @ take(value, [segment]) for segment in layout.grids]
    for i, segment in enumerate(layout.grids):
        others = sum(states[:i] + states[i + 1 :])
        outputs[i] = outputs[i] + take(phi_q, [segment]) @ others
    return torch.cat(outputs, 2)


def _check_gate(gate: torch.Tensor, phi_k: torch.Tensor, key_heads: int) -> torch.Tensor:
    """The gate with as many heads as the query."""
    batch, heads, tokens, features = phi_k.shape
    if gate.ndim == 4 and gate.shape[1] == key_heads != heads:
        gate = gate.repeat_interleave(heads // key_heads, 1)
    if gate.shape != phi_k.shape:
        raise ValueError(
            f"gate must have the shape (batch, heads, tokens, features) = {(batch, heads, tokens, features)}, got "
            f"{tuple(gate.shape)}: one log decay per feature of the key."
        )
    return gate
