"""Modes of single models: those that are refused with a reason, and calls that belong together."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from diffusers_linattn import ClearProcessor, linearize
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.models import REFUSED
from diffusers_linattn.tracker import find_tracker

from model_cases import CASES


def converted(name: str) -> tuple[Any, dict[str, Any]]:
    if not hasattr(diffusers, name.split()[0]):
        pytest.skip(f"this diffusers has no {name}")
    return linearize(CASES[name].make(), ClearProcessor(window=2)), CASES[name].calls[0].inputs


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_models_say_why(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    refused = type(name, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=f"{name} cannot be converted: "):
        linearize(refused, ClearProcessor())


def test_cogview4_refuses_packed_samples() -> None:
    model, inputs = converted("CogView4Transformer2DModel training")
    packed = {"attention_kwargs": {**inputs["attention_kwargs"], "batch_flag": torch.tensor([0, 0])}}
    with pytest.raises(ValueError, match=r"batch_flag.*several sizes.*leave batch_flag"):
        model(**{**inputs, **packed})


def test_kandinsky5_refuses_nabla_and_its_message_says_what_works() -> None:
    model, inputs = converted("Kandinsky5Transformer3DModel video")
    with pytest.raises(ValueError, match=r"sparse_params.*attention_type=\"regular\""):
        model(**inputs, sparse_params={"to_fractal": True})
    model.register_to_config(attention_type="nabla")
    pipe = diffusers.Kandinsky5T2VPipeline.__new__(diffusers.Kandinsky5T2VPipeline)
    pipe.register_modules(transformer=model)
    pipe.transformer.register_to_config(attention_type="regular")
    assert pipe.get_sparse_params(inputs["hidden_states"], "cpu") is None


@torch.no_grad()
def test_lumina_next_masks_keep_one_row() -> None:
    """Its processor expands a mask of keys to (batch, heads, tokens, tokens), which operators would copy."""
    model, inputs = converted("LuminaNextDiT2DModel")
    masks = []
    for layer in layers_of(model):
        attend = layer.processor.attend  # type: ignore[union-attr]
        layer.processor.attend = lambda call, attend=attend: masks.append(call.mask.shape) or attend(call)  # type: ignore[union-attr]
    model(**inputs)
    assert masks == [(2, 1, 1, 60)] * 2


def test_lumina_next_can_start_its_projections_afresh() -> None:
    """Its self-attention has no output projection of its own."""
    model, _ = converted("LuminaNextDiT2DModel")
    linearize(model, ClearProcessor(window=2, reset_projections=True))
    kept = layers_of(model)[0].processor.original_weights  # type: ignore[union-attr]
    assert {name.split(".")[0] for name in kept} == {"to_q", "to_k", "to_v"}


@torch.no_grad()
def test_glm_image_remembers_the_grids_of_the_references_in_its_cache() -> None:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    model, inputs = converted("GlmImageTransformer2DModel")

    def layouts() -> str:
        return " | ".join(map(str, find_tracker(model).layouts_of("joint")))  # type: ignore[union-attr]

    caches = GlmImageKVCache(num_layers=2)
    inputs = {**inputs, "attention_mask": None, "kv_caches": caches}

    def write(height: int, width: int) -> None:
        caches.set_mode("write")
        tokens = torch.zeros(1, height * width // 4, dtype=torch.long)
        reference = {
            "hidden_states": torch.randn(1, 4, height, width),
            "encoder_hidden_states": inputs["encoder_hidden_states"][:1, :0],
            "prior_token_id": tokens,
            "prior_token_drop": tokens.bool(),
            **{name: inputs[name][:1] for name in ("timestep", "target_size", "crop_coords")},
        }
        model(**{**inputs, **reference})
        assert layouts() == f"text 0 + image 1x{height // 2}x{width // 2}"

    def read(mode: str = "read") -> str:
        caches.set_mode(mode)
        model(**inputs)
        return layouts()

    assert read() == "text 7 + image 1x6x10"
    write(8, 12)
    write(12, 6)
    assert read() == "memory 1x4x6 + memory 1x6x3 + text 7 + image 1x6x10"
    assert read("skip") == "text 7 + image 1x6x10"
    caches.next_sample()  # the references of the second sample have other sizes
    write(6, 12)
    write(8, 12)
    assert read() == "memory 42 + text 7 + image 1x6x10"
    caches.clear()
    write(8, 12)
    assert read() == "memory 1x4x6 + text 7 + image 1x6x10"


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("FluxTransformer2DModel", "img_ids"),
        ("QwenImageTransformer2DModel", "img_shapes"),
        ("Lumina2Transformer2DModel", "encoder_attention_mask"),
    ],
)
def test_a_forgotten_argument_is_named(name: str, argument: str) -> None:
    model, inputs = converted(name)
    without = {key: value for key, value in inputs.items() if key != argument}
    with pytest.raises(ValueError, match=f"called without {argument}, which its token grid is read from"):
        model(**without)
    if isinstance(inputs[argument], torch.Tensor):
        with pytest.raises(ValueError, match=f"called without {argument}"):
            model(**without, **{argument: None})


@torch.no_grad()
def test_a_layer_that_gets_fewer_samples_than_the_model_does_not_take_the_layouts_of_others() -> None:
    """As caches do that skip the unconditional half of a batch."""
    model, inputs = converted("Lumina2Transformer2DModel")
    attn = layers_of(model)[-1].attn
    calls: list[dict[str, Any]] = []
    handle = attn.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    model(**inputs)
    handle.remove()
    half = {
        name: value[1:] if isinstance(value, torch.Tensor) and len(value) == 2 else value
        for name, value in calls[0].items()
    }
    with pytest.raises(ValueError, match="do not match the layout"):
        attn(**half)
