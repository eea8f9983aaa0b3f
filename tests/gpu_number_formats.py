"""bf16 and tf32 in Triton's interpreter, which takes the bits of bf16 for integers and computes tf32 in fp32.

Numbers stay what they are there, bf16 the integers of its bits; what is computed with them is patched. As on a GPU,
fp32 becomes bf16 by rounding to the nearest even, products of bf16 are exact and added up in fp32, and those in tf32
cut off what tf32 does not hold. Sums and maxima of two numbers in bf16 are rounded; other arithmetic on bf16, which no
kernel needs, is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def use_gpu_number_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter for as long as `monkeypatch` lives."""
    builder, handle, reduction = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.ReduceOps
    cast, dot, reduce = builder.cast_impl, builder.create_dot, reduction.apply_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return handle(widen(source.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return handle(round_to_bf16(source.data), tl.bfloat16)
        assert tl.bfloat16 not in kinds or kinds[0] == kinds[1], f"the interpreter has no cast from {kinds}"
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(widen(x.data), tl.float32) for x in (a, b))
        elif a.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = (handle(cut_to_tf32(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def binary_op(self: Any, left: Any, right: Any, compute: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16 and compute in (np.add, np.maximum):
            result = compute(widen(left.data), widen(right.data))
            return handle(round_to_bf16(result), tl.bfloat16)
        return binary(self, left, right, compute)

    def refusing(compute: Any) -> Any:
        def checked(self: Any, *args: Any) -> Any:
            operands = [x for x in args if isinstance(x, handle)]
            selects = args[-1] is np.where  # moves numbers, computes nothing
            assert selects or all(x.dtype.scalar != tl.bfloat16 for x in operands), "arithmetic on bf16"
            return compute(self, *args)

        return checked

    def apply_impl(self: Any, values: Any) -> Any:
        assert all(x.dtype.scalar != tl.bfloat16 for x in values), "a sum or maximum of bf16"
        return reduce(self, values)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(reduction, "apply_impl", apply_impl)
    binary = refusing(builder.binary_op)
    monkeypatch.setattr(builder, "binary_op", binary_op)
    for name in ("unary_op", "ternary_op"):
        monkeypatch.setattr(builder, name, refusing(getattr(builder, name)))


def widen(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 to the bits of the nearest bf16, the even one of two; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """fp32 without the last 13 bits of its fraction."""
    return (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32)
