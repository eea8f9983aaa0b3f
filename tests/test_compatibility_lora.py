"""LoRA and conversion in either order: loaded, several at once, fused, taken out again; saved and restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_linattn import ClearProcessor, LinearProcessor, linearize, load_linear_attention, restore
from diffusers_linattn import save_linear_attention as save
from diffusers_linattn.linearize import layers_of, original_attention

import tiny


pytest.importorskip("peft")

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def lora(seed: int) -> dict[str, torch.Tensor]:
    """LoRA weights for every projection of every attention layer of `tiny.flux`, as files on the Hub hold them."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for layer in layers_of(tiny.flux()):
        for name in PROJECTIONS:
            try:
                linear: Any = layer.attn.get_submodule(name)
            except AttributeError:
                continue
            key = f"transformer.{layer.name}.{name}"
            state[f"{key}.lora_A.weight"] = torch.randn(4, linear.in_features, generator=generator) * 0.2
            state[f"{key}.lora_B.weight"] = torch.randn(linear.out_features, 4, generator=generator) * 0.2
    return state


def load(pipe: Any, *names: str) -> Any:
    for seed, name in enumerate(names):
        pipe.load_lora_weights(lora(seed), adapter_name=name)
    pipe.set_adapters(list(names), [1.0, 0.5][: len(names)])
    return pipe


@torch.no_grad()
def output(pipe: Any) -> torch.Tensor:
    return pipe.transformer(**tiny.flux_inputs())[0]


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("first", ["lora", "conversion"])
@pytest.mark.parametrize("names", [["style"], ["style", "subject"]], ids=len)
def test_a_covering_window_is_the_stock_model_with_the_same_loras(names: list[str], first: str) -> None:
    plain = output(tiny.flux_pipeline())
    stock = load(tiny.flux_pipeline(), *names)
    assert not near(output(stock), plain)
    pipe = tiny.flux_pipeline()
    if first == "lora":
        linearize(load(pipe, *names), ClearProcessor(window=100))
    else:
        load(linearize(pipe, ClearProcessor(window=100)), *names)
    assert near(output(pipe), output(stock))
    for change in (
        lambda p: p.fuse_lora(lora_scale=0.7),
        lambda p: p.unfuse_lora(),
        lambda p: p.disable_lora(),
        lambda p: p.enable_lora(),
        lambda p: p.unload_lora_weights(),
    ):
        change(stock)
        change(pipe)
        assert near(output(pipe), output(stock))
    assert near(output(pipe), plain)


@pytest.mark.parametrize("mechanism", tiny.TRAINABLE)
def test_the_order_does_not_matter_with_trained_processors(mechanism: str) -> None:
    template = tiny.TRAINABLE[mechanism]
    before = tiny.train(linearize(load(tiny.flux_pipeline(), "style"), template))
    after = load(tiny.train(linearize(tiny.flux_pipeline(), template)), "style")
    assert near(output(before), output(after))
    untouched = tiny.train(linearize(tiny.flux_pipeline(), template))
    assert not near(output(untouched), output(after))
    after.fuse_lora()
    assert near(output(before), output(after))
    after.unfuse_lora()
    after.unload_lora_weights()
    assert near(output(untouched), output(after))


def test_restore_keeps_the_loras_fused_or_not() -> None:
    stock, pipe = load(tiny.flux_pipeline(), "style"), load(tiny.flux_pipeline(), "style")
    linearize(pipe, LinearProcessor())
    assert torch.equal(output(restore(pipe)), output(stock))
    linearize(pipe, LinearProcessor())
    stock.fuse_lora()
    pipe.fuse_lora()
    assert torch.equal(output(restore(pipe)), output(stock))


def student() -> Any:
    """A pipeline whose converted layers have other projections than the original, as after distillation."""
    pipe = tiny.train(linearize(tiny.flux_pipeline(), tiny.TRAINABLE["clear"]))
    for layer in layers_of(pipe):
        names = ["to_q.weight", "to_k.weight", "to_v.weight"]
        layer.processor.keep_original_weights(layer.attn, names)
        with torch.no_grad():
            for name in names:
                parameter = layer.attn.get_parameter(name)
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)) * 0.1)
    return pipe


@pytest.mark.parametrize("first", ["lora", "student"])
def test_a_saved_student_and_a_lora_load_in_either_order(first: str, tmp_path: Path) -> None:
    trained = student()
    save(trained, tmp_path)
    expected = output(load(trained, "style"))
    pipe = tiny.flux_pipeline()
    if first == "lora":
        load_linear_attention(load(pipe, "style"), tmp_path)
    else:
        load(load_linear_attention(pipe, tmp_path), "style")
    assert near(output(pipe), expected)
    save(pipe, tmp_path / "again")  # without the LoRA
    assert near(output(load_linear_attention(tiny.flux_pipeline(), tmp_path / "again")), output(student()))
    stock = load(tiny.flux_pipeline(), "style")
    assert near(output(restore(pipe)), output(stock))
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe), output(tiny.flux_pipeline()))


def test_a_student_with_a_lora_fused_since_is_refused_where_it_would_go_wrong(tmp_path: Path) -> None:
    pipe = load(student(), "style")
    before = output(pipe)
    save(pipe, tmp_path)
    pipe.fuse_lora()
    match = r"are not those from when its original weights were kept: style instead of none\. Call unfuse_lora\(\)"
    with pytest.raises(ValueError, match=match):
        restore(pipe)
    with pytest.raises(ValueError, match=match):
        save(pipe, tmp_path / "fused")
    with pytest.raises(ValueError, match=match), original_attention(pipe):
        pass
    assert near(output(pipe), before)  # nothing has changed
    fused = load(tiny.flux_pipeline(), "style")
    fused.fuse_lora()
    with pytest.raises(ValueError, match=r"has a LoRA fused into its weights.*call unfuse_lora\(\), load"):
        load_linear_attention(fused, tmp_path)
    assert all(layer.processor is None for layer in layers_of(fused))
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert near(output(restore(pipe)), output(tiny.flux_pipeline()))


def test_a_new_lora_freezes_the_processors_until_they_ask_for_gradients_again() -> None:
    peft = pytest.importorskip("peft")
    model = linearize(tiny.flux(), tiny.TRAINABLE["linear"])
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    model.add_adapter(config, "new")
    own = [p for layer in layers_of(model) for p in layer.processor.own_parameters().values()]
    assert not any(p.requires_grad for p in own)
    assert not [name for name, _ in model.named_modules() if ".processor." in name and "lora" in name]
    for parameter in own:
        parameter.requires_grad_(True)
    model(**tiny.flux_inputs())[0].sum().backward()
    assert all(p.grad is not None for p in own)
