"""How the kernels of linear attention are launched: chosen by sizes, dtype and chip, never by timing.

Each entry is compiled for every chip in `tests/test_triton_compile.py`, which asserts that it needs no more registers
and shared memory than there are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from diffusers_linattn.kernels.launching import SMALL_CHIPS


@dataclass(frozen=True)
class Launch:
    """Tokens of a block, text tokens of a block, channels that are summed over at a time, warps, pipeline stages, and
    programs per processor."""

    tokens: int
    text: int
    summed: int
    warps: int
    stages: int
    programs: int = 2


@functools.lru_cache(maxsize=256)
def choose_launch(kernel: str, dim: int, dtype: torch.dtype, chip: int, has_text: bool) -> Launch:
    """The launch of a kernel for heads of at most `dim` channels on a chip, its compute capability times 10; 0: the
    interpreter.

    Example:
        >>> choose_launch("product_kernel", 128, torch.bfloat16, 90, False)
        Launch(tokens=64, text=64, summed=128, warps=4, stages=3, programs=2)
    """
    # A block of the state that stays over all tokens is read once; beside text it would take too many registers.
    summed = 64 if dim > 128 or (has_text and dim > 64) else block_of(dim)
    if not chip:
        return Launch(64, 32, summed, 4, 1)
    if dtype != torch.bfloat16:
        narrow = dtype == torch.float32 and dim > 64 and kernel == "product_kernel"  # of fp32, 64 spill
        return Launch(32, 32, 32 if narrow else summed, 8, 2)
    if has_text and dim > 64 and kernel in ("feature_gradient_kernel", "blend_gradients_kernel"):
        return Launch(64, 16 if chip >= 100 else 32, 32, 8, 2)
    # Hopper's products of 64 rows are the work of 4 warps; 8 would do it twice. What a head of 128 keeps beside text,
    # or as its state, needs the registers of 8.
    wide = 64 if has_text or kernel == "state_kernel" else 128
    warps = 4 if chip == 90 and dim <= wide else 8
    if chip in SMALL_CHIPS or dim > 128 or has_text:
        return Launch(64, 64 if kernel == "text_gradients_kernel" else 32, summed, warps, 2)
    if chip != 90 or kernel == "state_kernel":
        return Launch(64, 64, summed, warps, 3)
    # Programs hide each other's waits: three of up to 64 channels fit at once, or two, the gradients' with 2 stages.
    return Launch(64, 64, summed, warps, 3 if kernel == "product_kernel" else 2, 3 if dim <= 64 else 2)


def block_of(dim: int) -> int:
    """How many of `dim` channels a kernel has in a block: a power of two from 16 to 128."""
    return min(128, max(16, 1 << (dim - 1).bit_length()))


def share_tokens(num_tokens: int, block: int, other_programs: int, places: int) -> tuple[int, int]:
    """How many tokens, in whole blocks, a program takes, and how many programs that makes per head.

    `places` is how many programs run at once, `other_programs` how many each share of the tokens has. Each reads the
    state or writes one, so that more of them than keep the processors busy only cost.

    Example:
        >>> share_tokens(4096, 64, 24, 264)
        (384, 11)
    """
    blocks = -(-num_tokens // block)
    programs = max(1, min(blocks, places // other_programs))
    share = -(-blocks // programs) * block
    return share, -(-num_tokens // share)
