"""Gated linear attention: linear attention whose weights decay along a scan of the grid.

Letters: B batch, H heads, N tokens, D head_dim, K features per head; G tokens in grids, T text tokens, G + T = N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffusers_linattn.kernels.gated_attention import IN_KERNEL_FEATURES, gated_attention_triton
from diffusers_linattn.kernels.scan_paths import DIRECTIONS, ORDERS, describe_path, scan_path
from diffusers_linattn.kernels.text_blending import blend_text
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.checks import (
    DTYPES,
    check_attention_inputs,
    check_choice,
    check_tensor,
    refuse_tangents,
    repeat_heads,
)
from diffusers_linattn.ops.features import FeatureMapArgument, check_features, full_precision, resolve_feature_map
from diffusers_linattn.ops.gated_choice import choose_impl, why_not_triton
from diffusers_linattn.ops.gated_chunked import gated_scan
from diffusers_linattn.ops.gated_fla import fla_scan, load_chunk_gla
from diffusers_linattn.ops.linear import (
    blend_with_text,
    recomputed,
    text_fits_kernels,
    text_for_kernels,
    with_text_queries,
)
from diffusers_linattn.ops.masks import KeyMask, reduce_to_key_mask, take


IMPLEMENTATIONS = (None, "triton", "chunked", "fla", "reference")


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
    initial_state: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str | None = None,
    path: int | None = None,
    dtype: torch.dtype | None = None,
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
            a learned feature map as many channels as that has features. (batch, heads, tokens, 1) decays all channels
            of a head alike, which is faster. Any dtype, used in fp32 or fp64. What stands at text positions is
            ignored.
        layout: What the tokens are. Text, padding and references of unknown grid are text.
        direction: `"forward"`, `"backward"` or `"bidirectional"` (both, each token counted once).
        order: `"rows"` or `"columns"`: what the scan walks along. Frames of a video follow one another in both.
        feature_map: As in [`linear_attention`]; `None` (identity) only with `normalize=False`.
        normalize: Divide by the sum of the weights. Without (as in DiG), the output is multiplied by `scale`, there
            is no text, and `feature_map=None` is allowed.
        initial_state: S_0 of the recurrence `S_t = diag(a_t) S_{t-1} + φ(k_t) v_tᵀ`: what tokens before the first
            one of the scan left behind, (batch, heads, features, value_dim), as many heads as query, any floating
            dtype. With `normalize` one column more, the sum of φ(k). For `"bidirectional"` (2, batch, …): what comes
            before the first token, and behind the last. The layout must have one grid.
        mask: As in [`linear_attention`]. A hidden key adds nothing, its gate still decays the others.
        scale: Softmax scale for the text, or the factor of `normalize=False`; `None` is `head_dim ** -0.5`.
        enable_gqa: Whether key and value may have fewer heads than query.
        impl: `"triton"` (kernels for an NVIDIA GPU, both directions in one pass; bf16, fp16 and fp32, head_dim and
            value_dim at most 256), `"chunked"` (PyTorch on every device), `"fla"` (the kernels of fla-core, one call
            per direction), or `"reference"` (quadratic, token by token, for tests). `None` takes `"triton"` where it
            runs, else `"chunked"`.
        path: For layers that alternate between paths under `torch.compile`: what `scan_paths.scan_path` gives, in
            place of `order` and of the choice between `"forward"` and `"backward"`.
        dtype: Of the output; `None` is the value's. Without a denominator sums may be too large for fp16.

    Returns:
        (batch, heads, tokens, value_dim) in `dtype`, computed in fp32, or fp64 for fp64.

    Raises:
        ValueError: Shapes that do not fit each other or the layout, an unknown `direction`, `order`, `feature_map` or
            `impl`, a mask that shows different keys to different queries, `feature_map=None` with a denominator,
            text without one, an `initial_state` beside several grids or none, or an `impl` that cannot answer this
            call or is not installed; `torch.func.jvp`, which `"reference"` alone knows.

    Example:
        >>> import torch
        >>> from diffusers_linattn.layout import TokenLayout
        >>> layout = TokenLayout.joint(text=7, grid=(1, 4, 6))
        >>> query, key, value, gate = torch.randn(4, 1, 2, layout.length, 16).unbind()
        >>> gate = torch.nn.functional.logsigmoid(gate) / 16
        >>> gated_linear_attention(query, key, value, gate, layout, order="columns").shape
        torch.Size([1, 2, 31, 16])

        Without a denominator, as in DiG, text can be what the scan begins with:

        >>> (text_key, key), (text_value, value) = key.split([7, 24], 2), value.split([7, 24], 2)
        >>> image = TokenLayout.image((1, 4, 6))
        >>> options = {"direction": "forward", "feature_map": None, "normalize": False}
        >>> state = text_key.transpose(-1, -2) @ text_value
        >>> query, gate = query[:, :, 7:], gate[:, :, 7:]
        >>> gated_linear_attention(query, key, value, gate, image, initial_state=state, **options).shape
        torch.Size([1, 2, 24, 16])
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("order", order, ORDERS)
    check_choice("dtype", dtype, (None, *DTYPES))
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
    check_attention_inputs(query, key, value, layout, mask, enable_gqa)
    if initial_state is not None and len(layout.grids) != 1:
        raise ValueError(
            f"initial_state is what the scan of one grid begins with, but the layout ({layout}) has "
            f"{len(layout.grids)} grids: leave it out, or call once per grid."
        )
    key_heads = key.shape[1]
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    of_query, of_key = (full_precision, full_precision) if feature_map is None else resolve_feature_map(feature_map)
    if not layout.grids:
        _check_gate(gate, of_key(key), key_heads)
        return with_text_queries(None, query, key, value, layout, mask, scale, dtype)
    key_mask = reduce_to_key_mask(mask, layout, query.dtype)
    both = direction == "bidirectional"
    path = scan_path(direction, order) if path is None else path
    name = "none" if feature_map is None else feature_map
    fused = _takes_features(impl or choose_impl(query, value, query.shape[-1]), name, layout, key_mask)
    phi_q, phi_k = (query, key) if fused else (of_query(query), of_key(key))
    check_features(phi_q, phi_k)
    gate = _check_gate(gate, phi_k, key_heads)
    if initial_state is not None:
        _check_initial_state(initial_state, phi_k, value.shape[-1] + normalize, both)
    impl = impl or choose_impl(query, value, phi_k.shape[-1])
    if impl != "chunked":  # which does so itself
        gate = gate.to(torch.promote_types(phi_k.dtype, torch.float32))
    if impl != "reference":
        refuse_tangents(impl, phi_q, phi_k, value, gate, *([] if initial_state is None else [initial_state]))
    if impl == "triton" and (reason := why_not_triton(query, value, phi_k.shape[-1])) is not None:
        raise ValueError(f"impl='triton' cannot answer this call: {reason}.")

    with torch.autocast(query.device.type, enabled=False):
        if impl == "reference":
            direction, order = describe_path(path, both)
            output = reference.gated_linear_attention(
                full_precision(query),
                full_precision(key),
                full_precision(value),
                gate.expand_as(phi_k),
                layout,
                query_features=lambda _: phi_q,
                key_features=lambda _: phi_k,
                direction=direction,
                order=order,
                normalize=normalize,
                initial_state=None if initial_state is None else initial_state.to(phi_q.dtype),
                mask=None if key_mask is None else key_mask.bias,
                scale=scale,
            )
            grid = take(output, layout.grids)
        else:
            weights = None if key_mask is None else key_mask.weights()
            if weights is not None and not fused:
                phi_k, weights = phi_k * weights, None
            settings = (impl, both, path, normalize, str(name) if fused else "none")
            sums, counts = _sum_over_grids(phi_q, phi_k, value, gate, weights, initial_state, layout, *settings)
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            if counts is None:
                grid = sums * factor
            elif impl != "chunked" and _blends_in_kernel(query, value, initial_state, layout, key_mask, feature_map):
                text = text_for_kernels(key, value, layout, key_mask)
                grid = blend_text(sums, counts[..., 0], take(query, layout.grids), *text, factor)[0]
            else:

                def blend(*x: torch.Tensor) -> torch.Tensor:
                    query, key, value, sums, counts = x
                    return blend_with_text(query, key, value, layout, sums, counts, key_mask, scale)

                inputs = (query, key, value, sums, counts)
                grid = recomputed(blend, *inputs) if layout.num_text else blend(*inputs)
        grid = grid if key_mask is None else key_mask.zero_hidden(grid)
    return with_text_queries(grid, query, key, value, layout, mask, scale, dtype)


def _sum_over_grids(
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    weights: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    layout: TokenLayout,
    impl: str,
    both: bool,
    path: int,
    normalize: bool,
    features: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights times values for the grid queries, (B, H, G, V), and to normalize the sums of the weights, (B, H, G, 1).

    Gated inside each grid, ungated across grids. `features` and the `weights` of keys are left to the operator.
    """
    sums, counts = [], []
    for segment in layout.grids:
        q, k, v, g = (take(x, [segment]) for x in (phi_q, phi_k, value, gate))
        assert segment.grid is not None
        settings = (segment.grid, both, path)
        if impl == "triton":
            _, height, width = segment.grid
            output, count = gated_attention_triton(
                q, k, v, g, initial_state, height, width, both, path, features, features, normalize
            )
            count = count[..., None]
        else:
            if impl == "chunked":
                w = None if weights is None else take(weights, [segment])
                output = gated_scan(q, k, v, g, *settings, features, normalize, w, initial_state)
            else:
                # fp16 has not the range of sums; fla-core keeps those in the dtype of its inputs.
                v = full_precision(v) if v.dtype == torch.float16 else v
                if normalize:
                    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # a value of 1 adds up the weights
                inputs = (q.to(v.dtype), k.to(v.dtype), v, g)
                output = full_precision(fla_scan(load_chunk_gla(), *inputs, *settings, initial_state))
            output, count = output[..., : value.shape[-1]], output[..., value.shape[-1] :]
        sums.append(output)
        counts.append(count)
    if len(layout.grids) == 1:  # without the copy that cat makes
        return sums[0], counts[0] if normalize else None

    def others(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _sum_over_other_grids(query, key, value, weights, layout, features)

    across = recomputed(others, phi_q, phi_k, value)
    sums_across, counts_across = across.split([value.shape[-1], 1], -1)
    return torch.cat(sums, 2) + sums_across, torch.cat(counts, 2) + counts_across if normalize else None


def _sum_over_other_grids(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor | None,
    layout: TokenLayout,
    features: str,
) -> torch.Tensor:
    """For the grid queries φ(q)·φ(k) times values, and a column of its sums, over the keys of the other grids."""
    of_query, of_key = (full_precision, full_precision) if features == "none" else resolve_feature_map(features)
    states = []
    for grid in layout.grids:
        k = of_key(take(key, [grid]))
        k = k if weights is None else k * take(weights, [grid])
        states.append(k.transpose(-1, -2) @ F.pad(full_precision(take(value, [grid])), (0, 1), value=1.0))
    outputs = [
        of_query(take(query, [grid])) @ sum(states[:i] + states[i + 1 :]) for i, grid in enumerate(layout.grids)
    ]
    return torch.cat(outputs, 2)


def _takes_features(impl: str, feature_map: FeatureMapArgument, layout: TokenLayout, key_mask: KeyMask | None) -> bool:
    """Whether the operator takes features itself, and so keeps its inputs rather than features for backward."""
    if not isinstance(feature_map, str):
        return False
    if impl == "chunked":  # has no gradient for the weights that a mask gives to keys
        return key_mask is None or not key_mask.bias.requires_grad
    # Masks and other grids need the features, too.
    return impl == "triton" and feature_map in IN_KERNEL_FEATURES and key_mask is None and len(layout.grids) == 1


def _blends_in_kernel(
    query: torch.Tensor,
    value: torch.Tensor,
    initial_state: torch.Tensor | None,
    layout: TokenLayout,
    key_mask: KeyMask | None,
    feature_map: FeatureMapArgument | None,
) -> bool:
    """Whether a kernel divides and adds the text: it has no gradient for a mask, and keeps logarithms of denominators,
    which callables and an initial state may make negative."""
    if not isinstance(feature_map, str) or initial_state is not None:
        return False
    if key_mask is not None and key_mask.bias.requires_grad:
        return False
    return text_fits_kernels(query, value, layout) and why_not_triton(query, value, 1) is None


def _check_initial_state(initial_state: torch.Tensor, phi_k: torch.Tensor, columns: int, both: bool) -> None:
    """Raise a ValueError unless it is a state of that many columns for each way that a scan goes."""
    check_tensor("initial_state", initial_state, phi_k)
    batch, heads, _, features = phi_k.shape
    shape = (*((2,) if both else ()), batch, heads, features, columns)
    if initial_state.shape != shape or not initial_state.is_floating_point():
        raise ValueError(
            f"initial_state is {tuple(initial_state.shape)} in {initial_state.dtype}, expected {shape} in a floating "
            f"dtype: ({'2, ' * both}batch, heads, features, value_dim), and with a denominator one column more, the "
            "sum of the features of the keys."
        )


def _check_gate(gate: torch.Tensor, phi_k: torch.Tensor, key_heads: int) -> torch.Tensor:
    """The gate with as many heads as the query."""
    check_tensor("gate", gate, phi_k)
    if not gate.is_floating_point():
        raise ValueError(f"gate is {gate.dtype}, expected floating: the logarithms of decays.")
    batch, heads, tokens, features = phi_k.shape
    if gate.ndim == 4 and gate.shape[1] == key_heads != heads:
        gate = gate.repeat_interleave(heads // key_heads, 1)
    if gate.shape != phi_k.shape and gate.shape != (batch, heads, tokens, 1):
        raise ValueError(
            f"gate must have the shape (batch, heads, tokens, features) = {(batch, heads, tokens, features)} or 1 "
            f"channel, got {tuple(gate.shape)}: one log decay per feature of the key, or one per head."
        )
    return gate
