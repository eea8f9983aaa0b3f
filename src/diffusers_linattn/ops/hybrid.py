"""Softmax in a window plus linear attention over the whole picture, one denominator.

Letters: B batch, H heads, N tokens, D value_dim, K features per head, G tokens in grids.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.checks import (
    check_attention_inputs,
    check_choice,
    check_tensor,
    check_window,
    repeat_heads,
)
from diffusers_linattn.ops.features import FeatureMapArgument, check_features, full_precision, resolve_feature_map
from diffusers_linattn.ops.linear import recomputed
from diffusers_linattn.ops.local import IMPLS, attend_in_kernel, local_attention
from diffusers_linattn.ops.local_choice import choose_impl
from diffusers_linattn.ops.masks import KeyMask, reduce_to_key_mask, take


def hybrid_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    *,
    window: int,
    far_weight: torch.Tensor,
    feature_map: FeatureMapArgument = "softmax",
    temporal_window: int | None = None,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention that is exact nearby and linear far away, at a cost linear in the image tokens.

    A token of a grid weighs the keys that [`local_attention`] shows it (the text, and a disc of image tokens) with
    exp(scale q·k), and besides them every token of all grids, those of the disc included, with λ c φ(q)·φ(k), under
    one denominator. λ is learned per head: 0 gives `local_attention` (CLEAR, arXiv 2412.16112). The constant c, see
    [`unit_mean_scale`], makes λ comparable between feature maps: λ = 0.1 weighs an average far token like a tenth of
    a key of score 0. Text queries attend to everything by softmax. `ops.reference.hybrid_attention` is the
    specification.

    Args:
        query: (batch, heads, tokens, head_dim), any floating dtype, which key, value and the output share.
        key: (batch, heads, tokens, head_dim); fewer heads with `enable_gqa`.
        value: (batch, heads, tokens, value_dim), as many heads as key.
        layout: What the tokens are. Text, padding and references of unknown grid are text.
        window: Radius of the disc in tokens, at least 1; strict, so 1 means the token itself.
        far_weight: λ, (heads,), any floating dtype, on the query's device; must not be negative, which is not checked
            because that would wait for the device.
        feature_map: `"relu"`, `"elu"`, `"softmax"`, or a pair `(query_features, key_features)` of callables for a
            learned map; see [`resolve_feature_map`]. The backward pass calls them again on the same tokens, and they
            have to give the same: no dropout.
        temporal_window: For the disc: frames with `|t - t'| < temporal_window`; `None` sees all.
        mask: Boolean (True = visible) or additive, broadcastable to (batch, heads, tokens, tokens), the same for every
            grid query that sees anything. Queries that see nothing give 0. No gradient flows to it.
        scale: Softmax scale, `None` is `head_dim ** -0.5`. Features are taken of query and key as they are.
        enable_gqa: Whether key and value may have fewer heads than query.
        impl: How the softmax part is computed: `"triton"`, `"tiled"` or `"dense"`, see [`local_attention`], chosen as
            there for `None`; or `"reference"` (all of it, quadratic).

    Returns:
        (batch, heads, tokens, value_dim) in the value's dtype. The softmax part is computed in that dtype (by
        `"tiled"` and `"dense"` in fp32 for fp16, whose range is too small), the linear part and the sum of the two in
        fp32, or fp64 for fp64, whatever autocast says.

    Raises:
        ValueError: Shapes or dtypes that do not fit each other or the layout, a window below 1, an unknown
            `feature_map` or `impl`, a mask that requires a gradient or shows different keys to different image
            queries, or `"triton"` for a call or a device that it cannot answer; `torch.func.jvp`, which `"reference"`
            alone knows.

    Example:
        >>> import torch
        >>> from diffusers_linattn import TokenLayout, hybrid_attention
        >>> layout = TokenLayout.joint(text=7, grid=(1, 12, 20))
        >>> query, key, value = torch.randn(3, 1, 2, layout.length, 16)
        >>> hybrid_attention(query, key, value, layout, window=4, far_weight=torch.tensor([0.0, 0.1])).shape
        torch.Size([1, 2, 247, 16])
    """
    check_choice("impl", impl, (None, *IMPLS))
    check_window("window", window)
    if temporal_window is not None:
        check_window("temporal_window", temporal_window)
    check_attention_inputs(query, key, value, layout, mask, enable_gqa)
    _check_far_weight(far_weight, query)
    if mask is not None and mask.requires_grad:
        raise ValueError("The mask requires a gradient, which hybrid_attention does not compute: pass mask.detach().")
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    of_query, of_key = resolve_feature_map(feature_map)
    key_mask = reduce_to_key_mask(mask, layout, query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not layout.grids or _known_to_add_nothing(far_weight):
        with torch.autocast(query.device.type, enabled=False):
            return local_attention(
                query,
                key,
                value,
                layout,
                window=window,
                temporal_window=temporal_window,
                mask=mask,
                scale=scale,
                impl=impl,
            )

    if impl == "reference":
        phi_q, phi_k = of_query(query), of_key(key)
        check_features(phi_q, phi_k)
        with torch.autocast(query.device.type, enabled=False):
            output = reference.hybrid_attention(
                full_precision(query),
                full_precision(key),
                full_precision(value),
                layout,
                far_weight=_weight_of_products(far_weight, phi_q, feature_map),
                query_features=lambda _: phi_q,
                key_features=lambda _: phi_k,
                window=window,
                temporal_window=temporal_window,
                mask=mask,
                scale=scale,
            )
        return _zero_where_all_is_hidden(output, mask).to(value.dtype)

    impl = choose_impl(query, value, layout, window, temporal_window, mask) if impl is None else impl
    attend = _attend_in_kernel if impl == "triton" else functools.partial(_attend_with_null_key, impl=impl)
    sums_of = functools.partial(_sums_of_kernel, layout) if impl == "triton" else _sums_beside_null_key
    with torch.autocast(query.device.type, enabled=False):
        attended = attend(query, key, value, layout, window, temporal_window, mask, scale)

    def add_far(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, far_weight: torch.Tensor, *attended: torch.Tensor
    ) -> torch.Tensor:
        phi_q, phi_k = of_query(query), of_key(key)
        check_features(phi_q, phi_k)
        weight = _weight_of_products(far_weight, phi_q, feature_map)
        with torch.autocast(query.device.type, enabled=False):
            near, null_weight = sums_of(*attended)
            far = phi_q @ (_grid_state(phi_k, value, layout, key_mask) * weight[:, None, None])
            summed = torch.addcmul(near, far, null_weight)
            output, total = summed[..., :-1], summed[..., -1:]
            nothing = total == 0
            return (output / total.masked_fill(nothing, 1)).masked_fill(nothing, 0).to(value.dtype)

    inputs = (query, key, value, far_weight, *attended)
    return _zero_where_all_is_hidden(recomputed(add_far, *inputs), mask)


def unit_mean_scale(feature_map: FeatureMapArgument, features: int) -> float:
    """The constant c for which c φ(q)·φ(k) has the mean 1 over queries and keys of independent unit normals.

    Maps given as callables are taken to sum to 1 over their features, as softmax and hedgehog do.

    Args:
        feature_map: What [`resolve_feature_map`] takes.
        features: How many features φ has per head.

    Example:
        >>> unit_mean_scale("softmax", 64)
        64.0
    """
    # The mean of φ for a unit normal, times the number of features where that is a constant.
    mean = 1 / features
    if feature_map == "relu":
        mean = 1 / math.sqrt(2 * math.pi)
    elif feature_map == "elu":  # x + 1 above 0, exp(x) below
        mean = 1 / math.sqrt(2 * math.pi) + 0.5 + math.exp(0.5) * 0.5 * math.erfc(1 / math.sqrt(2))
    return 1 / (features * mean**2)


def _weight_of_products(
    far_weight: torch.Tensor, phi_q: torch.Tensor, feature_map: FeatureMapArgument
) -> torch.Tensor:
    """λ c, (heads,), in the dtype of the features."""
    return far_weight.to(phi_q.dtype) * unit_mean_scale(feature_map, phi_q.shape[-1])


def _known_to_add_nothing(far_weight: torch.Tensor) -> bool:
    """Whether λ is 0 in all heads, as in an untrained swap, where that is known without waiting for a device."""
    if torch.compiler.is_compiling() or far_weight.device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and far_weight.requires_grad) and not far_weight.any()


