"""Linear attention in Triton as two operators of `torch.library` with gradients: the state, and the product with it.

The kernels read (batch, heads, tokens, channels) tensors of any strides as long as the channels are adjacent, so that
heads cut anew and the image's part of a longer sequence are not copied. Triton is imported by the first call.

Letters: B batch, H heads, G tokens, T text tokens, K features per head, V value columns.
"""

from __future__ import annotations

from typing import Any

import torch

from diffusers_linattn.kernels.launching import empty_like
from diffusers_linattn.kernels.linear_call import Call, empty_state


# Feature maps that the kernels compute; "none" takes features as they are.
FUSED_FEATURES = ("relu", "elu")
MAX_DIM = 1024
# The text is attended to by programs that have a whole head in one block.
MAX_TEXT_DIM = 128
# Up to here, in half precision, the gradients of key and value are one launch; more would not fit in the registers.
MAX_NARROW_DIM = 64


@torch.library.custom_op(
    "diffusers_linattn::linear_state",
    mutates_args=(),
    schema="(Tensor key, Tensor value, Tensor? weights, str feature_map) -> (Tensor, Tensor)",
)
def linear_state(
    key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor | None, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ w φ(k) vᵀ over all tokens, fp32 (B, H, K, V), and Σ w φ(k), fp32 (B, H, K).

    key (B, H, G, K) and value (B, H, G, V) share one of the dtypes bf16, fp16 and fp32; weights is fp32
    (B | 1, H | 1, G) without a gradient, or `None` for 1. `feature_map` is one of `FUSED_FEATURES`, or `"none"` where
    key is φ(k) already.
    """
    return Call(key, value, feature_map, weights=weights).state()


@linear_state.register_fake
def _(
    key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor | None, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_state(key, value)


@torch.library.custom_op(
    "diffusers_linattn::linear_state_backward",
    mutates_args=(),
    schema="(Tensor dstate, Tensor dnormalizer, Tensor key, Tensor value, Tensor? weights, str feature_map) "
    "-> (Tensor, Tensor)",
)
def linear_state_backward(
    dstate: torch.Tensor,
    dnormalizer: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor | None,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of key and value."""
    from diffusers_linattn.kernels.linear_attention_backward import feature_gradient_kernel, narrow_gradients_kernel
    from diffusers_linattn.kernels.linear_attention_forward import product_kernel

    call = Call(key, value, feature_map, weights=weights)
    dkey, dvalue = empty_like(key), empty_like(value)
    tensors: dict[str, Any] = {"state": dstate.contiguous(), "normalizer": dnormalizer.contiguous()}
    if max(call.sides) <= MAX_NARROW_DIM and key.dtype != torch.float32:
        call.launch(
            narrow_gradients_kernel, 1, key=call.tokens, value=call.columns, dkey=dkey, dvalue=dvalue, **tensors
        )
        return dkey, dvalue
    tensors["query"] = call.tokens
    call.launch(feature_gradient_kernel, call.feature_blocks, grad=call.columns, dquery=dkey, **tensors)
    call.launch(product_kernel, call.column_blocks, out=dvalue, **tensors)
    return dkey, dvalue


@linear_state_backward.register_fake
def _(
    dstate: torch.Tensor, dnormalizer: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_like(key), empty_like(value)


def _setup_state(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.feature_map = inputs
    ctx.save_for_backward(*tensors)


def _state_gradients(ctx: Any, dstate: torch.Tensor, dnormalizer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*linear_state_backward(dstate, dnormalizer, *ctx.saved_tensors, ctx.feature_map), None, None)


linear_state.register_autograd(_state_gradients, setup_context=_setup_state)


_INPUTS = (
    "Tensor query, Tensor state, Tensor normalizer, Tensor? text_key, Tensor? text_value, Tensor? text_bias, "
    "float scale, str feature_map"
)


@torch.library.custom_op(
    "diffusers_linattn::linear_product", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
def linear_product(
    query: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    text_bias: torch.Tensor | None,
    scale: float,
    feature_map: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(φ(q) S + Σ exp(s) v) / (φ(q)·z + EPS + Σ exp(s)) over the text, s = scale q·k + bias; log2 of the divisor.

    query is (B, H, G, K), state (B, H, K, V) and normalizer (B, H, K) are those of [`linear_state`]. text_key
    (B, H, T, K) and text_value (B, H, T, V), both at most `MAX_TEXT_DIM` wide, or `None`; text_bias is fp32
    (B | 1, H | 1, T) without a gradient, or `None`. The first result is (B, H, G, V) in query's dtype and in the
    memory order of (B, G, H, V), the second fp32 (B, H, G).
    """
    from diffusers_linattn.kernels.linear_attention_forward import product_kernel

    call = Call(query, state, feature_map, text_key, text_value, text_bias, scale=scale)
    out, lse = _empty_product(query, state)
    tensors: dict[str, Any] = {
        "query": call.tokens,
        "state": state.contiguous(),
        "normalizer": normalizer.contiguous(),
    }
    call.launch(product_kernel, call.column_blocks, normalized=True, out=out, lse=lse, **tensors)
    return out, lse


@linear_product.register_fake
def _(query: torch.Tensor, state: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_product(query, state)


@torch.library.custom_op(
    "diffusers_linattn::linear_product_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_product_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    text_bias: torch.Tensor | None,
    scale: float,
    feature_map: str,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, state, normalizer, text_key, text_value (empty without); the same bits every time."""
    from diffusers_linattn.kernels.linear_attention_backward import feature_gradient_kernel

    call = Call(query, grad, feature_map, text_key, text_value, text_bias, scale=scale)
    grad, dquery = call.columns, empty_like(query)
    shrunk, minus_delta = torch.empty_like(lse), torch.empty_like(lse)
    call.launch(
        feature_gradient_kernel,
        call.feature_blocks,
        normalized=True,
        query=call.tokens,
        grad=grad,
        out=out,
        lse=lse,
        state=state.contiguous(),
        normalizer=normalizer.contiguous(),
        dquery=dquery,
        shrunk=shrunk,
        minus_delta=minus_delta,
    )
    dstate, dnormalizer = call.state(weights=shrunk, counts=minus_delta)
    return dquery, dstate, dnormalizer, *call.text_gradients(lse, minus_delta)


@linear_product_backward.register_fake
def _(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    of_text = [query.new_empty(0 if x is None else x.shape) for x in (text_key, text_value)]
    return empty_like(query), torch.empty_like(state), torch.empty_like(normalizer), *of_text


def _setup_product(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, scale, feature_map = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)
    ctx.settings = (scale, feature_map)


def _product_gradients(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under gradient checkpointing it may not be asked again
    *gradients, dtext_key, dtext_value = linear_product_backward(grad, *saved, *ctx.settings)
    of_text = (dtext_key, dtext_value) if saved[5] is not None else (None, None)
    return (*gradients, *of_text, None, None, None)


linear_product.register_autograd(_product_gradients, setup_context=_setup_product)


def _empty_product(query: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, state.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=torch.float32)
