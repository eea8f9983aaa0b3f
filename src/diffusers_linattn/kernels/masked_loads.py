"""Loads of vectors of which some tokens or channels may not exist; shared by the Triton kernels.

Letters: M tokens of a block, BLOCK channels of a block, of which those from SIZE on do not exist.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def existing(valid, channel, SIZE: tl.constexpr):
    """The mask of a block; where all channels exist, the tokens' alone, which takes fewer registers."""
    BLOCK: tl.constexpr = channel.shape[0]
    if SIZE // BLOCK * BLOCK == SIZE:
        return valid[:, None]
    else:
        return valid[:, None] & (channel < SIZE)[None, :]


@triton.jit
def load_existing(pointers, valid, channel, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """(M, BLOCK) numbers, 0 where a token or a channel does not exist; without MASKED all tokens do."""
    BLOCK: tl.constexpr = channel.shape[0]
    if MASKED:
        return tl.load(pointers, mask=existing(valid, channel, SIZE), other=0.0)
    elif SIZE // BLOCK * BLOCK == SIZE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(channel < SIZE)[None, :], other=0.0)
