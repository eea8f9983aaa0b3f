"""Every supported model, tiny: against the stock model, and against dense attention under a mask written out pair by
pair from what `model_cases` says of its tokens."""

from __future__ import annotations

import re
import runpy
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from diffusers_linattn import (
    ClearProcessor,
    GLAProcessor,
    HybridProcessor,
    LinearProcessor,
    linearize,
    restore,
    status,
    supported_models,
)
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.processors.attention_call import AttentionCall

from model_cases import CASES, Call, Case, Token, assert_near, change, output_of


MECHANISMS = {
    "clear": ClearProcessor(window=2),
    "clear, pooled": ClearProcessor(window=2, down_factor=2),
    "linear": LinearProcessor(),
    "gla": GLAProcessor(),
    "hybrid": HybridProcessor(window=2, temporal_window=2),
}
FRAMES = 2  # the temporal window of the tests


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    missing = [need for need in (name.split()[0], *CASES[name].needs) if not hasattr(diffusers, need)]
    if missing:
        pytest.skip(f"this diffusers has no {missing[0]}")
    return CASES[name]


def pairwise_mask(sequence: list[Token], window: int, length: int) -> torch.Tensor:
    """Who sees whom, one pair at a time. Tokens beyond the sequence are padding, which this mask leaves alone."""
    mask = torch.ones(length, length, dtype=torch.bool)
    for i, query in enumerate(sequence):
        for j, key in enumerate(sequence):
            if query is not None and key is not None:
                y = (query[2] + 0.5) * key[5] / query[5] - 0.5
                x = (query[3] + 0.5) * key[6] / query[6] - 0.5
                near = (y - key[2]) ** 2 + (x - key[3]) ** 2 < window**2
                in_time = query[0] != key[0] or abs(query[1] - key[1]) < FRAMES
                mask[i, j] = near and in_time
    return mask


class MaskedAttention(TorchFunctionMode):
    """Gives the attention calls of one layer a mask, besides the one they have."""

    def __init__(self, sequences: list[list[Token]], window: int, asking: Sequence[int] | None):
        super().__init__()
        self.sequences, self.window, self.calls = sequences, window, 0
        on_grids = [i for i, token in enumerate(sequences[0]) if token is not None]
        self.asking = on_grids if asking is None else asking

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
            sequences = self.sequences
            if len(sequences) > 1 and len(named["query"]) == 1:  # a call for each sample
                sequences = sequences[self.calls : self.calls + 1]
            length = max(map(len, sequences))
            if named["key"].shape[2] == length:
                assert named["query"].shape[2] in (length, len(self.asking))
                masks = [pairwise_mask(sequence, self.window, length) for sequence in sequences]
                mask = torch.stack(masks)[:, None]
                if named["query"].shape[2] < length:
                    mask = mask[:, :, self.asking]
                given = named.get("attn_mask")
                if given is not None and given.dtype == torch.bool:
                    mask = mask & given
                elif given is not None:
                    mask = torch.where(mask, given, float("-inf"))
                args, kwargs = (), {**named, "attn_mask": mask}
                self.calls += 1
        return func(*args, **kwargs)


