"""The Triton kernels of linear attention in Triton's interpreter, on a CPU, against `ops/reference.py`.

    TRITON_INTERPRET=1 pytest tests/test_triton_linear_attention.py

The variable has to be set before the kernels are imported, so that this is a run of its own.
"""

from __future__ import annotations

import os

import pytest
import torch
from test_linear_attention import (
    LAYOUTS,
    assert_as_accurate,
    assert_same_under_checkpointing,
    make_inputs,
    one_thread,
    regrouped_by_hand,
    seen_keys,
    spec,
)
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_linattn import LinearProcessor, linearize, status
from diffusers_linattn.kernels import linear_attention as kernels
from diffusers_linattn.kernels import linear_call
from diffusers_linattn.kernels.linear_launches import Launch, share_tokens
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops.linear import linear_attention

import tiny


pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

__all__ = ["one_thread"]


def check(layout, dtype=torch.float32, inputs=None, feature_map="relu", **kwargs):
    inputs = make_inputs(layout, dtype) if inputs is None else inputs
    assert_as_accurate(
        lambda q, k, v: linear_attention(q, k, v, layout, feature_map=feature_map, impl="triton", **kwargs),
        spec(layout, feature_map, **kwargs),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "512 text first"])
def test_matches_reference(name, dtype):
    check(LAYOUTS[name], dtype)


@pytest.mark.parametrize("name", ["odd grid", "one text token", "77 text last"])
@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_feature_maps(dtype, feature_map, name):
    check(LAYOUTS[name], dtype, feature_map=feature_map)


@pytest.mark.parametrize("dim", [16, kernels.MAX_TEXT_DIM + 8])
@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_gradient_checkpointing(feature_map, dim):
    layout = LAYOUTS["one text token"]
    assert_same_under_checkpointing(
        lambda q, k, v: linear_attention(q, k, v, layout, feature_map=feature_map, impl="triton"),
        make_inputs(layout, batch=1, heads=1, dim=dim),
    )


@pytest.mark.parametrize("feature_map", ["relu", "elu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays(dtype, feature_map):
    layout = LAYOUTS["odd grid"]
    for place in range(3):
        inputs = make_inputs(layout, dtype)
        inputs[place][..., 5, 0] = float("nan")
        ours, theirs = (
            linear_attention(*inputs, layout, feature_map=feature_map, impl=impl) for impl in ("triton", "reference")
        )
        assert theirs.isnan().any()
        assert torch.equal(ours.isnan(), theirs.isnan())


def test_more_heads_than_a_launch_has_programs():
    query = torch.randn(2**15, 2, 1, 8)
    with pytest.raises(
        ValueError, match="at most 65535 heads of all samples together, got 32768 x 2: split the batch"
    ):
        linear_attention(query, query, query, TokenLayout.image((1, 1, 1)), impl="triton")


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
@pytest.mark.parametrize("text", [32, 64])
def test_text_of_whole_blocks(text, feature_map):
    check(TokenLayout.joint(text=text, grid=(1, 9, 10)), feature_map=feature_map)


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_are_not_positive(scale, feature_map):
    check(LAYOUTS["77 text first"], feature_map=feature_map, scale=scale)


@pytest.mark.parametrize("name", ["odd grid", "77 text first"])
def test_learned_feature_map(name):
    layout = LAYOUTS[name]
    projection = torch.nn.Linear(16, 16, bias=False)

    def hedgehog(x):
        return torch.softmax(torch.cat([projection(x), -projection(x)], -1), -1)

    results = []
    for impl in ("triton", "torch"):
        inputs = [x.requires_grad_() for x in make_inputs(layout)]
        output = linear_attention(*inputs, layout, feature_map=(hedgehog, hedgehog), impl=impl)
        results.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, projection.weight])])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["odd grid", "references and padding"])
