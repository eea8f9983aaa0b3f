"""Fused query, key and value projections, of models that swap their processors for it and of those that do not; and
`set_attention_backend`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from diffusers_linattn import ClearProcessor, LinearProcessor, linearize, load_linear_attention, restore, status
from diffusers_linattn import save_linear_attention as save
from diffusers_linattn.linearize import layers_of, original_attention

import tiny
from model_cases import CASES


# Their fuse_qkv_projections sets Fused* processors; that of FLUX changes what its one processor calls.
OLD = ("PixArtTransformer2DModel", "SD3Transformer2DModel", "AuraFlowTransformer2DModel", "HunyuanDiT2DModel")
OLD += ("CogVideoXTransformer3DModel",)
NEW = ("FluxTransformer2DModel", "ChromaTransformer2DModel", "WanTransformer3DModel")


def make(name: str = "FluxTransformer2DModel") -> Any:
    # Stock SD3.5 goes wrong when fused: no norms, and an error in layers with a second attention (diffusers 0.42).
    return tiny.sd3(dual_attention_layers=(), qk_norm=None) if name == "SD3Transformer2DModel" else CASES[name].make()


@torch.no_grad()
def output(model: Any, name: str = "FluxTransformer2DModel") -> torch.Tensor:
    found = model(**CASES[name].calls[0].inputs)
    return found[0] if isinstance(found, tuple) else found.sample


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, atol=2e-5 * max(1, expected.abs().max().item()), rtol=0)


def scale_fused(model: Any) -> None:
    """Make the fused weights differ from the single ones, to see which are used."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "to_qkv.weight" in name:
                parameter.mul_(1.5)


@pytest.mark.parametrize("name", [*OLD, *NEW])
def test_fused_before_conversion(name: str) -> None:
    model = make(name)
    plain = output(model, name)
    model.fuse_qkv_projections()
    assert near(output(model, name), plain)
    scale_fused(model)
    fused = output(model, name)
    assert not near(fused, plain)
    linearize(model, ClearProcessor(window=100))
    assert near(output(model, name), fused)
    model.fuse_qkv_projections()  # again: they stay converted
    assert len(status(model).converted) == len(layers_of(model))
    if name in NEW:
        model.unfuse_qkv_projections()
        assert len(status(model).converted) == len(layers_of(model))
        assert near(output(model, name), plain)
        assert near(output(restore(model), name), plain)


@pytest.mark.parametrize("name", NEW)
def test_fused_after_conversion_where_the_processors_stay(name: str) -> None:
    model = make(name)
    plain = output(model, name)
    linearize(model, ClearProcessor(window=100)).fuse_qkv_projections()
    assert any("to_qkv" in key for key in model.state_dict())
    assert near(output(model, name), plain)
    scale_fused(model)
    assert not near(output(model, name), plain)
    model.unfuse_qkv_projections()
    assert near(output(model, name), plain)


@pytest.mark.parametrize("name", OLD)
def test_fusing_after_conversion_is_refused_where_it_replaces_the_processors(name: str) -> None:
    model: Any = linearize(make(name), LinearProcessor())
    expected = output(model, name)
    with pytest.raises(ValueError, match=r"Fusing the projections of this model replaces its attention processors"):
        model.fuse_qkv_projections()
    assert torch.equal(output(model, name), expected)
    assert not [key for key in model.state_dict() if "to_qkv" in key]
    model.unfuse_qkv_projections()  # which sets the processors from before
    assert torch.equal(output(model, name), expected)


@pytest.mark.parametrize("name", OLD)
def test_unfusing_after_conversion_makes_the_layers_dense_and_says_so(name: str) -> None:
    model = make(name)
    plain = output(model, name)
    model.fuse_qkv_projections()
    linearize(model, LinearProcessor())
    model.unfuse_qkv_projections()
    assert "was converted, then replaced by a" in str(status(model))
    with pytest.warns(UserWarning, match="converted layers .* have another processor now"):
        assert near(output(model, name), plain)
    assert near(output(linearize(model, ClearProcessor(window=100)), name), plain)


