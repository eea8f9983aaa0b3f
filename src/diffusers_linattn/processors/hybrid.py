"""A window of softmax attention, and linear attention over the whole picture."""

from __future__ import annotations

import torch
from torch import nn

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops.checks import check_choice, check_window
from diffusers_linattn.ops.hybrid import hybrid_attention
from diffusers_linattn.processors.attention_call import AttentionCall
from diffusers_linattn.processors.base import BaseProcessor
from diffusers_linattn.processors.clear import ClearProcessor
from diffusers_linattn.processors.linear import FEATURE_MAP_NAMES, HedgehogFeatures


class HybridProcessor(BaseProcessor):
    """Softmax over the text and a disc around each image token, plus linear attention over the whole picture.

    Windows keep what is local and lose agreement across the picture; linear attention has it the other way round.
    Here both stand under one denominator. Image queries weigh the keys that [`ClearProcessor`] shows them by the exact
    softmax weight, and all image keys by λ c φ(q)·φ(k), λ learned per head. It starts at 0, so that an untrained swap
    is that of `ClearProcessor(window)`. Text queries keep softmax over everything.

    Args:
        window (`int`, *optional*, defaults to 8): Radius of the disc in tokens, strict, cut at the border.
        feature_map (`str`, *optional*, defaults to `"hedgehog"`): φ, one of `"relu"`, `"elu"`, `"softmax"` and
            `"hedgehog"` (learned: softmax of [xW, -xW], W starting as the identity).
        temporal_window (`int`, *optional*): For video: the disc reaches into frames with `|t - t'| <
            temporal_window`; `None` into all. The linear part always sees all.
        reset_projections (`bool`, *optional*, defaults to `False`): Start the layer's query, key, value and output
            projections afresh instead of inheriting them.
        impl (`str`, *optional*): `"triton"`, `"tiled"`, `"dense"` or `"reference"`, see `hybrid_attention`; `None`
            chooses.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from diffusers_linattn import HybridProcessor
        >>> HybridProcessor(window=4).feature_map
        'hedgehog'
    """

    impls = ClearProcessor.impls

    def __init__(
        self,
        window: int = 8,
        feature_map: str = "hedgehog",
        temporal_window: int | None = None,
        reset_projections: bool = False,
        impl: str | None = None,
    ) -> None:
        super().__init__(reset_projections=reset_projections, impl=impl)
        self.window = check_window("window", window)
        check_choice("feature_map", feature_map, FEATURE_MAP_NAMES)
        self.feature_map = feature_map
        if temporal_window is not None:
            check_window("temporal_window", temporal_window)
        self.temporal_window = temporal_window

    def build(self, heads: int, head_dim: int, channels: int, index: int) -> None:
        self.far = FarWeight(heads)
        if self.feature_map == "hedgehog":
            self.query_features = HedgehogFeatures(head_dim)
            self.key_features = HedgehogFeatures(head_dim)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        learned = self.feature_map == "hedgehog"
        return hybrid_attention(
            call.query,
            call.key,
            call.value,
            call.layout,
            window=self.window,
            far_weight=self.far(),
            feature_map=(self.query_features, self.key_features) if learned else self.feature_map,
            temporal_window=self.temporal_window,
            mask=call.mask,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
            impl=self.impl,
        )

    def implementation(self, layout: TokenLayout | None, query: torch.Tensor) -> str:
        nearby = ClearProcessor(self.window, temporal_window=self.temporal_window, impl=self.impl)
        name = nearby.implementation(layout, query)
        return name if name == "reference" else f"{name}; linear over all grids"


# A step of Adam moves a parameter by about the learning rate, and λ of a trained head is above 1: without this factor
# a transfer of some hundred steps would leave it near 0.
PER_STEP = 100.0


class FarWeight(nn.Module):
    """λ, the weight of the linear part per head: the positive part of `PER_STEP` times a weight that starts at 0."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))

    def forward(self) -> torch.Tensor:
        """`(heads,)`, at least 0."""
        # The gradient passes the clamp: otherwise a head whose weight once fell below 0 would never come back.
        weight = PER_STEP * self.weight
        return weight + (weight.clamp(min=0) - weight).detach()
