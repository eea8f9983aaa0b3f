"""`local_attention` against its specification in `ops/reference.py`, forward and all gradients."""

from __future__ import annotations

import functools
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from test_linear_attention import assert_same_under_checkpointing

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.local import local_attention
from diffusers_linattn.ops.local_choice import choose_impl, window_covers
from diffusers_linattn.ops.tiles import plan_tiles


HEADS, DIM = 3, 16

LAYOUTS = {
    "one token": TokenLayout.image((1, 1, 1)),
    "one token after text": TokenLayout.joint(text=77, grid=(1, 1, 1)),
    "text only": TokenLayout.of([("text", 20)]),
    "exact tiles": TokenLayout.joint(text=8, grid=(1, 16, 24)),
    "odd": TokenLayout.joint(text=1, grid=(1, 9, 21)),
    "smaller than a tile": TokenLayout.joint(text=5, grid=(1, 3, 5), text_first=False),
    "one row": TokenLayout.joint(text=3, grid=(1, 1, 37)),
    "one column": TokenLayout.joint(text=3, grid=(1, 37, 1), text_first=False),
    "long text first": TokenLayout.joint(text=512, grid=(1, 3, 17)),
    "long text last": TokenLayout.joint(text=77, grid=(1, 17, 18), text_first=False),
    "text around": TokenLayout.of([("text", 4), ("image", (1, 11, 12)), ("text", 9), ("padding", 3)]),
    "references": TokenLayout.joint(text=6, grid=(1, 9, 11), references=[(1, 18, 22), (2, 5, 4), (1, 9, 11)]),
    "reference of unknown grid": TokenLayout.of([("image", (1, 9, 10)), ("reference", 14), ("text", 7)]),
    "padding": TokenLayout.joint(text=7, grid=(1, 10, 11), padding=6),
    "video": TokenLayout.joint(text=6, grid=(5, 9, 10), text_first=False),
    "video with a reference": TokenLayout.joint(text=6, grid=(3, 9, 11), references=[(3, 4, 5)]),
}


