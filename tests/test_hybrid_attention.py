"""A window of softmax and linear attention over the picture against its specification, in fp64 as the truth."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_linear_attention import assert_as_accurate, make_inputs, seen_keys, with_gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from diffusers_linattn import (
    ClearProcessor,
    HybridProcessor,
    distill,
    linearize,
    load_linear_attention,
    make_samples,
    restore,
    save_linear_attention,
    status,
)
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.ops import hybrid_attention, local_attention, reference
from diffusers_linattn.ops.hybrid import unit_mean_scale
from diffusers_linattn.ops.local import IMPLS
from diffusers_linattn.processors.hybrid import PER_STEP, FarWeight

import tiny


LAYOUTS = {
    "two tokens": TokenLayout.image((1, 2, 1)),
    "one row": TokenLayout.image((1, 1, 9)),
    "odd grid": TokenLayout.image((1, 7, 5)),
    "video": TokenLayout.image((3, 4, 5)),
    "one text token": TokenLayout.joint(text=1, grid=(1, 5, 6)),
    "77 text first": TokenLayout.joint(text=77, grid=(1, 9, 13)),
    "77 text last": TokenLayout.joint(text=77, grid=(1, 5, 6), text_first=False),
    "references and padding": TokenLayout.joint(
        text=7, grid=(1, 6, 5), text_first=False, references=[(1, 3, 4), (2, 2, 3)], padding=5
    ),
    "text around": TokenLayout.of([("text", 3), ("image", (1, 4, 6)), ("text", 5), ("reference", 4)]),
    "only text": TokenLayout.of([("text", 9)]),
}
FAST = ("tiled", "dense")

by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
by_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
by_impl = pytest.mark.parametrize("impl", FAST)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring on tensors this small, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs_with(layout, far_weight=(0.4, 0.0, 1.5, 0.05, 0.0, 8.0), dtype=torch.float32, **kwargs):
    """query, key, value and λ; some heads have the λ they start with."""
    kwargs = {"heads": len(far_weight), **kwargs}
    return [*make_inputs(layout, dtype, **kwargs), torch.tensor(far_weight, dtype=dtype)]


def spec(layout, feature_map="softmax", window=3, **kwargs):
    """The specification, with the constant c worked out by hand, in the query's feature map."""
    features = reference.FEATURE_MAPS[feature_map]
    scale = {
        "softmax": lambda size: size,
        "relu": lambda size: 2 * torch.pi / size,
        "elu": lambda size: 1 / (1.1605205 * 1.1605205 * size),
    }[feature_map]
    return lambda q, k, v, w: reference.hybrid_attention(
        q,
        k,
        v,
        layout,
        far_weight=w,
        query_features=lambda x: scale(x.shape[-1]) * features(x),
        key_features=features,
        window=window,
        **kwargs,
    )


def ours(layout, window=3, **kwargs):
    return lambda q, k, v, w: hybrid_attention(q, k, v, layout, window=window, far_weight=w, **kwargs)


