"""Models that keep references in a cache, and sequences packed in ways that are refused."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from diffusers_linattn import ClearProcessor, GLAProcessor, HybridProcessor, LinearProcessor, linearize
from diffusers_linattn.linearize import layers_of

from model_cases import CASES, Case


CACHED = ["Flux2Transformer2DModel KV cache", "QwenImage21Transformer2DModel Edit"]
MECHANISMS = {
    "clear": ClearProcessor(window=2),
    "clear, pooled": ClearProcessor(window=2, down_factor=2),
    "linear": LinearProcessor(),
    "gla": GLAProcessor(),
    "gla, alternate": GLAProcessor(direction="alternate"),
    "hybrid": HybridProcessor(window=2),
}


def find(name: str) -> Case:
    if not hasattr(diffusers, name.split()[0]):
        pytest.skip(f"this diffusers has no {name.split()[0]}")
    return CASES[name]


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("mechanism", MECHANISMS)
@torch.no_grad()
def test_the_step_that_fills_the_cache_and_those_that_read_it_agree(name: str, mechanism: str) -> None:
    case = find(name)
    model = linearize(case.make(), MECHANISMS[mechanism])
    for layer in layers_of(model):
        for parameter in layer.processor.own_parameters().values():  # type: ignore[union-attr]
            parameter.normal_(0, 0.1)
    inputs = next(dict(call.inputs) for call in case.calls if call.inputs.get("kv_cache_mode") == "extract")
    inputs["timestep"] = inputs["timestep"] * 0  # FLUX.2 modulates the references as at 0
    if "Flux2" in name:
        length = inputs.pop("num_ref_tokens")
        first, cache = model(**inputs, num_ref_tokens=length)
        image = {key: inputs[key][:, length:] for key in ("hidden_states", "img_ids")}
        later = model(**{**inputs, **image, "kv_cache": cache, "kv_cache_mode": "cached"})[0]
    else:
        first = model(**inputs)[0]
        later = model(**{**inputs, "kv_cache_mode": "cached"})[0]
    torch.testing.assert_close(later, first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CACHED)
def test_the_input_of_a_layer_with_a_cache_cannot_be_changed(name: str) -> None:
    case = find(name)
    model = linearize(case.make(), GLAProcessor(input_conv=True))
    with pytest.raises(ValueError, match="keeps references in a cache"):
        model(**case.calls[0].inputs)


def refused(name: str, message: str, **changes: Any) -> None:
    case = find(name)
    model = linearize(case.make(), ClearProcessor(window=2))
    with pytest.raises(ValueError, match=message):
        model(**{**case.calls[0].inputs, **changes})


def test_ideogram_samples_packed_into_one_sequence() -> None:
    inputs = find("Ideogram4Transformer2DModel").calls[0].inputs
    segments, roles = inputs["segment_ids"].clone(), inputs["indicator"].clone()
    segments[0, -5:], roles[1, -1] = 2, 0
    refused("Ideogram4Transformer2DModel", "called with 2 segments", segment_ids=segments)
    refused("Ideogram4Transformer2DModel", "24 image tokens from 7", indicator=roles)
    positions = inputs["position_ids"].clone()
    positions[1, -1] += 1
    refused("Ideogram4Transformer2DModel", "same image ids in every sample", position_ids=positions)


def test_qwen_layers_of_different_sizes() -> None:
    shapes = [[(1, 4, 6), (1, 6, 4), (1, 4, 6), (1, 4, 6)]] * 2
    refused("QwenImageTransformer2DModel Layered", "layers of one size", img_shapes=shapes)


def test_qwen21_with_flex_attention() -> None:
    case = find("QwenImage21Transformer2DModel")
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

    model: Any = case.make()
    model.set_attn_processor(QwenImage21FlexAttnProcessor())
    linearize(model, ClearProcessor(window=2))
    with pytest.raises(ValueError, match="expected QwenImage21AttnProcessor"):
        model(**case.calls[0].inputs)


def test_tokens_that_are_not_in_raster_order() -> None:
    inputs = find("Krea2Transformer2DModel").calls[0].inputs
    ids = inputs["position_ids"].clone()
    ids[[8, 14]] = ids[[14, 8]]
    refused("Krea2Transformer2DModel", "not a .* grid in raster order", position_ids=ids)
