"""Quantized linear layers: conversion, generation, training of the processors, saving and loading."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_linattn import (
    ClearProcessor,
    LinearProcessor,
    linearize,
    load_linear_attention,
    restore,
    save_linear_attention,
)
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.processors import BaseProcessor

import tiny


def dynamic(model: Any) -> Any:
    """int8 on the CPU, in PyTorch itself: linear layers become modules without parameters."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao(model: Any) -> Any:
    """int8 weights: linear layers stay, their weights become tensors of a subclass."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


QUANTIZERS = {"dynamic": dynamic, "torchao": torchao}


@pytest.fixture(params=QUANTIZERS)
def quantize(request: pytest.FixtureRequest) -> Any:
    return QUANTIZERS[request.param]


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    return model(**tiny.flux_inputs())[0]


def near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(actual, expected, atol=tolerance, rtol=0)


def test_a_covering_window_is_the_quantized_model(quantize: Any) -> None:
    stock = quantize(tiny.flux())
    expected = run(stock)
    assert not near(expected, run(tiny.flux()))
    linearize(stock, ClearProcessor(window=100))
    assert near(run(stock), expected)
    assert torch.equal(run(restore(stock)), expected)


@pytest.mark.parametrize("mechanism", tiny.TRAINABLE)
def test_saved_processors_load_into_a_quantized_model(quantize: Any, mechanism: str, tmp_path: Path) -> None:
    template: BaseProcessor = tiny.TRAINABLE[mechanism]
    trained = tiny.train(linearize(tiny.flux(), template))
    save_linear_attention(trained, tmp_path)
    model = quantize(tiny.flux())
    stock = run(model)
    load_linear_attention(model, tmp_path)
    output = run(model)
    assert not near(output, stock)
    same = linearize(quantize(tiny.flux()), template)
    for layer, given in zip(layers_of(same), layers_of(trained), strict=True):
        layer.processor.load_state_dict(given.processor.state_dict())
    assert torch.equal(output, run(same))
    assert all(
        p.dtype == torch.float32 for layer in layers_of(model) for p in layer.processor.own_parameters().values()
    )
    save_linear_attention(model, tmp_path / "again")
    again = load_linear_attention(quantize(tiny.flux()), tmp_path / "again")
    assert torch.equal(run(again), output)
    assert torch.equal(run(restore(model)), stock)


def test_processors_of_a_quantized_model_train(quantize: Any) -> None:
    if quantize is dynamic:
        pytest.skip("the int8 layers of PyTorch itself have no gradient")
    model = linearize(quantize(tiny.flux()).requires_grad_(False), LinearProcessor())
    own = [p.requires_grad_(True) for layer in layers_of(model) for p in layer.processor.own_parameters().values()]
    model(**tiny.flux_inputs())[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own)
    assert any(p.grad.any() for p in own)


def test_fresh_projections_are_refused(quantize: Any) -> None:
    model = quantize(tiny.flux())
    expected = run(model)
    kind = "a Linear" if quantize is dynamic else "a quantized Linear"
    with pytest.raises(ValueError, match=f"reset_projections needs plain linear projections, to_q is {kind}"):
        linearize(model, LinearProcessor(reset_projections=True))
    assert torch.equal(run(model), expected)


def test_a_student_with_projections_of_its_own_does_not_load(quantize: Any, tmp_path: Path) -> None:
    trained = linearize(tiny.flux(), ClearProcessor(window=2))
    for layer in layers_of(trained):
        layer.processor.keep_original_weights(layer.attn, ["to_q.weight"])
        with torch.no_grad():
            layer.attn.to_q.weight.mul_(2)
    save_linear_attention(trained, tmp_path)
    model = quantize(tiny.flux())
    expected = run(model)
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn.*to_q"):
        load_linear_attention(model, tmp_path)
    assert torch.equal(run(model), expected)
    # The order that works: load first, quantize the student.
    student = run(quantize(load_linear_attention(tiny.flux(), tmp_path)))
    assert torch.equal(student, run(quantize(trained)))
    assert not near(student, run(quantize(linearize(tiny.flux(), ClearProcessor(window=2)))))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_a_transformer_that_diffusers_quantizes_at_loading(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    tiny.flux().save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=config)
    expected = run(model)
    assert not near(expected, run(tiny.flux()))
    linearize(model, ClearProcessor(window=100))
    assert near(run(model), expected)
