"""ControlNets, control pipelines, and guidance that perturbs or skips attention layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    PixArtSigmaPAGPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3PAGPipeline,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.layer_skip import apply_layer_skip

from diffusers_linattn import ClearProcessor, GLAProcessor, LinearProcessor, linearize, restore, status
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.processors import BaseProcessor

import tiny
from model_cases import CASES


WIDE = ClearProcessor(window=100)
CONTROL = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(9))


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, atol=2e-5 * max(1, expected.abs().max().item()), rtol=0)


def randomize(model: Any) -> Any:
    """The layers through which a ControlNet speaks start at zero."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def flux_controlnet() -> Any:
    pipe = tiny.flux_pipeline()
    config = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1}
    net = randomize(FluxControlNetModel.from_config(config).eval())
    pipe = FluxControlNetPipeline(**pipe.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_control() -> Any:
    components = tiny.flux_pipeline(in_channels=32, out_channels=16).components
    del components["image_encoder"], components["feature_extractor"]
    pipe = FluxControlPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_controlnet() -> Any:
    config = {**tiny.sd3().config, "num_layers": 2, "extra_conditioning_channels": 0}
    return tiny.sd3_pipeline(
        StableDiffusion3ControlNetPipeline, controlnet=randomize(SD3ControlNetModel.from_config(config).eval())
    )


FLUX_CALL = {"prompt": "a cat", **tiny.FLUX_CALL}
SD3_CALL = {**tiny.SD3_CALL, "height": 24, "width": 32}
CONTROLLED: dict[str, Any] = {
    "FLUX ControlNet": (flux_controlnet, {**FLUX_CALL, "control_image": CONTROL}, {"control_image": 1 - CONTROL}),
    "FLUX Control": (flux_control, {**FLUX_CALL, "control_image": CONTROL}, {"control_image": 1 - CONTROL}),
    "SD3 ControlNet": (sd3_controlnet, {**SD3_CALL, "control_image": CONTROL}, {"control_image": 1 - CONTROL}),
}


@pytest.mark.parametrize("name", CONTROLLED)
def test_controlled_pipelines(name: str) -> None:
    make, call, other = CONTROLLED[name]
    pipe = make()
    expected = tiny.generate(pipe, **call)
    assert not near(tiny.generate(pipe, **{**call, **other}), expected)
    linearize(pipe, WIDE)
    assert len(status(pipe).converted) == len(layers_of(pipe.transformer)) > 0
    assert near(tiny.generate(pipe, **call), expected)
    linearize(pipe, LinearProcessor())
    small = tiny.generate(pipe, **call)
    assert not near(small, expected)
    assert not near(tiny.generate(pipe, **{**call, **other}), small)
    assert torch.equal(tiny.generate(restore(pipe), **call), expected)


@pytest.mark.parametrize("make", [flux_controlnet, sd3_controlnet], ids=lambda f: f.__name__)
def test_a_controlnet_itself_stays_as_it_is(make: Any) -> None:
    pipe = linearize(make(), WIDE)
    assert not [m for m in pipe.controlnet.modules() if isinstance(m, BaseProcessor)]
    with pytest.raises(ValueError, match="ControlNetModel is not a transformer that diffusers_linattn knows"):
        linearize(pipe.controlnet, WIDE)


def sd3_pag() -> Any:
    return tiny.sd3_pipeline(StableDiffusion3PAGPipeline, pag_applied_layers=r"transformer_blocks\.1\.")


def pixart_pag() -> Any:
    components = tiny.pixart_pipeline().components
    pipe = PixArtSigmaPAGPipeline(**components, pag_applied_layers=r"transformer_blocks\.1\.attn1")
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIXART_CALL = {"prompt": "a cat", "height": 24, "width": 32, "use_resolution_binning": False, "num_inference_steps": 2}
PAG: dict[str, Any] = {
    "sd3": (sd3_pag, tiny.SD3_CALL, {"*": WIDE, "transformer_blocks.1.*": None}),
    "pixart": (pixart_pag, PIXART_CALL, {"*": WIDE, "transformer_blocks.1.*": None}),
}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", PAG)
def test_perturbed_attention_guidance_on_layers_that_stay_dense(name: str, guidance: float) -> None:
    make, call, mapping = PAG[name]
    pipe, call = make(), {**call, "guidance_scale": guidance}
    expected = tiny.generate(pipe, **call, pag_scale=3.0)
    assert not near(tiny.generate(pipe, **call, pag_scale=0.0), expected)
    linearize(pipe, mapping)
    before = [layer.processor for layer in layers_of(pipe)]
    assert near(tiny.generate(pipe, **call, pag_scale=3.0), expected)
    assert [layer.processor for layer in layers_of(pipe)] == before
    linearize(pipe, {pattern: processor and LinearProcessor() for pattern, processor in mapping.items()})
    assert not near(tiny.generate(pipe, **call, pag_scale=3.0), expected)
    assert torch.equal(tiny.generate(restore(pipe), **call, pag_scale=3.0), expected)


@pytest.mark.parametrize("name", PAG)
def test_perturbed_attention_guidance_on_converted_layers_is_refused(name: str) -> None:
    make, call, _ = PAG[name]
    pipe = linearize(make(), WIDE)
    expected = tiny.generate(pipe, **call, pag_scale=0.0)
    with pytest.raises(TypeError, match=r"cannot assign '.*PAG.*' as child module 'processor'"):
        tiny.generate(pipe, **call, pag_scale=3.0)
    assert torch.equal(tiny.generate(pipe, **call, pag_scale=0.0), expected)


def test_skip_layer_guidance_of_sd3() -> None:
    pipe = tiny.sd3_pipeline()
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    call = {**tiny.SD3_CALL, "num_inference_steps": 3}
    plain, expected = tiny.generate(pipe, **call), tiny.generate(pipe, **call, **skip)
    assert not near(plain, expected)
    linearize(pipe, WIDE)
    assert near(tiny.generate(pipe, **call, **skip), expected)
    linearize(pipe, GLAProcessor())
    assert not near(tiny.generate(pipe, **call, **skip), tiny.generate(pipe, **call))


def skipping(model: Any, **what: bool) -> Any:
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks", **what))
    return model


@torch.no_grad()
def run(model: Any, name: str) -> torch.Tensor:
    output = model(**CASES[name].calls[0].inputs)
    return output[0] if isinstance(output, tuple) else output.sample


SKIPS = {
    "block": {"skip_attention": True, "skip_ff": True},
    "attention": {"skip_attention": True, "skip_ff": False},
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
}


@pytest.mark.parametrize("first", ["guider", "conversion"])
@pytest.mark.parametrize("what", SKIPS)
@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "CogView4Transformer2DModel"])
def test_layer_skip_of_the_guiders(name: str, what: str, first: str) -> None:
    stock: Any = CASES[name].make()
    plain = run(stock, name)
    try:
        expected = run(skipping(stock, **SKIPS[what]), name)
    except (ValueError, AttributeError) as error:
        pytest.skip(f"stock {name}: {error}")
    assert not near(expected, plain)
    model: Any = CASES[name].make()
    if first == "guider":
        linearize(skipping(model, **SKIPS[what]), WIDE)
    else:
        skipping(linearize(model, WIDE), **SKIPS[what])
    assert near(run(model, name), expected)
    # A window that leaves keys out: the skipped layer is the same, the others are not.
    linearize(model, ClearProcessor(window=2))
    assert not near(run(model, name), expected)
    linearize(model, ClearProcessor(window=2), layers="transformer_blocks.1.*")
    for layer in layers_of(model):
        if ".1." not in layer.name:
            linearize(model, {layer.name: WIDE})
    assert near(run(model, name), expected)