def by_hand(query, key, value, layout, far_weight, window):
    """One query and one key at a time."""
    place = {}
    for segment in layout.grids:
        frames, height, width = segment.grid
        for i in range(segment.length):
            place[segment.start + i] = (i // width % height, i % width)
    phi_q, phi_k = torch.softmax(query, -1), torch.softmax(key, -1)
    output = torch.zeros_like(value)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for i in range(layout.length):
                weights = torch.zeros(layout.length, dtype=query.dtype)
                for j in range(layout.length):
                    near = True
                    if i in place and j in place:
                        (y, x), (y2, x2) = place[i], place[j]
                        near = (y - y2) ** 2 + (x - x2) ** 2 < window**2
                        weights[j] += far_weight[h] * query.shape[-1] * (phi_q[b, h, i] @ phi_k[b, h, j])
                    if near:
                        weights[j] += torch.exp(query[b, h, i] @ key[b, h, j] * query.shape[-1] ** -0.5)
                output[b, h, i] = weights @ value[b, h] / weights.sum()
    return output


def test_the_specification_is_the_formula():
    layout = TokenLayout.joint(text=3, grid=(1, 4, 5))
    query, key, value, far_weight = (x.double() for x in inputs_with(layout))
    expected = by_hand(query, key, value, layout, far_weight, 2)
    torch.testing.assert_close(spec(layout, window=2)(query, key, value, far_weight), expected)


@by_impl
@by_layout
@by_dtype
def test_matches_the_reference(layout, dtype, impl):
    assert_as_accurate(ours(layout, impl=impl), spec(layout), inputs_with(layout, dtype=dtype))


@by_impl
def test_one_token_gets_its_own_value(impl):
    query, key, value, far_weight = inputs_with(layout := TokenLayout.image((1, 1, 1)))
    output, *gradients = with_gradients(ours(layout, impl=impl), [query, key, value, far_weight], torch.float32)
    torch.testing.assert_close(output, value.double(), atol=1e-6, rtol=1e-6)
    for gradient in (gradients[0], gradients[1], gradients[3]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("feature_map", ["relu", "elu", "softmax"])
def test_feature_maps(feature_map, impl):
    layout = LAYOUTS["references and padding"]
    assert_as_accurate(
        ours(layout, feature_map=feature_map, impl=impl), spec(layout, feature_map), inputs_with(layout)
    )


@pytest.mark.parametrize("feature_map", ["relu", "elu", "softmax"])
def test_the_mean_weight_of_unit_normals_is_1(feature_map):
    query, key = torch.randn(2, 50_000, 16, dtype=torch.float64)
    features = reference.FEATURE_MAPS[feature_map]
    mean = features(query).mean(0) @ features(key).mean(0)
    assert unit_mean_scale(feature_map, 16) * mean == pytest.approx(1, abs=0.02)


@by_impl
@by_dtype
def test_learned_features_and_their_gradients(dtype, impl):
    layout = LAYOUTS["77 text first"]

    def features(x, weight):
        return torch.softmax(torch.cat([x @ weight, -x @ weight], -1), -1)

    def fast(q, k, v, w, query_weight, key_weight):
        maps = (lambda x: features(x, query_weight), lambda x: features(x, key_weight))
        return hybrid_attention(q, k, v, layout, window=3, far_weight=w, feature_map=maps, impl=impl)

    def slow(q, k, v, w, query_weight, key_weight):
        return reference.hybrid_attention(
            q,
            k,
            v,
            layout,
            far_weight=w,
            query_features=lambda x: 32 * features(x, query_weight),
            key_features=lambda x: features(x, key_weight),
            window=3,
        )

    weights = [torch.randn(16, 16).to(dtype) * 0.3 for _ in range(2)]
    assert_as_accurate(fast, slow, [*inputs_with(layout, dtype=dtype), *weights])


@by_impl
@pytest.mark.parametrize("temporal_window", [1, 2, None])
def test_video(temporal_window, impl):
    layout = TokenLayout.joint(text=4, grid=(3, 4, 5))
    settings = {"window": 2, "temporal_window": temporal_window}
    assert_as_accurate(ours(layout, impl=impl, **settings), spec(layout, **settings), inputs_with(layout))


@by_impl
@by_layout
def test_a_far_weight_of_0_is_the_window_alone(layout, impl):
    *qkv, zero = inputs_with(layout, far_weight=(0.0, 0.0, 0.0))
    assert torch.equal(ours(layout, impl=impl)(*qkv, zero), local_attention(*qkv, layout, window=3, impl=impl))
    zero.requires_grad_()  # now the linear part is computed
    hybrid = with_gradients(lambda q, k, v: ours(layout, impl=impl)(q, k, v, zero), qkv, torch.float32)
    local = with_gradients(lambda q, k, v: local_attention(q, k, v, layout, window=3, impl=impl), qkv, torch.float32)
    for a, b in zip(hybrid, local, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


def test_a_window_that_covers_everything():
    layout = LAYOUTS["77 text last"]
    assert_as_accurate(ours(layout, window=50), spec(layout, window=50), inputs_with(layout))


@by_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["odd grid", "77 text first", "references and padding"])
@pytest.mark.parametrize("form", ["bool", "float", "per head", "one dimension"])
def test_key_masks(name, form, dtype, impl):
    layout = LAYOUTS[name]
    mask = {
        "bool": seen_keys(layout),
        "float": torch.randn(2, 1, 1, layout.length).masked_fill(~seen_keys(layout), float("-inf")).to(dtype),
        "per head": torch.rand(2, 6, 1, layout.length) > 0.2,
        "one dimension": seen_keys(layout)[0, 0, 0],
    }[form]
    assert_as_accurate(ours(layout, mask=mask, impl=impl), spec(layout, mask=mask), inputs_with(layout, dtype=dtype))


@by_impl
@pytest.mark.parametrize("lowest", ["-inf", "lowest number", "bool"])
def test_pairwise_mask_of_a_padded_batch(lowest, impl):
    layout = LAYOUTS["77 text first"]
    seen = seen_keys(layout)
    pairs = seen & seen.transpose(-1, -2)
    mask = pairs
    if lowest != "bool":
        hidden = float("-inf") if lowest == "-inf" else torch.finfo(torch.float32).min
        mask = torch.zeros(pairs.shape).masked_fill(~pairs, hidden)
    assert_as_accurate(ours(layout, mask=mask, impl=impl), spec(layout, mask=pairs), inputs_with(layout))


@pytest.mark.parametrize("impl", [*FAST, "reference"])
@pytest.mark.parametrize("name", ["odd grid", "77 text last"])
@pytest.mark.parametrize("form", ["bool", "float", "lowest number", "pairwise"])
def test_queries_that_see_nothing_give_zero(name, form, impl):
    layout = LAYOUTS[name]
    seen = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, layout.length)
    hidden = {"float": float("-inf"), "lowest number": torch.finfo(torch.float32).min}.get(form)
    mask = seen if hidden is None else torch.zeros(seen.shape).masked_fill(~seen, hidden)
    if form == "pairwise":
        mask = mask.expand(2, 1, layout.length, layout.length)
    *inputs, far_weight = inputs_with(layout)
    output, *gradients = with_gradients(
        lambda q, k, v: ours(layout, mask=mask, impl=impl)(q, k, v, far_weight), inputs, torch.float32
    )
    assert (output[1] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()
    alone = ours(layout)(*(x[:1] for x in inputs), far_weight)
    torch.testing.assert_close(output[:1], alone.double(), atol=1e-6, rtol=1e-5)


@by_impl
def test_a_window_without_a_visible_key_leaves_the_linear_part(impl):
    layout = TokenLayout.image((1, 1, 9))
    mask = torch.arange(9) >= 6  # the first tokens see nothing within 3
    inputs = inputs_with(layout)
    assert_as_accurate(ours(layout, mask=mask, impl=impl), spec(layout, mask=mask), inputs)
    output = ours(layout, mask=mask, impl=impl)(*inputs)
    assert (output[:, 0, :3] != 0).any()
    assert (output[:, 1, :3] == 0).all()  # λ = 0: as the window alone


def test_irreducible_pairwise_mask():
    layout = LAYOUTS["odd grid"]
    causal = torch.ones(layout.length, layout.length, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="cannot honour a pairwise mask"):
        ours(layout, mask=causal)(*inputs_with(layout))


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_grouped_queries(impl):
    layout = LAYOUTS["77 text last"]
    query, key, value, far_weight = inputs_with(layout, (0.1, 0.0, 2.0, 0.3), heads=4, kv_heads=2)
    output = ours(layout, enable_gqa=True, impl=impl)(query, key, value, far_weight)
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    torch.testing.assert_close(output, ours(layout)(query, *repeated, far_weight), atol=1e-6, rtol=1e-5)


@by_impl
@pytest.mark.parametrize("scale", [0.7, 0.0])
def test_scale(scale, impl):
    layout = LAYOUTS["77 text last"]
    assert_as_accurate(ours(layout, scale=scale, impl=impl), spec(layout, scale=scale), inputs_with(layout))


@by_impl
@pytest.mark.parametrize("value_dim", [5, 24])
def test_values_of_another_width(value_dim, impl):
    layout = LAYOUTS["77 text last"]
    query, key, _, far_weight = inputs_with(layout)
    value = torch.randn(2, 6, layout.length, value_dim)
    assert_as_accurate(ours(layout, impl=impl), spec(layout), [query, key, value, far_weight])


def assert_as_accurate_as_the_window(layout, inputs, impl):
    """As `assert_as_accurate`; gradients may also have twice the error that `local_attention` has in this dtype.

    Where a softmax saturates, its gradient is the difference of two sums rounded apart, here as there.
    """

    def window(q, k, v, w):
        return local_attention(q, k, v, layout, window=3, impl=impl) + 0 * w.sum()

    def exact_window(q, k, v, w):
        return reference.local_attention(q, k, v, layout, window=3) + 0 * w.sum()

    dtype = inputs[0].dtype
    truths = [with_gradients(f, inputs, torch.float64) for f in (spec(layout), spec(layout), exact_window)]
    results = [with_gradients(f, inputs, dtype) for f in (ours(layout, impl=impl), spec(layout), window)]
    errors = [
        [(a - b).abs().max() for a, b in zip(result, truth, strict=True)]
        for result, truth in zip(results, truths, strict=True)
    ]
    for i, (mine, eager, local) in enumerate(zip(*errors, strict=True)):
        exact = truths[0][i].abs().max()
        floor = torch.finfo(dtype).eps / 2 + 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        bound = 2 * (max(eager, local) if i else eager) + floor * exact.clamp_min(1)
        assert mine <= bound, f"{i}: {mine:.2e} > {bound:.2e}"


@by_impl
@pytest.mark.parametrize("name", ["odd grid", "77 text first"])
@pytest.mark.parametrize("kind", ["high", "low", "own low", "own high", "mixed"])
def test_large_scores(kind, name, impl):
    """Scores up to ±60 and beyond: in the range of fp32 although exp(60) is far from the linear part's numbers."""
    layout = LAYOUTS[name]
    query, key, value, far_weight = inputs_with(layout)
    if kind in ("high", "low"):
        query, key = query.abs() * (15 if kind == "high" else -15), key.abs() + 0.5
    elif kind == "mixed":
        query = query * 15
    else:  # each token has a score with itself that is far from those with all others
        sign = 1 if kind == "own high" else -1
        key = torch.nn.functional.normalize(key, dim=-1)
        query = key * sign * 240 + query
    scores = (query @ key.transpose(-1, -2) / 4).abs().max()
    assert 40 < scores < 300
    assert_as_accurate_as_the_window(layout, [query, key, value, far_weight], impl)


@by_impl
def test_a_window_whose_scores_are_all_beyond_the_range_of_exp(impl):
    layout = LAYOUTS["77 text first"]
    query, key, value, far_weight = inputs_with(layout)
    axis = torch.nn.functional.normalize(torch.ones(16), dim=0)
    query, key = query * 0.5 - 440 * axis, key * 0.01 + axis
    assert (query @ key.transpose(-1, -2) / 4).max() < -104  # exp gives 0 in fp32
    output = ours(layout, impl=impl)(query, key, value, far_weight)
    exact = spec(layout)(*(x.double() for x in (query, key, value, far_weight)))
    torch.testing.assert_close(output.double(), exact, atol=1e-4, rtol=0)  # scores of 110 are rounded to 1e-5


@by_impl
@pytest.mark.parametrize("shift", [-15, -5, 5, 15])
def test_fp16_stays_in_range(shift, impl):
    """Scores of a token with itself that are far from the others'."""
    layout = LAYOUTS["77 text first"]
    query, key, value, far_weight = inputs_with(layout, dtype=torch.float16)
    key = torch.nn.functional.normalize(key, dim=-1)
    query = (query + key * 4 * shift).half()
    assert_as_accurate_as_the_window(layout, [query, key, value, far_weight], impl)


@by_impl
@pytest.mark.parametrize("case", ["own key hidden", "all low"])
def test_fp16_beside_a_null_key_that_is_far_from_the_scores(case, impl):
    layout = TokenLayout.joint(text=3, grid=(1, 6, 6))
    query, key, value, far_weight = inputs_with(layout, dtype=torch.float16)
    mask = None
    if case == "own key hidden":
        mask = torch.arange(layout.length) < 33  # padding at the end of the grid
        query = query * 2
        key = query + key / 10
        own = (query * key).sum(-1) / 4
        assert own.max() > 20
    else:
        axis = torch.nn.functional.normalize(torch.ones(16), dim=0)
        query, key = (query * 0.3 + 8 * axis).half(), (key * 0.3 - 9 * axis).half()
        assert (query @ key.transpose(-1, -2) / 4).max() < -12
    # Without the gradient of the far weights, which is beyond the range of fp16 here.
    assert_as_accurate(
        lambda q, k, v: ours(layout, mask=mask, impl=impl)(q, k, v, far_weight),
        lambda q, k, v: spec(layout, mask=mask)(q, k, v, far_weight.to(q.dtype)),
        [query, key, value],
    )


@by_impl
def test_empty_batch(impl):
    layout = LAYOUTS["77 text first"]
    inputs = inputs_with(layout, batch=0)
    output, *gradients = with_gradients(ours(layout, impl=impl), inputs, torch.float32)
    assert output.shape == inputs[2].shape
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_autocast_changes_nothing():
    layout = LAYOUTS["77 text first"]
    inputs = inputs_with(layout)
    for impl in (*FAST, "reference"):
        expected = ours(layout, impl=impl)(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = ours(layout, impl=impl)(*inputs)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected, atol=0, rtol=0)


def kept_for_backward(function, inputs):
    """The bytes that autograd keeps beyond inputs and output, each storage once; the gradients are taken twice."""
    inputs, kept = [x.requires_grad_() for x in inputs], {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = function(*inputs)
    for x in (*inputs, output):
        kept.pop(x.untyped_storage().data_ptr(), None)
    first, second = (torch.autograd.grad(output.square().sum(), inputs, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("feature_map", ["relu", "softmax", "learned"])
def test_training_keeps_what_the_window_keeps(feature_map):
    """Not the features, nor the sums over all tokens, which are computed again in the backward pass."""
    layout = TokenLayout.joint(text=7, grid=(1, 16, 16))
    inputs = inputs_with(layout, (0.4, 1.5), torch.bfloat16, batch=1)
    if feature_map == "learned":
        weight = torch.randn(16, 16, dtype=torch.bfloat16, requires_grad=True)
        feature_map = (lambda x: torch.softmax(x @ weight, -1), lambda x: torch.softmax(x @ weight, -1))
    kept = kept_for_backward(ours(layout, impl="tiled", feature_map=feature_map), inputs)
    # query, key, value and output, widened to 24 channels, with those of the null key, a score in fp32, and a mask.
    assert kept <= 2 * 2 * 24 * (4 * layout.length + 2) + 4 * 2 * layout.length + 2 * layout.length


def test_autocast_and_a_checkpoint_around_it():
    layout = LAYOUTS["77 text first"]
    inputs = [x.requires_grad_() for x in inputs_with(layout)]
    projection = torch.nn.Linear(16, 16, bias=False)
    maps = (lambda x: torch.softmax(projection(x), -1),) * 2
    results = []
    for outer in (False, True):
        function = ours(layout, feature_map=maps)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = checkpoint(function, *inputs, use_reentrant=False) if outer else function(*inputs)
        assert output.dtype == torch.float32
        results.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, projection.weight])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("given", ["as a layout", "as shapes"])
def test_compiles_once_for_all_sizes(given):
    def of_layout(query, key, value, far_weight, mask, layout):
        return hybrid_attention(query, key, value, layout, window=3, far_weight=far_weight, mask=mask, impl="tiled")

    def of_shapes(query, key, value, far_weight, mask, grid, text):
        layout = TokenLayout.joint(text=text.shape[0], grid=(1, *grid.shape))
        return hybrid_attention(query, key, value, layout, window=3, far_weight=far_weight, mask=mask, impl="tiled")

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = of_layout if given == "as a layout" else of_shapes
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for height, width, text in ((5, 6, 7), (7, 3, 11), (9, 13, 20), (3, 8, 33)):
        layout = TokenLayout.joint(text=text, grid=(1, height, width))
        inputs = [x.requires_grad_() for x in inputs_with(layout, far_weight=(0.4, 0.0))]
        geometry = (layout,) if given == "as a layout" else (torch.empty(height, width), torch.empty(text))
        mask = seen_keys(layout)
        output, expected = compiled(*inputs, mask, *geometry), function(*inputs, mask, *geometry)
        torch.testing.assert_close(output, expected)
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"impl": "torch"}, "Unknown impl 'torch': expected one of None, 'triton', 'tiled', 'dense', 'reference'"),
        ({"impl": "triton"}, "impl='triton' cannot answer this call"),
        ({"feature_map": "gelu"}, "'relu', 'elu', 'softmax', or a pair"),
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"temporal_window": 0}, "temporal_window must be an integer of at least 1"),
        ({"far_weight": torch.zeros(3)}, r"each of the 6 heads of query, got \(3,\) of torch.float32"),
        ({"far_weight": 0.1}, "far_weight is a float, expected a tensor"),
        ({"far_weight": torch.zeros(1, 6)}, r"got \(1, 6\)"),
        ({"far_weight": torch.zeros(6, dtype=torch.int64)}, "got .* of torch.int64"),
        ({"mask": torch.ones(2, 1, 1, 34, dtype=torch.bool)}, "does not broadcast"),
        ({"mask": torch.zeros(35, requires_grad=True)}, "pass mask.detach"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(arguments, match):
    layout = LAYOUTS["odd grid"]
    query, key, value, far_weight = inputs_with(layout)
    with pytest.raises(ValueError, match=match):
        hybrid_attention(query, key, value, layout, **{"window": 3, "far_weight": far_weight, **arguments})


def test_a_far_weight_is_never_negative_and_comes_back():
    module = FarWeight(3)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([-0.5, 0.0, 0.25]) / PER_STEP)
    far_weight = module()
    assert far_weight.tolist() == pytest.approx([0, 0, 0.25])
    assert torch.autograd.grad(far_weight.sum(), module.weight)[0].tolist() == [PER_STEP] * 3
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1 / PER_STEP)
    for _ in range(60):
        optimizer.zero_grad()
        (module() - 0.4).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(module(), torch.full((3,), 0.4), atol=0.05, rtol=0)


