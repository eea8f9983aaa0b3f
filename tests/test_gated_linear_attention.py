"""Gated linear attention against its specification, in fp64 as the truth, and against a loop over tokens."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from test_linear_attention import (
    assert_as_accurate,
    assert_same_under_checkpointing,
    make_inputs,
    seen_keys,
    with_gradients,
)
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_linattn.kernels import scan_paths
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import gated, gated_chunked, reference
from diffusers_linattn.ops.gated import gated_linear_attention
from diffusers_linattn.ops.gated_fla import fla_scan
from diffusers_linattn.ops.linear import linear_attention


LAYOUTS = {
    "one token": TokenLayout.image((1, 1, 1)),
    "one row of 15": TokenLayout.image((1, 1, 15)),
    "one column of 17": TokenLayout.image((1, 17, 1)),
    "odd grid": TokenLayout.image((1, 7, 5)),
    "several chunks": TokenLayout.image((1, 9, 11)),
    "video": TokenLayout.image((3, 4, 5)),
    "no text": TokenLayout.joint(text=0, grid=(1, 5, 6)),
    "77 text first": TokenLayout.joint(text=77, grid=(1, 5, 6)),
    "1 text last": TokenLayout.joint(text=1, grid=(1, 5, 6), text_first=False),
    "references and padding": TokenLayout.joint(
        text=7, grid=(1, 6, 5), text_first=False, references=[(1, 3, 4), (2, 2, 3)], padding=5
    ),
    "only text": TokenLayout.of([("text", 9)]),
}

by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
by_direction = pytest.mark.parametrize("direction", scan_paths.DIRECTIONS)
by_order = pytest.mark.parametrize("order", ["rows", "columns"])
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring on tensors this small, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_gated_inputs(layout, dtype=torch.float32, strength=0.5, per_head=False, **kwargs):
    query, key, value = make_inputs(layout, dtype, **kwargs)
    channels = 1 if per_head else key.shape[3]
    return [query, key, value, (-torch.rand(*key.shape[:3], channels) * strength).to(dtype)]


def make_initial_state(inputs, direction="bidirectional", normalize=True):
    """A non-negative state of the inputs' dtype, as keys and values behind a feature map leave it."""
    batch, heads, _, features = inputs[1].shape
    ways = (2,) if direction == "bidirectional" else ()
    return torch.rand(*ways, batch, heads, features, inputs[2].shape[3] + normalize).to(inputs[0].dtype)


def spec(layout, feature_map="relu", **kwargs):
    features = reference.FEATURE_MAPS[feature_map] if feature_map else lambda x: x
    return lambda q, k, v, g, state=None: reference.gated_linear_attention(
        q,
        k,
        v,
        g.expand_as(k),
        layout,
        query_features=features,
        key_features=features,
        initial_state=state,
        **kwargs,
    )


def ours(layout, **kwargs):
    return lambda q, k, v, g, state=None: gated_linear_attention(q, k, v, g, layout, initial_state=state, **kwargs)


@by_layout
@by_direction
@by_order
def test_matches_the_reference(layout, direction, order):
    options = {"direction": direction, "order": order}
    assert_as_accurate(ours(layout, **options), spec(layout, **options), make_gated_inputs(layout))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("with_state", [False, True])
def test_gradient_checkpointing(with_state, impl):
    layout = LAYOUTS["1 text last"]
    inputs = make_gated_inputs(layout)
    state = [make_initial_state(inputs)] if with_state else []
    assert_same_under_checkpointing(ours(layout, impl=impl), inputs + state)


@by_dtype
@pytest.mark.parametrize("name", ["77 text first", "several chunks"])
def test_dtypes(name, dtype):
    layout = LAYOUTS[name]
    assert_as_accurate(ours(layout), spec(layout), make_gated_inputs(layout, dtype))


@by_direction
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_slabs_and_chunks_of_any_size(chunk, direction, monkeypatch):
    monkeypatch.setattr(gated_chunked, "CHUNK", chunk)
    monkeypatch.setattr(gated_chunked, "SLAB", 2 * chunk)
    layout = LAYOUTS["several chunks"]
    options = {"direction": direction}
    assert_as_accurate(ours(layout, **options), spec(layout, **options), make_gated_inputs(layout, batch=1))


