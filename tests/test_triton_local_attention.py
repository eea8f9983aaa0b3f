"""The Triton kernels of windowed attention in Triton's interpreter, on a CPU, against `ops/reference.py`.

    TRITON_INTERPRET=1 pytest tests/test_triton_local_attention.py

The variable has to be set before the kernels are imported, so that this is a run of its own.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from diffusers_linattn import ClearProcessor, linearize, status
from diffusers_linattn.kernels import local_attention as kernels
from diffusers_linattn.kernels import tile_configurations, tile_lists
from diffusers_linattn.kernels.launching import adjacent
from diffusers_linattn.kernels.tile_configurations import Configuration, Tiles, choose_configuration
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.local import local_attention

import tiny
from test_local_attention import (
    DIM,
    HEADS,
    LAYOUTS,
    check_checkpointing,
    check_lowest_numbers,
    make_inputs,
    make_mask,
    run,
)
from test_local_attention import check as check_impl


# The products and their sum are rounded in an order of their own.
check = functools.partial(check_impl, impl="triton", slack=4, heads=1)


pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

SMALL = {
    "odd": TokenLayout.joint(text=5, grid=(1, 11, 13)),
    "text around": LAYOUTS["text around"],
    "references": TokenLayout.joint(text=3, grid=(1, 9, 10), references=[(1, 5, 14), (2, 3, 4)]),
    "small": TokenLayout.joint(text=3, grid=(1, 5, 9)),
}


@pytest.fixture
def _fresh_plans():
    """For tests that change how plans are made."""
    caches = (tile_lists.list_tiles, tile_configurations.choose_family, tile_configurations.plan, choose_configuration)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("exact tiles", "long text first")])
def test_matches_reference(name):
    check(LAYOUTS[name], torch.float32, window=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", SMALL.values(), ids=SMALL.keys())
def test_half_precision_pooled_keys_and_batch(layout, dtype):
    check(layout, dtype, batch=2, window=3, pooled=5, scale=0.1)


def test_gradient_checkpointing():
    check_checkpointing("triton")


@pytest.mark.parametrize("window", [1, 30, 10**7])
def test_windows_of_one_token_and_of_everything(window):
    check(SMALL["odd"], torch.float32, window=window)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1e-12])
@pytest.mark.parametrize("mask", [None, "keys"])
def test_scales_that_are_not_positive_or_tiny(scale, mask):
    check(SMALL["odd"], torch.float32, window=3, pooled=5, scale=scale, mask=mask)


@pytest.mark.parametrize("text", [77, 128])
def test_texts_that_are_whole_tiles_rows_and_tokens(text):
    layout = TokenLayout.of([("text", text), ("image", (1, 9, 10)), ("text", 13)])
    check(layout, torch.float32, window=3, mask="keys")


def test_long_rows():
    """Positions at which the squares of distances are no longer exact, beside text that is never far away."""
    check(TokenLayout.joint(text=5, grid=(1, 1, 5000)), torch.float32, window=3)


def test_nan_stays():
    layout = SMALL["odd"]
    tensors = make_inputs(layout, torch.float32, heads=1)
    tensors[0][:, :, 40, 0] = float("nan")
    with torch.no_grad():
        out = local_attention(*tensors[:3], layout, window=3, impl="triton")
    assert out.isnan().any(-1).nonzero()[:, 2].tolist() == [40]


@pytest.mark.parametrize("form", ["keys", "additive", "additive, keys apart", "all keys hidden"])
def test_masks_of_keys(form):
    check(SMALL["text around"], torch.float32, batch=2, window=3, pooled=5, mask=form)


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float16], ids=str)
def test_the_lowest_number_of_a_mask_hides(mask_dtype):
    check_lowest_numbers("triton", torch.float16, mask_dtype)


@pytest.mark.parametrize(
    "layout",
    [SMALL["small"], TokenLayout.joint(text=5, grid=(1, 12, 6), references=[(1, 4, 3)])],
    ids=["", "references"],
)
def test_hidden_rows_are_zero(layout):
    mask = make_mask("all keys hidden", layout, 1, torch.float32)
    out, *grads = run(
        local_attention, make_inputs(layout, torch.float32, heads=1), layout, window=3, mask=mask, impl="triton"
    )
    assert not out.any()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("family", ["video", "long video", "picture"])
@pytest.mark.parametrize("temporal_window", [2, None])
@pytest.mark.usefixtures("_fresh_plans")
def test_video(family, temporal_window, monkeypatch):
    monkeypatch.setattr(tile_configurations, "choose_family", lambda *_: family)
    layout = TokenLayout.joint(text=6, grid=(5, 7, 6), text_first=False)
    check(layout, torch.float32, window=3, temporal_window=temporal_window)


@pytest.mark.parametrize("tiles", [(16, 32), (64, 32)], ids=str)
@pytest.mark.usefixtures("_fresh_plans")
def test_sizes_of_tiles(tiles, monkeypatch):
    chosen = Tiles(*tiles, 4, 1)
    monkeypatch.setattr(kernels, "choose_configuration", lambda *_: Configuration(chosen, chosen, chosen))
    check(SMALL["odd"], torch.float32, window=3)


@pytest.mark.usefixtures("_fresh_plans")
def test_wide_tiles(monkeypatch):
    chosen = Tiles(64, 64, 4, 1, wide=1)
    monkeypatch.setattr(kernels, "choose_configuration", lambda *_: Configuration(chosen, chosen, chosen))
    layout = TokenLayout.joint(text=128, grid=(1, 16, 17))
    assert tile_configurations.plan(layout, 9, None, chosen)[0].other == 128
    check(layout, torch.float32, window=9)
    check(layout, torch.float32, window=9, pooled=70)


@pytest.mark.parametrize("pooled", [0, 70], ids=["", "pooled"])
@pytest.mark.usefixtures("_fresh_plans")
def test_keys_seen_by_all_are_split_over_queries(pooled, monkeypatch):
    monkeypatch.setattr(tile_lists, "_SHORTEST_PART", 2)
    layout = TokenLayout.of([("text", 4), ("image", (1, 11, 12)), ("text", 70)])
    _, lists, *_ = tile_configurations.plan(layout, 3, None, Tiles(128, 64, 4, 1), owners_are_keys=True)
    assert lists.parts > 1
    check(layout, torch.float32, window=3, pooled=pooled)


@pytest.mark.parametrize("pooled_heads", [2, 4])
def test_gqa(pooled_heads):
    layout = SMALL["small"]
    tensors = make_inputs(layout, torch.float32, heads=4, key_heads=2, pooled=5)
    if pooled_heads == 4:
        tensors[3:] = [x.repeat_interleave(2, 1) for x in tensors[3:]]
    expanded = [x if x.shape[1] == 4 else x.repeat_interleave(2, 1) for x in tensors]
    actual = run(local_attention, tensors, layout, window=3, enable_gqa=True, impl="triton")
    expected = run(reference.local_attention, expanded, layout, window=3)
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            b = b.unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("dim", [24, 72])
def test_head_dims_that_are_no_power_of_two(dim):
    layout = TokenLayout.joint(text=3, grid=(1, 9, 10))
    tensors = [torch.randn(1, layout.length, 1, dim).transpose(1, 2) for _ in range(3)] + [None, None]
    actual = run(local_attention, tensors, layout, window=3, impl="triton")
    for a, b in zip(actual, run(reference.local_attention, tensors, layout, window=3), strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("apart", [None, 0, 1, 2], ids=["none", "query", "key", "value"])
def test_strides_of_any_kind(apart):
    """Slices of one fused projection, channels apart, and a gradient that is one number everywhere."""
    layout = SMALL["small"]
    fused = torch.randn(1, layout.length, 3, HEADS, DIM)
    tensors = [fused[:, :, i].transpose(1, 2) for i in range(3)]
    if apart is not None:
        tensors[apart] = tensors[apart].transpose(2, 3).contiguous().transpose(2, 3)
    results = []
    for impl in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = local_attention(*leaves, layout, window=3, impl=impl)
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    assert results[0][0].transpose(1, 2).is_contiguous()
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_vectors_begin_at_multiples_of_eight_elements():
    """The kernels tell the compiler so where 8 divides head_dim; the interpreter takes no notice of it."""
    apart_by_nine = torch.randn(2, 5, 3, 9)[..., :8].transpose(1, 2)
    copied = adjacent(apart_by_nine)
    assert all(stride % 8 == 0 for stride in copied.stride()[:3])
    torch.testing.assert_close(copied, apart_by_nine, atol=0, rtol=0)
    fused = torch.randn(2, 5, 3, 4, 72)
    one_sample = torch.randn(1 + 4 * 72)[1:].as_strided((1, 4, 1, 72), (1, 72, 5, 1))
    for x in (fused[:, :, 1].transpose(1, 2), fused[0, :, 1:2, :1], one_sample, torch.randn(2, 3, 5, 9)):
        assert adjacent(x) is x


def test_frames_out_of_reach_are_refused():
    kernels._check_reach(TokenLayout.image((1, 2048, 2048)), 3072)
    kernels._check_reach(TokenLayout.image((81, 256, 256)), 3072)
    with pytest.raises(ValueError, match="512 x 512 tokens.*impl='tiled'"):
        kernels._check_reach(TokenLayout.image((81, 512, 512)), 3072)


def test_same_bits_in_every_run_and_no_number_left_unwritten():
    layout = SMALL["text around"]
    tensors = make_inputs(layout, torch.float32, heads=2, pooled=5)
    expected = run(local_attention, tensors, layout, window=3, impl="triton")
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = run(local_attention, tensors, layout, window=3, impl="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_gradients_numerically():
    """A directional derivative in fp32; gradcheck's fp64 is no dtype of the kernels."""
    layout = SMALL["small"]
    tensors = make_inputs(layout, torch.float32, heads=1, pooled=3)
    directions = [torch.randn_like(x) for x in tensors]

    def loss(step):
        moved = [x + step * d for x, d in zip(tensors, directions, strict=True)]
        out = local_attention(*moved[:3], layout, window=3, pooled_key=moved[3], pooled_value=moved[4], impl="triton")
        return out.double().square().mean()

    step = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(loss(step), step)
    numeric = (loss(1e-2) - loss(-1e-2)) / 2e-2
    torch.testing.assert_close(slope.double(), numeric, rtol=5e-3, atol=1e-4)


