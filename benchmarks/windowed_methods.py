"""The ways to compute attention in a window that the GPU benchmarks compare, and what they should give.

Letters: B batch, H heads, N tokens, D head_dim, T text tokens, which stand before a picture of side x side tokens.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from diffusers_linattn import TokenLayout, local_attention
from diffusers_linattn.kernels.local_attention import local_attention_triton
from diffusers_linattn.kernels.tile_configurations import choose_configuration, plan

from gpu_operators import Method


TILE = (16, 8)


def make_layout(text: int, side: int) -> TokenLayout:
    return TokenLayout.joint(text=text, grid=(1, side, side))


def ours(layout: TokenLayout, window: int) -> Method:
    return lambda q, k, v: local_attention(q, k, v, layout, window=window, impl="triton")


def dense_under_the_mask(layout: TokenLayout, window: int) -> Method:
    return lambda q, k, v: local_attention(q, k, v, layout, window=window, impl="dense")


def positions(text: int, side: int, device: str, order: torch.Tensor | None = None) -> torch.Tensor:
    """(2, N), int32: row and column of every token, -1 for text.

    CLEAR's mask counts in 32 bits as well; in 64 FlexAttention would have more to do for the same mask.
    """
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()])
    if order is not None:
        place = place[:, order]
    return torch.cat([torch.full((2, text), -1), place], 1).to(device, torch.int32)


def tile_order(side: int) -> torch.Tensor:
    """The tokens of a picture in tiles of 16 x 8, row by row inside a tile; the side divides by 16."""
    return (
        torch.arange(side * side).reshape(side // TILE[0], TILE[0], side // TILE[1], TILE[1]).transpose(1, 2).flatten()
    )


@functools.lru_cache(maxsize=2)
def flex(text: int, side: int, window: int, device: str, tiled: bool, compiled: bool) -> Method:
    """FlexAttention over tokens in raster order, as CLEAR runs it, or over tokens put in tile order.

    The blocks of its mask take seconds at the largest sizes: those of the last calls are kept.
    """
    y, x = positions(text, side, device, tile_order(side) if tiled else None)

    def visible(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        near = (y[i] - y[j]) ** 2 + (x[i] - x[j]) ** 2 < window**2
        return near | (i < text) | (j < text)

    mask = block_mask(visible, text + side * side, device)
    attend = _compiled_flex() if compiled else flex_attention
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def block_mask(visible: Callable[..., torch.Tensor], tokens: int, device: str, block: int = 128) -> BlockMask:
    """The blocks of a mask, a row of blocks at a time, so that the mask of all pairs is never in memory."""
    blocks = -(-tokens // block)
    j = torch.arange(tokens, device=device)
    partial = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    full = torch.zeros_like(partial)
    for row in range(blocks):
        i = torch.arange(row * block, min(tokens, (row + 1) * block), device=device)
        seen = F.pad(visible(0, 0, i[:, None], j[None, :]), (0, blocks * block - tokens))
        any_seen, all_seen = (f(seen, 0).unflatten(0, (blocks, block)) for f in (torch.any, torch.all))
        partial[row], full[row] = any_seen.any(1), all_seen.all(1) & (len(i) == block)
    partial &= ~full
    tables = []
    for kind in (partial, full):
        order = torch.argsort(kind.int(), dim=1, descending=True, stable=True).int()
        tables += [kind.sum(1, dtype=torch.int32)[None, None], order[None, None]]
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(tokens, tokens))


def natten(text: int, side: int, window: int) -> Method | None:
    """NATTEN's square window over the picture alone: another function, for the scale of its speed."""
    if importlib.util.find_spec("natten") is None:
        return None
    size = min(2 * window - 1, side if side % 2 else side - 1)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from natten import na2d  # here: where it is broken, its error stands in the table

        planes = [x[:, :, text:].transpose(1, 2).unflatten(1, (side, side)) for x in (q, k, v)]
        return na2d(*planes, kernel_size=(size, size)).flatten(1, 2).transpose(1, 2)

    return attend


def exact_pairs(text: int, side: int, window: int) -> int:
    """Pairs of tokens that see each other."""
    pairs = text * (2 * (text + side * side) - text)
    for dy in range(-window + 1, window):
        for dx in range(-window + 1, window):
            if dy * dy + dx * dx < window**2:
                pairs += max(0, side - abs(dy)) * max(0, side - abs(dx))
    return pairs


def visited_pairs(layout: TokenLayout, window: int, head_dim: int, dtype: torch.dtype, chip: int) -> dict[str, int]:
    """Pairs that each of our kernels computes."""
    chosen = choose_configuration(head_dim, dtype, chip)
    return {
        "forward": plan(layout, window, None, chosen.forward)[1].num_pairs,
        "query gradient": plan(layout, window, None, chosen.query_gradient)[1].num_pairs,
        "key gradients": plan(layout, window, None, chosen.key_gradients, owners_are_keys=True)[1].num_pairs,
    }


def check(text: int, side: int, window: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Compare output and gradients of some tokens of the text, the borders and the inside with fp32 arithmetic.

    A query's row and a key's column of the matrix of all pairs are enough for that. Raises where an error is larger
    than 1 % of the norm in 16 bits, 0.01 % in fp32.
    """
    layout, scale, device = make_layout(text, side), q.shape[-1] ** -0.5, str(q.device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    settings = (layout.encode(), window, None, scale)
    empty = k.new_empty(*k.shape[:2], 0, k.shape[3])
    out, lse = local_attention_triton(*leaves, empty, empty, None, *settings)
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    out = out.detach()
    y, x = positions(text, side, device)
    some = sorted({0, 1, side // 3, side // 2, side - 1})
    sample = torch.tensor(
        [0, text - 1] * (text > 0) + [text + r * side + c for r in some for c in some], device=device
    )
    seen = (y[sample, None] - y) ** 2 + (x[sample, None] - x) ** 2 < window**2
    seen |= (sample < text)[:, None] | (torch.arange(layout.length, device=device) < text)
    limit = 1e-4 if q.dtype == torch.float32 else 1e-2

    def compare(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        error = ((actual.float() - expected).norm() / expected.norm()).item()
        if not error < limit:
            raise RuntimeError(f"{name} is off by {error:.1e}, nothing was timed")

    for head in {0, q.shape[1] - 1}:
        tensors = [x[0, head].float() for x in (q, k, v, out, grad, dq, dk, dv)]
        fq, fk, fv, fo, fg, fdq, fdk, fdv = tensors
        delta = (fo * fg).sum(-1)
        weights = torch.softmax((fq[sample] @ fk.T * scale).masked_fill(~seen, -math.inf), -1)
        compare("the output", fo[sample], weights @ fv)
        dscores = weights * (fg[sample] @ fv.T - delta[sample, None])
        compare("the query's gradient", fdq[sample], dscores @ fk * scale)
        scores = (fk[sample] @ fq.T * scale).masked_fill(~seen, -math.inf)
        columns = torch.exp2(scores * math.log2(math.e) - lse[0, head])
        compare("the value's gradient", fdv[sample], columns @ fg)
        dscores = columns * (fv[sample] @ fg.T - delta)
        compare("the key's gradient", fdk[sample], dscores @ fq * scale)
