"""LiT: simplified linear attention (arXiv 2501.12976)."""

from __future__ import annotations

import torch
from torch import nn

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops.checks import check_choice, check_positive_int, repeat_heads
from diffusers_linattn.ops.linear import IMPLS, choose_impl, linear_attention, regroup_heads
from diffusers_linattn.ops.masks import key_visibility
from diffusers_linattn.processors.attention_call import AttentionCall
from diffusers_linattn.processors.base import BaseProcessor


FEATURE_MAP_NAMES = ("relu", "elu", "softmax", "hedgehog")


class LinearProcessor(BaseProcessor):
    """Linear attention between image tokens, plus a depth-wise convolution of the values on the grid.

    Image queries weigh image keys by φ(q)·φ(k) and text keys by the exact softmax weight, under one denominator; text
    queries keep softmax over everything. LiT, arXiv 2501.12976; the joint form is that of EDiT.

    Args:
        kernel_size (`int`, *optional*, defaults to 5): Side of the depth-wise convolution, odd; 0 leaves it out. It
            starts at zero when the layer's projections are kept.
        heads (`int`, *optional*): Number of heads that the channels are regrouped into; `None` keeps the model's.
        feature_map (`str`, *optional*, defaults to `"relu"`): φ, one of `"relu"`, `"elu"`, `"softmax"` and
            `"hedgehog"` (learned: softmax of [xW, -xW], W starting as the identity).
        reset_projections (`bool`, *optional*, defaults to `False`): Start the layer's query, key, value and output
            projections afresh, as LiT does when it has a training budget.
        impl (`str`, *optional*): `"triton"` (NVIDIA GPUs), `"torch"` or `"reference"`; `None` chooses.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from diffusers_linattn import LinearProcessor
        >>> LinearProcessor(feature_map="hedgehog").kernel_size
        5
    """

    impls = IMPLS

    def __init__(
        self,
        kernel_size: int = 5,
        heads: int | None = None,
        feature_map: str = "relu",
        reset_projections: bool = False,
        impl: str | None = None,
    ) -> None:
        super().__init__(reset_projections=reset_projections, impl=impl)
        check_positive_int("kernel_size", kernel_size, minimum=0)
        if kernel_size and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, or 0 for no convolution, got {kernel_size}.")
        if heads is not None:
            check_positive_int("heads", heads)
        check_choice("feature_map", feature_map, FEATURE_MAP_NAMES)
        self.kernel_size = kernel_size
        self.heads = heads
        self.feature_map = feature_map

    def build(self, heads: int, head_dim: int, channels: int, index: int) -> None:
        if self.heads is not None:
            if heads * head_dim % self.heads:
                raise ValueError(
                    f"heads={self.heads} does not divide the {heads * head_dim} channels of this layer ({heads} heads "
                    f"of {head_dim})."
                )
            head_dim = heads * head_dim // self.heads
        if self.kernel_size:
            self.conv = ValueConvolution(head_dim, self.kernel_size, zero=not self.reset_projections)
        if self.feature_map == "hedgehog":
            self.query_features = HedgehogFeatures(head_dim)
            self.key_features = HedgehogFeatures(head_dim)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        learned = self.feature_map == "hedgehog"
        attended = linear_attention(
            call.query,
            call.key,
            call.value,
            call.layout,
            feature_map=(self.query_features, self.key_features) if learned else self.feature_map,
            heads=self.heads,
            mask=call.mask,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
            impl=self.impl,
        )
        if self.kernel_size:
            value = repeat_heads(call.value, call.query.shape[1])
            attended = attended + self.conv(value, call.layout, call.mask, self.heads).to(attended.dtype)
        return attended

    def implementation(self, layout: TokenLayout | None, query: torch.Tensor) -> str:
        query = regroup_heads(query, self.heads or query.shape[1])
        return self.impl or choose_impl(query, query, None)


class HedgehogFeatures(nn.Module):
    """softmax([xW, -xW]) over the channels, W learned (arXiv 2402.04347)."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.proj = nn.Linear(head_dim, head_dim, bias=False)
        nn.init.eye_(self.proj.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., head_dim)` to `(..., 2 * head_dim)`, non-negative, in the dtype of `x`."""
        projected = self.proj(x).to(x.dtype)
        return torch.softmax(torch.cat([projected, -projected], -1), -1)


class ValueConvolution(nn.Module):
    """Depth-wise convolution of the values on each grid, one kernel per channel of a head, shared by all heads."""

    def __init__(self, head_dim: int, kernel_size: int, zero: bool):
        super().__init__()
        self.conv = nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim)
        if zero:
            nn.init.zeros_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(
        self, value: torch.Tensor, layout: TokenLayout, mask: torch.Tensor | None, heads: int | None
    ) -> torch.Tensor:
        """`(batch, heads, tokens, head_dim)` to the same, 0 at text tokens."""
        visible = None if mask is None else key_visibility(mask).to(value.dtype)
        parts = []
        for segment in layout.segments:
            part = value[:, :, segment.start : segment.stop]
            if segment.grid is None:
                parts.append(torch.zeros_like(part))
                continue
            if visible is not None:
                part = part * visible[..., segment.start : segment.stop, :]
            parts.append(self._convolve(part, segment.grid, heads))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _convolve(self, value: torch.Tensor, grid: tuple[int, int, int], heads: int | None) -> torch.Tensor:
        batch, model_heads, tokens, head_dim = value.shape
        channels = model_heads * head_dim
        # Heads are cut out of the concatenated channels, so that regrouping them is a reshape.
        heads = heads or model_heads
        planes = value.permute(0, 2, 1, 3).reshape(batch * grid[0], *grid[1:], heads, channels // heads)
        planes = planes.permute(0, 3, 4, 1, 2).flatten(0, 1)
        planes = self.conv(planes)
        planes = planes.reshape(batch * grid[0], channels, *grid[1:]).permute(0, 2, 3, 1)
        return planes.reshape(batch, tokens, model_heads, head_dim).transpose(1, 2)