@pytest.mark.parametrize("make", [tiny.flux, tiny.pixart], ids=lambda f: f.__name__)
def test_models_start_as_the_window_and_restore_exactly(make: Any) -> None:
    inputs = getattr(tiny, f"{make.__name__}_inputs")()
    model = make()
    with torch.no_grad():
        stock = model(**inputs)[0]
        hybrid = linearize(model, HybridProcessor(window=2))(**inputs)[0]
        window = linearize(make(), ClearProcessor(window=2))(**inputs)[0]
        assert not torch.allclose(window, stock, atol=1e-3)
        assert torch.equal(hybrid, window)
    # Where λ is to have a gradient, the linear part is computed.
    torch.testing.assert_close(model(**inputs)[0], window, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        tiny.train(model)
        for layer in layers_of(model):
            layer.processor.far.weight.abs_()  # type: ignore[union-attr]
        assert not torch.allclose(model(**inputs)[0], window, atol=1e-3)
    model(**inputs)[0].square().mean().backward()
    for layer in layers_of(model):
        assert layer.processor is not None
        for parameter in layer.processor.own_parameters().values():
            assert parameter.grad is not None
            assert (parameter.grad != 0).any()
    with torch.no_grad():
        assert torch.equal(restore(model)(**inputs)[0], stock)


def test_every_implementation_gives_a_model_the_same_answer() -> None:
    inputs, outputs = tiny.flux_inputs(reference=(4, 5)), []
    with torch.no_grad():
        for impl in (None, *(name for name in IMPLS if name != "triton")):
            model = tiny.train(linearize(tiny.flux(), HybridProcessor(window=2, impl=impl)))
            outputs.append(model(**inputs)[0])
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)


