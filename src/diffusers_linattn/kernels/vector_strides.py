"""How far apart vectors of channels lie, told to the compiler so that it reads several channels at once.

Triton asks of a stride only whether 16 divides it: heads of 72 channels, or tokens of one head of 88, would be read
element by element. The launches pass tensors whose vectors lie multiples of 8 apart where 8 divides their size: see
`launching.adjacent`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_offset(batch, head, stride_b, stride_h, DIM: tl.constexpr):
    """How many elements the first vector of a head, of DIM channels, lies behind the tensor's first."""
    return offset_along(batch, stride_b, DIM) + offset_along(head, stride_h, DIM)


@triton.jit
def offset_along(index, stride, DIM: tl.constexpr):
    """index * stride, of which the compiler learns that 8 divides it where 8 divides DIM."""
    offset = index * stride  # here, not an argument: the hint goes to the operation that computes it
    if DIM % 8 == 0:
        offset = tl.multiple_of(offset, 8)
    return offset


@triton.jit
def vector_stride(stride, DIM: tl.constexpr):
    """The stride, of which the compiler learns that 8 divides it where 8 divides DIM; for many offsets at once."""
    # A hint is lost where an argument is multiplied by a block of indices. Where 16 divides DIM it divides all strides
    # but those of odd views, and an argument that is used as it came costs no register.
    if DIM % 16 == 8:
        stride = stride // 8 * 8
    return stride
