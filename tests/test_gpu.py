"""What only a CUDA device can show; skipped elsewhere."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from diffusers_linattn import (
    ClearProcessor,
    GLAProcessor,
    HybridProcessor,
    LinearProcessor,
    TokenLayout,
    gated_linear_attention,
    linear_attention,
    linearize,
    local_attention,
)
from diffusers_linattn.ops.features import resolve_feature_map

import tiny


pytestmark = pytest.mark.gpu
# What cuBLAS needs to be deterministic; it reads this once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

LAYOUTS = {
    "text 77, 24x40": TokenLayout.joint(text=77, grid=(1, 24, 40)),
    "33x17, text 5": TokenLayout.joint(text=5, grid=(1, 33, 17), text_first=False),
    "video 3x9x11": TokenLayout.image((3, 9, 11)),
    "reference": TokenLayout.joint(text=16, grid=(1, 20, 12), references=[(1, 7, 30)]),
    "text 64, 20x24": TokenLayout.joint(text=64, grid=(1, 20, 24)),  # whole blocks of text: kernels without its masks
}
# The reference sums in fp32 whatever comes in; the kernels round weights and states to bf16, or cut them to tf32.
GATED_FLOORS = {torch.float32: 1e-5} | {dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}
OPERATORS: dict[str, Any] = {
    "local": lambda q, k, v, layout, impl: local_attention(q, k, v, layout, window=5, impl=impl),
    "linear": lambda q, k, v, layout, impl: linear_attention(q, k, v, layout, impl=impl),
    "gated": lambda q, k, v, layout, impl: gated_linear_attention(q, k, v, -k.detach().abs(), layout, impl=impl),
}


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Many processes test at once, and each would keep what its largest test took."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_default_operators_and_gradients(operator: str, layout: str, dtype: torch.dtype) -> None:
    tokens = LAYOUTS[layout]
    inputs = [torch.randn(2, 3, tokens.length, 64, dtype=dtype, device="cuda") for _ in range(3)]
    results = {}
    for name, kind, impl in (
        ("ours", dtype, None),
        ("same dtype", dtype, "reference"),
        ("exact", torch.float64, "reference"),
    ):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        output = OPERATORS[operator](*leaves, tokens, impl)
        results[name] = [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]
    floor = GATED_FLOORS[dtype] if operator == "gated" else 1e-5
    assert_as_exact(results["ours"], results["same dtype"], results["exact"], floor, least=0)


def in_poisoned_memory(run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """The results of a run whose new memory holds NaN; those of a second one are the same to the bit."""
    torch.use_deterministic_algorithms(True)  # fills new memory
    try:
        results, again = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(results, again, strict=True):
        assert torch.equal(a, b)
    return results


def assert_as_exact(ours: list, same: list, exact: list, floor: float, least: float) -> None:
    """Our error against fp64 may be twice that of eager code in our dtype, and `floor` of the largest number.

    The largest number counts as `least` where it is smaller.
    """
    for a, s, e in zip(ours, same, exact, strict=True):
        error, allowed = (a.double() - e).abs().max(), 2 * (s.double() - e).abs().max()
        assert error <= allowed + floor * e.abs().max().clamp_min(least), f"{error:.1e}, allowed {allowed:.1e}"


def with_gradients(output: torch.Tensor, leaves: list, dtype: torch.dtype) -> list:
    """The output and the gradients of a weighted sum of it, the weights being numbers of `dtype`."""
    weight = torch.linspace(-1, 1, output.numel(), device="cuda").reshape(output.shape).to(dtype)
    return [output.detach(), *torch.autograd.grad((output * weight.to(output.dtype)).sum(), leaves)]


def results_and_gradients(impl: str, kind: torch.dtype, inputs: list, layout: TokenLayout, **kwargs: Any) -> list:
    """Output and gradients of query, key, value and, if there are, pooled keys and values."""
    leaves = [x.to(kind).requires_grad_() for x in inputs]
    if len(leaves) == 5:
        kwargs |= {"pooled_key": leaves[3], "pooled_value": leaves[4]}
    output = local_attention(*leaves[:3], layout, impl=impl, **kwargs)
    return with_gradients(output, leaves, inputs[0].dtype)


def check_kernel(
    layout: TokenLayout, dtype: torch.dtype, dim: int = 64, pooled: int = 0, floor: float = 1e-6, **kwargs: Any
) -> None:
    sizes = [layout.length] * 3 + [pooled] * 2 * bool(pooled)
    inputs = [torch.randn(2, n, 3, dim, dtype=dtype, device="cuda").transpose(1, 2) for n in sizes]
    ours = in_poisoned_memory(lambda: results_and_gradients("triton", dtype, inputs, layout, **kwargs))
    same = results_and_gradients("reference", dtype, inputs, layout, **kwargs)
    exact = results_and_gradients("reference", torch.float64, inputs, layout, **kwargs)
    assert_as_exact(ours, same, exact, floor, least=1)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    # Each pair is compiled, which takes most of the time.
    [(dim, torch.bfloat16) for dim in (16, 24, 40, 64, 72, 96, 128, 160, 256)]
    + [(dim, torch.float16) for dim in (64, 128)]
    + [(dim, torch.float32) for dim in (32, 64, 128, 256)],
    ids=str,
)
def test_kernel_at_every_head_dim(dim: int, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        check_kernel(TokenLayout.joint(text=77, grid=(1, 33, 39)), dtype, dim, window=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 8, 16, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_on_every_layout(layout: str, window: int, dtype: torch.dtype) -> None:
    tokens = LAYOUTS[layout]
    mask = torch.rand(2, 1, 1, tokens.length, device="cuda") > 0.2
    check_kernel(tokens, dtype, window=window)
    check_kernel(tokens, dtype, 128, pooled=70, window=window, mask=mask, temporal_window=2)


@pytest.mark.parametrize("text", [0, 1, 512, 4096])
def test_kernel_and_text_of_any_length(text: int) -> None:
    check_kernel(TokenLayout.joint(text=text, grid=(1, 21, 27)), torch.bfloat16, 128, window=5)


def test_kernel_in_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        # Ours cuts digits off where cuBLAS may round.
        check_kernel(LAYOUTS["reference"], torch.float32, window=6, floor=2**-9)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_kernel_shares_key_heads() -> None:
    layout = LAYOUTS["text 77, 24x40"]
    shape = (2, layout.length, 6, 128)
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(3))
    inputs = [query, key[:, ::3], value[:, ::3]]
    ours = results_and_gradients("triton", torch.bfloat16, inputs, layout, window=6, enable_gqa=True)
    exact = results_and_gradients("reference", torch.float64, inputs, layout, window=6, enable_gqa=True)
    for a, e in zip(ours, exact, strict=True):
        assert (a - e).norm() <= 1e-2 * e.norm()


@pytest.mark.parametrize("text", [0, 77])
@pytest.mark.parametrize(
    ("dim", "dtype", "feature_map"),
    # Each is compiled, which takes most of the time.
    [(dim, torch.bfloat16, "relu") for dim in (8, 64, 72, 128, 200, 576)]
    + [(dim, torch.bfloat16, feature_map) for dim in (64, 576) for feature_map in ("elu", "softmax")]
    + [(dim, torch.float16, "relu") for dim in (72, 128, 576)]
    + [(dim, torch.float32, "relu") for dim in (64, 128, 576)],
    ids=str,
)
def test_linear_kernels(dim: int, dtype: torch.dtype, text: int, feature_map: str) -> None:
    check_linear(dim, dtype, text, feature_map, masked=text > 0)


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float16)], ids=str
)
@pytest.mark.parametrize("text", [64, 512, 77])
def test_linear_kernels_beside_text_that_all_see(dim: int, dtype: torch.dtype, text: int, feature_map: str) -> None:
    check_linear(dim, dtype, text, feature_map, masked=False)


def check_linear(dim: int, dtype: torch.dtype, text: int, feature_map: str, masked: bool) -> None:
    """As `check_kernel`, over more tokens than one program takes."""
    layout = TokenLayout.joint(text=text, grid=(1, 53, 47))
    shape = (2, layout.length, 2, dim)
    inputs = [torch.randn(shape, dtype=dtype, device="cuda").transpose(1, 2) for _ in range(3)]
    seen = torch.rand(2, 1, 1, layout.length, device="cuda") > 0.2 if masked else None

    def run(attend: Callable[..., torch.Tensor], kind: torch.dtype, **kwargs: Any) -> list[torch.Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        output = attend(*leaves, layout, feature_map=feature_map, mask=seen, **kwargs)
        return with_gradients(output, leaves, dtype)

    ours = in_poisoned_memory(lambda: run(linear_attention, dtype, impl="triton"))
    exact = run(linear_attention, torch.float64, impl="reference")
    same = run(all_pairs_in_one_dtype, dtype)
    # The value's gradient is the sum of rounded ones: from queries in the text, and from those of the grid.
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 16 * torch.finfo(dtype).eps
    assert_as_exact(ours, same, exact, floor=rounding, least=0)


def all_pairs_in_one_dtype(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    feature_map: str,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Linear attention as eager code has it that never leaves the dtype of its inputs."""
    of_query, of_key = resolve_feature_map(feature_map)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    products = of_query(query).to(query.dtype) @ of_key(key).to(key.dtype).transpose(-1, -2)
    in_text = torch.ones(layout.length, dtype=torch.bool, device=query.device)
    for segment in layout.grids:
        in_text[segment.start : segment.stop] = False
    weights = torch.where(in_text | in_text[:, None], scores.exp(), products)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0)
    weights = weights / weights.detach().amax(-1, keepdim=True)  # their sum may be out of fp16's range
    return weights @ value / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("impl", ["triton", "dense"])
