"""What the launches of all Triton kernels share: where they run, the tensors they take, the precision of products."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from typing import Any

import torch


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = math.log2(math.e)
# Without a mask, kernels multiply scores by the scale after they have taken their maximum, and hidden some with large
# negative numbers. For smaller scales, and negative ones, they get a mask of zeros.
SMALLEST_SCALE = 1e-10

# Programs along any axis of a grid but its first.
MAX_GRID = 65535

# Chips with 99 KB of shared memory per block: consumer cards. The others have 163 KB (sm_80) or 227 KB.
SMALL_CHIPS = (86, 87, 89, 120, 121)


@torch.compiler.assume_constant_result
def why_not(device: str) -> str | None:
    """Why the kernels cannot run on a device, as the rest of a sentence; `None` if they can."""
    return _why_not(device)


@functools.cache
def _why_not(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if torch.device(device).type != "cuda" or torch.version.hip is not None:
        return "it needs an NVIDIA GPU (or TRITON_INTERPRET=1 for tests): move the tensors to a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or later"
    return None


def precision_of(x: torch.Tensor) -> str:
    """What torch's settings say about products with `x`: `"tf32"` or `"ieee"`.

    They say nothing about other dtypes than fp32: kernels for those are compiled once, whatever is set.
    """
    if x.device.type != "cuda" or x.dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9; there the older setting cannot be read once this one has been set.
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def chip_of(device: torch.device) -> int:
    """The compute capability times 10; 0: the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """`x` with its channels side by side in memory, and vectors that begin multiples of 8 elements apart if 8 divides
    their size; copied where it is not so. An expanded gradient, for example, is not."""
    size = x.shape[3]
    apart = [stride for stride, length in zip(x.stride()[:3], x.shape[:3], strict=True) if length > 1]
    if (x.stride(3) == 1 or size == 1) and (size % 8 or all(stride % 8 == 0 for stride in apart)):
        return x
    return x.contiguous()


def run_kernel(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors, whichever is the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Triton 3.10 turns the fusion of products and sums off unless asked for.
        kernel[grid](*arguments, **options, enable_fp_fusion=True)


def strides_of(x: torch.Tensor) -> list[int]:
    return list(x.stride()[:3])


def empty_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(B, H, N, D) in the memory order of (B, N, H, D), which callers transpose back for free."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