def test_status_says_how_a_call_is_answered() -> None:
    model, inputs = linearize(tiny.flux(), HybridProcessor(window=2)), tiny.flux_inputs()
    with torch.no_grad():
        model(**inputs)
    assert "tiled; linear over all grids" in str(status(model))
    with torch.no_grad():
        model = linearize(tiny.flux(), HybridProcessor(window=2, impl="reference"))
        model(**inputs)
    assert "reference" in str(status(model))
    assert "linear over" not in str(status(model))


def test_saved_weights_come_back(tmp_path: Path) -> None:
    inputs = tiny.flux_inputs()
    model = tiny.train(linearize(tiny.flux(), HybridProcessor(window=2, feature_map="hedgehog")))
    save_linear_attention(model, tmp_path)
    config = json.loads((tmp_path / "linear_attention_config.json").read_text())
    assert {layer["processor"] for layer in config["layers"].values()} == {"hybrid"}
    other = load_linear_attention(tiny.flux(), tmp_path)
    with torch.no_grad():
        assert torch.equal(other(**inputs)[0], model(**inputs)[0])


def test_distillation_moves_the_far_weights(tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline()
    state = copy.deepcopy(pipe.transformer.state_dict())
    samples = make_samples(
        pipe,
        ["a cat", "the red dog"],
        tmp_path / "samples",
        num_samples=4,
        batch_size=4,
        resolutions=[(24, 32)],
        num_inference_steps=2,
        call_arguments={"max_sequence_length": 8},
    )
    linearize(pipe, HybridProcessor(window=1))
    distill(pipe, samples, tmp_path / "student", transfer_steps=4, steps=0, batch_size=2)
    weights = [layer.processor.far.weight.detach() for layer in layers_of(pipe)]
    assert all((weight != 0).any() for weight in weights)
    restored = restore(pipe).transformer.state_dict()
    assert all(torch.equal(restored[name], value) for name, value in state.items())