def make_inputs(layout, dtype=torch.float64, batch=1, heads=HEADS, key_heads=None, pooled=0, seed=0):
    """query, key, value, pooled_key, pooled_value: views of (batch, tokens, heads, head_dim) memory."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads, tokens):
        return torch.randn(batch, tokens, heads, DIM, generator=generator).to(dtype).transpose(1, 2)

    key_heads = key_heads or heads
    tensors = [tensor(heads, layout.length), tensor(key_heads, layout.length), tensor(key_heads, layout.length)]
    return tensors + ([tensor(key_heads, pooled), tensor(key_heads, pooled)] if pooled else [None, None])


def make_mask(form, layout, batch, dtype, heads=HEADS):
    n, generator = layout.length, torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.rand(shape, generator=generator)

    if form == "keys":
        return random(batch, 1, 1, n) > 0.3
    if form == "keys, 2 dimensions":
        return random(1, n) > 0.3
    if form == "additive":
        return random(batch, heads, 1, n).to(dtype)
    if form == "additive, keys apart":  # in memory
        return random(n, batch).to(dtype).t()[:, None, None]
    if form == "pairwise":
        return random(1, heads, n, n) > 0.3
    if form == "pairwise additive":
        return random(batch, 1, n, n).to(dtype)
    if form == "all keys hidden":
        return torch.zeros(1, 1, 1, n, dtype=torch.bool)
    assert form == "some rows hidden"
    return (random(1, 1, n, 1) > 0.5).expand(1, 1, n, n)


def run(function, tensors, layout, dtype=None, **kwargs):
    """The output and the gradients of every tensor under one fixed gradient of the output."""
    tensors = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    query, key, value, pooled_key, pooled_value = tensors
    out = function(query, key, value, layout, pooled_key=pooled_key, pooled_value=pooled_value, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    out.backward(grad)
    return [out.detach()] + [x.grad for x in tensors if x is not None]


def check(
    layout,
    dtype=torch.float64,
    batch=1,
    heads=HEADS,
    pooled=0,
    mask=None,
    impl="tiled",
    slack=1,
    tensors=None,
    **kwargs,
):
    """The error may be twice that of the reference in the same dtype, both measured against the reference in fp64.

    `slack` is how many roundings of the largest number are allowed besides, for results that cancel to nearly nothing.
    """
    tensors = tensors or make_inputs(layout, dtype, batch, heads, pooled=pooled)
    if isinstance(mask, str):
        mask = make_mask(mask, layout, batch, dtype, heads)
    actual = run(local_attention, tensors, layout, mask=mask, impl=impl, **kwargs)
    eager = run(reference.local_attention, tensors, layout, mask=mask, **kwargs)
    truth = run(reference.local_attention, tensors, layout, torch.float64, mask=mask, **kwargs)
    names = ("output", "query", "key", "value", "pooled_key", "pooled_value")
    for name, a, e, t in zip(names, actual, eager, truth, strict=False):
        assert a.dtype == dtype
        error, allowed = (a.double() - t).abs().max(), 2 * (e.double() - t).abs().max()
        floor = slack * max(torch.finfo(dtype).eps, 1e-12) * t.abs().max().clamp_min(1)
        assert error <= allowed + floor, f"{name}: {error:.1e}, allowed {allowed:.1e} + {floor:.1e}"


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_matches_reference(layout, window):
    check(layout, window=window)


@pytest.mark.parametrize("temporal_window", [1, 2, 9])
@pytest.mark.parametrize("name", ["video", "video with a reference"])
def test_temporal_window(name, temporal_window):
    check(LAYOUTS[name], window=3, temporal_window=temporal_window, batch=2, pooled=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["exact tiles", "odd", "long text first", "references"])
def test_dtypes(name, dtype):
    check(LAYOUTS[name], dtype, batch=2, window=4, pooled=6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_pooled_keys_and_batch(layout):
    check(layout, window=3, batch=2, pooled=5, scale=0.1)


@pytest.mark.parametrize("pooled", [0, 5], ids=["", "pooled"])
@pytest.mark.parametrize(
    "form",
    [
        "keys",
        "keys, 2 dimensions",
        "additive",
        "pairwise",
        "pairwise additive",
        "all keys hidden",
        "some rows hidden",
    ],
)
@pytest.mark.parametrize("name", ["text around", "video with a reference", "text only"])
def test_masks(name, form, pooled):
    check(LAYOUTS[name], batch=2, window=3, mask=form, pooled=pooled)


def test_fully_hidden_rows_are_zero_in_fp32():
    layout = LAYOUTS["odd"]
    mask = make_mask("all keys hidden", layout, 1, torch.float32)
    out, *grads = run(local_attention, make_inputs(layout, torch.float32), layout, window=3, mask=mask, impl="tiled")
    assert not out.any()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("impl", ["tiled", "dense", "reference"])
def test_gradient_checkpointing(impl):
    check_checkpointing(impl)


def check_checkpointing(impl):
    layout = LAYOUTS["smaller than a tile"]
    assert_same_under_checkpointing(
        lambda q, k, v, pk, pv: local_attention(q, k, v, layout, window=2, pooled_key=pk, pooled_value=pv, impl=impl),
        make_inputs(layout, torch.float32, pooled=3),
    )


def check_lowest_numbers(impl, dtype, mask_dtype, rows=1):
    """Additive masks often hide with the lowest finite number; a mask may have another dtype than the query."""
    layout = LAYOUTS["odd"]
    seen = (torch.rand(2, 1, rows, layout.length, generator=torch.Generator().manual_seed(1)) > 0.3).expand(
        -1, HEADS, -1, -1
    )
    seen = seen & torch.tensor([True, False])[:, None, None, None]
    lowest = torch.zeros(seen.shape, dtype=mask_dtype).masked_fill(~seen, torch.finfo(mask_dtype).min)
    tensors = make_inputs(layout, dtype, batch=2)
    actual, expected = (run(local_attention, tensors, layout, window=3, mask=m, impl=impl) for m in (lowest, seen))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
        assert a[0].any()
        assert not a[1].any()


@pytest.mark.parametrize("rows", [1, LAYOUTS["odd"].length], ids=["keys", "pairwise"])
@pytest.mark.parametrize("impl", ["tiled", "dense", "reference"])
@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_lowest_number_hides(dtype, mask_dtype, impl, rows):
    check_lowest_numbers(impl, dtype, mask_dtype, rows)


@pytest.mark.parametrize("number", [-1e5, -6e4])
def test_what_a_mask_of_another_dtype_hides_has_no_gradient(number):
    layout = LAYOUTS["odd"]
    mask = torch.zeros(1, 1, 1, layout.length)
    mask[..., : layout.length // 2] = number  # beyond the range of fp16, or just in it
    check(layout, torch.float16, window=3, mask=mask)
    mask[:] = number
    check(layout, torch.float16, window=3, mask=mask)


@pytest.mark.parametrize("impl", ["tiled", "dense", "reference", None])
@pytest.mark.parametrize("window", [3, 50])
@pytest.mark.parametrize("mask", [None, "keys"])
def test_autocast_changes_nothing(mask, window, impl):
    layout = LAYOUTS["odd"]
    tensors, mask = make_inputs(layout, torch.float32)[:3], mask and make_mask(mask, layout, 1, torch.float32)
    expected = local_attention(*tensors, layout, window=window, mask=mask, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = local_attention(*tensors, layout, window=window, mask=mask, impl=impl)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)


@pytest.mark.parametrize("mask", [None, "keys", "pairwise additive", "some rows hidden"])
@pytest.mark.parametrize("pooled", [0, 5], ids=["", "pooled"])
@pytest.mark.parametrize("impl", ["dense", None])
def test_dense(impl, pooled, mask):
    layout = TokenLayout.joint(text=7, grid=(2, 9, 11), references=[(1, 4, 6)])
    check(layout, window=30, temporal_window=2, batch=2, pooled=pooled, mask=mask, impl=impl)


@pytest.mark.parametrize("mask", [None, "keys", "pairwise additive", "all keys hidden"])
@pytest.mark.parametrize("pooled", [0, 5], ids=["", "pooled"])
def test_dense_under_the_window_as_a_mask(pooled, mask):
    check(
        LAYOUTS["video with a reference"], window=3, temporal_window=2, batch=2, pooled=pooled, mask=mask, impl="dense"
    )


@pytest.mark.parametrize("count", [1, 3, 10**6])
def test_any_number_of_tiles_per_call(count, monkeypatch):
    layout = TokenLayout.joint(text=5, grid=(1, 10, 75))
    monkeypatch.setattr("diffusers_linattn.ops.local_tiled._CPU_NUMBERS", count * HEADS * 600 * 4 * DIM)
    check(layout, window=4, pooled=3)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 12, 100])
def test_parts_hold_every_query_once(count):
    layout = TokenLayout.joint(text=6, grid=(1, 45, 61), references=[(2, 23, 31)])
    ids = torch.arange(layout.length)[None, None, :, None]
    parts = [part for block in plan_tiles(layout, 4, None) for part in block.split(count)]
    assert max(part.count for part in parts) <= count
    found = torch.cat([part.queries.of(ids, part.tiles).flatten() for part in parts])
    assert found.sort().values.tolist() == list(range(6, layout.length))


def test_first_keys_of_a_wide_window_are_all_hidden():
    """The CPU's kernel works on 512 keys at a time; some queries see none of the first 512."""
    check(TokenLayout.joint(text=1, grid=(1, 40, 72)), torch.float32, window=32, heads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.05, 20])
