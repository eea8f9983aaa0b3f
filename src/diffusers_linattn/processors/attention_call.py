"""The attention call inside a stock processor: what it hands over, and how it is answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from diffusers_linattn.layout import Segment, TokenLayout
from diffusers_linattn.ops.checks import broadcasts


@dataclass
class AttentionCall:
    """One attention call of a layer, as its processor answers it.

    Args:
        query: `(batch, heads, tokens, head_dim)`, after the model's own projections, norms and rotary embedding.
        key: The same; with grouped queries (`enable_gqa`) it has fewer heads.
        value: The same.
        layout: What the tokens are.
        mask: Boolean (True = visible) or additive mask that broadcasts to `(batch, heads, tokens, tokens)`, or `None`.
        scale: Softmax scale; `None` is `head_dim ** -0.5`.
        enable_gqa: Whether key and value may have fewer heads.
        hidden_states: The input of the layer, `(batch, tokens or those that are not text, channels)`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: TokenLayout
    mask: torch.Tensor | None
    scale: float | None
    enable_gqa: bool
    hidden_states: torch.Tensor


Attend = Callable[[AttentionCall], torch.Tensor]


class AnswerAttention(TorchFunctionMode):
    """While the stock processor runs: its attention calls over the layout's tokens go to a processor's `attend`.

    Other attention calls (cross-attention, IP-Adapter) have other lengths and pass through. What was answered and what
    passed is noted in lists of the caller's: Dynamo cannot read an attribute of the mode after its block.
    """

    def __init__(
        self,
        attend: Attend,
        scope: str,
        layouts: tuple[TokenLayout, ...],
        hidden_states: torch.Tensor,
        answered: list[bool],
        passed: list[tuple[int, int]],
    ):
        super().__init__()
        self.attend = attend
        self.scope = scope
        self.layouts = layouts
        self.hidden_states = hidden_states
        self.answered = answered
        self.passed = passed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.answer(*args, **kwargs)
        if func is torch.Tensor.unflatten:
            # Tensor.unflatten is Python that calls super(), which Dynamo cannot trace under a mode (torch 2.13).
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def answer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Answer an attention call with the arguments of `scaled_dot_product_attention`, or let it pass."""
        layouts, hidden_states = self.layouts, self.hidden_states
        if len(query) < len(hidden_states):
            # A model with a call for each sample, which leaves out the padding.
            sample = len(self.answered)
            hidden_states = hidden_states[sample : sample + len(query)]
            layouts = layouts if len(layouts) == 1 else layouts[sample : sample + len(query)]
        length = max(layout.length for layout in layouts) if layouts else -1
        asking = _asking(layouts[0], self.scope) if len(layouts) == 1 else ()
        queries = sum(segment.length for segment in asking) if asking else length
        of_other_samples = not broadcasts(len(layouts), len(query))
        if of_other_samples or query.shape[2] != queries or key.shape[2] != length or dropout_p or is_causal:
            self.passed.append((query.shape[2], key.shape[2]))
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self.answered.append(True)
        outer = None if torch.compiler.is_compiling() else _get_current_function_mode()
        if isinstance(outer, AttentionScoreSkipFunctionMode):
            # A guider wants the values of this layer in place of its attention: its mode answers.
            return F.scaled_dot_product_attention(query, key, value)
        device = query.device.type
        if torch.is_autocast_enabled(device):  # what autocast does to the call that is answered here
            dtype = torch.get_autocast_dtype(device)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        mask = None if attn_mask is None else _without_repeats(attn_mask)
        call = AttentionCall(query, key, value, layouts[0], mask, scale, enable_gqa, hidden_states)
        if len(layouts) > 1:
            return _attend_by_sample(self.attend, call, layouts)
        if queries < length:
            return _attend_some_queries(self.attend, call, asking)
        return self.attend(call).to(query.dtype)


def _without_repeats(mask: torch.Tensor) -> torch.Tensor:
    """What a mask was before `expand` over samples, heads or queries, as in Lumina-Next: operators would copy it."""
    for dim in range(mask.ndim - 1):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _attend_by_sample(attend: Attend, call: AttentionCall, layouts: tuple[TokenLayout, ...]) -> torch.Tensor:
    """Answer a padded batch whose samples have layouts of their own; what stands behind a layout is padding, and 0."""
    mask = call.mask
    output = call.query.new_zeros(*call.query.shape[:3], call.value.shape[3])
    for samples, layout in alike(layouts):
        length = layout.length
        some = mask
        if mask is not None:
            some = mask[samples] if mask.ndim == 4 and len(mask) > 1 else mask
            some = some[..., :length] if some.shape[-2] == 1 else some[..., :length, :length]
        query, key, value = (x[samples, :, :length] for x in (call.query, call.key, call.value))
        hidden_states = call.hidden_states[samples, :length]
        part = AttentionCall(query, key, value, layout, some, call.scale, call.enable_gqa, hidden_states)
        output[samples, :, :length] = attend(part).to(output.dtype)
    return output


def _asking(layout: TokenLayout, scope: str) -> tuple[Segment, ...]:
    """The segments whose tokens are queries."""
    silent = ("text", "memory") if scope == "queries" else ("memory",)
    return tuple(segment for segment in layout.segments if segment.kind not in silent)


def _attend_some_queries(attend: Attend, call: AttentionCall, asking: tuple[Segment, ...]) -> torch.Tensor:
    """Answer a call whose queries are some segments alone: the others get queries of 0, whose answers are dropped."""
    query = _spread(call.query, call.layout, asking, 2)
    hidden_states = call.hidden_states
    if any(segment.kind == "memory" for segment in call.layout.segments):
        # The layer's input has the memory in it only when it is made; the image always ends it.
        images = tuple(segment for segment in asking if segment.kind == "image")
        length = sum(segment.length for segment in images)
        hidden_states = _spread(hidden_states[:, hidden_states.shape[1] - length :], call.layout, images, 1)
    attended = attend(replace(call, query=query, hidden_states=hidden_states)).to(call.query.dtype)
    return torch.cat([attended[:, :, segment.start : segment.stop] for segment in asking], 2)


def _spread(tokens: torch.Tensor, layout: TokenLayout, given: tuple[Segment, ...], dim: int) -> torch.Tensor:
    """The tokens of the `given` segments at their places in the layout, with 0 everywhere else."""
    parts, start = [], 0
    for segment in layout.segments:
        if segment in given:
            parts.append(tokens.narrow(dim, start, segment.length))
            start += segment.length
        else:
            shape = list(tokens.shape)
            shape[dim] = segment.length
            parts.append(tokens.new_zeros(shape))
    return torch.cat(parts, dim)


def alike(layouts: tuple[TokenLayout, ...]) -> list[tuple[list[int], TokenLayout]]:
    """The samples of a batch, those with the same layout together."""
    groups: dict[TokenLayout, list[int]] = {}
    for sample, layout in enumerate(layouts):
        groups.setdefault(layout, []).append(sample)
    return [(samples, layout) for layout, samples in groups.items()]