@pytest.mark.parametrize("form", ["bool", "float", "keys apart", "per head", "pairwise"])
@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_key_masks(dtype, feature_map, form, name):
    layout = LAYOUTS[name]
    seen = seen_keys(layout)
    mask = {
        "bool": seen,
        "float": torch.randn(2, 1, 1, layout.length).masked_fill(~seen, float("-inf")),
        "keys apart": torch.randn(layout.length, 2).t()[:, None, None],  # in memory
        "per head": torch.rand(2, 2, 1, layout.length) > 0.2,
        "pairwise": seen & seen.transpose(-1, -2),
    }[form]
    check(layout, dtype, feature_map=feature_map, mask=mask)


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
@pytest.mark.parametrize("name", ["77 text first", "references and padding"])
def test_key_masks_in_fp16(name, feature_map):
    layout = LAYOUTS[name]
    check(layout, torch.float16, feature_map=feature_map, mask=seen_keys(layout))


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_queries_that_see_nothing_give_zero(feature_map):
    layout = LAYOUTS["77 text last"]
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, layout.length)
    inputs = [x.requires_grad_() for x in make_inputs(layout)]
    output = linear_attention(*inputs, layout, mask=mask, feature_map=feature_map, impl="triton")
    for x in (output, *torch.autograd.grad(output.sum(), inputs)):
        assert x.isfinite().all()
        assert not x[1].any()


@pytest.mark.parametrize("dim", [8, 72, 200])
@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_head_dims(feature_map, dim, text):
    """Also heads wider than a block, and text beside them, which is then added outside of the kernels."""
    layout = TokenLayout.joint(text=text, grid=(1, 9, 10))
    check(layout, inputs=make_inputs(layout, heads=1, dim=dim), feature_map=feature_map)


@pytest.mark.parametrize("name", ["odd grid", "references and padding"])
def test_few_large_heads(name):
    layout = LAYOUTS[name]
    assert_as_accurate(
        lambda q, k, v: linear_attention(q, k, v, layout, heads=1, impl="triton"),
        lambda q, k, v: regrouped_by_hand(q, k, v, layout, 1, None),
        make_inputs(layout, heads=4),
    )


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_large_scores_of_either_sign(feature_map):
    layout = LAYOUTS["77 text first"]
    query, key, value = make_inputs(layout)
    for sign in (40, -40):
        check(layout, inputs=[query.abs() * sign, key.abs() + 1, value], feature_map=feature_map)