@by_direction
@pytest.mark.parametrize("name", ["one token", "several chunks", "video", "77 text first", "references and padding"])
def test_one_gate_per_head(name, direction):
    layout = LAYOUTS[name]
    options = {"direction": direction, "order": "columns"}
    inputs = make_gated_inputs(layout, per_head=True)
    assert_as_accurate(ours(layout, **options), spec(layout, **options), inputs)
    assert_as_accurate(ours(layout, impl="reference", **options), spec(layout, **options), inputs)


@by_direction
@pytest.mark.parametrize("per_head", [False, True], ids=["per channel", "per head"])
@pytest.mark.parametrize("strength", [1.0, 20.0, 1e4])
def test_strong_gates(strength, per_head, direction):
    layout = LAYOUTS["several chunks"]
    inputs = make_gated_inputs(layout, strength=strength, per_head=per_head)
    inputs[3][:, :, ::3] *= 1e-3  # weak gates next to strong ones: differences of long sums would lose them
    options = {"direction": direction, "feature_map": "elu"}
    assert_as_accurate(ours(layout, **options), spec(layout, **options), inputs)
    eager = spec(layout, **options)(*inputs)
    torch.testing.assert_close(ours(layout, **options)(*inputs), eager, atol=1e-5, rtol=0)


@by_direction
@pytest.mark.parametrize("per_head", [False, True], ids=["per channel", "per head"])
def test_gates_of_minus_infinity(direction, per_head):
    layout = LAYOUTS["odd grid"]
    inputs = make_gated_inputs(layout, per_head=per_head)
    inputs[3][:, :, ::4] = float("-inf")
    output, *gradients = with_gradients(ours(layout, direction=direction), inputs, torch.float32)
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(output, spec(layout, direction=direction)(*inputs).double(), atol=1e-5, rtol=1e-5)


@by_order
@pytest.mark.parametrize("name", ["77 text first", "references and padding", "video"])
def test_without_decay_it_is_linear_attention(name, order):
    layout = LAYOUTS[name]
    query, key, value, gate = make_gated_inputs(layout, torch.float64)
    output = gated_linear_attention(query, key, value, 0 * gate, layout, order=order)
    torch.testing.assert_close(output, linear_attention(query, key, value, layout))


def transposed(x, layout):
    """The tokens of a picture in the raster order of the transposed picture."""
    frames, height, width = layout.grids[0].grid
    return x.unflatten(2, (frames, height, width)).transpose(3, 4).flatten(2, 4)


@by_direction
@pytest.mark.parametrize("name", ["odd grid", "video", "one row of 15"])
def test_columns_are_the_rows_of_the_transposed_grid(name, direction):
    layout = LAYOUTS[name]
    inputs = make_gated_inputs(layout, torch.float64)
    frames, height, width = layout.grids[0].grid
    other = TokenLayout.image((frames, width, height))
    by_rows = gated_linear_attention(*(transposed(x, layout) for x in inputs), other, direction=direction)
    output = gated_linear_attention(*inputs, layout, direction=direction, order="columns")
    torch.testing.assert_close(output, transposed(by_rows, other))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@by_direction
def test_recurrence(direction, impl):
    """S_t = diag(a_t) S_(t-1) + k_t v_tᵀ, o_t = scale · q_tᵀ S_t, as GLA writes it."""
    layout = LAYOUTS["odd grid"]
    inputs = make_gated_inputs(layout, torch.float64)

    def scan(query, key, value, gate):
        state, outputs = torch.zeros(2, 2, 16, 16, dtype=torch.float64), []
        for t in range(query.shape[2]):
            state = gate[:, :, t, :, None].exp() * state + key[:, :, t, :, None] * value[:, :, t, None]
            outputs.append(16**-0.5 * torch.einsum("bhk,bhkv->bhv", query[:, :, t], state))
        return torch.stack(outputs, 2)

    expected = torch.zeros_like(inputs[2])
    if direction != "backward":
        expected += scan(*inputs)
    if direction != "forward":
        expected += scan(*(x.flip(2) for x in inputs)).flip(2)
    if direction == "bidirectional":
        query, key, value, _ = inputs
        expected -= 16**-0.5 * (query * key).sum(-1, keepdim=True) * value
    output = gated_linear_attention(*inputs, layout, direction=direction, feature_map=None, normalize=False, impl=impl)
    torch.testing.assert_close(output, expected)