def test_text_that_outweighs_the_window_or_hardly_counts(size, dtype):
    layout = TokenLayout.joint(text=40, grid=(1, 20, 30))
    tensors = make_inputs(layout, dtype, pooled=3)
    tensors[1][:, :, :40] *= size
    check(layout, dtype, window=5, tensors=tensors)


def test_head_dim_with_a_stride():
    layout = LAYOUTS["odd"]
    tensors = [x.float().transpose(2, 3).contiguous().transpose(2, 3) for x in make_inputs(layout)[:3]]
    out = local_attention(*tensors, layout, window=3, impl="tiled")
    torch.testing.assert_close(out, reference.local_attention(*tensors, layout, window=3))


@pytest.mark.parametrize("impl", ["tiled", "dense", "reference"])
def test_empty_batch(impl):
    layout = LAYOUTS["odd"]
    tensors = make_inputs(layout, batch=0)
    for result in run(local_attention, tensors, layout, window=3, impl=impl):
        assert result.shape == tensors[0].shape


def test_poisoned_buffers(monkeypatch):
    layout = LAYOUTS["references"]
    expected = run(local_attention, make_inputs(layout, pooled=5), layout, window=3, impl="tiled")
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = run(local_attention, make_inputs(layout, pooled=5), layout, window=3, impl="tiled")
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_gqa():
    layout = LAYOUTS["odd"]
    tensors = make_inputs(layout, heads=4, key_heads=2, pooled=5)
    expanded = [tensors[0]] + [x.repeat_interleave(2, 1) for x in tensors[1:]]
    actual = run(local_attention, tensors, layout, window=3, enable_gqa=True, impl="tiled")
    expected = run(reference.local_attention, expanded, layout, window=3)
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            b = b.unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_memory_order_of_output(contiguous):
    layout = LAYOUTS["odd"]
    tensors = make_inputs(layout)[:3]
    if contiguous:
        tensors = [x.contiguous() for x in tensors]
    out = local_attention(*tensors, layout, window=3)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, reference.local_attention(*tensors, layout, window=3))


