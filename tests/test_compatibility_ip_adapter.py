"""IP-Adapters of FLUX and SD3, loaded before and after conversion: strength, unloading, and the warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

from diffusers_linattn import ClearProcessor, linearize, restore, status
from diffusers_linattn.linearize import layers_of

import tiny


EMBEDS = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(7))


def random_state(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in state.items()}


def load_flux(pipe: Any) -> Any:
    image_proj = {"proj.weight": (96, 12), "proj.bias": (96,), "norm.weight": (24,), "norm.bias": (24,)}
    layers = {}
    for i in range(2):
        for name in ("to_k_ip", "to_v_ip"):
            layers |= {f"{i}.{name}.weight": (32, 24), f"{i}.{name}.bias": (32,)}
    state = {
        part: random_state({name: torch.empty(shape) for name, shape in shapes.items()}, seed)
        for seed, (part, shapes) in enumerate({"image_proj": image_proj, "ip_adapter": layers}.items())
    }
    pipe.load_ip_adapter(state, weight_name="", image_encoder_pretrained_model_name_or_path=None)
    return pipe


def load_sd3(pipe: Any) -> Any:
    projection = IPAdapterTimeImageProjection(embed_dim=12, output_dim=32, hidden_dim=64, heads=1, num_queries=4)
    processor = SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, timesteps_emb_dim=64)
    num_layers = len([name for name in pipe.transformer.attn_processors if name.startswith("transformer_blocks")])
    image_proj = random_state(projection.state_dict(), 0)
    layers = [random_state(processor.state_dict(), i) for i in range(num_layers)]
    ip_adapter = {f"{i}.{name}": tensor for i, state in enumerate(layers) for name, tensor in state.items()}
    pipe.load_ip_adapter({"image_proj": image_proj, "ip_adapter": ip_adapter}, image_encoder_folder=None)
    return pipe


def flux(pipe: Any, image: bool = True) -> torch.Tensor:
    embeds = {"ip_adapter_image_embeds": [EMBEDS], "negative_ip_adapter_image_embeds": [EMBEDS]} if image else {}
    return tiny.generate(pipe, prompt="a cat", **tiny.FLUX_CALL, **embeds)


def sd3(pipe: Any, image: bool = True) -> torch.Tensor:
    embeds = {"ip_adapter_image_embeds": torch.cat([EMBEDS * 0, EMBEDS])} if image else {}
    return tiny.generate(pipe, **tiny.SD3_CALL, **embeds)


MODELS: dict[str, Any] = {
    "flux": (tiny.flux_pipeline, load_flux, flux),
    "sd3": (tiny.sd3_pipeline, load_sd3, sd3),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, atol=2e-5, rtol=0)


def test_converting_after_loading_keeps_the_image_prompt(model: Any) -> None:
    make, load, generate = model
    plain, stock = generate(make(), image=False), load(make())
    pipe = linearize(load(make()), ClearProcessor(window=100))
    assert len(status(pipe).converted) == len(layers_of(pipe))
    outputs = []
    for scale in (None, 0.3, 0.0):
        for each in (stock, pipe) if scale is not None else ():
            each.set_ip_adapter_scale(scale)
        outputs.append(generate(stock))
        assert near(generate(pipe), outputs[-1]), scale
    assert not near(outputs[0], outputs[1])
    assert near(outputs[2], plain)
    pipe.set_ip_adapter_scale(0.6)
    stock.set_ip_adapter_scale(0.6)
    assert near(generate(restore(pipe)), generate(stock))


def test_the_strength_is_read_and_set_on_the_processor_that_is_held() -> None:
    pipe = linearize(load_sd3(tiny.sd3_pipeline()), ClearProcessor(window=100))
    assert pipe.is_ip_adapter_active
    pipe.set_ip_adapter_scale(0.0)
    assert not pipe.is_ip_adapter_active
    assert not hasattr(linearize(tiny.sd3_pipeline(), ClearProcessor()).transformer.transformer_blocks[0], "scale")
    assert layers_of(pipe)[0].attn.processor.original.scale == 0


def test_loading_after_conversion_is_noticed_and_mended_by_converting_again(model: Any) -> None:
    make, load, generate = model
    expected = generate(load(make()))
    pipe = load(linearize(make(), ClearProcessor(window=100)))
    replaced = [layer for layer in status(pipe).layers if layer.processor is None]
    assert replaced
    assert all(
        "was converted, then replaced by a " in layer.implementation and "IPAdapter" in layer.implementation
        for layer in replaced
    )
    text = "converted layers .* something replaced it, as loading an IP-Adapter does"
    with pytest.warns(UserWarning, match=f"{len(replaced)} of {len(layers_of(pipe))} {text}") as caught:
        assert near(generate(pipe), expected)
    assert len([warning for warning in caught if "converted layers" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(pipe)
        linearize(pipe, ClearProcessor(window=100))
        assert near(generate(pipe), expected)
    assert len(status(pipe).converted) == len(layers_of(pipe))


def test_loading_leaves_the_single_blocks_of_flux_as_they_were_converted() -> None:
    pipe = linearize(tiny.flux_pipeline(), {"*": ClearProcessor(window=2, down_factor=2)})
    singles = [layer.processor for layer in layers_of(tiny.train(pipe))[2:]]
    load_flux(pipe)
    assert [layer.processor for layer in layers_of(pipe)] == [None, None, *singles]
    assert isinstance(layers_of(pipe)[0].attn.processor, FluxIPAdapterAttnProcessor)
    same = linearize(load_flux(tiny.flux_pipeline()), ClearProcessor(window=2, down_factor=2), layers=[2, 3])
    for layer, processor in zip(layers_of(same)[2:], singles, strict=True):
        layer.processor.load_state_dict(processor.state_dict())
    with pytest.warns(UserWarning, match="2 of 4 converted layers"):
        assert torch.equal(flux(pipe), flux(same))


def test_unloading_after_conversion_is_noticed_too(model: Any) -> None:
    make, load, generate = model
    plain = generate(make(), image=False)
    pipe = linearize(load(make()), ClearProcessor(window=100))
    pipe.unload_ip_adapter()
    left = [layer.processor for layer in layers_of(pipe)]
    if make is tiny.flux_pipeline:
        assert left[:2] == [None, None]
        assert isinstance(layers_of(pipe)[0].attn.processor, FluxAttnProcessor)
        assert None not in left[2:]
    else:
        assert not any(left)
    with pytest.warns(UserWarning, match="converted layers"):
        assert near(generate(pipe, image=False), plain)
    linearize(pipe, ClearProcessor(window=100))
    assert near(generate(pipe, image=False), plain)
    assert near(generate(restore(pipe), image=False), plain)


def test_layers_that_a_loader_replaces_get_their_original_weights_back() -> None:
    expected = flux(load_flux(tiny.flux_pipeline()))
    pipe = linearize(tiny.flux_pipeline(), ClearProcessor(window=100), layers=[0, 1])
    for layer in layers_of(pipe)[:2]:
        layer.processor.keep_original_weights(layer.attn, ["to_q.weight"])
        with torch.no_grad():
            layer.attn.to_q.weight.mul_(3)
    load_flux(pipe)
    with pytest.warns(UserWarning, match="2 of 2 converted layers"):
        assert near(flux(pipe), expected)


@pytest.mark.parametrize("change", ["attribute", "dict", "set_processor"])
def test_any_other_replacement_is_noticed(change: str) -> None:
    model: Any = linearize(tiny.flux(), ClearProcessor(window=2))
    attn = model.transformer_blocks[0].attn
    if change == "dict":
        model.set_attn_processor({**model.attn_processors, "transformer_blocks.0.attn.processor": FluxAttnProcessor()})
    else:
        del attn.processor
        setattr(attn, "processor", FluxAttnProcessor()) if change == "attribute" else attn.set_processor(
            FluxAttnProcessor()
        )
    assert "was converted, then replaced by a FluxAttnProcessor" in str(status(model))
    with pytest.warns(UserWarning, match=r"1 of 4 converted layers \(transformer_blocks.0.attn …\)"), torch.no_grad():
        model(**tiny.flux_inputs())


@torch.no_grad()
def test_setting_one_stock_processor_for_all_layers_is_no_surprise() -> None:
    model: Any = linearize(tiny.flux(), ClearProcessor(window=2))
    model.set_attn_processor(FluxAttnProcessor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(**tiny.flux_inputs())[0], tiny.flux()(**tiny.flux_inputs())[0])