def test_many_tokens_are_shared_between_programs():
    layout = TokenLayout.joint(text=40, grid=(1, 21, 27))
    assert share_tokens(567, 64, 1, 8) == (128, 5)
    check(layout, inputs=make_inputs(layout, batch=1, heads=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_launch_gives_the_same(dtype, monkeypatch):
    monkeypatch.setattr(linear_call, "choose_launch", lambda *_: Launch(32, 16, 16, 4, 1))
    for layout in (TokenLayout.image((1, 9, 13)), TokenLayout.joint(text=21, grid=(1, 7, 9))):
        check(layout, dtype, make_inputs(layout, dtype, heads=1, dim=40))


def test_fp16_stays_in_range():
    layout = TokenLayout.image((1, 20, 30))
    query, key, value = (x.abs() * 30 for x in make_inputs(layout, torch.float16, batch=1))
    output = linear_attention(query, key, value, layout, impl="triton")
    expected = spec(layout)(*(x.double() for x in (query, key, value)))
    torch.testing.assert_close(output.double(), expected, atol=0, rtol=2e-3)


def test_fp16_sums_are_not_smaller_than_they_should_be():
    """Products in tf32 cut digits off; cut from every number of a sum they would be missing in it."""
    layout = TokenLayout.image((1, 20, 30))
    inputs = [x.abs() for x in make_inputs(layout, torch.float16, batch=1, dim=40)]
    output = linear_attention(*inputs, layout, impl="triton").double()
    expected = spec(layout)(*(x.double() for x in inputs))
    assert abs((output / expected - 1).mean()) < 3e-5


def test_strides_of_any_kind():
    """Slices of one fused projection, channels apart, and a gradient that is one number everywhere."""
    layout = TokenLayout.joint(text=3, grid=(1, 5, 9))
    fused = torch.randn(1, layout.length, 3, 2, 16)
    tensors = [fused[:, :, i].transpose(1, 2) for i in range(3)]
    tensors[2] = tensors[2].transpose(2, 3).contiguous().transpose(2, 3)
    results = []
    for impl in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = linear_attention(*leaves, layout, impl=impl)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    assert results[0][0].transpose(1, 2).is_contiguous()
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_same_bits_in_every_run_and_no_number_left_unwritten(feature_map):
    layout = TokenLayout.joint(text=7, grid=(1, 15, 13))
    tensors = make_inputs(layout)

    def run():
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = linear_attention(*leaves, layout, feature_map=feature_map, mask=seen_keys(layout), impl="triton")
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = run()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_training_keeps_the_inputs_and_a_number_per_query():
    layout = TokenLayout.joint(text=5, grid=(1, 16, 16))
    inputs = [x.requires_grad_() for x in make_inputs(layout, batch=1)]
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_attention(*inputs, layout, impl="triton")
    own = {x.untyped_storage().data_ptr() for x in inputs}
    size = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    # The output, one number per query and head, and the state.
    assert size <= 1.2 * 4 * 2 * (256 * (16 + 1) + 16 * 17)


@pytest.mark.parametrize("text", [0, 6])
def test_operator_registration(text):
    query, key, value = (torch.randn(1, 20, 1, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    operators = torch.ops.diffusers_linattn
    weights = torch.rand(1, 1, 20) if text else None
    torch.library.opcheck(operators.linear_state.default, (key, value, weights, "relu"))
    state, normalizer = (x.detach().requires_grad_() for x in kernels.linear_state(key, value, weights, "elu"))
    of_text = [torch.randn(1, 1, text, 16).requires_grad_() for _ in range(2)] if text else [None, None]
    bias = torch.randn(1, 1, text) if text else None
    arguments = (query, state, normalizer, *of_text, bias, 0.25, "elu")
    torch.library.opcheck(operators.linear_product.default, arguments)


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_compiles_once_for_all_sizes(feature_map):
    def attend(query, key, value, text, grid):
        layout = TokenLayout.joint(text=text.shape[0], grid=(1, grid.shape[0], grid.shape[1]))
        return linear_attention(query, key, value, layout, feature_map=feature_map, impl="triton")

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for text, height, width in [(7, 5, 12), (5, 9, 4), (9, 6, 7)]:
        layout = TokenLayout.joint(text=text, grid=(1, height, width))
        inputs = make_inputs(layout, heads=1)
        shapes = torch.empty(text), torch.empty(height, width)
        results = []
        for function in (compiled, attend):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = function(*leaves, *shapes)
            out.square().sum().backward()
            results.append([out] + [x.grad for x in leaves])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


@pytest.mark.parametrize("feature_map", ["relu", "hedgehog"])
@torch.no_grad()
def test_processor_in_a_model(feature_map):
    outputs = {}
    for impl in ("triton", "torch"):
        model = linearize(tiny.flux(), LinearProcessor(feature_map=feature_map, impl=impl))
        outputs[impl] = model(**tiny.flux_inputs(5, 6, 3))[0]
        assert status(model).converted[0].implementation == impl
        if impl == "torch":  # what a CPU gets by default, the interpreter or not
            by_default = linearize(tiny.flux(), LinearProcessor(feature_map=feature_map))
            assert status(by_default).converted[0].implementation == "torch"
            assert torch.equal(by_default(**tiny.flux_inputs(5, 6, 3))[0], outputs["torch"])
    torch.testing.assert_close(outputs["triton"], outputs["torch"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dtype": torch.float64}, "it computes in bf16, fp16 and fp32, but got torch.float64"),
        ({"dim": 1040}, "head_dim may be at most 1024"),
    ],
    ids=["dtype", "head_dim"],
)
def test_errors(arguments, match):
    layout = TokenLayout.image((1, 2, 3))
    with pytest.raises(ValueError, match=match):
        linear_attention(*make_inputs(layout, **arguments), layout, impl="triton")


def test_mask_gradient_is_refused():
    layout = LAYOUTS["odd grid"]
    mask = torch.zeros(1, 1, 1, layout.length, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for a mask"):
        linear_attention(*make_inputs(layout), layout, mask=mask, impl="triton")
    assert linear_attention(*make_inputs(layout), layout, mask=mask).requires_grad  # torch
