"""Where the vectors of a head begin; shared by all Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_offset(batch, head, stride_b, stride_h, DIM: tl.constexpr):
    """How many elements the first vector of a head lies behind the tensor's first.

    Triton asks of a stride only whether 16 divides it: heads of 72 channels would be read element by element. The
    launches pass tensors whose vectors lie multiples of 8 apart where 8 divides `DIM`: see `launching.adjacent`.
    """
    offset = batch * stride_b + head * stride_h
    if DIM % 8 == 0:
        offset = tl.multiple_of(offset, 8)
    return offset
