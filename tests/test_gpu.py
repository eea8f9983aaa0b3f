"""What only a CUDA device can show; skipped elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_linattn import (
    ClearProcessor,
    GLAProcessor,
    LinearProcessor,
    TokenLayout,
    gated_linear_attention,
    linear_attention,
    linearize,
    local_attention,
)

import tiny


pytestmark = pytest.mark.gpu

LAYOUTS = {
    "text 77, 24x40": TokenLayout.joint(text=77, grid=(1, 24, 40)),
    "33x17, text 5": TokenLayout.joint(text=5, grid=(1, 33, 17), text_first=False),
    "video 3x9x11": TokenLayout.image((3, 9, 11)),
    "reference": TokenLayout.joint(text=16, grid=(1, 20, 12), references=[(1, 7, 30)]),
}
OPERATORS: dict[str, Any] = {
    "local": lambda q, k, v, layout, impl: local_attention(q, k, v, layout, window=5, impl=impl),
    "linear": lambda q, k, v, layout, impl: linear_attention(q, k, v, layout, impl=impl),
    "gated": lambda q, k, v, layout, impl: gated_linear_attention(q, k, v, -k.detach().abs(), layout, impl=impl),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_and_gradients(operator: str, layout: str, dtype: torch.dtype) -> None:
    tokens = LAYOUTS[layout]
    inputs = [torch.randn(2, 3, tokens.length, 64, dtype=dtype, device="cuda") for _ in range(3)]
    results = {}
    for name, kind, impl in (
        ("ours", dtype, None),
        ("same dtype", dtype, "reference"),
        ("exact", torch.float64, None),
    ):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        output = OPERATORS[operator](*leaves, tokens, "reference" if name == "exact" else impl)
        results[name] = [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]
    for ours, same, exact in zip(results["ours"], results["same dtype"], results["exact"], strict=True):
        floor = 1e-5 * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (same - exact).abs().max() + floor


@pytest.mark.parametrize(
    "template",
    [ClearProcessor(window=3), ClearProcessor(window=2, down_factor=4), LinearProcessor(), GLAProcessor()],
    ids=repr,
)
@torch.no_grad()
def test_converted_models_on_the_device(template: Any) -> None:
    model, inputs = linearize(tiny.flux(), template), tiny.flux_inputs(reference=(4, 5))
    expected = model(**inputs)[0]
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    torch.testing.assert_close(model.cuda()(**moved)[0].cpu(), expected, atol=1e-3, rtol=1e-3)
