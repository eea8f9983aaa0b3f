"""Saving converted attention to a folder and loading it: exact, or refused with the model untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from diffusers_linattn import (
    ClearProcessor,
    GLAProcessor,
    HybridProcessor,
    LinearProcessor,
    linearize,
    load_linear_attention,
    restore,
    save_linear_attention,
)
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.sharing.summary import summarize
from diffusers_linattn.weights import CONFIG_NAME, WEIGHTS_NAME

import tiny


def train_a_little(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    parameters = [p for layer in layers_of(model) for p in layer.attn.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model(**inputs)[0].square().mean().backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    "template",
    [
        ClearProcessor(window=2),
        ClearProcessor(window=2, down_factor=2),
        LinearProcessor(feature_map="hedgehog"),
        LinearProcessor(reset_projections=True),
        GLAProcessor(),
        GLAProcessor(direction="alternate", input_conv=True),
        HybridProcessor(window=2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("make", [tiny.flux, tiny.pixart, tiny.dit], ids=lambda f: f.__name__)
def test_round_trip(make: Any, template: Any, tmp_path: Path) -> None:
    inputs = getattr(tiny, f"{make.__name__}_inputs")()
    model = linearize(make(), template)
    train_a_little(model, inputs)
    save_linear_attention(model, tmp_path)
    other = make()
    with torch.no_grad():
        stock = other(**inputs)[0]
        load_linear_attention(other, tmp_path)
        assert torch.equal(other(**inputs)[0], model(**inputs)[0])
        assert [repr(layer.processor) for layer in layers_of(other)] == [
            repr(layer.processor) for layer in layers_of(model)
        ]
        assert torch.equal(restore(other)(**inputs)[0], stock)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    model = linearize(tiny.flux(), ClearProcessor(window=2, down_factor=2))
    for name in ("a", "b"):
        save_linear_attention(model, tmp_path / name)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([CONFIG_NAME, WEIGHTS_NAME])


def test_a_swap_without_training_saves_no_weights_of_the_model(tmp_path: Path) -> None:
    model = linearize(tiny.flux(), ClearProcessor(window=2, down_factor=4))
    model(**tiny.flux_inputs())  # with gradients on: the weights are kept in case they change
    save_linear_attention(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert set(tensors) == {f"{layer.name}.processor.pool.spatial_weight" for layer in layers_of(tiny.flux())}
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(1, 1, 1, 4, 1, 4, 1)}


def test_only_some_layers_and_into_a_pipeline_in_another_dtype(tmp_path: Path) -> None:
    model = linearize(tiny.flux(), {"single_*.1.*": LinearProcessor(), "transformer_blocks.0.*": ClearProcessor(3)})
    train_a_little(model, tiny.flux_inputs())
    save_linear_attention(model, tmp_path)
    pipe = tiny.flux_pipeline().to(torch.bfloat16)
    load_linear_attention(pipe, tmp_path)
    processors = {layer.name: layer.processor for layer in layers_of(pipe)}
    assert [name for name, processor in processors.items() if processor is not None] == [
        "transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    assert pipe("a cat", **tiny.FLUX_CALL, output_type="np").images.shape == (1, 24, 32, 3)


def test_loading_replaces_what_was_converted(tmp_path: Path) -> None:
    model = linearize(tiny.flux(), ClearProcessor(window=2))
    save_linear_attention(model, tmp_path)
    load_linear_attention(linearize(model, LinearProcessor(reset_projections=True)), tmp_path)
    with torch.no_grad():
        expected = linearize(tiny.flux(), ClearProcessor(window=2))(**tiny.flux_inputs())[0]
        assert torch.equal(model(**tiny.flux_inputs())[0], expected)


def test_folders_of_save_pretrained_are_told_apart(tmp_path: Path) -> None:
    linearize(tiny.flux(), ClearProcessor(window=2)).save_pretrained(tmp_path / "model")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for name, kind in (("model", "FluxTransformer2DModel"), ("pipe", "FluxPipeline")):
        for call in (lambda path: load_linear_attention(tiny.flux(), path), summarize):
            with pytest.raises(ValueError, match=f"a {kind} as save_pretrained writes it: from_pretrained loads it"):
                call(tmp_path / name)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No attention layer is converted"):
        save_linear_attention(tiny.flux(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "processor",
    [ClearProcessor(window=100_000), LinearProcessor(kernel_size=65), GLAProcessor(gate_low_rank=1025)],
    ids=repr,
)
def test_what_could_not_be_read_again_is_not_saved(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"What would be saved: transformer_blocks.0.attn: .* at most"):
        save_linear_attention(linearize(tiny.flux(), processor), tmp_path)
    assert not list(tmp_path.iterdir())


def test_subclasses_of_a_model_share_its_weights(tmp_path: Path) -> None:
    class OwnFlux(FluxTransformer2DModel):
        pass

    model = linearize(OwnFlux.from_config(tiny.flux().config), ClearProcessor(window=2, down_factor=2))
    save_linear_attention(tiny.train(model), tmp_path / "own")
    plain = load_linear_attention(tiny.flux(), tmp_path / "own")
    save_linear_attention(plain, tmp_path / "plain")
    load_linear_attention(restore(model), tmp_path / "plain")


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    change(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


LAYER = "transformer_blocks.0.attn"
POOL = f"{LAYER}.processor.pool.spatial_weight"
DAMAGE = {
    "no folder": (lambda d: [path.unlink() for path in d.iterdir()], "does not exist"),
    "no weights": (lambda d: (d / WEIGHTS_NAME).unlink(), "cannot be read"),
    "truncated weights": (
        lambda d: (d / WEIGHTS_NAME).write_bytes((d / WEIGHTS_NAME).read_bytes()[:200]),
        "cannot be read",
    ),
    "no JSON": (lambda d: (d / CONFIG_NAME).write_text("{"), "not valid JSON"),
    "not ours": (lambda d: (d / CONFIG_NAME).write_text("[]"), "does not describe converted layers"),
    "newer format": (lambda d: edit_config(d, lambda c: c.update(format_version=9)), "format_version 9"),
    "another model": (
        lambda d: edit_config(d, lambda c: c.update(transformer="PixArtTransformer2DModel")),
        "is for a PixArtTransformer2DModel, this model is a FluxTransformer2DModel",
    ),
    "another depth": (
        lambda d: edit_config(d, lambda c: c["layers"].update({"transformer_blocks.9.attn": c["layers"][LAYER]})),
        "layers that this FluxTransformer2DModel does not have: transformer_blocks.9.attn",
    ),
    "unknown processor": (
        lambda d: edit_config(d, lambda c: c["layers"][LAYER].update(processor="os.system")),
        "unknown processor 'os.system'",
    ),
    "unknown argument": (
        lambda d: edit_config(d, lambda c: c["layers"][LAYER]["arguments"].update(sigma=1)),
        "has no argument 'sigma'",
    ),
    "argument out of range": (
        lambda d: edit_config(d, lambda c: c["layers"][LAYER]["arguments"].update(window=0)),
        "window must be an integer",
    ),
    "unknown weight": (
        lambda d: edit_config(d, lambda c: c["layers"][LAYER].update(weights=["to_x.weight"])),
        "has no weight to_x.weight",
    ),
    "another processor's tensors": (
        lambda d: edit_config(
            d, lambda c: c["layers"].update({LAYER: {"processor": "linear", "arguments": {}, "weights": []}})
        ),
        "misses .*conv.conv.bias.* and has extra",
    ),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(POOL)), "misses .*spatial_weight"),
    "extra tensor": (lambda d: edit_tensors(d, lambda t: t.update(other=torch.zeros(1))), "has extra other"),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({POOL: torch.zeros(1, 1, 1, 4, 1, 4, 1)})),
        r"has shape \(1, 1, 1, 4, 1, 4, 1\), this model needs \(1, 1, 1, 2, 1, 2, 1\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("converted", [False, True], ids=["into a stock model", "into a converted model"])
def test_a_damaged_checkpoint_is_refused_and_the_model_unchanged(damage: str, converted: bool, tmp_path: Path) -> None:
    break_it, match = DAMAGE[damage]
    save_linear_attention(linearize(tiny.flux(), ClearProcessor(window=2, down_factor=2)), tmp_path)
    break_it(tmp_path)
    model, inputs = tiny.flux(), tiny.flux_inputs()
    if converted:
        linearize(model, LinearProcessor())
    with torch.no_grad():
        before = model(**inputs)[0]
    processors = [layer.attn.processor for layer in layers_of(model)]
    with pytest.raises(ValueError, match=match):
        load_linear_attention(model, tmp_path)
    assert all(layer.attn.processor is p for layer, p in zip(layers_of(model), processors, strict=True))
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], before)
