"""Converted models against the stock model and against dense attention under a mask written out pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from diffusers_linattn import ClearProcessor, GLAProcessor, HybridProcessor, LinearProcessor, linearize, restore
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.models.grids import grids_of_ids
from diffusers_linattn.tracker import find_tracker

import tiny


Case = tuple[Callable[[], torch.nn.Module], dict[str, Any]]

CASES: dict[str, Case] = {
    "dit": (tiny.dit, tiny.dit_inputs(16)),
    "pixart 6x10": (tiny.pixart, tiny.pixart_inputs(12, 20)),
    "flux 6x9, text 7": (tiny.flux, tiny.flux_inputs(6, 9, 7)),
    "flux 5x3, text 1": (tiny.flux, tiny.flux_inputs(5, 3, 1)),
    "flux 1x7, text 77": (tiny.flux, tiny.flux_inputs(1, 7, 77)),
    "flux text 0": (tiny.flux, tiny.flux_inputs(4, 5, 0)),
    "kontext 6x9 + 4x5": (tiny.flux, tiny.flux_inputs(6, 9, 7, reference=(4, 5))),
    "flux fill (more channels)": (
        lambda: tiny.flux(in_channels=32, out_channels=16),
        tiny.flux_inputs(4, 6, channels=32),
    ),
}
MECHANISMS = {
    "clear": ClearProcessor(window=3),
    "clear, pooled": ClearProcessor(window=2, down_factor=4),
    "linear relu": LinearProcessor(),
    "linear elu, no conv": LinearProcessor(kernel_size=0, feature_map="elu"),
    "linear softmax, one head": LinearProcessor(heads=1, feature_map="softmax"),
    "linear hedgehog": LinearProcessor(feature_map="hedgehog"),
    "gla": GLAProcessor(),
    "gla alternate": GLAProcessor(direction="alternate", input_conv=True),
    "gla, a gate per head": GLAProcessor(gates="scalar"),
    "hybrid": HybridProcessor(window=2),
}


def case(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    make, inputs = CASES[name]
    return make(), inputs


class MaskedAttention(TorchFunctionMode):
    """Gives every self-attention call of a given length a mask."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask, self.calls = mask, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
            if named["query"].shape[2] == named["key"].shape[2] == len(self.mask):
                args, kwargs = (), {**named, "attn_mask": self.mask}
                self.calls += 1
        return func(*args, **kwargs)


