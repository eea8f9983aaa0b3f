"""How the kernels of linear attention are launched: chosen by sizes, dtype and chip, never by timing.

Each entry is compiled for every chip in `tests/test_triton_compile.py`, which asserts that it needs no more registers
and shared memory than there are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Tokens of a block, text tokens of a block, channels that are summed over at a time, warps, pipeline stages."""

    tokens: int
    text: int
    summed: int
    warps: int
    stages: int


# Chips with 99 KB of shared memory per block: consumer cards. The others have 163 KB (sm_80) or 227 KB.
_SMALL_CHIPS = (86, 87, 89, 120, 121)


@functools.lru_cache(maxsize=256)
def choose_launch(kernel: str, dim: int, dtype: torch.dtype, chip: int, has_text: bool) -> Launch:
    """The launch of a kernel for heads of at most `dim` channels on a chip, its compute capability times 10; 0: the
    interpreter.

    Example:
        >>> choose_launch("product_kernel", 128, torch.bfloat16, 90, False)
        Launch(tokens=64, text=64, summed=128, warps=8, stages=3)
    """
    # A block of the state that stays over all tokens is read once; beside text it would take too many registers.
    summed = 64 if dim > 128 or (has_text and dim > 64) else block_of(dim)
    if not chip:
        return Launch(64, 32, summed, 4, 1)
    if dtype != torch.bfloat16:
        return Launch(32, 32, summed, 8, 2)
    if has_text and dim > 64 and kernel == "feature_gradient_kernel":
        return Launch(64, 16 if chip >= 100 else 32, 32, 8, 2)
    if chip in _SMALL_CHIPS or dim > 128 or has_text:
        return Launch(64, 64 if kernel == "text_gradients_kernel" else 32, summed, 8, 2)
    return Launch(64, 64, summed, 8, 3)


def block_of(dim: int) -> int:
    """How many of `dim` channels a kernel has in a block: a power of two from 16 to 128."""
    return min(128, max(16, 1 << (dim - 1).bit_length()))


def share_tokens(num_tokens: int, block: int, other_programs: int, processors: int) -> tuple[int, int]:
    """How many tokens, in whole blocks, a program takes, and how many programs that makes per head.

    Each program reads the state or writes one, so that more of them than keep the processors busy only cost.

    Example:
        >>> share_tokens(4096, 64, 24, 132)
        (384, 11)
    """
    blocks = -(-num_tokens // block)
    programs = max(1, min(blocks, 2 * processors // other_programs))
    share = -(-blocks // programs) * block
    return share, -(-num_tokens // share)
