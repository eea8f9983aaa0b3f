"""Linear attention in Triton as two operators of `torch.library` with gradients: the state, and the product with it.

The kernels read (batch, heads, tokens, channels) tensors of any strides as long as the channels are adjacent, so that
heads cut anew and the image's part of a longer sequence are not copied. Triton is imported by the first call.

Letters: B batch, H heads, G tokens, T text tokens, K features per head, V value columns.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from diffusers_linattn.kernels.launching import LOG2_E, adjacent, chip_of, empty_like, fp32_precision
from diffusers_linattn.kernels.linear_launches import Launch, block_of, choose_launch, share_tokens


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
    return _Call(key, value, feature_map, weights=weights).state(weights)


@linear_state.register_fake
def _(
    key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor | None, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_state(key, value)


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

    call = _Call(key, value, feature_map, weights=weights)
    dkey, dvalue = empty_like(key), empty_like(value)
    tensors: dict[str, Any] = {"state": dstate.contiguous(), "normalizer": dnormalizer.contiguous()}
    if max(call.sides) <= MAX_NARROW_DIM and key.dtype != torch.float32:
        call.launch(narrow_gradients_kernel, 1, key=call.key, value=call.value, dkey=dkey, dvalue=dvalue, **tensors)
        return dkey, dvalue
    tensors["query"] = call.key
    call.launch(feature_gradient_kernel, call.feature_blocks, grad=call.value, dquery=dkey, **tensors)
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

    call = _Call(query, state, feature_map, text_key, text_value, text_bias, scale=scale)
    out, lse = _empty_product(query, state)
    tensors: dict[str, Any] = {"query": call.key, "state": state.contiguous(), "normalizer": normalizer.contiguous()}
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
    from diffusers_linattn.kernels.linear_attention_backward import feature_gradient_kernel, text_gradients_kernel

    call = _Call(query, grad, feature_map, text_key, text_value, text_bias, scale=scale)
    grad, dquery = call.value, empty_like(query)
    shrunk, minus_delta = torch.empty_like(lse), torch.empty_like(lse)
    call.launch(
        feature_gradient_kernel,
        call.feature_blocks,
        normalized=True,
        query=call.key,
        grad=grad,
        out=out,
        lse=lse,
        state=state.contiguous(),
        normalizer=normalizer.contiguous(),
        dquery=dquery,
        shrunk=shrunk,
        minus_delta=minus_delta,
    )
    dstate, dnormalizer = call.state(shrunk, minus_delta)
    if text_key is None or text_value is None:
        return dquery, dstate, dnormalizer, query.new_empty(0), query.new_empty(0)
    blocks = call.text_blocks()
    _, _, shares = call.plan("text_gradients_kernel", blocks)
    parts = [query.new_empty(shares, *x.shape, dtype=torch.float32) for x in (text_key, text_value)]
    results: dict[str, Any] = {"dkey": parts[0], "dvalue": parts[1]}
    call.launch(text_gradients_kernel, blocks, query=call.key, grad=grad, lse=lse, minus_delta=minus_delta, **results)
    return dquery, dstate, dnormalizer, *(part.sum(0).to(query.dtype) for part in parts)


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


def _empty_state(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*key.shape[:2], key.shape[3])
    return key.new_empty(*shape, value.shape[3], dtype=torch.float32), key.new_empty(shape, dtype=torch.float32)


def _empty_product(query: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, state.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=torch.float32)


# Which tensor the strides of a kernel are of, by the letters of their names.
_STRIDES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "w": "weights",
    "g": "grad",
    "o": "out",
    "d": "dquery",
    "dk": "dkey",
    "dv": "dvalue",
    "tk": "text_key",
    "tv": "text_value",
    "b": "text_bias",
}


class _Call:
    """What the launches of one call share.

    `key` are the tokens that φ is taken of, keys or queries, and the last side of `value` is V.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        feature_map: str,
        text_key: torch.Tensor | None = None,
        text_value: torch.Tensor | None = None,
        text_bias: torch.Tensor | None = None,
        *,
        weights: torch.Tensor | None = None,
        scale: float = 0.0,
    ) -> None:
        self.key, self.value = adjacent(key), adjacent(value)
        self.sides = (key.shape[3], value.shape[3])
        self.blocks = tuple(map(block_of, self.sides))
        self.feature_blocks, self.column_blocks = (-(-n // b) for n, b in zip(self.sides, self.blocks, strict=True))
        self.weights = None if weights is None else weights.expand(*key.shape[:2], -1)
        self.text: dict[str, torch.Tensor] = {}
        self.num_text, self.has_bias = 0, text_bias is not None
        if text_key is not None and text_value is not None:
            self.text, self.num_text = (
                {"text_key": adjacent(text_key), "text_value": adjacent(text_value)},
                text_key.shape[2],
            )
            if text_bias is not None:
                self.text["text_bias"] = (text_bias * LOG2_E).expand(*key.shape[:2], -1)
        self.scale, self.feature_map = scale, feature_map
        # fp16 is multiplied in fp32, for its range: tf32 has all its digits.
        self.precision = "tf32" if key.dtype == torch.float16 else fp32_precision(key.device)

    def text_blocks(self) -> int:
        return -(-self.num_text // self._launch("text_gradients_kernel").text)

    def plan(self, kernel: str, blocks: int) -> tuple[Launch, int, int]:
        """How a kernel is launched, the tokens of a program, and how many programs share those of a head."""
        launch = self._launch(kernel)
        others = max(1, blocks * self.key.shape[0] * self.key.shape[1])
        places = launch.programs * _processors(self.key.device)
        return launch, *share_tokens(self.key.shape[2], launch.tokens, others, places)

    def state(
        self, weights: torch.Tensor | None, counts: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ w φ(k) vᵀ and Σ w φ(k) c with the counts c (batch, heads, tokens), which are 1 where not given."""
        from diffusers_linattn.kernels.linear_attention_forward import state_kernel

        if weights is not None:
            weights = weights.expand(*self.key.shape[:2], -1)
        blocks = self.feature_blocks * self.column_blocks
        _, _, shares = self.plan("state_kernel", blocks)
        state, normalizer = (x.new_empty(shares, *x.shape) for x in _empty_state(self.key, self.value))
        self.launch(
            state_kernel,
            blocks,
            key=self.key,
            value=self.value,
            weights=weights,
            counts=counts,
            state=state,
            normalizer=normalizer,
        )
        return (state[0], normalizer[0]) if shares == 1 else (state.sum(0), normalizer.sum(0))

    def launch(self, kernel: Any, blocks: int, *, normalized: bool = False, **tensors: torch.Tensor | None) -> None:
        """Run a kernel over `blocks` times the shares times the heads."""
        batch, heads, tokens, _ = self.key.shape
        if not batch * heads:
            return
        launch, share, shares = self.plan(kernel.__name__, blocks)
        given = {"weights": self.weights, **self.text, **tensors}
        weighted = given["weights"] is not None
        numbers = {
            "heads": heads,
            "num_tokens": tokens,
            "num_text": self.num_text,
            "share": share,
            "scale": self.scale,
            "log2_scale": self.scale * LOG2_E,
            "FEATURES": self.sides[0],
            "COLUMNS": self.sides[1],
            "BLOCK_K": launch.summed if kernel.__name__ == "product_kernel" else self.blocks[0],
            "BLOCK_V": launch.summed if kernel.__name__ == "feature_gradient_kernel" else self.blocks[1],
            "WIDE_K": self.blocks[0],
            "WIDE_V": self.blocks[1],
            "BLOCK_M": launch.tokens,
            "BLOCK_T": launch.text,
            "FEATURE_MAP": self.feature_map,
            "NORMALIZED": normalized,
            "WEIGHTED": weighted,
            "COUNTED": given.get("counts") is not None,
            "HAS_TEXT": self.num_text > 0,
            "HAS_BIAS": self.has_bias,
            # Products with the state in the tokens' own dtype, the state in two summands; fp16 has not the range.
            "SPLIT": self.key.dtype == torch.bfloat16,
            "PRECISION": self.precision,
        }
        arguments: dict[str, Any] = {}
        for name in kernel.arg_names:
            if name.startswith("stride_"):
                tensor = given.get(_STRIDES[name[7:-1]])
                arguments[name] = 0 if tensor is None else tensor.stride("bhn".index(name[-1]))
            elif name in numbers:
                arguments[name] = numbers[name]
            else:
                tensor = given.get(name)
                arguments[name] = self.key if tensor is None else tensor  # where there is none it is not read
        device = self.key.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            # Triton 3.10 turns the fusion of products and sums off unless asked for.
            kernel[blocks, shares, batch * heads](
                **arguments, num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True
            )

    def _launch(self, kernel: str) -> Launch:
        chip = chip_of(self.key.device)
        return choose_launch(kernel, max(self.sides), self.key.dtype, chip, self.num_text > 0)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
