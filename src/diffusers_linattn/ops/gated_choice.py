"""Which implementation of `gated_linear_attention` answers a call where the user names none."""

from __future__ import annotations

import torch

from diffusers_linattn.kernels.gated_attention import MAX_DIM
from diffusers_linattn.kernels.launching import DTYPES, why_not


def choose_impl(query: torch.Tensor, value: torch.Tensor, features: int) -> str:
    """The implementation for a call: `"triton"` on a GPU that it runs on, else `"chunked"`."""
    on_gpu = query.device.type == "cuda"
    return "triton" if on_gpu and why_not_triton(query, value, features) is None else "chunked"


def why_not_triton(query: torch.Tensor, value: torch.Tensor, features: int) -> str | None:
    """Why `impl="triton"` cannot answer this call, as the rest of a sentence; `None` if it can."""
    if query.dtype not in DTYPES:
        return f"it computes in bf16, fp16 and fp32, but got {query.dtype}: use impl='chunked'"
    if max(features, value.shape[-1]) > MAX_DIM:
        return (
            f"features and value_dim may be at most {MAX_DIM}, but got {features} and {value.shape[-1]}: use "
            "impl='chunked'"
        )
    return why_not(str(query.device))
