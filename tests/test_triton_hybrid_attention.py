"""The hybrid whose softmax part is the Triton kernel, in Triton's interpreter, against the specification.

TRITON_INTERPRET=1 pytest tests/test_triton_hybrid_attention.py
"""

from __future__ import annotations

import os

import pytest
import torch
from test_hybrid_attention import inputs_with, kept_for_backward, ours, spec
from test_linear_attention import (
    assert_as_accurate,
    assert_same_under_checkpointing,
    seen_keys,
    with_gradients,
)

from diffusers_linattn.layout import TokenLayout


pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

LAYOUTS = {
    "one token": TokenLayout.image((1, 1, 1)),
    "odd": TokenLayout.joint(text=5, grid=(1, 5, 9)),
    "references and padding": TokenLayout.joint(
        text=7, grid=(1, 6, 5), text_first=False, references=[(1, 3, 4), (2, 2, 3)], padding=5
    ),
    "video": TokenLayout.image((2, 3, 5)),
}
LAMBDA = (0.4, 0.0, 8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_matches_the_reference(layout, dtype):
    inputs = inputs_with(layout, LAMBDA, dtype=dtype)
    assert_as_accurate(ours(layout, impl="triton"), spec(layout), inputs)


def test_gradient_checkpointing():
    layout = LAYOUTS["odd"]
    assert_same_under_checkpointing(ours(layout, impl="triton"), inputs_with(layout, LAMBDA))


@pytest.mark.parametrize("scale", [0.0, 20.0])
def test_scores_of_every_size(scale):
    layout = LAYOUTS["odd"]
    assert_as_accurate(
        ours(layout, impl="triton", scale=scale), spec(layout, scale=scale), inputs_with(layout, LAMBDA)
    )


def test_masks_of_keys():
    layout = LAYOUTS["odd"]
    mask = seen_keys(layout)
    inputs = inputs_with(layout, LAMBDA)
    assert_as_accurate(ours(layout, impl="triton", mask=mask), spec(layout, mask=mask), inputs)


def test_a_window_without_a_visible_key_leaves_the_linear_part():
    layout = TokenLayout.image((1, 1, 9))
    mask = torch.arange(9) >= 6  # the first tokens see nothing within 3
    inputs = inputs_with(layout, LAMBDA)
    assert_as_accurate(ours(layout, mask=mask, impl="triton"), spec(layout, mask=mask), inputs)
    output = ours(layout, mask=mask, impl="triton")(*inputs)
    assert (output[:, 0, :3] != 0).any()
    assert (output[:, 1, :3] == 0).all()  # λ = 0: as the window alone


def test_queries_that_see_nothing_give_zero():
    layout = LAYOUTS["odd"]
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, layout.length)
    *inputs, far_weight = inputs_with(layout, LAMBDA)
    output, *gradients = with_gradients(
        lambda q, k, v: ours(layout, mask=mask, impl="triton")(q, k, v, far_weight), inputs, torch.float32
    )
    assert (output[1] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_training_keeps_the_output_of_the_window_and_a_number_per_query(feature_map):
    layout = LAYOUTS["odd"]
    inputs = inputs_with(layout, LAMBDA, dtype=torch.float16, batch=1)
    kept = kept_for_backward(ours(layout, impl="triton", feature_map=feature_map), inputs)
    assert kept <= len(LAMBDA) * layout.length * (2 * 16 + 4)


def test_compiles_without_a_break():
    layout = LAYOUTS["odd"]
    results = []
    function = ours(layout, impl="triton")
    torch._dynamo.reset()
    for attend in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        inputs = [x.requires_grad_() for x in inputs_with(layout, LAMBDA)]
        output = attend(*inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    torch.testing.assert_close(*results)
