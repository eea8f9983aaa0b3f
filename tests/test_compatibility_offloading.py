"""Offloading, layerwise casting and device maps, with trained weights in the processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from diffusers import FluxPipeline, FluxTransformer2DModel, __version__
from packaging.version import Version

from diffusers_linattn import (
    ClearProcessor,
    linearize,
    load_linear_attention,
    original_attention,
    restore,
    save_linear_attention,
    status,
)
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.processors import BaseProcessor

import tiny


CPU = torch.device("cpu")


def group(**arguments: Any) -> Any:
    def apply(model: Any, folder: Path) -> None:
        disk = {"offload_to_disk_path": str(folder)} if arguments.get("disk") else {}
        kind = {name: value for name, value in arguments.items() if name != "disk"}
        if torch.accelerator.current_accelerator() is None and Version(__version__) < Version("0.42"):
            pytest.skip("group offloading of this diffusers needs an accelerator")
        model.enable_group_offload(onload_device=CPU, offload_device=CPU, **kind, **disk)

    return apply


OFFLOADS: dict[str, Any] = {
    "model": lambda model, folder: cpu_offload_with_hook(model, execution_device="cpu"),
    "sequential": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "sequential to disk": lambda model, folder: disk_offload(model, str(folder), execution_device="cpu"),
    "group leaf": group(offload_type="leaf_level"),
    "group leaf to disk": group(offload_type="leaf_level", disk=True),
    "group block": group(offload_type="block_level", num_blocks_per_group=1),
    "group block to disk": group(offload_type="block_level", num_blocks_per_group=1, disk=True),
}


@pytest.fixture(params=tiny.TRAINABLE)
def template(request: pytest.FixtureRequest) -> BaseProcessor:
    return tiny.TRAINABLE[request.param]


def trained(template: BaseProcessor) -> Any:
    return tiny.train(linearize(tiny.flux(), template))


@torch.no_grad()
def run(model: Any, *size: int) -> torch.Tensor:
    return model(**tiny.flux_inputs(*(size or (6, 9))))[0]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_converted_then_offloaded(offload: str, template: BaseProcessor, tmp_path: Path) -> None:
    plain = trained(template)
    assert not torch.allclose(run(plain), run(linearize(tiny.flux(), template)), atol=1e-4)
    model = trained(template)
    OFFLOADS[offload](model, tmp_path)
    for size in ((6, 9), (9, 6)):
        assert torch.equal(run(model, *size), run(plain, *size))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_then_converted_works_or_is_refused(offload: str, tmp_path: Path) -> None:
    windows, pooled = ClearProcessor(window=2), ClearProcessor(window=2, down_factor=2)
    model = tiny.flux()
    OFFLOADS[offload](model, tmp_path)
    assert torch.equal(run(linearize(model, windows)), run(linearize(tiny.flux(), windows)))
    if offload in ("model", "group leaf", "group block"):
        assert torch.equal(run(linearize(model, pooled)), run(linearize(tiny.flux(), pooled)))
        return
    how = "to disk.*before enable_group_offload" if "group" in offload else "weight by weight.*before enable_sequent"
    with pytest.raises(ValueError, match=f"model is offloaded {how}"):
        linearize(model, pooled)
    assert len(status(model).converted) == 4
    assert torch.equal(run(model), run(linearize(tiny.flux(), windows)))
    assert torch.equal(run(restore(model)), run(tiny.flux()))


def test_an_offloaded_student_cannot_be_its_own_teacher_and_says_so() -> None:
    model = trained(tiny.TRAINABLE["clear"])
    for layer in layers_of(model):
        layer.processor.keep_original_weights(layer.attn, ["to_q.weight"])
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"offloaded weight by weight.*Remove the offloading hooks first"):
        with original_attention(model):
            pass


def store_in_fp8(model: Any) -> Any:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


def test_layerwise_casting_stores_linear_layers_of_processors_in_fp8_too(template: BaseProcessor) -> None:
    plain = trained(template)
    model = store_in_fp8(trained(template))
    cast = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert any(".attn.to_q." in name for name in cast)
    own = [name for name, _ in model.named_parameters() if ".processor." in name]
    assert bool(cast & set(own)) == (not isinstance(template, ClearProcessor))
    output = run(model)
    assert not torch.equal(output, run(plain))
    # The same numbers, rounded once to fp8, in a model without casting.
    plain.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    assert torch.equal(output, run(plain))


def test_converting_a_model_that_is_stored_in_fp8(template: BaseProcessor) -> None:
    model = tiny.train(linearize(store_in_fp8(tiny.flux()), template))
    plain = trained(template)
    plain.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    assert torch.equal(run(model), run(plain))
    restore(model)
    stock = store_in_fp8(tiny.flux())
    assert torch.equal(run(model), run(stock))


@pytest.mark.parametrize("name", ["flux", "pixart"])  # attention of PixArt has no norm, which would stay in bf16
def test_converting_a_bf16_model_that_is_stored_in_fp8(name: str, template: BaseProcessor) -> None:
    make, given = getattr(tiny, name), getattr(tiny, f"{name}_inputs")()
    model: Any = make().to(torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    tiny.train(linearize(model, template))
    floats = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    inputs = {**given, **{k: v.bfloat16() for k, v in floats.items()}}
    plain = tiny.train(linearize(make().to(torch.bfloat16), template))
    plain.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], plain(**inputs)[0])


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"": CPU}], ids=str)
def test_a_transformer_loaded_with_a_device_map(device_map: Any, template: BaseProcessor, tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path / "model")
    save_linear_attention(trained(template), tmp_path / "student")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "model", device_map=device_map)
    load_linear_attention(model, tmp_path / "student")
    assert torch.equal(run(model), run(trained(template)))
    assert torch.equal(run(restore(model)), run(tiny.flux()))


def test_a_transformer_spread_over_cpu_and_disk(template: BaseProcessor, tmp_path: Path) -> None:
    tiny.flux().save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in tiny.flux().named_children()} | {"single_transformer_blocks": "disk"}
    model = FluxTransformer2DModel.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "disk")
    )
    stock = run(model)
    assert torch.allclose(stock, run(tiny.flux()), atol=1e-6)
    with pytest.raises(ValueError, match=r"single_transformer_blocks.0.attn: the model is offloaded weight by weight"):
        linearize(model, template)
    assert torch.equal(run(model), stock)
    double = {"layers": "transformer_blocks.*"}
    tiny.train(linearize(model, template, **double))
    assert torch.allclose(run(model), run(tiny.train(linearize(tiny.flux(), template, **double))), atol=1e-6)


def test_a_pipeline_loaded_with_a_device_map(template: BaseProcessor, tmp_path: Path) -> None:
    call = {"prompt": "a cat", **tiny.FLUX_CALL}
    made = tiny.flux_pipeline()
    made.save_pretrained(tmp_path)
    pipe = FluxPipeline.from_pretrained(tmp_path, device_map="cpu")
    pipe.set_progress_bar_config(disable=True)
    expected = tiny.generate(tiny.train(linearize(made, template)), **call)
    output = tiny.generate(tiny.train(linearize(pipe, template)), **call)
    assert torch.allclose(output, expected, atol=1e-5)