def _attend_in_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    window: int,
    temporal_window: int | None,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of the softmax part, (B, H, N, D), and log2 Σ exp(s), (B, H, N), by the kernel that gives both."""
    while mask is not None and mask.ndim < 4:
        mask = mask[None]
    pooled = key[:, :, :0]
    return attend_in_kernel(query, key, value, pooled, pooled, mask, layout, window, temporal_window, scale)


def _sums_of_kernel(layout: TokenLayout, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`_sums_beside_null_key`] gives, from the results of [`_attend_in_kernel`]."""
    lse = (lse * math.log(2)).masked_fill(lse == float("inf"), float("-inf"))[..., None]  # +inf: sees nothing
    divisor = lse.detach().clamp(min=0)
    total, null_weight = (lse - divisor).exp(), (-divisor).exp()
    for segment in layout.text:
        null_weight[:, :, segment.start : segment.stop] = 0
    return torch.cat([out * total, total], -1), null_weight


def _attend_with_null_key(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    window: int,
    temporal_window: int | None,
    mask: torch.Tensor | None,
    scale: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax part beside a null key, and the score of that, (B, H, N, 1), in fp32 or fp64.

    The first is Σ exp(s) v, Σ exp(s) and exp(null), divided by Σ exp(s) + exp(null), (B, H, N, D + 2).
    """
    # One softmax over these keys and a null key, whose score the query chooses through one more channel. Two more
    # columns of the values count the keys and the null key: the three sums come out divided by Σ exp(s) + exp(null),
    # in range for every score and without scores in memory. The result does not depend on the null key's score. It is
    # somewhat less than that of the query with its own key: of the order of the others, and most of the weight theirs.
    if query.dtype == torch.float16:  # too small a range for sums beside a null key that is far from the others
        query, key, value = query.float(), key.float(), value.float()
    head_dim, dim = query.shape[-1], value.shape[-1]
    width = (max(head_dim + 1, dim + 2) + 7) // 8 * 8  # kernels want one width, a multiple of 8
    own = scale * (full_precision(query.detach()) * full_precision(key.detach())).sum(-1, keepdim=True)
    # Lower, the weight of the null key would underflow beside ordinary scores; higher, nothing changes.
    channel = (own - 4).clamp(-50, 60).to(query.dtype)
    unit = key.new_full((*key.shape[:2], 1, 1), 1 / scale if scale else 0.0)
    null_key = F.pad(unit, (head_dim, width - head_dim - 1))
    null_value = F.pad(value.new_ones(*value.shape[:2], 1, 1), (dim + 1, width - dim - 2))
    if mask is None and query.device.type == "cpu":
        # Without a mask "tiled" blends two softmaxes there, which keeps the absolute precision of the null key's
        # weight but not the relative one.
        mask = query.new_zeros(1, 1, 1, layout.length)
    out = local_attention(
        F.pad(torch.cat([query, channel], -1), (0, width - head_dim - 1)),
        F.pad(key, (0, width - head_dim)),
        F.pad(F.pad(value, (0, 1), value=1.0), (0, width - dim - 1)),
        layout,
        window=window,
        temporal_window=temporal_window,
        pooled_key=null_key,
        pooled_value=null_value,
        mask=mask,
        scale=scale,
        impl=impl,
    )
    return out[..., : dim + 2], scale * full_precision(channel) * full_precision(unit)


def _sums_beside_null_key(out: torch.Tensor, null_score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of the softmax part and what a weight of 1 is beside them, for all queries.

    Returns:
        Σ exp(s) v and Σ exp(s) over the text and the window, (B, H, N, D + 1), and 1, (B, H, N, 1), all three divided
        by the same positive number; in fp32 or fp64. For text queries the last is 0.
    """
    out = full_precision(out)
    return out[..., :-1], out[..., -1:] * (-null_score).exp()


def _grid_state(
    phi_k: torch.Tensor, value: torch.Tensor, layout: TokenLayout, key_mask: KeyMask | None
) -> torch.Tensor:
    """Σ φ(k) v and Σ φ(k) over all grids, (B, H, K, D + 1), in fp32 or fp64."""
    if key_mask is not None:
        phi_k = phi_k * key_mask.weights()
    counted = F.pad(full_precision(take(value, layout.grids)), (0, 1), value=1.0)
    return take(phi_k, layout.grids).transpose(-1, -2) @ counted


def _zero_where_all_is_hidden(output: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`output`, (B, H, N, D), with 0 for the queries that the mask shows nothing."""
    if mask is None:
        return output
    while mask.ndim < 4:
        mask = mask[None]
    return torch.where(reference.hidden_by(mask).all(-1, keepdim=True), 0, output)


def _check_far_weight(far_weight: torch.Tensor, query: torch.Tensor) -> None:
    check_tensor("far_weight", far_weight, query)
    if far_weight.shape != query.shape[1:2] or not far_weight.is_floating_point():
        raise ValueError(
            f"far_weight must be one floating number for each of the {query.shape[1]} heads of query, got "
            f"{tuple(far_weight.shape)} of {far_weight.dtype}: pass a tensor of shape ({query.shape[1]},)."
        )
