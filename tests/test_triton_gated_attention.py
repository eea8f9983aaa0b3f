"""The Triton kernels of gated linear attention in Triton's interpreter, on a CPU, against `ops/reference.py`.

    TRITON_INTERPRET=1 pytest tests/test_triton_gated_attention.py

The variable has to be set before the kernels are imported, so that this is a run of its own.
"""

from __future__ import annotations

import os

import pytest
import torch
from test_gated_linear_attention import LAYOUTS, make_gated_inputs, make_initial_state, ours, spec
from test_linear_attention import (
    assert_as_accurate,
    assert_same_under_checkpointing,
    seen_keys,
    with_gradients,
)
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_linattn import GLAProcessor, linearize, status
from diffusers_linattn.kernels import gated_attention as kernels
from diffusers_linattn.kernels.linear_attention import MAX_TEXT_DIM
from diffusers_linattn.kernels.scan_paths import scan_path
from diffusers_linattn.kernels.text_blending import blend_text
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops.gated import gated_linear_attention

import tiny


pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

by_direction = pytest.mark.parametrize("direction", ["bidirectional", "forward", "backward"])
by_gate = pytest.mark.parametrize("per_head", [False, True], ids=["per channel", "per head"])


@pytest.fixture
def short_chunks(monkeypatch):
    """Several chunks, the last one cut short, in few tokens."""
    monkeypatch.setattr(kernels, "CHUNK", 32)


def check(layout, per_head=False, dtype=torch.float32, strength=0.5, **options):
    shape = {key: options.pop(key) for key in ("batch", "heads", "dim") if key in options}
    inputs = make_gated_inputs(layout, dtype, strength, per_head, **{"batch": 1, "heads": 1} | shape)
    assert_as_accurate(ours(layout, impl="triton", **options), spec(layout, **options), inputs)


@by_gate
@by_direction
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.usefixtures("short_chunks")
def test_matches_the_reference(direction, order, per_head):
    check(LAYOUTS["several chunks"], per_head, direction=direction, order=order)


@pytest.mark.parametrize("name", ["one token", "one row of 15", "one column of 17", "video", "only text"])
@pytest.mark.usefixtures("short_chunks")
def test_other_grids(name):
    check(LAYOUTS[name], order="columns", batch=2)


@by_gate
def test_chunks_of_full_size_and_channels_of_several_blocks(per_head):
    check(LAYOUTS["several chunks"], per_head, dim=24, feature_map="elu")


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.usefixtures("short_chunks")
def test_gradient_checkpointing(with_state):
    layout = LAYOUTS["1 text last"]
    inputs = make_gated_inputs(layout, batch=1, heads=1)
    state = [make_initial_state(inputs)] if with_state else []
    assert_same_under_checkpointing(ours(layout, impl="triton"), inputs + state)


@pytest.mark.parametrize("name", ["77 text first", "references and padding"])
@pytest.mark.usefixtures("short_chunks")
def test_text_and_references(name):
    check(LAYOUTS[name], order="columns")


@by_gate
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("short_chunks")
def test_half_precision(dtype, per_head):
    check(LAYOUTS["odd grid"], per_head, dtype, heads=2)