@by_order
@pytest.mark.parametrize("feature_map", [None, "relu"])
def test_without_denominator(feature_map, order):
    layout = TokenLayout.of([("image", (1, 6, 5)), ("reference", (2, 2, 3))])
    options = {"feature_map": feature_map, "normalize": False, "order": order, "direction": "forward", "scale": 0.3}
    assert_as_accurate(ours(layout, **options), spec(layout, **options), make_gated_inputs(layout))


@by_direction
@by_order
@pytest.mark.parametrize("name", ["one token", "odd grid", "video", "77 text first"])
def test_initial_state(name, direction, order):
    layout, options = LAYOUTS[name], {"direction": direction, "order": order}
    inputs = make_gated_inputs(layout)
    inputs.append(make_initial_state(inputs, direction))
    assert_as_accurate(ours(layout, **options), spec(layout, **options), inputs)


@by_dtype
@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("per_head", [False, True], ids=["per channel", "per head"])
def test_initial_state_in_other_dtypes(per_head, impl, dtype):
    layout = LAYOUTS["1 text last"]
    inputs = make_gated_inputs(layout, dtype, per_head=per_head)
    inputs.append(make_initial_state(inputs))
    assert_as_accurate(ours(layout, feature_map="elu", impl=impl), spec(layout, "elu"), inputs)


@by_direction
@pytest.mark.parametrize("feature_map", [None, "relu"])
def test_initial_state_without_denominator(feature_map, direction):
    layout = LAYOUTS["odd grid"]
    options = {"feature_map": feature_map, "normalize": False, "direction": direction, "scale": 0.3}
    inputs = make_gated_inputs(layout)
    inputs.append(make_initial_state(inputs, direction, normalize=False))
    assert_as_accurate(ours(layout, **options), spec(layout, **options), inputs)


@pytest.mark.parametrize("form", ["bool", "pairwise"])
def test_initial_state_beside_a_mask(form):
    """A mask hides keys, not what came before them; queries that see nothing give 0."""
    layout = LAYOUTS["odd grid"]
    seen = seen_keys(layout)
    mask = seen if form == "bool" else seen & seen.transpose(-1, -2)
    inputs = make_gated_inputs(layout)
    inputs.append(make_initial_state(inputs))
    assert_as_accurate(ours(layout, mask=mask), spec(layout, mask=mask), inputs)


def test_initial_state_of_a_denominator_may_be_negative():
    layout = LAYOUTS["odd grid"]
    inputs = make_gated_inputs(layout)
    state = make_initial_state(inputs)
    state[..., -1] -= 3
    assert_as_accurate(ours(layout), spec(layout), [*inputs, state])


