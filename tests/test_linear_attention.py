"""Linear attention against its specification, in fp64 as the truth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.features import resolve_feature_map
from diffusers_linattn.ops.linear import linear_attention
from diffusers_linattn.ops.masks import reduce_to_key_mask
from diffusers_linattn.processors.linear import ValueConvolution


LAYOUTS = {
    "one token": TokenLayout.image((1, 1, 1)),
    "one row": TokenLayout.image((1, 1, 9)),
    "odd grid": TokenLayout.image((1, 7, 5)),
    "video": TokenLayout.image((3, 4, 5)),
    "no text": TokenLayout.joint(text=0, grid=(1, 5, 6)),
    "one text token": TokenLayout.joint(text=1, grid=(1, 5, 6)),
    "77 text first": TokenLayout.joint(text=77, grid=(1, 5, 6)),
    "77 text last": TokenLayout.joint(text=77, grid=(1, 5, 6), text_first=False),
    "512 text first": TokenLayout.joint(text=512, grid=(1, 3, 7)),
    "references and padding": TokenLayout.joint(
        text=7, grid=(1, 6, 5), text_first=False, references=[(1, 3, 4), (2, 2, 3)], padding=5
    ),
    "text around": TokenLayout.of([("text", 3), ("image", (1, 4, 6)), ("text", 5), ("reference", 4)]),
    "only text": TokenLayout.of([("text", 9)]),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring on tensors this small, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(layout, dtype=torch.float32, batch=2, heads=2, kv_heads=None, dim=16, seed=0):
    torch.manual_seed(seed)
    kv_heads = kv_heads or heads
    return [torch.randn(batch, count, layout.length, dim).to(dtype) for count in (heads, kv_heads, kv_heads)]


def with_gradients(function, inputs, dtype):
    """Output and gradients of all inputs, in fp64, of a function computed in `dtype`."""
    inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    output = function(*inputs)
    direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).sin()
    gradients = torch.autograd.grad(output, inputs, direction.to(output.dtype), materialize_grads=True)
    return [x.double() for x in (output, *gradients)]


def assert_as_accurate(function, specification, inputs):
    """Error at most twice that of the specification in the same dtype, plus the rounding of the result itself."""
    dtype = inputs[0].dtype
    truth = with_gradients(specification, inputs, torch.float64)
    eager = with_gradients(specification, inputs, dtype)
    ours = with_gradients(function, inputs, dtype)
    # Both are raised to fp32: a rounding there is no error of ours, however lucky the specification is.
    floor = torch.finfo(dtype).eps / 2 + 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for i, (exact, theirs, mine) in enumerate(zip(truth, eager, ours, strict=True)):
        assert mine.isfinite().all()
        bound = 2 * (theirs - exact).abs().max().nan_to_num(0) + floor * exact.abs().max().clamp_min(1)
        error = (mine - exact).abs().max()
        assert error <= bound, f"{'output' if i == 0 else f'gradient {i}'}: {error:.2e} > {bound:.2e}"


def assert_same_under_checkpointing(function, inputs):
    """Gradient checkpointing runs a function twice and lets its backward pass ask for what it kept only once."""
    dtype = inputs[0].dtype
    plain = with_gradients(function, inputs, dtype)
    checkpointed = with_gradients(lambda *x: checkpoint(function, *x, use_reentrant=False), inputs, dtype)
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def spec(layout, feature_map="relu", **kwargs):
    features = reference.FEATURE_MAPS[feature_map]
    return lambda q, k, v: reference.linear_attention(
        q, k, v, layout, query_features=features, key_features=features, **kwargs
    )


@by_layout
@by_dtype
def test_matches_the_reference(layout, dtype):
    assert_as_accurate(lambda q, k, v: linear_attention(q, k, v, layout), spec(layout), make_inputs(layout, dtype))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradient_checkpointing(impl):
    layout = LAYOUTS["one text token"]
    assert_same_under_checkpointing(lambda q, k, v: linear_attention(q, k, v, layout, impl=impl), make_inputs(layout))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("feature_map", ["relu", "elu", "softmax"])
def test_feature_maps(feature_map, impl):
    layout = LAYOUTS["references and padding"]
    assert_as_accurate(
        lambda q, k, v: linear_attention(q, k, v, layout, feature_map=feature_map, impl=impl),
        spec(layout, feature_map),
        make_inputs(layout),
    )


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_learned_feature_map_runs_in_its_own_dtype(dtype, impl):
    layout = LAYOUTS["77 text first"]
    query, key, value = make_inputs(layout, dtype)
    projection = torch.nn.Linear(16, 16, bias=False, dtype=dtype)

    def hedgehog(x):
        return torch.softmax(torch.cat([projection(x), -projection(x)], -1), -1)

    output = linear_attention(query, key, value, layout, feature_map=(hedgehog, hedgehog), impl=impl)
    output.sum().backward()
    assert projection.weight.grad.isfinite().all()
    expected = reference.linear_attention(
        query.double(),
        key.double(),
        value.double(),
        layout,
        query_features=lambda _: hedgehog(query).double(),
        key_features=lambda _: hedgehog(key).double(),
    )
    torch.testing.assert_close(output.double(), expected, atol=4e-6 if dtype == torch.float32 else 2e-2, rtol=0)


def seen_keys(layout, batch=2):
    torch.manual_seed(1)
    seen = torch.rand(batch, 1, 1, layout.length) > 0.3
    seen[..., 0] = True
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["odd grid", "77 text first", "references and padding"])
@pytest.mark.parametrize("form", ["bool", "float", "per head", "one dimension"])
def test_key_masks(name, form, dtype):
    layout = LAYOUTS[name]
    mask = {
        "bool": seen_keys(layout),
        "float": torch.randn(2, 1, 1, layout.length).masked_fill(~seen_keys(layout), float("-inf")).to(dtype),
        "per head": torch.rand(2, 2, 1, layout.length) > 0.2,
        "one dimension": seen_keys(layout)[0, 0, 0],
    }[form]
    assert_as_accurate(
        lambda q, k, v: linear_attention(q, k, v, layout, mask=mask),
        spec(layout, mask=mask),
        make_inputs(layout, dtype),
    )


@pytest.mark.parametrize("lowest", ["-inf", "lowest number", "bool"])
def test_pairwise_mask_of_a_padded_batch(lowest):
    layout = LAYOUTS["77 text first"]
    seen = seen_keys(layout)
    pairs = seen & seen.transpose(-1, -2)
    mask = pairs
    if lowest != "bool":
        hidden = float("-inf") if lowest == "-inf" else torch.finfo(torch.float32).min
        mask = torch.zeros(pairs.shape).masked_fill(~pairs, hidden)
    assert_as_accurate(
        lambda q, k, v: linear_attention(q, k, v, layout, mask=mask), spec(layout, mask=pairs), make_inputs(layout)
    )


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", ["odd grid", "77 text last"])
@pytest.mark.parametrize("form", ["bool", "float", "lowest number", "pairwise"])
def test_queries_that_see_nothing_give_zero(name, form, impl):
    layout = LAYOUTS[name]
    seen = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, layout.length)
    hidden = {"float": float("-inf"), "lowest number": torch.finfo(torch.float32).min}.get(form)
    mask = seen if hidden is None else torch.zeros(seen.shape).masked_fill(~seen, hidden)
    if form == "pairwise":
        mask = mask.expand(2, 1, layout.length, layout.length)
    output, *gradients = with_gradients(
        lambda q, k, v: linear_attention(q, k, v, layout, mask=mask, impl=impl), make_inputs(layout), torch.float32
    )
    assert (output[1] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()
    alone = linear_attention(*(x[:1] for x in make_inputs(layout)), layout)
    torch.testing.assert_close(output[:1], alone.double(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", [None, 1, 4])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_empty_batch(impl, heads):
    layout = LAYOUTS["77 text first"]
    inputs = make_inputs(layout, batch=0)
    for result in with_gradients(
        lambda q, k, v: linear_attention(q, k, v, layout, heads=heads, impl=impl), inputs, torch.float32
    ):
        assert result.shape == inputs[0].shape


@pytest.mark.parametrize("heads", [None, 4])
def test_convolution_of_an_empty_batch(heads):
    layout = LAYOUTS["77 text first"]
    value = make_inputs(layout, batch=0)[2].requires_grad_()
    convolution = ValueConvolution(16 if heads is None else 8, kernel_size=5, zero=False)
    output = convolution(value, layout, None, heads)
    assert output.shape == value.shape
    output.sum().backward()
    assert not convolution.conv.weight.grad.any()


def test_irreducible_pairwise_mask():
    layout = LAYOUTS["odd grid"]
    causal = torch.ones(layout.length, layout.length, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="cannot honour a pairwise mask"):
        linear_attention(*make_inputs(layout), layout, mask=causal)


def test_mask_gradient():
    layout = LAYOUTS["77 text first"]
    inputs = [x.double() for x in make_inputs(layout)]
    bias = torch.randn(2, 1, 1, layout.length, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(linear_attention(*inputs, layout, mask=bias).square().sum(), bias)[0]
    theirs = torch.autograd.grad(spec(layout, mask=bias)(*inputs).square().sum(), bias)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_grouped_queries(impl):
    layout = LAYOUTS["77 text last"]
    query, key, value = make_inputs(layout, heads=4, kv_heads=2)
    output = linear_attention(query, key, value, layout, enable_gqa=True, impl=impl)
    repeated = linear_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), layout)
    torch.testing.assert_close(output, repeated, atol=1e-6, rtol=1e-5)


def test_scale():
    layout = LAYOUTS["77 text last"]
    assert_as_accurate(
        lambda q, k, v: linear_attention(q, k, v, layout, scale=0.7), spec(layout, scale=0.7), make_inputs(layout)
    )


def regrouped_by_hand(query, key, value, layout, heads, scale):
    """Grid queries one new head after the other, each on its share of the concatenated channels."""
    output = spec(layout, scale=scale)(query, key, value)
    flat = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
    size = flat[0].shape[-1] // heads
    wide = torch.cat(
        [
            spec(layout, scale=scale)(*(x[:, None, :, h * size : (h + 1) * size] for x in flat))[:, 0]
            for h in range(heads)
        ],
        -1,
    )
    wide = wide.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
    for segment in layout.text:
        wide = torch.cat(
            [wide[:, :, : segment.start], output[:, :, segment.start : segment.stop], wide[:, :, segment.stop :]], 2
        )
    return wide


@pytest.mark.parametrize("scale", [None, 0.3], ids=["default scale", "scale 0.3"])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_regrouped_heads(heads, scale, impl):
    layout = LAYOUTS["references and padding"]
    assert_as_accurate(
        lambda q, k, v: linear_attention(q, k, v, layout, heads=heads, scale=scale, impl=impl),
        lambda q, k, v: regrouped_by_hand(q, k, v, layout, heads, scale),
        make_inputs(layout, heads=4),
    )


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_changes_nothing(impl):
    layout = LAYOUTS["77 text first"]
    inputs = make_inputs(layout)
    expected = linear_attention(*inputs, layout, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = linear_attention(*inputs, layout, impl=impl)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=0, rtol=0)


@pytest.mark.parametrize("layout", [TokenLayout.image((1, 20, 30)), LAYOUTS["77 text first"]], ids=["image", "joint"])
def test_fp16_stays_in_range(layout):
    query, key, value = (x.abs() * 30 for x in make_inputs(layout, torch.float16))
    output = linear_attention(query, key, value, layout)
    expected = spec(layout)(*(x.double() for x in (query, key, value)))
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.double(), expected, atol=0, rtol=2e-3)


def test_large_scores_of_either_sign():
    layout = LAYOUTS["77 text first"]
    query, key, value = make_inputs(layout)
    for sign in (40, -40):
        assert_as_accurate(
            lambda q, k, v: linear_attention(q, k, v, layout),
            spec(layout),
            [query.abs() * sign, key.abs() + 1, value],
        )


@pytest.mark.parametrize("feature_map", ["relu", "softmax", "learned", "learned, of frozen inputs"])
@pytest.mark.parametrize("text", [0, 7])
def test_training_keeps_the_inputs_alone(text, feature_map):
    """Not the features, nor the sums over all tokens, which are computed again in the backward pass."""
    layout = TokenLayout.joint(text=text, grid=(1, 32, 32))
    trained = [x.requires_grad_("frozen" not in feature_map) for x in make_inputs(layout, torch.bfloat16)]
    query, key, value = trained
    projection = torch.nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    if feature_map.startswith("learned"):
        trained = [projection.weight] if "frozen" in feature_map else [*trained, projection.weight]
        feature_map = (lambda x: projection(x).exp(), lambda x: projection(x).exp())
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = linear_attention(query, key, value, layout, feature_map=feature_map)
    for x in (query, key, value, output):
        kept.pop(x.untyped_storage().data_ptr(), None)
    # What remains belongs to the text queries, 16 channels and a number each, and to the learned map.
    assert sum(storage.nbytes() for storage in kept.values()) <= 4 * (4 * text * 17 + text) + 2 * 16 * 16
    gradients = torch.autograd.grad(output.sum(), trained)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("given", ["as a layout", "as shapes"])
def test_compiles_once_for_all_sizes(given):
    def of_layout(query, key, value, mask, layout):
        return linear_attention(query, key, value, layout, mask=mask)

    def of_shapes(query, key, value, mask, grid, text):
        layout = TokenLayout.joint(text=text.shape[0], grid=(1, *grid.shape))
        return linear_attention(query, key, value, layout, mask=mask)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = of_layout if given == "as a layout" else of_shapes
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for height, width, text in ((5, 6, 7), (7, 3, 11), (9, 13, 20), (3, 8, 33)):
        layout = TokenLayout.joint(text=text, grid=(1, height, width))
        inputs = [x.requires_grad_() for x in make_inputs(layout)]
        geometry = (layout,) if given == "as a layout" else (torch.empty(height, width), torch.empty(text))
        mask = seen_keys(layout)
        output, expected = compiled(*inputs, mask, *geometry), linear_attention(*inputs, layout, mask=mask)
        torch.testing.assert_close(output, expected)
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs))
    assert counter.frame_count == 1


def test_compiled_pairwise_mask_is_checked_at_run_time():
    torch._dynamo.reset()
    layout = LAYOUTS["odd grid"]
    inputs, seen = make_inputs(layout), seen_keys(layout)
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    mask = seen & seen.transpose(-1, -2)
    torch.testing.assert_close(compiled(*inputs, layout, mask=mask), linear_attention(*inputs, layout, mask=mask))
    with pytest.raises(RuntimeError, match="cannot honour a pairwise mask"):
        compiled(*inputs, layout, mask=torch.ones(mask.shape, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"impl": "dense"}, "Unknown impl 'dense': expected one of None, 'triton', 'torch', 'reference'"),
        ({"impl": "triton"}, "impl='triton' cannot answer this call: it needs an NVIDIA GPU"),
        ({"feature_map": "gelu"}, "'relu', 'elu', 'softmax', or a pair"),
        ({"feature_map": None}, "Unknown feature_map None"),
        ({"feature_map": (torch.exp, lambda x: x[..., :8].exp())}, "queries 16 features and keys 8"),
        (
            {"feature_map": (torch.exp, lambda x: x[:, :, 1:].exp())},
            "made .* expected .batch, heads, tokens, features.",
        ),
        ({"heads": 2.0}, "heads must be an integer"),
        ({"heads": 3}, "heads=3 does not divide the 32 channels of query"),
        ({"heads": 0}, "heads must be an integer of at least 1"),
        ({"heads": 1, "mask": torch.ones(2, 2, 1, 35, dtype=torch.bool)}, "differs between heads"),
        ({"mask": torch.ones(2, 1, 1, 34, dtype=torch.bool)}, "does not broadcast"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(arguments, match):
    layout = LAYOUTS["odd grid"]
    with pytest.raises(ValueError, match=match):
        linear_attention(*make_inputs(layout), layout, **arguments)


def test_resolve_feature_map_raises_to_fp32():
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    of_query, of_key = resolve_feature_map("relu")
    assert of_query(x).dtype == of_key(x).dtype == torch.float32
    assert resolve_feature_map((F.relu, F.elu))[0](x).dtype == torch.float32
    assert resolve_feature_map("elu")[1](x.double()).dtype == torch.float64


def test_reduce_to_key_mask_takes_the_rows_that_see():
    row = torch.tensor([0.0, -1.5, float("-inf")])
    mask = torch.stack([torch.full((3,), float("-inf")), row, row])
    key_mask = reduce_to_key_mask(mask, TokenLayout.image((1, 1, 3)), torch.float64)
    assert key_mask.bias.dtype == torch.float64
    torch.testing.assert_close(key_mask.bias.flatten(), row.double())
    assert key_mask.visible.flatten().tolist() == [False, True, True]
    assert reduce_to_key_mask(None, TokenLayout.image((1, 1, 3)), torch.float32) is None