def test_kernel_is_chosen_and_captured_in_a_graph(impl: str) -> None:
    side = 96 if impl == "triton" else 24
    layout = TokenLayout.joint(text=64, grid=(1, side, side))
    shape = (1, layout.length, 4, 128)
    inputs = [torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in range(3)]
    leaves = [x.requires_grad_() for x in inputs]

    def step() -> list[torch.Tensor]:
        output = local_attention(*leaves, layout, window=8, impl=None if impl == "triton" else impl)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
        other = torch.randn(1, 4, 256, 128, dtype=torch.bfloat16, device="cuda")
        for window in range(1, 100):  # the graph keeps its lists of tiles, or mask, however many others are made
            local_attention(other, other, other, TokenLayout.image((1, 16, 16)), window=window, impl=impl)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        if impl == "triton":
            assert torch.equal(a, b)
        else:  # torch's gradients are summed in any order
            torch.testing.assert_close(a, b)
    assert torch.equal(captured[0], local_attention(*leaves, layout, window=8, impl=impl))


def test_kernel_compiles_whole_for_all_sizes() -> None:
    def attend(query: torch.Tensor, text: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        layout = TokenLayout.joint(text=text.shape[0], grid=(1, grid.shape[0], grid.shape[1]))
        return local_attention(query, query, query, layout, window=4)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    for text, height, width in [(7, 65, 72), (5, 79, 64), (9, 86, 97)]:
        query = torch.randn(1, 2, text + height * width, 64, dtype=torch.bfloat16, device="cuda")
        shapes = torch.empty(text), torch.empty(height, width)
        torch.testing.assert_close(compiled(query, *shapes), attend(query, *shapes))
    assert counter.frame_count <= 2


def gated_results(impl: str, kind: torch.dtype, inputs: list, layout: TokenLayout, **kwargs: Any) -> list:
    """Output and gradients of query, key, value, gate and, where there is one, the initial state."""
    leaves = [x.to(kind).requires_grad_() for x in inputs]
    state = leaves[4] if len(leaves) > 4 else None
    output = gated_linear_attention(*leaves[:4], layout, initial_state=state, impl=impl, **kwargs)
    return with_gradients(output, leaves, inputs[0].dtype)


GATED_CASES: dict[str, tuple[TokenLayout, dict[str, Any]]] = {
    "columns": (LAYOUTS["33x17, text 5"], {"order": "columns"}),
    "backward, elu": (LAYOUTS["video 3x9x11"], {"direction": "backward", "feature_map": "elu"}),
    "rows": (LAYOUTS["reference"], {}),
    "whole blocks of text": (LAYOUTS["text 64, 20x24"], {}),
    "one way by columns": (LAYOUTS["33x17, text 5"], {"direction": "forward", "order": "columns"}),
    "no denominator": (
        TokenLayout.image((1, 12, 15)),
        {"direction": "forward", "feature_map": None, "normalize": False},
    ),
}


def check_gated(dim: int, dtype: torch.dtype, per_head: bool, case: str, with_state: bool = False) -> None:
    """As `check_kernel`, with gates that forget everything among others."""
    layout, options = GATED_CASES[case]
    inputs = [torch.randn(2, layout.length, 3, dim, dtype=dtype, device="cuda").transpose(1, 2) for _ in range(3)]
    inputs.append(-torch.rand(2, 3, layout.length, 1 if per_head else dim, device="cuda").to(dtype))
    inputs[3][:, :, ::7] = -1e4
    if with_state:
        inputs.append(torch.rand(2, 2, 3, dim, dim + 1, device="cuda").to(dtype))
    ours = in_poisoned_memory(partial(gated_results, "triton", dtype, inputs, layout, **options))
    same = gated_results("reference", dtype, inputs, layout, **options)
    exact = gated_results("reference", torch.float64, inputs, layout, **options)
    assert_as_exact(ours, same, exact, GATED_FLOORS[dtype], least=1e-3)


@pytest.mark.parametrize("case", GATED_CASES)
@pytest.mark.parametrize(
    ("dim", "dtype", "per_head"),
    [(64, torch.bfloat16, False), (64, torch.bfloat16, True), (64, torch.float16, False), (64, torch.float32, False)],
    ids=str,
)
def test_gated_kernels(dim: int, dtype: torch.dtype, per_head: bool, case: str) -> None:
    check_gated(dim, dtype, per_head, case)


@pytest.mark.parametrize(
    ("dim", "dtype", "per_head"),
    [(dim, torch.bfloat16, False) for dim in (16, 40, 256)]
    + [(128, torch.bfloat16, True), (128, torch.float32, False)],
    ids=str,
)
def test_gated_kernels_at_other_head_dims(dim: int, dtype: torch.dtype, per_head: bool) -> None:
    check_gated(dim, dtype, per_head, "columns")


@pytest.mark.parametrize("case", GATED_CASES)
def test_gated_kernels_at_the_head_dim_of_flux(case: str) -> None:
    check_gated(128, torch.bfloat16, False, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gated_initial_state(dtype: torch.dtype) -> None:
    check_gated(64, dtype, False, "columns", with_state=True)


def test_gated_heads_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["33x17, text 5"]
    inputs = [torch.randn(2, 3, layout.length, 64, device="cuda") for _ in range(3)]
    inputs.append(-torch.rand_like(inputs[0]))
    expected = gated_results("triton", torch.float32, inputs, layout)
    monkeypatch.setattr("diffusers_linattn.kernels.gated_attention._WORKSPACE", 2**20)
    for a, b in zip(gated_results("triton", torch.float32, inputs, layout), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla-core")
@pytest.mark.parametrize("direction", ["bidirectional", "forward", "backward"])
def test_fla_agrees(direction: str) -> None:
    layout = LAYOUTS["text 77, 24x40"]
    inputs = [torch.randn(1, 2, layout.length, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    inputs.append(-torch.rand_like(inputs[0]))
    results = (gated_results(impl, torch.bfloat16, inputs, layout, direction=direction) for impl in ("fla", "triton"))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


@pytest.mark.parametrize(
    "template",
    [
        ClearProcessor(window=3),
        ClearProcessor(window=2, down_factor=4),
        LinearProcessor(),
        GLAProcessor(),
        GLAProcessor(gates="scalar"),
        HybridProcessor(window=2),
    ],
    ids=repr,
)
@torch.no_grad()
def test_converted_models_on_the_device(template: Any) -> None:
    model, inputs = linearize(tiny.flux(), template), tiny.flux_inputs(reference=(4, 5))
    expected = model(**inputs)[0]
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    torch.testing.assert_close(model.cuda()(**moved)[0].cpu(), expected, atol=1e-3, rtol=1e-3)