def test_value_dim_of_its_own():
    layout = LAYOUTS["text around"]
    query, key, value, *_ = make_inputs(layout)
    tensors = [query, key, value[..., :5], None, None]
    actual = run(local_attention, tensors, layout, window=3, impl="tiled")
    for a, b in zip(actual, run(reference.local_attention, tensors, layout, window=3), strict=True):
        torch.testing.assert_close(a, b)


def test_reference_mask_pair_by_pair():
    """The rule in words, one pair of tokens at a time, in integers: twice a distance is exact here."""
    window, temporal_window = 3, 2
    layout = TokenLayout.of([("text", 2), ("image", (3, 4, 6)), ("reference", (2, 2, 3)), ("padding", 1)])
    actual = reference.local_mask(layout, window, temporal_window)

    def place(i):
        for segment in layout.segments:
            if segment.start <= i < segment.stop:
                if segment.grid is None:
                    return None
                (_, height, width), i = segment.grid, i - segment.start
                return segment, i // (height * width), i // width % height, i % width
        raise AssertionError(i)

    for i in range(layout.length):
        for j in range(layout.length):
            query, key = place(i), place(j)
            visible = True
            if query is not None and key is not None:
                (a, t, y, x), (b, s, v, u) = query, key
                # The image is twice as high and wide as the reference, so 4 times a distance is an integer.
                if a == b:
                    dy, dx = 4 * (y - v), 4 * (x - u)
                elif a.kind == "image":
                    dy, dx = 2 * y + 1 - 2 - 4 * v, 2 * x + 1 - 2 - 4 * u
                else:
                    dy, dx = 8 * y + 4 - 2 - 4 * v, 8 * x + 4 - 2 - 4 * u
                visible = dy**2 + dx**2 < (4 * window) ** 2
                if a == b:
                    visible = visible and abs(t - s) < temporal_window
            assert actual[i, j] == visible, (i, j)


COVERS = {
    "text only": (TokenLayout.of([("text", 9)]), 1),
    "one token": (TokenLayout.image((1, 1, 1)), 1),
    "3-4-5": (TokenLayout.image((1, 4, 5)), 6),
    "one row": (TokenLayout.joint(text=3, grid=(1, 1, 9)), 9),
    "smaller reference": (TokenLayout.joint(text=3, grid=(1, 8, 8), references=[(1, 2, 3)]), 10),
    "larger reference": (TokenLayout.joint(text=3, grid=(1, 2, 3), references=[(1, 9, 14)]), 16),
}


@pytest.mark.parametrize("impl", ["reference", "dense", "tiled"])
@pytest.mark.parametrize(("size", "reference_size", "window"), [(13, 5, 2), (5, 13, 3), (9, 11, 3)], ids=str)
def test_what_lies_on_the_circle_is_outside(size, reference_size, window, impl):
    """Between grids of unlike sizes as well, where 1.2 ** 2 + 1.6 ** 2 is not quite 4 in floats."""
    layout = TokenLayout.of([("image", (1, size, size)), ("reference", (1, reference_size, reference_size))])
    sizes = {0: size, 1: reference_size}
    tokens = [(grid, y, x) for grid, side in sizes.items() for y in range(side) for x in range(side)]
    place = {(g, i): [Fraction(2 * i + 1, 2 * sizes[g]) * to for to in sizes.values()] for g, i, _ in tokens}
    visible = torch.ones(layout.length, layout.length, dtype=torch.bool)
    on_circle = 0
    for row, (a, y, x) in enumerate(tokens):
        for column, (b, v, u) in enumerate(tokens):
            distance = (place[a, y][b] - place[b, v][b]) ** 2 + (place[a, x][b] - place[b, u][b]) ** 2
            visible[row, column] = distance < window**2
            on_circle += a != b and distance == window**2
    assert on_circle
    query, key, value = make_inputs(layout)[:3]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible)
    torch.testing.assert_close(local_attention(query, key, value, layout, window=window, impl=impl), expected)


