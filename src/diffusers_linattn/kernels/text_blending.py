"""Sums over image keys divided by their weights, with the text keys added to both, as an operator of `torch.library`.

For mechanisms whose weights of image keys are not exp(score), so that one softmax over all keys is no option.

Letters: B batch, H heads, G image tokens, T text tokens, K features, V value columns.
"""

from __future__ import annotations

from typing import Any

import torch

from diffusers_linattn.kernels.launching import empty_like
from diffusers_linattn.kernels.linear_call import Call


_INPUTS = "Tensor query, Tensor? text_key, Tensor? text_value, Tensor? text_bias, float scale"


@torch.library.custom_op(
    "diffusers_linattn::blend_text",
    mutates_args=(),
    schema=f"(Tensor sums, Tensor counts, {_INPUTS}) -> (Tensor, Tensor)",
)
def blend_text(
    sums: torch.Tensor,
    counts: torch.Tensor,
    query: torch.Tensor,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    text_bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums + Σ exp(s) v) / (counts + EPS + Σ exp(s)) over the text, s = scale q·k + bias; log2 of the divisor.

    sums (B, H, G, V) and counts (B, H, G), not negative, are fp32. query (B, H, G, K), text_key (B, H, T, K) and
    text_value (B, H, T, V) share one of the dtypes bf16, fp16 and fp32; beside text, K and V are at most
    `MAX_TEXT_DIM`. text_bias is fp32 (B | 1, H | 1, T) without a gradient, or `None`. The first result is (B, H, G, V)
    in query's dtype and in the memory order of (B, G, H, V), the second fp32 (B, H, G).
    """
    from diffusers_linattn.kernels.text_blending_passes import blend_kernel

    call = Call(query, sums, "none", text_key, text_value, text_bias, scale=scale)
    out, lse = empty_like(sums, query.dtype), torch.empty_like(counts, memory_format=torch.contiguous_format)
    tensors: dict[str, Any] = {"query": call.tokens, "value": call.columns, "counts": counts.contiguous()}
    call.launch(blend_kernel, call.column_blocks, out=out, lse=lse, **tensors)
    return out, lse


@blend_text.register_fake
def _(sums: torch.Tensor, counts: torch.Tensor, query: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_like(sums, query.dtype), torch.empty_like(counts, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "diffusers_linattn::blend_text_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def blend_text_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    text_bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """The gradients of sums, counts, query, text_key, text_value (the last three empty without text)."""
    from diffusers_linattn.kernels.text_blending_passes import blend_gradients_kernel

    call = Call(query, grad, "none", text_key, text_value, text_bias, scale=scale)
    dsums, dcounts, minus_delta = empty_like(out, torch.float32), torch.empty_like(lse), torch.empty_like(lse)
    dquery = query.new_empty(0) if text_key is None else empty_like(query)
    if not call.num_text:  # nothing writes it
        dquery.zero_()
    call.launch(
        blend_gradients_kernel,
        1,
        query=call.tokens,
        grad=call.columns,
        out=out,
        lse=lse,
        dquery=None if text_key is None else dquery,
        dsums=dsums,
        dcounts=dcounts,
        minus_delta=minus_delta,
    )
    return dsums, dcounts, dquery, *call.text_gradients(lse, minus_delta)


@blend_text_backward.register_fake
def _(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    of_text = [query.new_empty(0 if x is None else x.shape) for x in (text_key, text_value)]
    dquery = query.new_empty(0) if text_key is None else empty_like(query)
    return empty_like(out, torch.float32), torch.empty_like(lse), dquery, *of_text


def _setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, _, *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under gradient checkpointing it may not be asked again
    dsums, dcounts, *of_query_and_text = blend_text_backward(grad, *saved, ctx.scale)
    return dsums, dcounts, *(of_query_and_text if saved[3] is not None else (None, None, None)), None, None


blend_text.register_autograd(_backward, setup_context=_setup_context)