@torch.no_grad()
def test_processor_in_a_model():
    outputs = {}
    for impl in ("triton", "tiled"):
        template = ClearProcessor(window=2, down_factor=2, impl=impl)
        model = linearize(tiny.flux(), template)
        outputs[impl] = model(**tiny.flux_inputs(5, 6, 3))[0]
        assert status(model).converted[0].implementation == impl
    torch.testing.assert_close(outputs["triton"], outputs["tiled"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [None, "additive"])
def test_operator_registration(mask):
    layout = SMALL["small"]
    tensors = make_inputs(layout, torch.float32, heads=1, pooled=3)
    mask = mask and make_mask(mask, layout, 1, torch.float32, heads=1)
    tensors = [x.requires_grad_() for x in tensors]
    operator = torch.ops.diffusers_linattn.local_attention_triton.default
    torch.library.opcheck(operator, (*tensors, mask, layout.encode(), 3, None, 0.25))


def test_compiles_whole_and_exports():
    def attend(query, key, value, text, grid):
        layout = TokenLayout.joint(text=text.shape[0], grid=(1, grid.shape[0], grid.shape[1]))
        return local_attention(query, key, value, layout, window=3, impl="triton")

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for text, height, width in [(7, 5, 12), (5, 9, 4), (9, 6, 7)]:
        layout = TokenLayout.joint(text=text, grid=(1, height, width))
        inputs = make_inputs(layout, torch.float32, heads=1)[:3]
        shapes = torch.empty(text), torch.empty(height, width)
        results = []
        for function in (compiled, attend):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = function(*leaves, *shapes)
            out.square().sum().backward()
            results.append([out] + [x.grad for x in leaves])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1

    class Attend(torch.nn.Module):
        forward = staticmethod(attend)

    program = torch.export.export(Attend(), (*inputs, *shapes))
    assert "local_attention_triton" in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs, *shapes), attend(*inputs, *shapes))
