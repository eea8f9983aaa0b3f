"""The files that the authors of CLEAR published, as files of the same names, keys and shapes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from diffusers_linattn import ClearProcessor, linearize, load_linear_attention, restore, save_linear_attention, status
from diffusers_linattn.linearize import layers_of

import tiny


POOLED = "clear_local_16_down_4.safetensors"
PLAIN = "clear_local_8.safetensors"


def clear_state(model: Any, down_factor: int = 1) -> dict[str, torch.Tensor]:
    """What CLEAR's training script saves: parameters whose names contain these parts."""
    parts = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.")
    state = {name: p for name, p in model.named_parameters() if any(part in name for part in parts)}
    if down_factor > 1:
        for name in {name.rpartition(".attn.")[0] for name in state}:
            state[f"{name}.attn.processor.spatial_weight"] = torch.empty(
                1, 1, 1, down_factor, 1, down_factor, 1, device=model.device
            )
    return state


def trained(down_factor: int = 1) -> dict[str, torch.Tensor]:
    return {name: torch.randn(tensor.shape) * 0.2 for name, tensor in clear_state(tiny.flux(), down_factor).items()}


@pytest.mark.parametrize(("name", "window", "down_factor"), [(PLAIN, 8, 1), (POOLED, 16, 4)])
def test_settings_come_from_the_name(name: str, window: int, down_factor: int, tmp_path: Path) -> None:
    state = trained(down_factor)
    save_file(state, tmp_path / name)
    model = tiny.flux()
    with torch.no_grad():
        stock = model(**tiny.flux_inputs())[0]
    load_linear_attention(model, tmp_path, weight_name=name)
    expected = linearize(tiny.flux(), ClearProcessor(window=window, down_factor=down_factor))
    keys = expected.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert not [key for key in keys.missing_keys if ".processor." in key]
    assert {repr(layer.processor) for layer in status(model).layers} == {
        repr(ClearProcessor(window=window, down_factor=down_factor))
    }
    with torch.no_grad():
        for text in (3, 7):  # no length of text is fixed
            inputs = tiny.flux_inputs(height=20, width=18, text=text)
            assert torch.equal(model(**inputs)[0], expected(**inputs)[0])
        save_linear_attention(model, tmp_path / "ours")
        again = load_linear_attention(tiny.flux(), tmp_path / "ours")
        assert torch.equal(again(**tiny.flux_inputs())[0], model(**tiny.flux_inputs())[0])
        assert torch.equal(restore(model)(**tiny.flux_inputs())[0], stock)


def test_settings_that_are_given(tmp_path: Path) -> None:
    save_file(trained(2), tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"does not tell their settings.*pass processor=ClearProcessor\(window="):
        load_linear_attention(tiny.flux(), tmp_path, weight_name="mine.safetensors")
    model = load_linear_attention(
        tiny.flux(), tmp_path, weight_name="mine.safetensors", processor=ClearProcessor(window=3, down_factor=2)
    )
    assert all(layer.processor.window == 3 for layer in layers_of(model))


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (
            PLAIN,
            lambda s: s.pop("transformer_blocks.0.attn.to_q.bias"),
            "27 tensors where this model needs 28.*missing",
        ),
        (PLAIN, lambda s: s.update({"proj_out.weight": torch.zeros(1)}), r"extra: \['proj_out.weight'\]"),
        (
            PLAIN,
            lambda s: s.update({"transformer_blocks.0.attn.to_q.bias": torch.zeros(5)}),
            r"to_q.bias has shape \(5,\), this model needs \(32,\)",
        ),
        (POOLED, lambda s: None, "has no pooling weights, but its name says down_factor=4"),
        ("clear_local_0.safetensors", lambda s: None, "stands for impossible settings"),
        (PLAIN, lambda s: s.clear(), "its tensors are not named as CLEAR's are"),
    ],
)
def test_anything_else_is_refused(name: str, change: Any, match: str, tmp_path: Path) -> None:
    state = trained()
    change(state)
    save_file(state, tmp_path / name)
    model = tiny.flux()
    with pytest.raises(ValueError, match=match):
        load_linear_attention(model, tmp_path, weight_name=name)
    assert not status(model).converted


def test_another_model_and_no_file_named(tmp_path: Path) -> None:
    save_file(trained(), tmp_path / PLAIN)
    with pytest.raises(ValueError, match=r"for FLUX.1, this model is a PixArtTransformer2DModel"):
        load_linear_attention(tiny.pixart(), tmp_path, weight_name=PLAIN)
    with pytest.raises(ValueError, match=r'For the published weights of CLEAR give weight_name="clear_local_16'):
        load_linear_attention(tiny.flux(), tmp_path)


def test_linfusion_is_refused_with_an_explanation(tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "LinFusion", "modules_list": []}))
    save_file({"0.to_q.weight": torch.zeros(4, 4), "0.to_q_.0.weight": torch.zeros(4, 4)}, tmp_path / name)
    for options in ({}, {"weight_name": name}):
        with pytest.raises(ValueError, match=r"weights of LinFusion: whole attention modules of the UNets"):
            load_linear_attention(tiny.flux(), tmp_path, **options)


def full_size_flux() -> Any:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)


@pytest.mark.parametrize(("name", "down_factor", "count"), [(PLAIN, 1, 380), (POOLED, 4, 437)])
def test_the_tensors_of_the_published_files(name: str, down_factor: int, count: int, tmp_path: Path) -> None:
    """At full size on the meta device, from a file of the real size of which nothing but the header is on the disk."""
    model = full_size_flux()
    state = clear_state(model, down_factor)
    assert len(state) == count
    assert sum(p.numel() for p in clear_state(model).values()) == pytest.approx(1.794e9, rel=1e-3)
    header, end = {}, 0
    for key, tensor in state.items():
        size = 2 * tensor.numel()
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / name).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    load_linear_attention(model, tmp_path, weight_name=name)
    assert len(status(model).converted) == 57
    assert {layer.processor.down_factor for layer in layers_of(model)} == {down_factor}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