@pytest.mark.parametrize(("layout", "smallest"), COVERS.values(), ids=COVERS.keys())
def test_window_covers_exactly_when_the_mask_is_full(layout, smallest):
    for window in range(1, smallest + 3):
        full = bool(reference.local_mask(layout, window).all())
        assert window_covers(layout, window) == full == (window >= smallest), window


def test_window_covers_frames():
    layout = TokenLayout.image((3, 2, 2))
    assert window_covers(layout, 2, 3)
    assert window_covers(layout, 2)
    assert not window_covers(layout, 2, 2)


CHOICES = {
    "covered": ((1, 8, 8), 16, {}, "dense"),
    "large": ((1, 128, 128), 16, {}, "triton"),
    "leaves out too little": ((1, 64, 64), 40, {}, "dense"),
    "mask of keys": ((1, 128, 128), 16, {"mask": (1, 1, 1, 16384)}, "triton"),
    "mask of pairs": ((1, 128, 128), 16, {"mask": (1, 1, 16384, 16384)}, "tiled"),
    "fp64": ((1, 128, 128), 16, {"dtype": torch.float64}, "tiled"),
    "large heads": ((1, 128, 128), 16, {"dim": 512}, "tiled"),
    "cpu": ((1, 128, 128), 16, {"device": "cpu"}, "tiled"),
    "cpu, leaves out too little": ((1, 64, 64), 40, {"device": "cpu"}, "tiled"),
}


@pytest.mark.parametrize(("grid", "window", "call", "expected"), CHOICES.values(), ids=CHOICES.keys())
def test_choice_of_the_implementation(grid, window, call, expected, monkeypatch):
    monkeypatch.setattr("diffusers_linattn.ops.local_choice.why_not", lambda device: None)
    layout = TokenLayout.image(grid)
    query = SimpleNamespace(
        device=torch.device(call.get("device", "cuda")),
        dtype=call.get("dtype", torch.bfloat16),
        shape=(1, 2, layout.length, call.get("dim", 64)),
    )
    mask = torch.empty(call["mask"], device="meta") if "mask" in call else None
    assert choose_impl(query, query, layout, window, None, mask) == expected


@pytest.mark.parametrize("mask", [None, "keys"])
def test_operator_registration(mask):
    layout = TokenLayout.joint(text=5, grid=(1, 9, 10))
    tensors = make_inputs(layout, torch.float32, batch=2, pooled=3)
    mask = mask and make_mask(mask, layout, 2, torch.float32)
    tensors = [x.requires_grad_() for x in tensors]
    operator = torch.ops.diffusers_linattn.local_attention_tiled.default
    torch.library.opcheck(operator, (*tensors, mask, layout.encode(), 3, None, 0.25))


@pytest.mark.parametrize("pooled", [0, 3], ids=["", "pooled"])
def test_compiles_once_for_all_sizes(pooled):
    def attend(query, key, value, pooled_key, pooled_value, text, grid):
        layout = TokenLayout.joint(text=text.shape[0], grid=(1, grid.shape[0], grid.shape[1]))
        out = local_attention(
            query, key, value, layout, window=3, pooled_key=pooled_key, pooled_value=pooled_value, impl="tiled"
        )
        return out.transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for text, height, width in [(7, 9, 12), (12, 16, 10), (5, 10, 16), (9, 21, 33), (7, 40, 8), (31, 12, 9)]:
        layout = TokenLayout.joint(text=text, grid=(1, height, width))
        inputs = make_inputs(layout, pooled=pooled)
        shapes = torch.empty(text), torch.empty(height, width)
        results = []
        for function in (compiled, attend):
            leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
            out = function(*leaves, *shapes)
            out.square().sum().backward()
            results.append([out] + [x.grad for x in leaves if x is not None])
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_compiles_where_a_mask_joins_at_another_batch_size():
    # The batch is a symbolic size by then, that of the mask a number.
    layout = TokenLayout.joint(text=5, grid=(1, 4, 6))
    torch._dynamo.reset()
    compiled = torch.compile(local_attention, backend="eager", fullgraph=True)
    for batch, mask in [(3, None), (2, torch.rand(2, 1, 1, layout.length) > 0.3)]:
        inputs = make_inputs(layout, batch=batch)[:3]
        expected = local_attention(*inputs, layout, window=2, mask=mask, impl="tiled")
        torch.testing.assert_close(compiled(*inputs, layout, window=2, mask=mask, impl="tiled"), expected)