@pytest.mark.usefixtures("short_chunks")
def test_sums_beyond_the_range_of_fp16():
    layout = LAYOUTS["odd grid"]
    query, key, value, gate = make_gated_inputs(layout, strength=0.01, batch=1, heads=1)
    inputs = [(x.abs() * 60).half() for x in (query, key, value)]
    options = {"direction": "forward", "feature_map": None, "normalize": False}
    expected = gated_linear_attention(*(x.float() for x in inputs), gate, layout, impl="reference", **options)
    assert expected.max() > torch.finfo(torch.float16).max
    output = gated_linear_attention(*inputs, gate, layout, impl="triton", dtype=torch.float32, **options)
    torch.testing.assert_close(output, expected, atol=0, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("short_chunks")
def test_text_in_half_precision(dtype):
    check(LAYOUTS["77 text first"], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("short_chunks")
def test_text_beside_wide_heads(dtype):
    """More channels than the kernel that blends the text in takes, and than a program has columns of a state; of two
    chunks, since one alone reads no state."""
    check(TokenLayout.joint(text=5, grid=(1, 5, 7)), dtype=dtype, dim=MAX_TEXT_DIM + 8)


@pytest.mark.parametrize(
    ("direction", "per_head"), [("bidirectional", False), ("bidirectional", True), ("backward", False)]
)
@pytest.mark.parametrize("strength", [0.0, 1e4])
@pytest.mark.usefixtures("short_chunks")
def test_gates_of_zero_and_very_strong_ones(strength, direction, per_head):
    layout = LAYOUTS["odd grid"]
    options = {"direction": direction, "feature_map": "elu"}
    inputs = make_gated_inputs(layout, strength=strength, per_head=per_head, batch=1, heads=1)
    inputs[3][:, :, ::3] *= 1e-3  # weak gates next to strong ones: differences of long sums would lose them
    assert_as_accurate(ours(layout, impl="triton", **options), spec(layout, **options), inputs)


@pytest.mark.usefixtures("short_chunks")
def test_gates_of_minus_infinity():
    layout = LAYOUTS["odd grid"]
    inputs = make_gated_inputs(layout, batch=1, heads=1)
    inputs[3][:, :, ::4] = float("-inf")
    output, *gradients = with_gradients(ours(layout, impl="triton"), inputs, torch.float32)
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(output, spec(layout)(*inputs).double(), atol=1e-5, rtol=1e-5)


@by_gate
@pytest.mark.parametrize("feature_map", ["relu", "elu"])
@pytest.mark.usefixtures("short_chunks")
def test_nan_stays(feature_map, per_head):
    layout = LAYOUTS["odd grid"]
    for place in range(4):
        inputs = make_gated_inputs(layout, per_head=per_head, batch=1, heads=1)
        inputs[place][:, :, 5, 0] = float("nan")
        by_kernels, expected = (
            f(*inputs).isnan()
            for f in (ours(layout, impl="triton", feature_map=feature_map), spec(layout, feature_map=feature_map))
        )
        assert expected.any()
        assert torch.equal(by_kernels, expected)


@pytest.mark.parametrize(("direction", "per_head"), [("bidirectional", True), ("backward", False)])
@pytest.mark.usefixtures("short_chunks")
def test_without_denominator(direction, per_head):
    options = {"direction": direction, "feature_map": None, "normalize": False, "scale": 0.3, "order": "columns"}
    check(LAYOUTS["odd grid"], per_head, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("odd grid", {"direction": "bidirectional", "order": "columns"}),
        ("1 text last", {"direction": "backward"}),
        ("odd grid", {"direction": "forward", "feature_map": None, "normalize": False}),
    ],
    ids=["both", "text", "without denominator"],
)
@by_gate
@pytest.mark.usefixtures("short_chunks")
def test_initial_state(name, options, per_head):
    layout = LAYOUTS[name]
    inputs = make_gated_inputs(layout, per_head=per_head, batch=1, heads=1)
    inputs.append(make_initial_state(inputs, options["direction"], options.get("normalize", True)))
    assert_as_accurate(ours(layout, impl="triton", **options), spec(layout, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("short_chunks")
def test_initial_state_in_half_precision_and_several_launches(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_WORKSPACE", 1)
    layout = LAYOUTS["odd grid"]
    inputs = make_gated_inputs(layout, dtype, batch=2, heads=1)
    inputs.append(make_initial_state(inputs))
    assert_as_accurate(ours(layout, impl="triton"), spec(layout), inputs)


@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
@pytest.mark.usefixtures("short_chunks")
def test_masks_and_other_features(feature_map):
    layout = LAYOUTS["odd grid"]
    mask = seen_keys(layout)
    inputs = make_gated_inputs(layout, heads=1)
    options = {"mask": mask, "feature_map": feature_map}
    assert_as_accurate(ours(layout, impl="triton", **options), spec(layout, **options), inputs)


@pytest.mark.usefixtures("short_chunks")
def test_masks_whose_keys_lie_apart_in_memory():
    layout = LAYOUTS["77 text first"]
    check(layout, batch=2, mask=torch.randn(layout.length, 2).t()[:, None, None])


@pytest.mark.usefixtures("short_chunks")
def test_gradient_of_a_mask():
    layout = TokenLayout.joint(text=5, grid=(1, 3, 4))
    inputs = make_gated_inputs(layout, batch=1, heads=1)
    gradients = []
    for impl in ("triton", "reference"):
        mask = torch.linspace(-1, 1, layout.length)[None, None, None].clone().requires_grad_()
        output = gated_linear_attention(*inputs, layout, mask=mask, impl=impl)
        gradients += torch.autograd.grad(output.square().sum(), mask)
    torch.testing.assert_close(*gradients)


@pytest.mark.usefixtures("short_chunks")
def test_signed_features():
    """The denominator of callables may be negative, of which there is no logarithm."""
    layout = LAYOUTS["odd grid"]
    inputs = make_gated_inputs(layout, batch=1, heads=1)
    inputs = [inputs[0].abs() + 1, -inputs[1].abs() - 1, *inputs[2:]]
    impls = (ours(layout, impl=impl, feature_map=(torch.clone, torch.clone)) for impl in ("triton", "chunked"))
    results = (with_gradients(impl, inputs, torch.float32) for impl in impls)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("short_chunks")
def test_heads_beyond_the_memory_for_states_wait(monkeypatch):
    monkeypatch.setattr(kernels, "_WORKSPACE", 1)
    check(LAYOUTS["odd grid"], batch=2, heads=2)


@pytest.mark.usefixtures("short_chunks")
def test_strides_of_any_kind():
    """Slices of one fused projection, channels apart, and a gradient that is one number everywhere."""
    layout = LAYOUTS["odd grid"]
    fused = torch.randn(1, layout.length, 3, 2, 16)
    inputs = [fused[:, :, i].transpose(1, 2) for i in range(3)] + [-torch.rand(1, 2, layout.length, 16)]
    inputs[2] = inputs[2].transpose(2, 3).contiguous().transpose(2, 3)
    results = []
    for impl in ("triton", "chunked"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = gated_linear_attention(*leaves, layout, impl=impl)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@by_gate
@pytest.mark.usefixtures("short_chunks")
def test_same_bits_in_every_run_and_no_number_left_unwritten(per_head):
    layout = LAYOUTS["odd grid"]
    inputs = make_gated_inputs(layout, batch=1, per_head=per_head)
    expected = with_gradients(ours(layout, impl="triton"), inputs, torch.float32)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = with_gradients(ours(layout, impl="triton"), inputs, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@by_gate
@pytest.mark.parametrize("counted", [True, False])
def test_operator_registration(counted, per_head):
    query, key, value, gate = make_gated_inputs(TokenLayout.image((1, 3, 5)), batch=1, heads=1, per_head=per_head)
    inputs = [x.requires_grad_() for x in (query, key, value[..., :9], gate)]
    settings = (3, 5, True, scan_path("bidirectional", "columns"), "relu", "relu", counted)
    state = torch.rand(2, 1, 1, 16, 9 + counted, requires_grad=True)
    for initial in (None, state):
        torch.library.opcheck(kernels.gated_attention_triton, (*inputs, initial, *settings))


@pytest.mark.parametrize("text", [0, 3])
def test_operator_registration_of_the_blend(text):
    sums, counts, query = torch.randn(1, 2, 7, 9), torch.rand(1, 2, 7), torch.randn(1, 2, 7, 16)
    of_text = torch.randn(1, 2, text, 16), torch.randn(1, 2, text, 9)
    inputs = [x.requires_grad_() for x in (sums, counts, query, *of_text)]
    bias = torch.randn(1, 1, text)
    torch.library.opcheck(blend_text, (*inputs, bias, 0.25))
    torch.library.opcheck(blend_text, (*inputs[:3], None, None, None, 0.25))


@pytest.mark.usefixtures("short_chunks")
def test_one_graph_for_all_sizes_and_paths():
    def attend(query, key, value, gate, grid, path):
        layout = TokenLayout.image((1, *grid.shape))
        return gated_linear_attention(query, key, value, gate, layout, path=path.shape[1], impl="triton")

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for height, width, order in ((5, 6, "rows"), (7, 3, "columns"), (4, 9, "columns")):
        inputs = make_gated_inputs(TokenLayout.image((1, height, width)), batch=1, heads=2)
        inputs = [x.requires_grad_() for x in inputs]
        shapes = torch.empty(height, width), torch.empty(0, scan_path("bidirectional", order))
        results = []
        for function in (compiled, attend):
            output = function(*inputs, *shapes)
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2


@torch.no_grad()
@pytest.mark.usefixtures("short_chunks")
def test_processor_in_a_model():
    outputs = {}
    for impl in ("triton", "chunked"):
        model = linearize(tiny.flux(), GLAProcessor(impl=impl))
        outputs[impl] = model(**tiny.flux_inputs(5, 6, 3))[0]
        assert status(model).converted[0].implementation == impl
    torch.testing.assert_close(outputs["triton"], outputs["chunked"], atol=1e-5, rtol=1e-4)