def run_masked(model: nn.Module, case: Case, call: Call, window: int) -> torch.Tensor:
    """The stock model under the masks of `call`, layer by layer."""
    handles, modes = [], []

    for name, module in model.named_modules():
        for pattern, scope in case.layers.items():
            if fnmatchcase(name, pattern) and hasattr(module, "processor"):
                sequences: Any = call.tokens["joint" if scope == "queries" else scope]
                sequences = sequences if isinstance(sequences[0], list) else [sequences]
                mode = MaskedAttention(sequences, window, call.asking)
                modes.append(mode)
                handles.append(module.register_forward_pre_hook(lambda *_, mode=mode: mode.__enter__() and None))
                handles.append(module.register_forward_hook(lambda *_, mode=mode: mode.__exit__(None, None, None)))
    try:
        output = output_of(model, call.inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert modes
    assert all(mode.calls for mode in modes)
    return output


@torch.no_grad()
def test_a_window_that_covers_the_grid_is_the_stock_model(case: Case) -> None:
    model = case.make()
    expected = [output_of(model, call.inputs) for call in case.calls]
    linearize(model, ClearProcessor(window=100))
    for call, output in zip(case.calls, expected, strict=True):
        assert_near(output_of(model, call.inputs), output)
    assert_near(output_of(restore(model), case.calls[0].inputs), expected[0], tolerance=0)


@torch.no_grad()
def test_a_small_window_is_dense_attention_under_a_mask(case: Case) -> None:
    model = case.make()
    expected = [run_masked(model, case, call, window=2) for call in case.calls]
    stock = output_of(model, case.calls[0].inputs)
    assert (stock - expected[0]).abs().max() > 1e-4 * stock.abs().max()  # else this would show nothing
    linearize(model, ClearProcessor(window=2, temporal_window=FRAMES))
    for call, output in [*zip(case.calls, expected, strict=True), (case.calls[0], expected[0])]:
        assert_near(output_of(model, call.inputs), output)


@torch.no_grad()
def test_every_attention_layer_is_converted_or_left_for_a_reason(case: Case) -> None:
    model = case.make()
    found = status(linearize(model, ClearProcessor(window=2)))
    names = [name for name, module in model.named_modules() if hasattr(module, "processor")]
    expected = [name for name in names if any(fnmatchcase(name, pattern) for pattern in case.layers)]
    assert sorted(layer.name for layer in found.converted) == sorted(expected)
    assert sorted(layer.name for layer in found.layers + found.left) == sorted(names)
    assert not [layer.name for layer in found.left if "unknown" in layer.implementation]
    assert {layer.scope for layer in layers_of(model)} == set(case.layers.values())


@torch.no_grad()
def test_the_layout_finds_the_token_that_a_latent_becomes(case: Case) -> None:
    model = linearize(case.make(), ClearProcessor(window=2))
    seen: list[AttentionCall] = []
    for layer in layers_of(model):
        processor: Any = layer.processor
        processor.attend = lambda call, attend=processor.attend: seen.append(call) or attend(call)
    for call in case.calls:
        if call.touched is None:
            continue
        index, row = call.touched
        seen.clear()
        output_of(model, call.inputs)
        num_calls = len(seen)
        output_of(model, change(call.inputs, call.latents, index))
        before, after = seen[0].query, seen[num_calls].query
        rows = (before != after).any(-1).any(1).any(0).nonzero().flatten().tolist()
        assert rows == [row], f"rows {rows} of a query over {seen[0].layout}"
    assert seen


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_fast_and_reference_implementations_agree_in_the_model(case: Case, mechanism: str) -> None:
    if mechanism in case.left_out:
        pytest.skip(case.left_out[mechanism])
    template, call = MECHANISMS[mechanism], case.calls[0]
    model = case.make()
    outputs, gradients = [], []
    for impl in (None, "reference"):
        linearize(model, type(template)(**{**template.to_config(), "impl": impl}))
        output = output_of(model, call.inputs)
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert_near(outputs[0], outputs[1], tolerance=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max().item() for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        scale = gradients[1][name].abs().max().item()
        atol = 1e-4 * scale + 1e-6 * largest
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=atol, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    own = [name for name in gradients[0] if ".processor." in name]
    assert bool(own) == (mechanism != "clear")


@pytest.mark.parametrize("mechanism", MECHANISMS)
@torch.no_grad()
def test_what_a_mask_hides_does_not_matter(case: Case, mechanism: str) -> None:
    calls = [call for call in case.calls if call.hidden is not None]
    if not calls or mechanism in case.left_out:
        pytest.skip("this model takes no mask" if not calls else case.left_out[mechanism])
    model = case.make()
    for call in calls:
        other = change(call.inputs, *call.hidden)  # type: ignore[misc]
        assert_near(output_of(restore(model), other), output_of(model, call.inputs))
        linearize(model, MECHANISMS[mechanism])
        for layer in layers_of(model):
            for parameter in layer.processor.own_parameters().values():  # type: ignore[union-attr]
                parameter.normal_(0, 0.1)
        assert_near(output_of(model, other), output_of(model, call.inputs), tolerance=1e-5)


def test_the_patterns_in_the_docs_convert_every_layer(case: Case) -> None:
    model = case.make()
    row = re.search(rf"^\| `{type(model).__name__}` \|[^|]*\|([^|]*)\|", models_page(), re.MULTILINE)
    assert row is not None
    linearize(model, dict.fromkeys(re.findall("`(.*?)`", row[1]), ClearProcessor(window=16)))
    assert len(status(model).converted) == len(layers_of(model)) > 0


def test_the_snippet_in_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    model = CASES["FluxTransformer2DModel"].make()
    snippet = re.search(r"```python\n(.*?)```", models_page(), re.DOTALL)
    assert snippet is not None
    exec(snippet[1], {"pipe": SimpleNamespace(transformer=model)})
    assert "4 of 4" in capsys.readouterr().out


def models_page() -> str:
    return runpy.run_path(str(Path(__file__).parents[1] / "docs" / "make_models_page.py"))["page"]()


def test_every_supported_model_has_a_case() -> None:
    tested = {name.split()[0] for name in CASES}
    assert tested == set(supported_models())
