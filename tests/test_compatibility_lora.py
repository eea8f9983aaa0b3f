"""LoRA and conversion in either order: loaded, several at once, fused, taken out again; saved and restored."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from diffusers_linattn import (
    ClearProcessor,
    GLAProcessor,
    LinearProcessor,
    evaluate,
    linearize,
    load_linear_attention,
    restore,
    status,
)
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


@pytest.fixture
def low_rank(tmp_path: Path) -> Path:
    """The folder of a student whose LoRA has other ranks and scales from layer to layer: 1.5, 1 and 5 / 3."""
    import peft

    model = linearize(tiny.flux(), LinearProcessor())
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        rank_pattern={"to_v": 3, "to_k": 3},
        alpha_pattern={"to_k": 5},
        target_modules=[f"{layer.name}.{name}" for layer in layers_of(model) for name in ("to_q", "to_k", "to_v")],
        init_lora_weights=False,
    )
    torch.manual_seed(4)
    model.add_adapter(config)
    return save(model, tmp_path / "low rank")


def low_rank_student(folder: Path) -> Any:
    return load_linear_attention(tiny.flux_pipeline(), folder)


def warned(pipe: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output(pipe)
    return [str(item.message) for item in caught if "converted layers" in str(item.message)]


def test_the_scale_of_a_student_outlives_set_adapters_and_saving(low_rank: Path, tmp_path: Path) -> None:
    pipe = low_rank_student(low_rank)
    expected = output(pipe)
    for change in (
        lambda p: p.set_adapters(["linear_attention"]),
        lambda p: p.set_adapters(["linear_attention"], [1.0]),
        lambda p: [p.disable_lora(), p.enable_lora()],
        lambda p: [p.load_lora_weights(lora(0), adapter_name="style"), p.delete_adapters("style")],
    ):
        change(pipe)
        pipe.set_adapters(["linear_attention"])
        assert torch.equal(output(pipe), expected)
    save(pipe, tmp_path / "again")
    for file in low_rank.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    pipe.set_adapters(["linear_attention"], [0.5])
    half = output(pipe)
    pipe.set_adapters(["linear_attention"])
    assert not near(half, expected)
    assert torch.equal(output(pipe), expected)


OFF: dict[str, tuple[Callable[[Any], Any], str, Callable[[Any], Any]]] = {
    "another one loaded": (
        lambda p: p.load_lora_weights(lora(0), adapter_name="style"),
        r'is not active: call pipe.set_adapters\(\["linear_attention", "style"\]\)',
        lambda p: p.set_adapters(["linear_attention", "style"]),
    ),
    "disabled": (lambda p: p.disable_lora(), r"is disabled: call pipe.enable_lora\(\)", lambda p: p.enable_lora()),
    "another one fused": (
        lambda p: [
            p.load_lora_weights(lora(0), adapter_name="style"),
            p.set_adapters(["linear_attention", "style"]),
            p.fuse_lora(adapter_names=["style"]),
        ],
        r"takes no part while style is fused without it: call pipe.unfuse_lora\(\)",
        lambda p: p.unfuse_lora(),
    ),
    "unloaded": (lambda p: p.unload_lora_weights(), r"is gone .*load the student again", lambda p: None),
    "deleted": (lambda p: p.delete_adapters("linear_attention"), r"is gone .*load the student again", lambda p: None),
}


@pytest.mark.parametrize("how", OFF)
def test_a_student_without_its_lora_warns_once_for_each_state(how: str, low_rank: Path, tmp_path: Path) -> None:
    switch_off, match, remedy = OFF[how]
    pipe = low_rank_student(low_rank)
    expected = output(pipe)
    assert not warned(pipe)
    switch_off(pipe)
    with pytest.warns(UserWarning, match=rf'4 of 4 converted layers .*their LoRA "linear_attention" {match}'):
        assert not near(output(pipe), expected)
    assert "without the LoRA trained with it" in str(status(pipe))
    with original_attention(pipe):
        assert not warned(pipe)
    assert not warned(pipe)
    assert not warned(copy.deepcopy(pipe))
    remedy(pipe)
    if how in ("unloaded", "deleted"):
        with pytest.raises(ValueError, match=r"to_k was trained with the LoRA .* which is gone .*Load it again"):
            save(pipe, tmp_path / "other")
        assert not (tmp_path / "other").exists()
        load_linear_attention(pipe, low_rank)
        assert torch.equal(output(pipe), expected)
    assert not warned(pipe)
    assert "without" not in str(status(pipe))
    save(pipe, tmp_path / "again")
    if how == "disabled":  # the state comes back, and so does the warning
        switch_off(pipe)
        assert len(warned(pipe)) == 1
    restore(pipe)
    assert not warned(pipe)


def test_a_student_whose_lora_is_fused_has_no_original_at_hand(low_rank: Path, tmp_path: Path) -> None:
    pipe = low_rank_student(low_rank)
    pipe.transformer.to(torch.bfloat16)
    inputs = {
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in tiny.flux_inputs().items()
    }

    @torch.no_grad()
    def run() -> torch.Tensor:
        return pipe.transformer(**inputs)[0]

    pipe.fuse_lora()
    fused, state = run(), copy.deepcopy(pipe.transformer.state_dict())
    for call in (
        lambda: original_attention(pipe).__enter__(),
        lambda: evaluate(pipe, ["a cat"], call_arguments=tiny.FLUX_CALL),
        lambda: save(pipe, tmp_path / "fused"),
        lambda: restore(pipe),
        lambda: linearize(pipe, ClearProcessor(window=2)),
        lambda: load_linear_attention(pipe, low_rank),
        lambda: pipe.transformer.set_attn_processor(
            dict.fromkeys(pipe.transformer.attn_processors, FluxAttnProcessor())
        ),
    ):
        with pytest.raises(
            ValueError, match=r"linear_attention is merged into the weights: call unfuse_lora\(\) first"
        ):
            call()
        assert len(status(pipe).converted) == 4
        now = pipe.transformer.state_dict()
        assert now.keys() == state.keys()
        assert all(torch.equal(now[name], value) for name, value in state.items())
        assert torch.equal(run(), fused)
    pipe.unfuse_lora()
    restore(pipe)
    assert not hasattr(pipe.transformer, "peft_config")


def test_a_student_is_not_loaded_beside_a_fused_lora_where_it_would_have_no_effect(low_rank: Path) -> None:
    pipe = load(tiny.flux_pipeline(), "style")
    pipe.fuse_lora()
    before = output(pipe)
    with pytest.raises(ValueError, match=r"has the LoRA style fused into it, .* call unfuse_lora\(\) first"):
        load_linear_attention(pipe, low_rank)
    assert torch.equal(output(pipe), before)
    assert not status(pipe).converted
    pipe.unfuse_lora()
    load_linear_attention(pipe, low_rank)
    both = output(pipe)
    pipe.fuse_lora()
    assert near(output(pipe), both)


def test_processors_are_not_moved_away_from_their_lora(low_rank: Path) -> None:
    processors = dict(low_rank_student(low_rank).transformer.attn_processors)
    with pytest.raises(ValueError, match=r"belongs with trained projections, or a LoRA"):
        tiny.flux().set_attn_processor(processors)


@pytest.mark.parametrize("template", [LinearProcessor(feature_map="hedgehog"), GLAProcessor()], ids=repr)
def test_a_lora_beside_layers_of_the_processors(template: Any, tmp_path: Path) -> None:
    import peft

    def adapted(name: str) -> Any:
        model = tiny.train(linearize(tiny.flux(), template))
        targets = r".*\.attn\.(to_q|processor\..*(proj|down|up))"
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), name)
        assert any("lora_A" in key for key in model.state_dict() if ".processor." in key)
        return model

    model = adapted("style")
    save(model, tmp_path / "style")
    other = load_linear_attention(tiny.flux(), tmp_path / "style")
    student = tiny.train(linearize(tiny.flux(), template))
    for layer, expected in zip(layers_of(other), layers_of(student), strict=True):
        own = layer.processor.own_parameters()
        assert own.keys() == expected.processor.own_parameters().keys()
        assert all(torch.equal(own[name], p) for name, p in expected.processor.own_parameters().items())
    model.fuse_lora()
    with pytest.raises(ValueError, match=r"\.processor\..*: The LoRA style is merged .*call unfuse_lora\(\)"):
        save(model, tmp_path / "fused")
    match = r"transformer_blocks\.0\.attn\.processor\..* belongs to a processor, and the LoRA default beside it cannot"
    with pytest.raises(ValueError, match=match):
        save(adapted("default"), tmp_path / "default")
    assert [path.name for path in tmp_path.iterdir()] == ["style"]


def test_compiled_blocks_of_a_student_with_a_lora(low_rank: Path) -> None:
    pipe = low_rank_student(low_rank)
    torch._dynamo.reset()
    expected = output(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert near(output(pipe), expected)
    assert not warned(pipe)
    with original_attention(pipe):
        output(pipe)
    assert near(output(pipe), expected)
    pipe.load_lora_weights(lora(0), adapter_name="style")
    assert len(warned(pipe)) == 1