def test_backward_of_an_initial_state_under_autocast():
    layout = LAYOUTS["odd grid"]
    inputs = make_gated_inputs(layout)
    inputs.append(make_initial_state(inputs))
    expected = with_gradients(ours(layout), inputs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = with_gradients(ours(layout), inputs, torch.float32)
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("impl", ["chunked", "fla"])
def test_initial_state_has_no_forward_derivative(impl, monkeypatch):
    monkeypatch.setattr(gated, "load_chunk_gla", lambda: recurrence)
    layout = LAYOUTS["odd grid"]
    inputs = make_gated_inputs(layout)
    state = make_initial_state(inputs)
    with pytest.raises(ValueError, match=r"has no forward-mode derivative \(torch.func.jvp\)"):
        torch.func.jvp(lambda s: ours(layout, impl=impl)(*inputs, s), (state,), (state,))


def test_nothing_to_train_in_a_compiled_function():
    """With gradients on and none asked for, as where a user calls a frozen model without `torch.no_grad()`."""
    layout = LAYOUTS["references and padding"]
    inputs = make_gated_inputs(layout)
    torch._dynamo.reset()
    for function in (ours(layout), lambda *x: linear_attention(*x[:3], layout)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


@by_direction
def test_a_scan_goes_on_from_the_state_of_the_one_before(direction):
    """A video of two parts: each begins with what the other left behind."""
    height, width, batch, heads, dim = 3, 5, 2, 2, 16
    whole, first, second = (TokenLayout.image((frames, height, width)) for frames in (3, 1, 2))
    inputs = make_gated_inputs(whole, torch.float64, batch=batch, heads=heads, dim=dim)
    parts = [[x[:, :, : first.length] for x in inputs], [x[:, :, first.length :] for x in inputs]]

    def state_behind(key, value, gate, backward):
        state = torch.zeros(batch, heads, dim, dim + 1, dtype=torch.float64)
        tokens = range(key.shape[2])
        for t in reversed(tokens) if backward else tokens:
            phi, counted = (
                torch.relu(key[:, :, t]) + reference.EPS,
                torch.nn.functional.pad(value[:, :, t], (0, 1), value=1),
            )
            state = gate[:, :, t, :, None].exp() * state + phi[..., None] * counted[:, :, None]
        return state

    nothing = torch.zeros(batch, heads, dim, dim + 1, dtype=torch.float64)
    behind_first, behind_second = state_behind(*parts[0][1:], False), state_behind(*parts[1][1:], True)
    states = {
        "forward": (None, behind_first),
        "backward": (behind_second, None),
        "bidirectional": (torch.stack([nothing, behind_second]), torch.stack([behind_first, nothing])),
    }[direction]
    output = [
        gated_linear_attention(*part, layout, direction=direction, initial_state=state)
        for part, layout, state in zip(parts, (first, second), states, strict=True)
    ]
    torch.testing.assert_close(torch.cat(output, 2), gated_linear_attention(*inputs, whole, direction=direction))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("feature_map", ["relu", "elu", "softmax"])
def test_feature_maps(feature_map, impl):
    layout = LAYOUTS["references and padding"]
    assert_as_accurate(
        ours(layout, feature_map=feature_map, impl=impl), spec(layout, feature_map), make_gated_inputs(layout)
    )


def test_learned_feature_map_with_a_gate_per_feature():
    layout = LAYOUTS["77 text first"]
    query, key, value, gate = make_gated_inputs(layout)
    pair = tuple(lambda x: torch.softmax(torch.cat([x, -x], -1), -1) for _ in range(2))
    with pytest.raises(ValueError, match="one log decay per feature of the key"):
        gated_linear_attention(query, key, value, gate, layout, feature_map=pair)
    inputs = query, key, value, torch.cat([gate, gate], -1)
    output = gated_linear_attention(*inputs, layout, feature_map=pair)
    expected = gated_linear_attention(*inputs, layout, feature_map=pair, impl="reference")
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["odd grid", "references and padding"])
@pytest.mark.parametrize("form", ["bool", "float", "pairwise"])
def test_masks(name, form):
    layout = LAYOUTS[name]
    seen = seen_keys(layout)
    mask = {
        "bool": seen,
        "float": torch.randn(2, 1, 1, layout.length).masked_fill(~seen, float("-inf")),
        "pairwise": seen & seen.transpose(-1, -2),
    }[form]
    assert_as_accurate(ours(layout, mask=mask), spec(layout, mask=mask), make_gated_inputs(layout))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("name", ["odd grid", "1 text last"])
@pytest.mark.parametrize("hidden", [None, torch.finfo(torch.float32).min], ids=["bool", "lowest number"])
def test_queries_that_see_nothing_give_zero(hidden, name, impl):
    layout = LAYOUTS[name]
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, layout.length)
    mask = mask if hidden is None else torch.zeros(mask.shape).masked_fill(~mask, hidden)
    output, *gradients = with_gradients(ours(layout, mask=mask, impl=impl), make_gated_inputs(layout), torch.float32)
    assert (output[1] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_empty_batch(impl, direction):
    layout = LAYOUTS["77 text first"]
    inputs = make_gated_inputs(layout, batch=0)
    for result in with_gradients(ours(layout, direction=direction, impl=impl), inputs, torch.float32):
        assert result.shape == inputs[0].shape


@pytest.mark.parametrize("gate_heads", [2, 4])
def test_grouped_queries(gate_heads):
    layout = LAYOUTS["77 text first"]
    query, key, value, gate = make_gated_inputs(layout, heads=4, kv_heads=2)
    wide_key, wide_value, wide_gate = (x.repeat_interleave(2, 1) for x in (key, value, gate))
    if gate_heads == 4:
        gate = wide_gate
    output = gated_linear_attention(query, key, value, gate, layout, enable_gqa=True)
    expected = gated_linear_attention(query, wide_key, wide_value, wide_gate, layout, impl="reference")
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_gates_at_text_positions_are_ignored():
    layout = LAYOUTS["77 text first"]
    query, key, value, gate = make_gated_inputs(layout)
    other = gate.clone()
    other[:, :, :77] = -3
    torch.testing.assert_close(
        gated_linear_attention(query, key, value, gate, layout),
        gated_linear_attention(query, key, value, other, layout),
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_changes_nothing(impl):
    layout = LAYOUTS["77 text first"]
    inputs = make_gated_inputs(layout)
    expected = gated_linear_attention(*inputs, layout, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = gated_linear_attention(*inputs, layout, impl=impl)
    torch.testing.assert_close(output, expected, atol=0, rtol=0)


def test_a_thousand_tokens_and_more():
    layout = TokenLayout.image((1, 25, 41))
    assert gated_chunked.SLAB < layout.length
    inputs = make_gated_inputs(layout, batch=1, heads=1, dim=4)
    options = {"direction": "forward", "feature_map": "elu"}
    output, *gradients = with_gradients(ours(layout, **options), inputs, torch.float32)
    expected, *expected_gradients = with_gradients(spec(layout, **options), inputs, torch.float64)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-5)


def path_of(direction, order):
    """The last arguments of the operators, for a grid of 4 x 9 tokens."""
    return (4, 9, direction == "bidirectional", scan_paths.scan_path(direction, order))


@by_direction
@pytest.mark.parametrize(
    ("order", "per_head", "features"),
    [("rows", False, "none"), ("columns", False, "relu"), ("rows", True, "elu"), ("columns", True, "softmax")],
)
def test_custom_operators(direction, order, per_head, features):
    dtype = torch.bfloat16 if per_head else torch.float32
    inputs = make_gated_inputs(TokenLayout.image((1, 4, 9)), dtype, dim=4, per_head=per_head)
    query, key, value, gate = (x.requires_grad_() for x in inputs)
    weights = torch.rand(1, 1, 36, 1) if order == "columns" else None
    settings = (features, features != "none", *path_of(direction, order))
    state = make_initial_state([query, key, value[..., :3]], direction, features != "none").requires_grad_()
    for initial in (state, None):
        torch.library.opcheck(
            gated_chunked._gated_scan, (query, key, value[..., :3], gate, weights, initial, *settings)
        )
    output, starts = gated_chunked._gated_scan(query, key, value, gate, weights, None, *settings)
    arguments = [x.detach() for x in (output, starts, query, key, value, gate)]
    torch.library.opcheck(gated_chunked._gated_scan_backward, (*arguments, weights, *settings))


@by_direction
@pytest.mark.parametrize(
    ("order", "per_head", "features"),
    [("rows", False, "none"), ("columns", False, "relu"), ("rows", True, "elu"), ("columns", True, "softmax")],
)
def test_scan_gradients(direction, order, per_head, features):
    inputs = make_gated_inputs(TokenLayout.image((1, 4, 9)), torch.float64, dim=2, per_head=per_head)
    inputs.append(make_initial_state(inputs, direction))
    inputs = [x.requires_grad_() for x in inputs]
    height, width, both, path = path_of(direction, order)
    weights = torch.rand(1, 1, 36, 1, dtype=torch.float64) if order == "columns" else None

    def scan(query, key, value, gate, state):
        grid = (1, height, width)
        return gated_chunked.gated_scan(query, key, value, gate, grid, both, path, features, True, weights, state)

    assert torch.autograd.gradcheck(scan, inputs, fast_mode=True)


def kept_for_backward(function, inputs):
    """Bytes of what autograd keeps beyond the inputs and the output, each storage once."""
    inputs, kept = [x.requires_grad_() for x in inputs], {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = function(*inputs)
    for x in (*inputs, output):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("per_head", [False, True], ids=["per channel", "per head"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    ("name", "feature_map"),
    [("no text", None), ("no text", "relu"), ("77 text first", "elu"), ("references and padding", "softmax")],
)
def test_keeps_little_for_backward(name, masked, per_head, feature_map):
    layout = LAYOUTS[name]
    inputs = make_gated_inputs(layout, torch.bfloat16, per_head=per_head, dim=16)
    mask = torch.arange(layout.length) != 3 if masked else None
    options = {"feature_map": feature_map, "normalize": feature_map is not None, "mask": mask}
    kept = kept_for_backward(ours(layout, **options), inputs)
    batch, heads, _, dim = inputs[0].shape
    tokens, slabs = sum(grid.length for grid in layout.grids), len(layout.grids)
    states = 2 * batch * heads * slabs * dim * (dim + 1) * 4
    sums = batch * heads * tokens * (dim + 2) * 4 if feature_map else 0
    of_text = batch * heads * layout.num_text * (4 * dim + 1) * 2 * 3 if layout.num_text else 0
    of_mask = batch * heads * layout.length * 16 if masked else 0
    assert kept <= states + sums + of_text + of_mask
    if len(layout.grids) == 1:
        inputs.append(make_initial_state(inputs, normalize=options["normalize"]))
        assert kept_for_backward(ours(layout, **options), inputs) <= kept


def recurrence(query, key, value, gate, scale, initial_state=None):
    """What `fla.ops.gla.chunk_gla` computes, (batch, tokens, heads, channels), one token at a time."""
    state, outputs = 0 if initial_state is None else initial_state, []
    for t in range(query.shape[1]):
        state = gate[:, t, :, :, None].exp() * state + key[:, t, :, :, None] * value[:, t, :, None]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return torch.stack(outputs, 1), None


@by_direction
@by_order
@pytest.mark.parametrize("per_head", [False, True], ids=["per channel", "per head"])
def test_fla_scans_the_same_path(direction, order, per_head):
    """All but fla's kernel itself, which runs on a GPU only."""
    layout, grid = LAYOUTS["video"], LAYOUTS["video"].grids[0].grid
    inputs = [x.requires_grad_() for x in make_gated_inputs(layout, torch.float64, per_head=per_head)]
    path = scan_paths.scan_path(direction, order)
    output = 0.25 * fla_scan(recurrence, *inputs, grid, direction == "bidirectional", path)
    options = {"direction": direction, "order": order, "feature_map": None, "normalize": False, "scale": 0.25}
    expected = gated_linear_attention(*inputs, layout, **options)
    torch.testing.assert_close(output, expected)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (output, expected)), strict=True):
        torch.testing.assert_close(a, b)


@by_order
@by_direction
def test_initial_state_beside_fla(direction, order, monkeypatch):
    monkeypatch.setattr(gated, "load_chunk_gla", lambda: recurrence)
    layout, options = LAYOUTS["video"], {"direction": direction, "order": order}
    inputs = make_gated_inputs(layout)
    inputs.append(make_initial_state(inputs, direction))
    assert_as_accurate(ours(layout, impl="fla", **options), spec(layout, **options), inputs)


@pytest.mark.parametrize("impl", ["chunked", "reference", "fla"])
def test_sums_beyond_the_range_of_fp16(impl, monkeypatch):
    # fla's kernel runs on a GPU only; this stand-in keeps its sums in the dtype that it gets, as that does.
    monkeypatch.setattr(gated, "load_chunk_gla", lambda: recurrence)
    layout = LAYOUTS["several chunks"]
    query, key, value, gate = make_gated_inputs(layout, strength=0.01)
    inputs = [(x * 60).half() for x in (query.abs(), key.abs(), value.abs())]
    options = {"direction": "forward", "feature_map": None, "normalize": False}
    expected = gated_linear_attention(*(x.float() for x in inputs), gate, layout, **options)
    assert expected.max() > torch.finfo(torch.float16).max
    output = gated_linear_attention(*inputs, gate, layout, impl=impl, dtype=torch.float32, **options)
    torch.testing.assert_close(output, expected, atol=0, rtol=1e-4)
    assert gated_linear_attention(*inputs, gate, layout, impl=impl, **options).dtype == torch.float16


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="fla-core is installed")
def test_fla_is_asked_for_where_it_is_missing():
    layout = LAYOUTS["odd grid"]
    with pytest.raises(ValueError, match=r"pip install 'diffusers-linattn\[fla\]'"):
        gated_linear_attention(*make_gated_inputs(layout), layout, impl="fla")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter answers")
def test_triton_by_name_never_falls_back():
    layout = LAYOUTS["odd grid"]
    with pytest.raises(ValueError, match="impl='triton' cannot answer this call"):
        gated_linear_attention(*make_gated_inputs(layout), layout, impl="triton")
    with pytest.raises(ValueError, match="bf16, fp16 and fp32, but got torch.float64"):
        gated_linear_attention(*make_gated_inputs(layout, torch.float64), layout, impl="triton")
    with pytest.raises(ValueError, match="at most 256, but got 300"):
        gated_linear_attention(*make_gated_inputs(layout, dim=300), layout, impl="triton")


@by_direction
@pytest.mark.parametrize("order", scan_paths.ORDERS)
def test_a_path_says_direction_and_order(direction, order):
    path = scan_paths.scan_path(direction, order)
    assert scan_paths.describe_path(path, direction == "bidirectional") == (direction, order)


def one_grid(text, height, width):
    return TokenLayout.joint(text=text, grid=(1, height, width))


def with_a_reference(text, height, width):
    return TokenLayout.of([("image", (1, height, width)), ("reference", (1, 3, text))])


@pytest.mark.parametrize(
    ("given", "make_layout", "with_state"),
    [
        ("as a layout", one_grid, False),
        ("as shapes", one_grid, False),
        ("as shapes", one_grid, True),
        pytest.param("as shapes", with_a_reference, False, marks=pytest.mark.weekly),
    ],
    ids=["layout", "shapes", "initial state", "reference"],
)
def test_does_not_compile_once_per_size(given, make_layout, with_state):
    """Neither once per order of the scan, where that is a shape."""

    def of_layout(query, key, value, gate, state, layout):
        return gated_linear_attention(query, key, value, gate, layout, initial_state=state, order="columns")

    def of_shapes(query, key, value, gate, state, grid, text, path):
        layout = make_layout(text.shape[0], *grid.shape)
        path = path.shape[1]
        return gated_linear_attention(query, key, value, gate, layout, initial_state=state, path=path)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = of_layout if given == "as a layout" else of_shapes
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for height, width, text, order in ((5, 6, 7, "rows"), (7, 3, 11, "columns"), (9, 13, 20, "columns")):
        layout = make_layout(text, height, width)
        inputs = make_gated_inputs(layout)
        state = make_initial_state(inputs).requires_grad_() if with_state else None
        inputs = [x.requires_grad_() for x in inputs]
        path = scan_paths.scan_path("bidirectional", order)
        shapes = torch.empty(height, width), torch.empty(text), torch.empty(0, path)
        geometry = (layout,) if given == "as a layout" else shapes
        output = compiled(*inputs, state, *geometry)
        order = order if given == "as shapes" else "columns"
        expected = gated_linear_attention(*inputs, layout, initial_state=state, order=order)
        torch.testing.assert_close(output, expected)
        leaves = [*inputs, state] if with_state else inputs
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), leaves))
    assert counter.frame_count <= 2  # one in torch 2.13; 2.15 compiles a second time, not once per size


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        (
            "odd grid",
            {"impl": "torch"},
            "Unknown impl 'torch': expected one of None, 'triton', 'chunked', 'fla', 'reference'",
        ),
        ("odd grid", {"dtype": torch.int64}, "Unknown dtype torch.int64: expected one of None, torch.float32"),
        ("odd grid", {"direction": "alternate"}, "'forward', 'backward', 'bidirectional'"),
        ("odd grid", {"order": "diagonal"}, "'rows', 'columns'"),
        ("odd grid", {"feature_map": "gelu"}, "Unknown feature_map 'gelu'"),
        ("odd grid", {"path": 4}, "path is 4, which scan_path never gives"),
        ("odd grid", {"feature_map": None}, "or normalize=False"),
        ("77 text first", {"normalize": False}, "no denominator to share with text"),
        ("odd grid", {"mask": torch.ones(35, 35, dtype=torch.bool).tril()}, "cannot honour a pairwise mask"),
        (
            "odd grid",
            {"initial_state": torch.zeros(2, 2, 16, 17)},
            r"expected \(2, 2, 2, 16, 17\) in a floating dtype",
        ),
        ("odd grid", {"initial_state": torch.zeros(2, 2, 2, 16, 17).int()}, "in torch.int32, expected"),
        (
            "odd grid",
            {"initial_state": torch.zeros(2, 2, 16, 17), "direction": "forward", "normalize": False},
            "16, 16",
        ),
        ("references and padding", {"initial_state": torch.zeros(2, 2, 2, 16, 17)}, "has 3 grids"),
        ("only text", {"initial_state": torch.zeros(2, 2, 2, 16, 17)}, "has 0 grids"),
    ],
    ids=[
        "impl",
        "dtype",
        "direction",
        "order",
        "feature map",
        "path",
        "no feature map",
        "text",
        "pairwise mask",
        "state of one way",
        "integer state",
        "state with a sum",
        "state of three grids",
        "state of no grid",
    ],
)
def test_errors(name, arguments, match):
    layout = LAYOUTS[name]
    with pytest.raises(ValueError, match=match):
        gated_linear_attention(*make_gated_inputs(layout), layout, **arguments)