ERRORS = {
    "window": ({"window": 0}, "window must be an integer of at least 1, got 0"),
    "fractional window": ({"window": 2.5}, "window must be an integer"),
    "temporal window": ({"temporal_window": 0}, "temporal_window must be an integer of at least 1"),
    "impl": ({"impl": "fast"}, "Unknown impl 'fast': expected one of None, 'triton', 'tiled', 'dense', 'reference'"),
    "triton": (
        {"impl": "triton"},
        "impl='triton' cannot answer this call: (Triton is not inst|it needs an NVIDIA GPU)",
    ),
    "triton, pairwise mask": (
        {"impl": "triton", "mask": torch.ones(95, 95, dtype=torch.bool)},
        "it takes a mask of keys.* use impl='tiled'",
    ),
    "mask": ({"mask": torch.ones(3, dtype=torch.bool)}, "does not broadcast"),
    "mask of integers": ({"mask": torch.ones(95, dtype=torch.int64)}, "expected bool .* pass mask.bool"),
    "mask without sides": ({"mask": torch.tensor(True)}, "does not broadcast"),
    "mask elsewhere": ({"mask": torch.ones(95, dtype=torch.bool, device="meta")}, "mask is on meta and query on cpu"),
    "list as mask": ({"mask": [True] * 95}, "mask is a list, expected a tensor"),
    "endless window": ({"window": 2**40}, "window must be at most 16777216"),
    "mask with gradient": ({"mask": torch.zeros(95, requires_grad=True)}, "requires a gradient"),
    "pooled alone": ({"pooled_key": torch.randn(1, HEADS, 2, DIM)}, "got only one of them"),
    "pooled dimensions": (
        {"pooled_key": torch.randn(1, HEADS, 2, 4), "pooled_value": torch.randn(1, HEADS, 2, 4)},
        "do not fit query",
    ),
    "pooled heads": (
        {"pooled_key": torch.randn(1, 2, 2, DIM), "pooled_value": torch.randn(1, 2, 2, DIM)},
        "pooled_key 2: expected as many",
    ),
    "pooled counts": (
        {"pooled_key": torch.randn(1, HEADS, 2, DIM), "pooled_value": torch.randn(1, HEADS, 3, DIM)},
        "Expected .batch, heads, pooled tokens",
    ),
    "pooled dtype": (
        {
            "pooled_key": torch.randn(1, HEADS, 2, DIM).half(),
            "pooled_value": torch.randn(1, HEADS, 2, DIM).half(),
        },
        "share a dtype",
    ),
}


@pytest.mark.parametrize(("kwargs", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(kwargs, message):
    layout = TokenLayout.joint(text=5, grid=(1, 9, 10))
    tensors = make_inputs(layout, torch.float32)[:3]
    with pytest.raises(ValueError, match=message):
        local_attention(*tensors, layout, **{"window": 3, **kwargs})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.long(), "query is torch.int64, expected torch.float32"),
        (lambda x: x.to(torch.float8_e4m3fn), "query is torch.float8_e4m3fn"),
        (lambda x: x[:, :0], "at least one head"),
        (lambda x: x[..., :0], "at least one head and one channel"),
        (lambda x: x.numpy(), "query is a ndarray, expected a tensor"),
    ],
    ids=["integers", "fp8", "no heads", "no channels", "no tensor"],
)
def test_what_no_attention_takes(change, message):
    layout = LAYOUTS["odd"]
    query, key, value = make_inputs(layout, torch.float32)[:3]
    with pytest.raises(ValueError, match=message):
        local_attention(change(query), change(key), change(value), layout, window=3)


def test_tangents_are_refused_not_dropped():
    layout = LAYOUTS["odd"]
    query, key, value = make_inputs(layout, torch.float32)[:3]

    def tangent(impl):
        attend = functools.partial(local_attention, key=key, value=value, layout=layout, window=3, impl=impl)
        return torch.func.jvp(attend, (query,), (torch.ones_like(query),))[1]

    assert tangent("reference").abs().max() > 0
    with pytest.raises(ValueError, match="no forward-mode derivative.*impl='reference'"):
        tangent("tiled")


def test_wrong_layout():
    tensors = make_inputs(LAYOUTS["odd"], torch.float32)[:3]
    with pytest.raises(ValueError, match="expected a TokenLayout"):
        local_attention(*tensors, (1, 9, 10), window=3)
    with pytest.raises(ValueError, match="Build the TokenLayout for the tokens of this call"):
        local_attention(*tensors, LAYOUTS["video"], window=3)
