"""Where the vectors of a head begin; shared by all Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_offset(batch, head, stride_b, stride_h, DIM: tl.constexpr):
    """How many elements the first vector of a head, of DIM channels, lies behind the tensor's first."""
    return offset_along(batch, stride_b, DIM) + offset_along(head, stride_h, DIM)


@triton.jit
def offset_along(index, stride, DIM: tl.constexpr):
    """index * stride, of which the compiler learns that 8 divides it where 8 divides DIM.

    Triton asks of a stride only whether 16 divides it: heads of 72 channels would be read element by element. The
    launches pass tensors whose vectors lie multiples of 8 apart where 8 divides their size: see `launching.adjacent`.
    """
    offset = index * stride  # here, not an argument: the hint goes to the operation that computes it
    if DIM % 8 == 0:
        offset = tl.multiple_of(offset, 8)
    return offset
