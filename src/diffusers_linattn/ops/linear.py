"""Linear attention among grid tokens, softmax to the text, one denominator.

Letters: B batch, H heads, N tokens, D head_dim, K features per head; G tokens in grids, T text tokens, G + T = N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from diffusers_linattn.kernels.launching import DTYPES, why_not
from diffusers_linattn.kernels.linear_attention import (
    FUSED_FEATURES,
    MAX_DIM,
    MAX_TEXT_DIM,
    linear_product,
    linear_state,
)
from diffusers_linattn.kernels.text_blending import blend_text
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.checks import (
    check_attention_inputs,
    check_choice,
    check_positive_int,
    refuse_tangents,
    repeat_heads,
)
from diffusers_linattn.ops.features import FeatureMapArgument, check_features, full_precision, resolve_feature_map
from diffusers_linattn.ops.local_tiled import masked_sdpa
from diffusers_linattn.ops.masks import KeyMask, reduce_to_key_mask, take


IMPLS = ("triton", "torch", "reference")


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    *,
    feature_map: FeatureMapArgument = "relu",
    heads: int | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention whose cost is linear in the image tokens (LiT, arXiv 2501.12976).

    A token of a grid weighs the tokens of all grids with φ(q)·φ(k) and the text with exp(scale q·k), under one
    denominator. A text token attends to everything by softmax. Time and memory are linear in the grid tokens.

    Args:
        query: (batch, heads, tokens, head_dim), any floating dtype.
        key: (batch, heads, tokens, head_dim); fewer heads with `enable_gqa`.
        value: (batch, heads, tokens, value_dim), as many heads as key.
        layout: What the tokens are. Text, padding and references of unknown grid are text.
        feature_map: `"relu"`, `"elu"`, `"softmax"`, or a pair `(query_features, key_features)` of callables for a
            learned map; see [`resolve_feature_map`]. Features must not be negative (`"triton"` keeps logarithms of
            denominators). The backward pass calls them again on the same tokens, and they have to give the same: no
            dropout.
        heads: Number of heads for grid queries, usually fewer than the model has (LiT): the concatenated heads are cut
            anew, before the feature map. Text queries keep the model's heads. `None` keeps them for all.
        mask: Boolean (True = visible) or additive, broadcastable to (batch, heads, tokens, tokens), the same for every
            query that sees anything; with `heads`, the same for all heads. Queries that see nothing give 0.
        scale: Softmax scale, used for text keys and text queries. `None` is `head_dim ** -0.5`, for grid queries with
            the head_dim that `heads` makes; a number is used as it is in both places.
        enable_gqa: Whether key and value may have fewer heads than query.
        impl: `"triton"` (kernels for NVIDIA GPUs, in bf16, fp16 and fp32), `"torch"`, or `"reference"` (quadratic, for
            tests). `None` takes `"triton"` on a GPU that can run this call with it, else `"torch"`.

    Returns:
        (batch, heads, tokens, value_dim) in the value's dtype. Sums are in fp32, or fp64 for fp64, whatever autocast
        says; text queries are answered by `F.scaled_dot_product_attention` in the dtype they came in.

    Raises:
        ValueError: Shapes that do not fit each other or the layout, an unknown `feature_map` or `impl`, `heads` that
            do not divide the channels, a mask that shows different keys to different queries, or `"triton"` for a
            device, a call or a derivative (`torch.func.jvp`) that it does not know.

    Example:
        >>> import torch
        >>> from diffusers_linattn.layout import TokenLayout
        >>> layout = TokenLayout.joint(text=7, grid=(1, 4, 6))
        >>> query, key, value = torch.randn(3, 1, 2, layout.length, 16).unbind()
        >>> linear_attention(query, key, value, layout).shape
        torch.Size([1, 2, 31, 16])
    """
    check_choice("impl", impl, (None, *IMPLS))
    check_attention_inputs(query, key, value, layout, mask, enable_gqa)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    resolve_feature_map(feature_map)
    grid_query, grid_key, grid_value = query, key, value
    if heads is not None and check_positive_int("heads", heads) != query.shape[1]:
        _check_heads(heads, query, value, mask)
        grid_query, grid_key, grid_value = (regroup_heads(x, heads) for x in (query, key, value))
    if not layout.grids:
        return with_text_queries(None, query, key, value, layout, mask, scale)
    key_mask = reduce_to_key_mask(mask, layout, query.dtype)

    if impl is None:
        impl = choose_impl(grid_query, grid_value, mask)
    elif impl == "triton" and (reason := why_not_triton(grid_query, grid_value, mask)) is not None:
        raise ValueError(f"impl='triton' cannot answer this call: {reason}.")
    if impl == "triton":
        refuse_tangents(impl, query, key, value)
    compute = {"triton": _by_kernels, "torch": _by_products, "reference": _by_reference}[impl]

    def of_grid_queries(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        grid = compute(query, key, value, layout, feature_map, key_mask, scale)
        return (grid if key_mask is None else key_mask.zero_hidden(grid)).to(value.dtype)

    if impl == "triton" and _kernels_do_all(feature_map, grid_query, grid_value, layout):
        grid = of_grid_queries(grid_query, grid_key, grid_value)
    else:
        grid = recomputed(of_grid_queries, grid_query, grid_key, grid_value)
    return with_text_queries(regroup_heads(grid, query.shape[1]), query, key, value, layout, mask, scale)


def choose_impl(query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> str:
    """The implementation for a call: `"triton"` on a GPU that it runs on, else `"torch"`."""
    on_gpu = query.device.type == "cuda"
    return "triton" if on_gpu and why_not_triton(query, value, mask) is None else "torch"


def why_not_triton(query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Why `impl="triton"` cannot answer a call with these grid queries, in words, or `None` if it can."""
    if mask is not None and mask.requires_grad:
        return "it has no gradient for a mask: use impl='torch', or pass mask.detach()"
    if query.dtype not in DTYPES:
        return f"it computes in bf16, fp16 and fp32, but got {query.dtype}: use impl='torch'"
    if max(query.shape[-1], value.shape[-1]) > MAX_DIM:
        return f"head_dim may be at most {MAX_DIM}, but got {query.shape[-1]} and {value.shape[-1]}: use impl='torch'"
    return why_not(str(query.device))


def _by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    feature_map: FeatureMapArgument,
    key_mask: KeyMask | None,
    scale: float | None,
) -> torch.Tensor:
    """The output of the grid queries, (B, H, G, D), in fp32 or fp64."""
    of_query, of_key = resolve_feature_map(feature_map)
    phi_q, phi_k = of_query(take(query, layout.grids)), of_key(take(key, layout.grids))
    check_features(phi_q, phi_k)
    with torch.autocast(query.device.type, enabled=False):
        if key_mask is not None:
            phi_k = phi_k * take(key_mask.weights(), layout.grids)
        # fp32 has the range that fp16 lacks, so that nothing needs to be divided by the number of tokens here.
        state = phi_k.transpose(-1, -2) @ full_precision(take(value, layout.grids))  # (B, H, K, D)
        sums = _sums(phi_q, state, phi_k.sum(-2))
        return blend_with_text(query, key, value, layout, *sums, key_mask, scale)


def _by_kernels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    feature_map: FeatureMapArgument,
    key_mask: KeyMask | None,
    scale: float | None,
) -> torch.Tensor:
    """The same by the Triton kernels, in the value's dtype."""
    of_query, of_key = resolve_feature_map(feature_map)
    name = feature_map if isinstance(feature_map, str) and feature_map in FUSED_FEATURES else "none"
    queries, keys = take(query, layout.grids), take(key, layout.grids)
    if name == "none":
        queries, keys = of_query(queries).to(query.dtype), of_key(keys).to(key.dtype)
        check_features(queries, keys)
    with torch.autocast(query.device.type, enabled=False):
        weights = None if key_mask is None else take(key_mask.weights(), layout.grids)[..., 0]
        state, normalizer = linear_state(keys, take(value, layout.grids), weights, name)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        text = text_for_kernels(key, value, layout, key_mask)
        if not layout.num_text or _kernels_do_all(feature_map, query, value, layout):
            return linear_product(queries, state, normalizer, *text, scale, name)[0]
        phi_q = full_precision(queries) if name == "none" else of_query(queries)
        sums, counts = _sums(phi_q, state, normalizer, padding=7)  # kernels want rows of a multiple of 8 numbers
        if text_fits_kernels(query, value, layout):
            return blend_text(sums, counts[..., 0], take(query, layout.grids), *text, scale)[0]
        return blend_with_text(query, key, value, layout, sums, counts, key_mask, scale)


def _kernels_do_all(
    feature_map: FeatureMapArgument, query: torch.Tensor, value: torch.Tensor, layout: TokenLayout
) -> bool:
    """Whether the kernels take φ and attend to the text themselves, and so keep nothing but their inputs."""
    fused = isinstance(feature_map, str) and feature_map in FUSED_FEATURES
    return fused and text_fits_kernels(query, value, layout)


def text_fits_kernels(query: torch.Tensor, value: torch.Tensor, layout: TokenLayout) -> bool:
    """Whether heads are narrow enough for kernels to attend to the text, if there is any."""
    return not layout.num_text or max(query.shape[-1], value.shape[-1]) <= MAX_TEXT_DIM


def text_for_kernels(
    key: torch.Tensor, value: torch.Tensor, layout: TokenLayout, key_mask: KeyMask | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The text's keys and values and what a mask adds to their scores, (B | 1, H | 1, T); `None` without."""
    if not layout.num_text:
        return None, None, None
    bias = None if key_mask is None else take(key_mask.bias, layout.text, -1)[:, :, 0].float()
    return take(key, layout.text), take(value, layout.text), bias


def _by_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    feature_map: FeatureMapArgument,
    key_mask: KeyMask | None,
    scale: float | None,
) -> torch.Tensor:
    """The same by the specification."""
    of_query, of_key = resolve_feature_map(feature_map)
    phi_q, phi_k = of_query(query), of_key(key)
    check_features(phi_q, phi_k)
    with torch.autocast(query.device.type, enabled=False):
        output = reference.linear_attention(
            full_precision(query),
            full_precision(key),
            full_precision(value),
            layout,
            query_features=lambda _: phi_q,
            key_features=lambda _: phi_k,
            mask=None if key_mask is None else key_mask.bias,
            scale=scale,
        )
        return take(output, layout.grids)


def _sums(
    phi_q: torch.Tensor, state: torch.Tensor, normalizer: torch.Tensor, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """φ(q) S, (B, H, G, D), and φ(q)·z, (B, H, G, 1), in one product, whose rows are longer by `padding`."""
    dim = state.shape[-1]
    product = phi_q @ torch.cat([state, F.pad(normalizer[..., None], (0, padding))], -1)
    return product[..., :dim], product[..., dim : dim + 1]


def blend_with_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    key_mask: KeyMask | None,
    scale: float | None,
) -> torch.Tensor:
    """Add exp(scale q·k) for the text keys to the numerator and denominator of the grid queries, and divide.

    `query`, `key` and `value` are the whole sequence; `numerator` (B, H, G, D) and `denominator` (B, H, G, 1) are sums
    of non-negative weights over the grid keys, in fp32 or fp64. The result has their dtype.
    """
    if layout.num_text == 0:
        return numerator * (denominator + reference.EPS).reciprocal()  # in half the passes that a division takes back
    # One softmax over the text and a null key of score 0 gives Σ exp(s) v, Σ exp(s) and 1, all three divided by
    # Σ exp(s) + 1: in range for every score, and without a (G, T) matrix in memory. Two more columns of the values
    # count the text and the null key.
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dim = value.shape[-1]
    width = (max(query.shape[-1], dim + 2) + 7) // 8 * 8  # fused kernels want one width, a multiple of 8
    query = full_precision(take(query, layout.grids))
    key, value = full_precision(take(key, layout.text)), full_precision(take(value, layout.text))
    query = F.pad(query, (0, width - query.shape[-1]))
    key = F.pad(key, (0, width - key.shape[-1], 0, 1))
    text = F.pad(torch.cat([value, torch.ones_like(value[..., :1])], -1), (0, width - dim - 1))
    null = F.pad(value.new_ones(*value.shape[:2], 1, 1), (dim + 1, width - dim - 2))
    bias = None if key_mask is None else F.pad(take(full_precision(key_mask.bias), layout.text, -1), (0, 1))
    softmax = F.scaled_dot_product_attention(query, key, torch.cat([text, null], 2), bias, scale=scale)
    text_sum, text_count, unit = softmax[..., :dim], softmax[..., dim : dim + 1], softmax[..., dim + 1 : dim + 2]
    return (text_sum + numerator * unit) * (text_count + (denominator + reference.EPS) * unit).reciprocal()


def recomputed(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of the tensors, which alone are kept for the backward pass; that calls it again.

    Features in fp32 and sums over all tokens are many times the inputs to keep, and little to compute again.
    """
    # What is compiled without a backward pass must not ask for one; learned features may, where no input does.
    frozen = torch.compiler.is_compiling() and not any(x.requires_grad for x in tensors)
    if frozen or not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def with_text_queries(
    grid: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    mask: torch.Tensor | None,
    scale: float | None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The whole output: that of the grid queries, (B, H, G, D), and softmax over all tokens for the text queries.

    Text queries that the mask shows nothing give 0. The result has the dtype given, or the value's.
    """
    text = None
    if layout.num_text or grid is None:
        while mask is not None and mask.ndim < 4:
            mask = mask[None]
        if mask is not None and mask.shape[-2] != 1:
            mask = take(mask, layout.text, -2)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        with torch.autocast(query.device.type, enabled=False):
            text = masked_sdpa(take(query, layout.text), key, value, mask, scale)
    parts, starts = [], {True: 0, False: 0}
    for segment in layout.segments:
        is_text = segment.grid is None
        source = text if is_text else grid
        if source is not None:
            start = starts[is_text]
            parts.append(source[:, :, start : start + segment.length].to(dtype or value.dtype).transpose(1, 2))
            starts[is_text] = start + segment.length
    # In the memory order of (B, N, H, D), so that merging the heads afterwards copies nothing.
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)


def regroup_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Cut the concatenated heads of (B, H, N, D) into another number of heads, (B, heads, N, H·D / heads)."""
    if x.shape[1] == heads:
        return x
    return x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)


def _check_heads(heads: int, query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
    for name, channels in (
        ("query", query.shape[1] * query.shape[-1]),
        ("value", value.shape[1] * value.shape[-1]),
    ):
        if channels % heads:
            raise ValueError(
                f"heads={heads} does not divide the {channels} channels of {name} ({query.shape[1]} heads): choose a "
                "divisor, or None to keep the model's heads."
            )
    if mask is not None and mask.ndim > 2 and mask.shape[-3] != 1:
        raise ValueError(
            f"The mask {tuple(mask.shape)} differs between heads, which heads={heads} regroups: pass one mask for all "
            "heads, (batch, 1, 1, tokens), or heads=None."
        )
