"""CLEAR: attention in a circular window (arXiv 2412.16112)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusers_linattn.layout import Segment, TokenLayout
from diffusers_linattn.ops.checks import broadcasts, check_positive_int, check_window
from diffusers_linattn.ops.local import local_attention
from diffusers_linattn.ops.local_choice import choose_impl, choose_windowed, window_covers
from diffusers_linattn.ops.masks import key_visibility
from diffusers_linattn.processors.attention_call import AttentionCall
from diffusers_linattn.processors.base import BaseProcessor


class ClearProcessor(BaseProcessor):
    """Each image token attends to the text and to the image tokens within a disc around it.

    Image queries see the keys with `(y - y')**2 + (x - x')**2 < window**2`, every text token, and in reference images
    the disc around their own position scaled to that grid. Text queries see everything. CLEAR, arXiv 2412.16112.

    Args:
        window (`int`, *optional*, defaults to 16): Radius of the disc in tokens, strict, cut at the border.
        down_factor (`int`, *optional*, defaults to 1): Above 1, image queries also see all keys and values pooled over
            `down_factor x down_factor` cells with one learned weight per layer. That part is quadratic in the tokens.
        temporal_window (`int`, *optional*): For video: frames with `|t - t'| < temporal_window`; `None` sees all.
        reset_projections (`bool`, *optional*, defaults to `False`): Start the layer's query, key, value and output
            projections afresh instead of inheriting them.
        impl (`str`, *optional*): `"triton"`, `"tiled"`, `"dense"` or `"reference"`, see `local_attention`; `None`
            chooses.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from diffusers_linattn import ClearProcessor
        >>> ClearProcessor(window=8, down_factor=4)
        ClearProcessor(window=8, down_factor=4, temporal_window=None, reset_projections=False, impl=None)
    """

    impls = ("triton", "tiled", "dense", "reference")

    def __init__(
        self,
        window: int = 16,
        down_factor: int = 1,
        temporal_window: int | None = None,
        reset_projections: bool = False,
        impl: str | None = None,
    ) -> None:
        super().__init__(reset_projections=reset_projections, impl=impl)
        self.window = check_window("window", window)
        self.down_factor = check_positive_int("down_factor", down_factor)
        if temporal_window is not None:
            check_window("temporal_window", temporal_window)
        self.temporal_window = temporal_window

    def build(self, heads: int, head_dim: int, channels: int, index: int) -> None:
        if self.down_factor > 1:
            self.pool = KeyValuePool(self.down_factor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}spatial_weight" in state_dict:  # as CLEAR's own code names it
            state_dict[f"{prefix}pool.spatial_weight"] = state_dict.pop(f"{prefix}spatial_weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        pooled_key = pooled_value = None
        if self.down_factor > 1:
            visible = None if call.mask is None else key_visibility(call.mask)
            pooled_key = self.pool(call.key, call.layout, visible)
            pooled_value = self.pool(call.value, call.layout, visible)
        return local_attention(
            call.query,
            call.key,
            call.value,
            call.layout,
            window=self.window,
            temporal_window=self.temporal_window,
            pooled_key=pooled_key,
            pooled_value=pooled_value,
            mask=call.mask,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
            impl=self.impl,
        )

    def implementation(self, layout: TokenLayout | None, query: torch.Tensor) -> str:
        if self.impl is not None:
            return self.impl
        if layout is None:
            return choose_windowed(query, query, None)
        impl = choose_impl(query, query, layout, self.window, self.temporal_window, None)
        if impl != "dense":
            return impl
        pooled = ", with pooled keys" if self.down_factor > 1 else ""
        if window_covers(layout, self.window, self.temporal_window):
            return f"dense{pooled} (the window covers the grid)"
        return f"dense{pooled}, masked (the window leaves out too little to win)"


class KeyValuePool(nn.Module):
    """Pools keys or values of every grid over `factor x factor` cells with one learned weight.

    Cells cut by the right or bottom border pool the tokens they have, scaled up by the share that is missing. A cell
    without a visible token pools to zero.
    """

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor
        # The shape of the published CLEAR weights: (1, 1, 1, factor, 1, factor, 1).
        self.spatial_weight = nn.Parameter(torch.full((1, 1, 1, factor, 1, factor, 1), factor**-2.0))

    def forward(self, tokens: torch.Tensor, layout: TokenLayout, visible: torch.Tensor | None = None) -> torch.Tensor:
        """`(batch, heads, tokens, head_dim)` to `(batch, heads, cells of all grids, head_dim)`.

        `visible` is [`key_visibility`]: hidden tokens are left out of their cells as those beyond the border are.
        """
        if visible is None:
            visible = tokens.new_ones(1, 1, layout.length, 1)
        elif not broadcasts(visible.shape[1], tokens.shape[1]):
            visible = visible.amax(1, keepdim=True)  # a mask per query head over fewer key heads
        visible = visible.to(tokens.dtype)
        pooled = []
        for segment in layout.grids:
            seen = visible[:, :, segment.start : segment.stop]
            cells = self._cells(tokens[:, :, segment.start : segment.stop] * seen, segment)
            counts = self._cells(seen, segment).sum((4, 6)).clamp_min(1)
            weighted = (cells * self.spatial_weight.to(cells.dtype)).sum((4, 6))
            pooled.append((weighted * (self.factor**2 / counts)).flatten(2, 4))
        return torch.cat(pooled, dim=2)

    def _cells(self, tokens: torch.Tensor, segment: Segment) -> torch.Tensor:
        """`(batch, heads, frames, cell rows, factor, cell columns, factor, channels)`, zeros beyond the border."""
        assert segment.grid is not None
        _, height, width = segment.grid
        planes = tokens.unflatten(2, segment.grid)
        planes = nn.functional.pad(planes, (0, 0, 0, -width % self.factor, 0, -height % self.factor))
        return planes.unflatten(4, (-1, self.factor)).unflatten(3, (-1, self.factor))
