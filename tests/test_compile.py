"""torch.compile of converted models: right at every size, and no more graphs than the stock model."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_linattn import ClearProcessor, GLAProcessor, HybridProcessor, LinearProcessor, linearize, restore

import tiny
from model_cases.case import assert_near, output_of
from model_cases.image_streams import z_image, z_image_call


# (height, width, text): more sizes than torch compiles a block for, two of the same length among them.
SIZES = [
    (4, 4, 7),
    (4, 6, 7),
    (6, 4, 5),
    (5, 7, 3),
    (8, 8, 9),
    (3, 9, 4),
    (2, 9, 11),
    (7, 7, 8),
    (10, 4, 6),
    (6, 11, 9),
]


def graphs(model: torch.nn.Module) -> int:
    """Compile the blocks, call the model with all sizes, compare with eager, count the graphs."""
    torch._dynamo.reset()
    calls = [tiny.flux_inputs(*size) for size in SIZES]
    with torch.no_grad():
        expected = [model(**inputs)[0] for inputs in calls]
        counter = CompileCounterWithBackend("eager")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for inputs, output in zip(calls, expected, strict=True):
            torch.testing.assert_close(model(**inputs)[0], output, atol=1e-5, rtol=0)
    return counter.frame_count


@pytest.fixture(scope="module")
def stock_graphs() -> int:
    return graphs(tiny.flux())


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        ClearProcessor(window=2),
        ClearProcessor(window=2, down_factor=2),
        LinearProcessor(),
        GLAProcessor(),
        pytest.param(GLAProcessor(gates="scalar"), marks=pytest.mark.weekly),
        pytest.param(HybridProcessor(window=2), marks=pytest.mark.weekly),
    ],
    ids=repr,
)
def test_repeated_blocks_over_many_sizes(template: Any, stock_graphs: int) -> None:
    count = graphs(linearize(tiny.flux(), template))
    # A size that another one equals by chance, or an alternating path, costs a graph or two, not one per size.
    assert count <= stock_graphs + 4


@torch.no_grad()
def test_samples_with_layouts_of_their_own_after_a_single_one() -> None:
    if not hasattr(diffusers, "ZImageTransformer2DModel"):
        pytest.skip("this diffusers has no ZImageTransformer2DModel")
    torch._dynamo.reset()
    model = linearize(z_image(n_layers=1), ClearProcessor(window=2))
    calls = [z_image_call([(8, 12)], [7]).inputs, z_image_call([(8, 12), (12, 16)], [7, 40]).inputs]
    expected = [output_of(model, inputs) for inputs in calls]
    counter = CompileCounterWithBackend("eager")
    model.layers[0].compile(fullgraph=True, backend=counter)
    for inputs, output in zip(calls, expected, strict=True):
        assert_near(output_of(model, inputs), output, tolerance=1e-5)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_whole_models_never_see_a_stale_layout(name: str) -> None:
    torch._dynamo.reset()
    model = linearize(getattr(tiny, name)(), ClearProcessor(window=2))
    sizes = [(4, 6), (6, 4), (6, 6), (4, 6)] if name == "flux" else [(8, 12), (12, 8), (12, 12), (8, 12)]
    calls = [getattr(tiny, f"{name}_inputs")(*size) for size in sizes]
    with torch.no_grad():
        expected = [model(**inputs)[0] for inputs in calls]
        compiled = torch.compile(model, backend="eager")
        for inputs, output in zip(calls, expected, strict=True):
            torch.testing.assert_close(compiled(**inputs)[0], output, atol=1e-5, rtol=0)


@torch.no_grad()
def test_layers_that_stay_eager_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = linearize(tiny.flux(), ClearProcessor(window=2))
    inputs, others = tiny.flux_inputs(8, 5), tiny.flux_inputs(5, 8)  # as many tokens
    expected = model(**inputs)[0]
    compiled = torch.compile(model, backend="eager")
    for block in model.transformer_blocks:
        block.attn.forward = torch._dynamo.disable(block.attn.forward)
    for call in (model, compiled):
        call(**others)
        torch.testing.assert_close(compiled(**inputs)[0], expected, atol=1e-5, rtol=0)


def test_restore_is_exact_after_training_a_compiled_model() -> None:
    torch._dynamo.reset()
    model, inputs = tiny.flux(), tiny.flux_inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
    compiled = torch.compile(linearize(model, ClearProcessor(window=2)), backend="eager")
    compiled(**inputs)[0].sum().backward()
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight.add_(1)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(restore(model)(**inputs)[0], expected)
