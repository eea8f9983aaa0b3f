"""What the launches of one call of linear attention share: tensors, strides, sizes, and how many programs there are.

Letters: B batch, H heads, G tokens, K features per head, V value columns.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from diffusers_linattn.kernels.launching import (
    LOG2_E,
    MAX_GRID,
    SMALLEST_SCALE,
    adjacent,
    chip_of,
    precision_of,
    run_kernel,
)
from diffusers_linattn.kernels.linear_launches import Launch, block_of, choose_launch, share_tokens


def empty_state(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for a state, fp32 (B, H, K, V), and its normalizer, fp32 (B, H, K)."""
    shape = (*key.shape[:2], key.shape[3])
    return key.new_empty(*shape, value.shape[3], dtype=torch.float32), key.new_empty(shape, dtype=torch.float32)


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
    "s": "dsums",
}


class Call:
    """What the launches of one call share.

    φ is taken of `tokens` (B, H, G, K), keys or queries; `columns` has V as its last side: values, gradients of the
    output, or the state.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        columns: torch.Tensor,
        feature_map: str,
        text_key: torch.Tensor | None = None,
        text_value: torch.Tensor | None = None,
        text_bias: torch.Tensor | None = None,
        *,
        weights: torch.Tensor | None = None,
        scale: float = 0.0,
    ) -> None:
        self.tokens, self.columns = adjacent(tokens), adjacent(columns)
        self.sides = (tokens.shape[3], columns.shape[3])
        self.blocks = tuple(map(block_of, self.sides))
        self.feature_blocks, self.column_blocks = (-(-n // b) for n, b in zip(self.sides, self.blocks, strict=True))
        self.weights = None if weights is None else weights.contiguous().expand(*tokens.shape[:2], -1)
        self.text: dict[str, torch.Tensor] = {}
        self.num_text, self.has_bias = 0, False
        if text_key is not None and text_value is not None:
            self.text, self.num_text = (
                {"text_key": adjacent(text_key), "text_value": adjacent(text_value)},
                text_key.shape[2],
            )
            if text_bias is None and scale < SMALLEST_SCALE:
                text_bias = text_key.new_zeros(1, 1, self.num_text, dtype=torch.float32)
            if text_bias is not None:
                self.has_bias = True
                self.text["text_bias"] = (text_bias * LOG2_E).contiguous().expand(*tokens.shape[:2], -1)
        self.scale, self.feature_map = scale, feature_map
        # fp16 is multiplied in fp32, for its range: tf32 has all its digits.
        self.precision = "tf32" if tokens.dtype == torch.float16 else precision_of(tokens)

    def plan(self, kernel: str, blocks: int) -> tuple[Launch, int, int]:
        """How a kernel is launched, the tokens of a program, and how many programs share those of a head."""
        launch = self._launch(kernel)
        others = max(1, blocks * self.tokens.shape[0] * self.tokens.shape[1])
        places = launch.programs * _processors(self.tokens.device)
        return launch, *share_tokens(self.tokens.shape[2], launch.tokens, others, places)

    def state(self, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ w φ(k) vᵀ and Σ w φ(k) c; `given` weights w instead of the call's, and counts c, else 1.

        Both (batch, heads, tokens).
        """
        from diffusers_linattn.kernels.linear_attention_forward import state_kernel

        blocks = self.feature_blocks * self.column_blocks
        _, _, shares = self.plan("state_kernel", blocks)
        state, normalizer = (x.new_empty(shares, *x.shape) for x in empty_state(self.tokens, self.columns))
        self.launch(
            state_kernel,
            blocks,
            key=self.tokens,
            value=self.columns,
            state=state,
            normalizer=normalizer,
            **given,
        )
        return (state[0], normalizer[0]) if shares == 1 else (state.sum(0), normalizer.sum(0))

    def text_gradients(self, lse: torch.Tensor, minus_delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of the text's keys and values, where `columns` is that of the output; empty without text.

        lse is the base-2 logarithm of the denominators, minus_delta what is taken off products of values with
        gradients, both (batch, heads, tokens).
        """
        from diffusers_linattn.kernels.linear_attention_backward import text_gradients_kernel

        if not self.text:
            return self.tokens.new_empty(0), self.tokens.new_empty(0)
        blocks = -(-self.num_text // self._launch("text_gradients_kernel").text)
        _, _, shares = self.plan("text_gradients_kernel", blocks)
        of_text = (self.text["text_key"], self.text["text_value"])
        dkey, dvalue = (x.new_empty(shares, *x.shape, dtype=torch.float32) for x in of_text)
        tensors: dict[str, Any] = {"query": self.tokens, "grad": self.columns, "lse": lse, "minus_delta": minus_delta}
        self.launch(text_gradients_kernel, blocks, dkey=dkey, dvalue=dvalue, **tensors)
        return dkey.sum(0).to(self.tokens.dtype), dvalue.sum(0).to(self.tokens.dtype)

    def launch(self, kernel: Any, blocks: int, *, normalized: bool = False, **tensors: torch.Tensor | None) -> None:
        """Run a kernel over `blocks` times the shares times the heads."""
        batch, heads, num_tokens, _ = self.tokens.shape
        if not batch * heads:
            return
        if batch * heads > MAX_GRID:  # not beside the other conditions: a compiled function would bound the batch
            raise ValueError(
                f"impl='triton' takes at most {MAX_GRID} heads of all samples together, got {batch} x {heads}: split "
                "the batch, or use another impl."
            )
        launch, share, shares = self.plan(kernel.__name__, blocks)
        given = {"weights": self.weights, **self.text, **tensors}
        weighted = given["weights"] is not None
        numbers = {
            "heads": heads,
            "num_tokens": num_tokens,
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
            "RAGGED": self.num_text % launch.text > 0,
            # Products with the state in the tokens' own dtype, the state in two summands; fp16 has not the range.
            "SPLIT": self.tokens.dtype == torch.bfloat16,
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
                arguments[name] = self.tokens if tensor is None else tensor  # where there is none it is not read
        grid = (blocks, shares, batch * heads)
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        run_kernel(kernel, grid, self.tokens.device, **arguments, **options)

    def _launch(self, kernel: str) -> Launch:
        chip = chip_of(self.tokens.device)
        return choose_launch(kernel, max(self.sides), self.tokens.dtype, chip, self.num_text > 0)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
