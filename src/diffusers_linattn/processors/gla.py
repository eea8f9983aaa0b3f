"""DiG: gated linear attention (arXiv 2405.18428)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_linattn.kernels.scan_paths import scan_path
from diffusers_linattn.layout import Segment, TokenLayout
from diffusers_linattn.ops.checks import check_choice, check_positive_int
from diffusers_linattn.ops.gated import gated_linear_attention
from diffusers_linattn.ops.gated_choice import choose_impl
from diffusers_linattn.processors.attention_call import AttentionCall
from diffusers_linattn.processors.base import BaseProcessor


DIRECTIONS = ("bidirectional", "alternate")
FEATURE_MAP_NAMES = ("relu", "elu", "softmax")
GATES = ("vector", "scalar")
SILU_INVERSE_OF_ONE = 1.2784645427610738  # silu(1.278...) = 1: the bias at which the output gate does nothing


class GLAProcessor(BaseProcessor):
    """Gated linear attention: image tokens are scanned, and what a scan carries decays by learned gates.

    Args:
        direction (`str`, *optional*, defaults to `"bidirectional"`): `"bidirectional"` scans both ways in each layer,
            by rows on even and by columns on odd layers, with a non-negative feature map, a denominator and gates
            that start at 1: for a pretrained model. `"alternate"` is DiG's own form for training from scratch: rows
            forward, rows backward, columns forward, columns backward by layer index modulo 4, no feature map, no
            denominator, and a norm and an output gate after it.
        gate_low_rank (`int`, *optional*, defaults to 16): Rank of the gate's projection.
        gate_normalizer (`int`, *optional*, defaults to 16): What the logarithm of the gate is divided by.
        feature_map (`str`, *optional*, defaults to `"relu"`): One of `"relu"`, `"elu"`, `"softmax"`.
        gates (`str`, *optional*, defaults to `"vector"`): `"vector"` is a gate per channel, `"scalar"` one per head,
            which is faster and says less.
        input_conv (`bool`, *optional*, defaults to `False`): A 3x3 depth-wise convolution on the input of the layer,
            starting as the identity.
        reset_projections (`bool`, *optional*, defaults to `False`): Start the layer's query, key, value and output
            projections afresh instead of inheriting them.
        impl (`str`, *optional*): `"triton"`, `"chunked"`, `"fla"` or `"reference"`; `None` takes `"triton"` on a GPU
            that it runs on, else `"chunked"`.

    Image queries weigh text keys by the exact softmax weight under one shared denominator, which in joint models
    `"alternate"` has as well; text queries keep softmax over everything. Key and value keep the model's head_dim,
    where DiG from scratch halves that of the keys. DiG, arXiv 2405.18428; GLA, arXiv 2312.06635.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> from diffusers_linattn import GLAProcessor
        >>> GLAProcessor().direction
        'bidirectional'
    """

    impls = ("triton", "chunked", "fla", "reference")

    def __init__(
        self,
        direction: str = "bidirectional",
        gate_low_rank: int = 16,
        gate_normalizer: int = 16,
        feature_map: str = "relu",
        gates: str = "vector",
        input_conv: bool = False,
        reset_projections: bool = False,
        impl: str | None = None,
    ) -> None:
        super().__init__(reset_projections=reset_projections, impl=impl)
        check_choice("direction", direction, DIRECTIONS)
        check_choice("feature_map", feature_map, FEATURE_MAP_NAMES)
        check_choice("gates", gates, GATES)
        if not isinstance(input_conv, bool):
            raise ValueError(f"input_conv must be True or False, got {input_conv!r}.")
        self.direction = direction
        self.gate_low_rank = check_positive_int("gate_low_rank", gate_low_rank)
        self.gate_normalizer = check_positive_int("gate_normalizer", gate_normalizer)
        self.feature_map = feature_map
        self.gates = gates
        self.input_conv = input_conv

    def build(self, heads: int, head_dim: int, channels: int, index: int) -> None:
        alternate = self.direction == "alternate"
        gate_dim = head_dim if self.gates == "vector" else 1
        self.gate = LogGate(channels, heads, gate_dim, self.gate_low_rank, self.gate_normalizer, centred=not alternate)
        if self.input_conv:
            self.conv = GridConvolution(channels)
        if alternate:
            self.output_gate = OutputGate(channels, heads, head_dim)
            path = scan_path(("forward", "backward")[index % 2], ("rows", "columns")[index // 2 % 2])
        else:
            path = scan_path("bidirectional", ("rows", "columns")[index % 2])
        # As a shape it is symbolic in a compiled block, so that all layers share one; as a number it would be a guard.
        self._path = torch.empty(0, path)

    @property
    def changes_input(self) -> bool:
        return self.input_conv

    def prepare(self, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        return self.conv(hidden_states, layout)

    def implementation(self, layout: TokenLayout | None, query: torch.Tensor) -> str:
        return self.impl or choose_impl(query, query, query.shape[-1])

    def attend(self, call: AttentionCall) -> torch.Tensor:
        # Without a denominator there is none to share with the text, so that joint models always have one.
        normalize = self.direction == "bidirectional" or call.layout.num_text > 0
        attended = gated_linear_attention(
            call.query,
            call.key,
            call.value,
            self.gate(call.hidden_states, call.layout),
            call.layout,
            direction="bidirectional" if self.direction == "bidirectional" else "forward",
            path=self._path.shape[1],
            feature_map=self.feature_map if normalize else None,
            normalize=normalize,
            mask=call.mask,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
            impl=self.impl,
            # What has no denominator may leave fp16's range, until the norm brings it back.
            dtype=torch.float32 if call.value.dtype == torch.float16 and not normalize else None,
        )
        if self.direction == "alternate":
            attended = self.output_gate(attended, call.hidden_states, call.layout)
        return attended.to(call.value.dtype)


class LogGate(nn.Module):
    """The logarithm of the gates, ≤ 0: logsigmoid(W2 W1 x) / normalizer.

    `centred` subtracts logsigmoid(0) and stops at 0, so that W2 = 0 is a gate of exactly 1 that still has a gradient.
    """

    def __init__(self, channels: int, heads: int, gate_dim: int, rank: int, normalizer: int, centred: bool):
        super().__init__()
        self.heads, self.gate_dim, self.normalizer, self.centred = heads, gate_dim, normalizer, centred
        self.down = nn.Linear(channels, rank, bias=False)
        self.up = nn.Linear(rank, heads * gate_dim)
        if centred:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """`(batch, tokens, channels)` to fp32 `(batch, heads, tokens, gates per head)`, 0 at text tokens."""
        logits = self.up(self.down(hidden_states)).float()
        log_gate = F.logsigmoid(logits)
        if self.centred:
            log_gate = (log_gate - F.logsigmoid(torch.zeros((), device=logits.device))).clamp(max=0)
        log_gate = spread_over(log_gate / self.normalizer, layout, fill=0.0)
        return log_gate.reshape(*log_gate.shape[:2], self.heads, self.gate_dim).transpose(1, 2)


class OutputGate(nn.Module):
    """RMSNorm of each head times silu(W x), which starts at silu = 1; text tokens pass unchanged."""

    def __init__(self, channels: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = HeadNorm(head_dim, eps=1e-5)
        self.proj = nn.Linear(channels, heads * head_dim)
        nn.init.zeros_(self.proj.weight)
        nn.init.constant_(self.proj.bias, SILU_INVERSE_OF_ONE)

    def forward(self, attended: torch.Tensor, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """`attended` is `(batch, heads, tokens, head_dim)`, `hidden_states` the input of the layer."""
        gate = spread_over(F.silu(self.proj(hidden_states)), layout, fill=1.0)
        gate = gate.reshape(*gate.shape[:2], self.heads, self.head_dim).transpose(1, 2)
        gated = self.norm(attended) * gate
        parts = [
            (attended if segment.grid is None else gated)[:, :, segment.start : segment.stop].to(attended.dtype)
            for segment in layout.segments
        ]
        return torch.cat(parts, 2)


class HeadNorm(nn.RMSNorm):
    """RMSNorm that computes in the wider dtype of its input and its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)