def trained() -> Any:
    model = linearize(make(), ClearProcessor(window=100))
    for layer in layers_of(model):
        layer.processor.keep_original_weights(layer.attn, ["to_q.weight", "to_k.weight"])
        with torch.no_grad():
            layer.attn.to_q.weight.mul_(0.5)
            layer.attn.to_k.weight.mul_(2.5)
    return model


def test_restore_makes_the_fused_projections_of_a_trained_model_again() -> None:
    plain = output(make())
    model = trained()
    student = output(model)
    assert not near(student, plain)
    model.fuse_qkv_projections()
    assert near(output(model), student)
    with pytest.raises(ValueError, match=r"its projections are fused.*Call unfuse_qkv_projections\(\)"):
        with original_attention(model):
            pass
    restore(model)
    assert near(output(model), plain)
    model.unfuse_qkv_projections()
    assert near(output(model), plain)


def test_trained_weights_reach_a_model_with_fused_projections(tmp_path: Path) -> None:
    save(trained(), tmp_path)
    plain = output(make())
    model = make()
    model.fuse_qkv_projections()
    load_linear_attention(model, tmp_path)
    assert near(output(model), output(trained()))
    assert near(output(restore(model)), plain)


def test_training_with_fused_projections_can_be_undone() -> None:
    model = make()
    model.fuse_qkv_projections()
    plain = output(model)
    linearize(model, ClearProcessor(window=100))
    model(**CASES["FluxTransformer2DModel"].calls[0].inputs)[0].sum().backward()
    scale_fused(model)
    student = output(model)
    assert not near(student, plain)
    with original_attention(model):
        assert near(output(model), plain)
    assert near(output(model), student)
    assert near(output(restore(model)), plain)


def test_fresh_projections_of_a_fused_model_are_used() -> None:
    fused: Any = make()
    fused.fuse_qkv_projections()
    linearize(fused, LinearProcessor(reset_projections=True))
    single = linearize(make(), LinearProcessor(reset_projections=True))
    assert near(output(fused), output(single))


@pytest.fixture
def backend() -> Any:
    """The active backend is global, and reset_attention_backend leaves it as it is."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("first", ["backend", "conversion"])
def test_another_attention_backend_is_for_the_layers_that_are_dense(first: str, masked: bool) -> None:
    inputs = tiny.flux_inputs(6, 9)
    if masked:
        mask = torch.ones(1, 1, 1, 61, dtype=torch.bool)
        mask[..., 2] = False
        inputs["joint_attention_kwargs"] = {"attention_mask": mask}
    with torch.no_grad():
        plain = tiny.train(linearize(tiny.flux(), tiny.TRAINABLE["clear"], layers="transformer_blocks.*"))
        expected = plain(**inputs)[0]
    model = tiny.flux()
    if first == "backend":
        model.set_attention_backend("flex")
    tiny.train(linearize(model, tiny.TRAINABLE["clear"], layers="transformer_blocks.*"))
    if first == "conversion":
        model.set_attention_backend("flex")
    calls: list[str] = []
    name = next(n for n in _AttentionBackendRegistry._backends if n.value == "flex")
    stock = _AttentionBackendRegistry._backends[name]
    native = _AttentionBackendRegistry._backends[type(name)("native")]
    _AttentionBackendRegistry._backends[name] = lambda **kwargs: (
        calls.append("flex") or native(**{key: value for key, value in kwargs.items() if key != "_parallel_config"})
    )
    try:
        with torch.no_grad():
            assert torch.equal(model(**inputs)[0], expected)
            assert len(calls) == 2  # the two dense layers
            assert len(status(model).converted) == 2
            restore(model)(**inputs)
            assert len(calls) == 6  # and all four
            linearize(model, tiny.TRAINABLE["clear"])
            model.reset_attention_backend()
            assert all(processor._attention_backend is None for processor in model.attn_processors.values())
    finally:
        _AttentionBackendRegistry._backends[name] = stock