def positions(inputs: dict[str, Any]) -> list[tuple[Any, ...] | None]:
    """(picture, y, x, height, width) of every token of the sequence, None for text; from the inputs alone."""
    if "img_ids" not in inputs:
        height, width = (side // 2 for side in inputs["hidden_states"].shape[-2:])
        return [(0, y, x, height, width) for y in range(height) for x in range(width)]
    rows = [tuple(int(value) for value in row) for row in inputs["img_ids"]]
    sizes = {picture: (max(r[1] for r in rows if r[0] == picture) + 1, 0) for picture in {row[0] for row in rows}}
    sizes = {p: (h, max(r[2] for r in rows if r[0] == p) + 1) for p, (h, _) in sizes.items()}
    return [None] * inputs["encoder_hidden_states"].shape[1] + [(*row, *sizes[row[0]]) for row in rows]


def pairwise_mask(inputs: dict[str, Any], window: int) -> torch.Tensor:
    tokens = positions(inputs)
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            if query is not None and key is not None:
                y = (query[1] + 0.5) * key[3] / query[3] - 0.5
                x = (query[2] + 0.5) * key[4] / query[4] - 0.5
                mask[i, j] = (y - key[1]) ** 2 + (x - key[2]) ** 2 < window**2
    return mask


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_window_that_covers_the_grid_is_the_stock_model(name: str) -> None:
    model, inputs = case(name)
    expected = model(**inputs)[0]
    linearize(model, ClearProcessor(window=100))
    torch.testing.assert_close(model(**inputs)[0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [1, 2, 3])
@torch.no_grad()
def test_a_small_window_is_dense_attention_under_a_mask(name: str, window: int) -> None:
    model, inputs = case(name)
    with MaskedAttention(pairwise_mask(inputs, window)) as masked:
        expected = model(**inputs)[0]
    assert masked.calls == len(layers_of(model))
    linearize(model, ClearProcessor(window=window))
    torch.testing.assert_close(model(**inputs)[0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", ["dit", "pixart 6x10", "flux 6x9, text 7", "kontext 6x9 + 4x5", "flux text 0"])
def test_fast_and_reference_implementations_agree_in_the_model(name: str, mechanism: str) -> None:
    model, inputs = case(name)
    template = MECHANISMS[mechanism]
    outputs, gradients = [], []
    for impl in (None, "reference"):
        linearize(model, type(template)(**{**template.to_config(), "impl": impl}))
        output = model(**inputs)[0]
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert outputs[0].isfinite().all()
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    assert gradients[0].keys() == gradients[1].keys()
    for parameter in gradients[0]:
        assert gradients[0][parameter].isfinite().all(), parameter
        scale = gradients[1][parameter].abs().max().item()
        torch.testing.assert_close(
            gradients[0][parameter], gradients[1][parameter], atol=1e-4 * scale + 1e-6, rtol=1e-3
        )


@pytest.mark.parametrize("name", ["dit", "pixart 6x10", "flux 6x9, text 7", "kontext 6x9 + 4x5"])
@torch.no_grad()
def test_gates_of_one_are_ungated_linear_attention(name: str) -> None:
    model, inputs = case(name)
    linearize(model, LinearProcessor(kernel_size=0))
    expected = model(**inputs)[0]
    linearize(model, GLAProcessor())
    torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["pixart 6x10", "flux 6x9, text 7", "kontext 6x9 + 4x5"])
@torch.no_grad()
def test_the_layout_finds_the_token_that_a_latent_becomes(name: str) -> None:
    model, inputs = case(name)
    linearize(model, ClearProcessor(window=2))
    first = layers_of(model)[0]
    seen: list[torch.Tensor] = []

    def attend(call: Any) -> torch.Tensor:
        seen.append(call.query)
        return call.value

    first.processor.attend = attend  # type: ignore[union-attr, method-assign]
    model(**inputs)
    changed = inputs["hidden_states"].clone()
    if changed.ndim == 4:
        changed[:, :, 2 * 3 + 1, 2 * 4] += 5  # patch of 2: token (3, 4)
    else:
        changed[:, 3 * 9 + 4] += 5
    model(**{**inputs, "hidden_states": changed})
    rows = (seen[0] != seen[1]).any(-1).any(1).any(0).nonzero().flatten().tolist()
    (layout,) = find_tracker(model).last["joint"]  # type: ignore[union-attr]
    segment = layout.grids[0]
    assert rows == [segment.start + 3 * segment.grid[2] + 4]  # type: ignore[index]


@torch.no_grad()
def test_size_prompt_and_batch_change_between_calls() -> None:
    model = tiny.flux()
    calls = [
        tiny.flux_inputs(6, 9, 7),
        tiny.flux_inputs(9, 6, 7),  # the same number of tokens
        tiny.flux_inputs(6, 9, 3, batch=1),
        tiny.flux_inputs(4, 4, 77, batch=3),
        tiny.flux_inputs(6, 9, 7, reference=(3, 3)),
        tiny.flux_inputs(6, 9, 7),
    ]
    for inputs in calls:
        with MaskedAttention(pairwise_mask(inputs, 2)):
            expected = restore(model)(**inputs)[0]
        linearize(model, ClearProcessor(window=2))
        inputs["expected"] = expected
    for inputs in calls + calls[::-1]:
        arguments = {name: value for name, value in inputs.items() if name != "expected"}
        torch.testing.assert_close(model(**arguments)[0], inputs["expected"], atol=2e-6, rtol=0)


@torch.no_grad()
def test_an_img_ids_tensor_changed_in_place_is_read_again() -> None:
    model, inputs = tiny.flux(), tiny.flux_inputs(6, 9, 7)
    linearize(model, ClearProcessor(window=2))
    model(**inputs)
    inputs["img_ids"].copy_(tiny.flux_ids(9, 6))
    with MaskedAttention(pairwise_mask(inputs, 2)):
        expected = tiny.flux()(**inputs)[0]
    torch.testing.assert_close(model(**inputs)[0], expected, atol=2e-6, rtol=0)


@torch.no_grad()
def test_the_cross_attention_of_pixart_is_untouched() -> None:
    model = tiny.pixart()
    before = {name: module.processor for name, module in model.named_modules() if name.endswith("attn2")}
    linearize(model, LinearProcessor())
    after = {name: module.processor for name, module in model.named_modules() if name.endswith("attn2")}
    assert before
    assert all(before[name] is after[name] for name in before)


@torch.no_grad()
def test_cross_attention_of_the_same_length_as_the_image_is_untouched() -> None:
    model, inputs = tiny.pixart(), tiny.pixart_inputs(4, 4, text=4)
    expected = model(**inputs)[0]
    linearize(model, ClearProcessor(window=50))
    torch.testing.assert_close(model(**inputs)[0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_low_precision_models(mechanism: str, dtype: torch.dtype) -> None:
    model, inputs = case("flux 6x9, text 7")
    linearize(model, MECHANISMS[mechanism])
    expected = model(**inputs)[0]
    ids = ("img_ids", "txt_ids")
    low = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and name not in ids else value
        for name, value in inputs.items()
    }
    output = model.to(dtype)(**low)[0]
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_autocast(mechanism: str) -> None:
    model, inputs = case("flux 6x9, text 7")
    linearize(model, MECHANISMS[mechanism])
    with torch.no_grad():
        expected = model(**inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)[0]
    output.float().square().sum().backward()
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp16 model", "fp16 autocast"])
def test_sums_without_a_denominator_beyond_the_range_of_fp16(autocast: bool, impl: str) -> None:
    model, inputs = tiny.dit(), tiny.dit_inputs()
    for block in model.transformer_blocks:
        for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            projection.weight.data *= 50
    linearize(model, GLAProcessor(direction="alternate", impl=impl))
    with torch.no_grad():
        expected = model(**inputs)[0]
    if not autocast:
        model, inputs["hidden_states"] = model.half(), inputs["hidden_states"].half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        output = model(**inputs)[0]
    (output.float().square().mean() * 1e-2).backward()
    assert output.dtype == torch.float16
    assert (output.float() - expected).abs().max() < 0.02 * expected.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_grouped_queries_and_padding_masks_reach_the_mechanism() -> None:
    # The text of the last sample is padded: what stands in the padded tokens must not matter.
    model, inputs = tiny.flux(), tiny.flux_inputs(6, 9, 8)
    mask = torch.ones(2, 1, 1, 8 + 54, dtype=torch.bool)
    mask[1, ..., 5:8] = False
    changed = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][1, 5:] += 3.0
    for template in (*MECHANISMS.values(), ClearProcessor(window=100)):
        linearize(model, template)
        outputs = [
            model(**arguments, joint_attention_kwargs={"attention_mask": mask})[0] for arguments in (inputs, changed)
        ]
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_backward_inside_autocast(mechanism: str) -> None:
    model, inputs = case("flux 6x9, text 7")
    linearize(model, MECHANISMS[mechanism])
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)[0].float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [(300, 4), (2, 300), (1, 600), (257, 2), (3, 1)], ids=str)
def test_position_ids_in_the_dtype_of_the_latents(grid: tuple[int, int], dtype: torch.dtype) -> None:
    # bf16 rounds whole numbers above 256, and pipelines make the ids in it.
    ids = torch.cat([tiny.flux_ids(*grid), tiny.flux_ids(5, 7, picture=1)]).to(dtype)
    assert grids_of_ids(ids) == [(1, *grid), (1, 5, 7)]
    if grid[0] * grid[1] > 3:
        ids[[1, -2]] = ids[[-2, 1]]
        with pytest.raises(ValueError, match="in raster order"):
            grids_of_ids(ids)


@torch.no_grad()
def test_inference_mode_reads_changed_ids_again() -> None:
    model = linearize(tiny.flux(), ClearProcessor(window=2))
    with torch.inference_mode():
        inputs = tiny.flux_inputs(6, 9, 7)
        model(**inputs)
        inputs["img_ids"].copy_(tiny.flux_ids(9, 6))
        changed = model(**inputs)[0]
    torch.testing.assert_close(changed, model(**{**inputs, "img_ids": tiny.flux_ids(9, 6)})[0], atol=0, rtol=0)


@pytest.mark.parametrize("hidden", [float("-inf"), -10_000.0], ids=["-inf", "-10000"])
@pytest.mark.parametrize("mechanism", ["clear", "clear, pooled", "linear relu", "gla", "hybrid"])
@torch.no_grad()
def test_hidden_image_tokens_do_not_leak(mechanism: str, hidden: float) -> None:
    model, inputs = case("flux 6x9, text 7")
    linearize(model, MECHANISMS[mechanism])
    for layer in layers_of(model):
        if isinstance(layer.processor, LinearProcessor):
            layer.processor.conv.conv.weight.fill_(0.1)
        if isinstance(layer.processor, HybridProcessor):
            layer.processor.far.weight.fill_(0.5)
    # The hidden token's own row may change, so look at the answer of one layer, not at later ones.
    layer = layers_of(model)[0]
    answers = []
    attend = layer.processor.attend  # type: ignore[union-attr]
    layer.processor.attend = lambda call: answers.append(attend(call)) or answers[-1]  # type: ignore[union-attr]
    mask = torch.zeros(1, 1, 1, 61)
    mask[..., 7 + 20] = hidden
    changed = inputs["hidden_states"].clone()
    changed[:, 20] += 3
    for states in (inputs["hidden_states"], changed):
        arguments = {**inputs, "hidden_states": states}
        model(**arguments, joint_attention_kwargs={"attention_mask": mask})
    before, after = (torch.cat([answer[:, :, :27], answer[:, :, 28:]], 2) for answer in answers)
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)