class GridConvolution(nn.Module):
    """A 3x3 depth-wise convolution over the grid tokens of a layer's input that starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        nn.init.dirac_(self.conv.weight, groups=channels)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """`(batch, tokens, channels)` to the same; text tokens pass unchanged."""
        parts, start = [], 0
        for segment in input_segments(hidden_states, layout):
            part = hidden_states[:, start : start + segment.length]
            start += segment.length
            if segment.grid is not None:
                frames, height, width = segment.grid
                planes = part.reshape(-1, height, width, part.shape[-1]).permute(0, 3, 1, 2)
                part = self.conv(planes).permute(0, 2, 3, 1).reshape(part.shape)
            parts.append(part)
        return torch.cat(parts, 1)


def spread_over(values: torch.Tensor, layout: TokenLayout, fill: float) -> torch.Tensor:
    """Per-token values of the layer's input over the whole layout, with `fill` at tokens without a grid."""
    input_segments(values, layout)  # checks the length
    has_text = values.shape[1] == layout.length
    parts, start = [], 0
    for segment in layout.segments:
        if segment.grid is None:
            parts.append(values.new_full((values.shape[0], segment.length, values.shape[2]), fill))
        else:
            parts.append(values[:, start : start + segment.length])
        start += 0 if segment.kind == "text" and not has_text else segment.length
    return torch.cat(parts, 1)


def input_segments(values: torch.Tensor, layout: TokenLayout) -> tuple[Segment, ...]:
    """The segments that the input of a layer holds, (batch, tokens, channels).

    Joint layers get either the whole sequence (single-stream blocks) or all but the text (double-stream ones).
    """
    if values.shape[1] == layout.length:
        return layout.segments
    given = tuple(segment for segment in layout.segments if segment.kind != "text")
    expected = sum(segment.length for segment in given)
    if values.shape[1] != expected:
        raise ValueError(
            f"The layer's input has {values.shape[1]} tokens, the layout ({layout}) {layout.length}, of which "
            f"{expected} are not text."
        )
    return given
