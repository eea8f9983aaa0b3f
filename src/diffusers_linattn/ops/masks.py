"""Attention masks for operators that never form the (tokens, tokens) matrix a mask would be added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusers_linattn.layout import Segment, TokenLayout
from diffusers_linattn.ops.features import full_precision
from diffusers_linattn.ops.reference import hidden_by, mask_bias


def take(x: torch.Tensor, segments: Sequence[Segment], dim: int = 2) -> torch.Tensor:
    """The tokens of some segments, one after the other; a view where they are neighbours."""
    if segments and all(a.stop == b.start for a, b in zip(segments, segments[1:], strict=False)):
        return x.narrow(dim, segments[0].start, segments[-1].stop - segments[0].start)
    parts = [x.narrow(dim, segment.start, segment.length) for segment in segments]
    return torch.cat(parts, dim)


@dataclass(frozen=True)
class KeyMask:
    """A mask that is the same for every grid query that sees anything at all.

    Args:
        bias: What is added to the scores of each key, (batch | 1, heads | 1, 1, tokens); never -inf for all keys.
        visible: Whether a grid query sees anything, bool (batch | 1, heads | 1, grid tokens | 1, 1). The others give
            0.
    """

    bias: torch.Tensor
    visible: torch.Tensor

    def weights(self) -> torch.Tensor:
        """What the features of each key are multiplied with: (batch | 1, heads | 1, tokens, 1), fp32 or fp64."""
        return full_precision(self.bias).exp().transpose(-1, -2)

    def zero_hidden(self, output: torch.Tensor) -> torch.Tensor:
        """`output`, (batch, heads, grid tokens, head_dim), with 0 for the queries that see nothing."""
        return torch.where(self.visible, output, 0)


def reduce_to_key_mask(mask: torch.Tensor | None, layout: TokenLayout, dtype: torch.dtype) -> KeyMask | None:
    """Turn a boolean (True = visible) or additive attention mask into a [`KeyMask`] for the grid queries of a layout.

    A mask with a query dimension, as padded batches often have, is accepted when all its rows for grid queries are
    equal except those of queries that see nothing; what text queries see is not looked at. Checking that reads the
    mask's values: a synchronisation on a GPU, and under `torch.compile` an assertion at run time. Masks of shape
    (batch | 1, heads | 1, 1, tokens) need no check.

    Args:
        mask: (batch | 1, heads | 1, tokens | 1, tokens), leading dimensions may be missing; or `None`.
        layout: What the tokens are.
        dtype: The dtype of the result, that of the query.

    Raises:
        ValueError: Different queries see different keys.

    Example:
        >>> import torch
        >>> seen = torch.tensor([True, True, False])
        >>> key_mask = reduce_to_key_mask(seen[:, None] & seen, TokenLayout.image((1, 1, 3)), torch.float32)
        >>> key_mask.bias.tolist(), key_mask.visible.flatten().tolist()
        ([[[[0.0, 0.0, -inf]]]], [True, True, False])
    """
    if mask is None or not layout.grids:
        return None
    while mask.ndim < 4:
        mask = mask[None]
    visible = None
    if mask.shape[-2] != 1:
        mask, visible = _common_row(take(mask, layout.grids, -2))
    bias = mask_bias(mask, dtype)
    sees_any = ~bias.isneginf().all(-1, keepdim=True)
    # A softmax over nothing but -inf is NaN, also in gradients that are multiplied by 0 later.
    bias = torch.where(sees_any, bias, 0)
    return KeyMask(bias, sees_any if visible is None else visible & sees_any)


def _common_row(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The one row that all rows which see anything share, (…, 1, tokens), and which rows those are, (…, tokens, 1)."""
    visible = ~hidden_by(mask).all(-1, keepdim=True)
    first = visible.to(torch.uint8).argmax(-2, keepdim=True)
    row = mask.take_along_dim(first, -2)
    uniform = ((mask == row) | ~visible).all()
    message = (
        "Linear attention cannot honour a pairwise mask between image tokens, only one that hides the same keys "
        "from every image query: pass a "
        "mask of shape (batch, heads or 1, 1, tokens), or use local_attention."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(uniform, "Linear attention cannot honour a pairwise mask, only a mask of keys.")
    elif not uniform:
        raise ValueError(message)
    return row, visible


def key_visibility(mask: torch.Tensor) -> torch.Tensor:
    """How far any query sees each key, in [0, 1]: (batch | 1, heads | 1, tokens, 1), fp32.

    What is added to the output or pooled besides attention is multiplied by this, so that hidden tokens do not leak.
    """
    while mask.ndim < 4:
        mask = mask[None]
    return mask_bias(mask, torch.float32).exp().amax(-2).clamp(max=1).unsqueeze(-1)
