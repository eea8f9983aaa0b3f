"""linearize, restore, status and set_attn_processor: what they select, what they leave alone, what they refuse."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_linattn import (
    ClearProcessor,
    GLAProcessor,
    HybridProcessor,
    LinearProcessor,
    linearize,
    restore,
    status,
)
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.linearize import layers_of, original_attention
from diffusers_linattn.processors.base import BaseProcessor
from diffusers_linattn.tracker import find_tracker

import tiny
from model_cases import CASES


def windows(model: Any) -> list[Any]:
    return [getattr(layer.processor, "window", None) for layer in layers_of(model)]


@pytest.mark.parametrize(
    "make", [tiny.flux_pipeline, tiny.pixart_pipeline, tiny.dit_pipeline], ids=lambda f: f.__name__
)
def test_set_attn_processor_of_a_pipeline(make: Any) -> None:
    pipe = make()
    pipe.set_attn_processor(ClearProcessor(window=2))
    assert set(windows(pipe)) == {2}
    assert len({id(layer.processor) for layer in layers_of(pipe)}) == len(layers_of(pipe))
    restore(pipe)
    assert set(windows(pipe)) == {None}


@pytest.mark.parametrize("make", [tiny.flux, tiny.pixart, tiny.dit], ids=lambda f: f.__name__)
def test_set_attn_processor_of_a_model(make: Any) -> None:
    model = make()
    model.set_attn_processor(LinearProcessor())
    assert all(isinstance(layer.processor, LinearProcessor) for layer in layers_of(model))
    assert find_tracker(model) is not None


def test_set_attn_processor_passes_other_processors_on() -> None:
    model = tiny.flux()
    linearize(model, ClearProcessor(window=2))
    model.set_attn_processor(dict(model.attn_processors))
    assert windows(model) == [2] * 4
    model.set_attn_processor(FluxAttnProcessor())
    assert windows(model) == [None] * 4
    pixart = tiny.pixart_pipeline()
    pixart.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(AttributeError, match="no set_attn_processor of its own"):
        tiny.dit().set_attn_processor(AttnProcessor2_0())


def test_dicts_as_diffusers_gives_and_takes_them() -> None:
    pixart = tiny.pixart()
    cross = {name: p for name, p in pixart.attn_processors.items() if "attn2" in name}
    mixed = {name: ClearProcessor(2) if "attn1" in name else p for name, p in pixart.attn_processors.items()}
    pixart.set_attn_processor(mixed)
    assert windows(pixart) == [2] * 3
    assert len(mixed) == 6  # not popped from
    pixart.set_attn_processor({name: ClearProcessor(3) for name in pixart.attn_processors})
    assert windows(pixart) == [3] * 3
    assert {name: p for name, p in pixart.attn_processors.items() if "attn2" in name} == cross
    pixart.set_attn_processor({name: AttnProcessor2_0() for name in pixart.attn_processors})
    assert windows(pixart) == [None] * 3
    pipe = tiny.flux_pipeline()
    pipe.set_attn_processor({"transformer_blocks.0.attn.processor": ClearProcessor(2)})
    assert windows(pipe) == [2, None, None, None]
    with pytest.raises(ValueError, match="has no attention layer 'nowhere'"):
        pipe.set_attn_processor({"transformer_blocks.0.attn": ClearProcessor(3), "nowhere": FluxAttnProcessor()})
    assert windows(pipe) == [2, None, None, None]


@torch.no_grad()
def test_installed_processors_set_elsewhere_are_copied() -> None:
    first, second = tiny.flux(), tiny.flux()
    linearize(first, ClearProcessor(window=2, down_factor=2))
    for layer in layers_of(first):
        layer.processor.pool.spatial_weight.mul_(1.5)
    expected = {size: first(**tiny.flux_inputs(*size))[0] for size in ((6, 9), (9, 6))}
    second.set_attn_processor(first.attn_processors)
    second(**tiny.flux_inputs(6, 9))
    assert torch.equal(first(**tiny.flux_inputs(9, 6))[0], expected[9, 6])
    assert torch.equal(second(**tiny.flux_inputs(6, 9))[0], expected[6, 9])
    kept = first.attn_processors
    restore(first)
    first.set_attn_processor(kept)
    assert torch.equal(first(**tiny.flux_inputs(9, 6))[0], expected[9, 6])


@torch.no_grad()
@pytest.mark.parametrize("taken_out", ["restored", "replaced", "of another model"])
def test_processors_are_not_put_back_without_the_trained_weights_around_them(taken_out: str) -> None:
    model, other = linearize(tiny.flux(), ClearProcessor(window=2)), tiny.flux()
    for layer in layers_of(model):
        layer.processor.keep_original_weights(layer.attn, ["to_q.weight"])
        layer.attn.to_q.weight.mul_(3)
    trained = model(**tiny.flux_inputs())[0]
    kept = dict(model.attn_processors)
    model.set_attn_processor(dict(kept))
    with original_attention(model):
        assert torch.equal(model(**tiny.flux_inputs())[0], other(**tiny.flux_inputs())[0])
    assert torch.equal(model(**tiny.flux_inputs())[0], trained)
    if taken_out == "restored":
        restore(model)
    elif taken_out == "replaced":
        linearize(model, LinearProcessor())
    target = other if taken_out == "of another model" else model
    before, expected = target.attn_processors, target(**tiny.flux_inputs())[0]
    with pytest.raises(ValueError, match=r"took the trained projections out.* \(load_linear_attention\)"):
        target.set_attn_processor(kept)
    assert target.attn_processors == before
    assert torch.equal(target(**tiny.flux_inputs())[0], expected)


@torch.no_grad()
def test_processors_are_not_put_back_without_the_lora_beside_them() -> None:
    peft = pytest.importorskip("peft")
    model = linearize(tiny.flux(), ClearProcessor(window=2))
    targets = [f"{layer.name}.to_q" for layer in layers_of(model)]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "linear_attention")
    trained, kept = model(**tiny.flux_inputs())[0], dict(model.attn_processors)
    model.set_attn_processor(dict(kept))
    assert torch.equal(model(**tiny.flux_inputs())[0], trained)
    restore(model)
    with pytest.raises(ValueError, match=r"took the trained projections out.* \(load_linear_attention\)"):
        model.set_attn_processor(kept)
    assert windows(model) == [None] * 4


@pytest.mark.parametrize(
    "make", [tiny.flux_pipeline, tiny.flux, tiny.dit_pipeline, tiny.dit], ids=lambda f: f.__name__
)
def test_what_is_no_processor_is_refused_at_once(make: Any) -> None:
    target = make()
    instance = r"Got the class ClearProcessor: give an instance of it, ClearProcessor\(\.\.\.\)\."
    for given in (ClearProcessor, {"*": ClearProcessor}):
        for call in (target.set_attn_processor, lambda given: linearize(target, given)):
            with pytest.raises(ValueError, match=instance):
                call(given)
    for given, kind in ((None, "NoneType"), ("clear", "str"), ({"*": "clear"}, "str")):
        with pytest.raises(ValueError, match=f"Got a {kind}: expected a processor such as ClearProcessor"):
            target.set_attn_processor(given)
    assert windows(target) == [None] * len(layers_of(target))


def test_replacing_trained_processors_by_stock_ones_restores_the_weights() -> None:
    model, inputs = tiny.pixart(), tiny.pixart_inputs()
    state = copy.deepcopy(model.state_dict())
    linearize(model, ClearProcessor(window=2))
    model(**inputs)[0].sum().backward()
    with torch.no_grad():
        layers_of(model)[0].attn.to_q.weight.add_(1)
    with pytest.raises(ValueError, match="Fusing the projections of this model replaces"):
        model.fuse_qkv_projections()
    model.set_attn_processor(AttnProcessor2_0())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_original_weights_follow_the_model_to_another_dtype() -> None:
    model, inputs = tiny.flux(), tiny.flux_inputs()
    linearize(model, LinearProcessor(reset_projections=True)).to(torch.bfloat16)
    low = {name: value.bfloat16() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad(), original_attention(model):
        teacher = model(**low)[0]
    assert torch.equal(tiny.flux().to(torch.bfloat16)(**low)[0], teacher)


def test_a_lora_loaded_before_training_and_deleted_after() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny.flux(), tiny.flux_inputs()
    expected = model(**inputs)[0]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "style")
    linearize(model, ClearProcessor(window=2)).requires_grad_(True)
    model(**inputs)[0].sum().backward()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.attn.to_v.weight.add_(1)
            layer.attn.to_q.base_layer.weight.add_(1)
    model.delete_adapters("style")
    assert torch.equal(restore(model)(**inputs)[0], expected)


def test_attributes_that_diffusers_sets_on_processors_move_along() -> None:
    model = tiny.flux()
    original = model.transformer_blocks[0].attn.processor
    original._attention_backend = "before"
    linearize(model, ClearProcessor(window=2))
    assert model.transformer_blocks[0].attn.processor._attention_backend == "before"
    model.transformer_blocks[0].attn.processor._attention_backend = "meanwhile"
    restore(model)
    assert original._attention_backend == "meanwhile"
    original._attention_backend = None
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    linearize(model, ClearProcessor(window=2))
    with pytest.raises(NotImplementedError, match="Context parallelism splits the sequence"):
        model(**tiny.flux_inputs())


@pytest.mark.parametrize(
    "template", [ClearProcessor(2, 2), LinearProcessor(feature_map="hedgehog"), GLAProcessor(), HybridProcessor(2)]
)
@torch.no_grad()
def test_sequential_offload(template: BaseProcessor) -> None:
    from accelerate import cpu_offload

    inputs = tiny.flux_inputs()
    expected = linearize(tiny.flux(), template)(**inputs)[0]
    model = linearize(tiny.flux(), template)
    cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(**inputs)[0], expected)
    late = tiny.flux()
    cpu_offload(late, execution_device="cpu")
    for refused in (template, LinearProcessor(kernel_size=0, reset_projections=True)):
        with pytest.raises(ValueError, match="convert it before enable_sequential_cpu_offload"):
            linearize(late, refused)


def test_linearize_returns_what_it_got_and_a_template_stays_a_template() -> None:
    pipe, template = tiny.flux_pipeline(), ClearProcessor(window=2)
    assert linearize(pipe, template) is pipe
    assert template.is_template
    assert restore(pipe) is pipe


@pytest.mark.parametrize(
    ("mapping", "layers", "expected"),
    [
        (ClearProcessor(window=2), None, [2, 2, 2, 2]),
        (ClearProcessor(window=2), "single_*", [None, None, 2, 2]),
        (ClearProcessor(window=2), 1, [None, 2, None, None]),
        (ClearProcessor(window=2), [0, -1], [2, None, None, 2]),
        (ClearProcessor(window=2), ["transformer_blocks.0.*", 3], [2, None, None, 2]),
        (ClearProcessor(window=2), lambda name: "1" in name, [None, 2, None, 2]),
        ({"transformer_blocks.*": ClearProcessor(window=2)}, None, [2, 2, None, None]),
        ({"*": ClearProcessor(window=2), "*blocks.0.*": ClearProcessor(window=3)}, None, [3, 2, 3, 2]),
        ({"*": ClearProcessor(window=2), "single_*": None}, None, [2, 2, None, None]),
    ],
)
def test_selection(mapping: Any, layers: Any, expected: list[int | None]) -> None:
    assert windows(linearize(tiny.flux(), mapping, layers=layers)) == expected


def test_converting_twice_replaces_and_none_makes_dense() -> None:
    model = tiny.flux()
    linearize(model, ClearProcessor(window=2, down_factor=2))
    linearize(model, ClearProcessor(window=3), layers="transformer_blocks.*")
    assert windows(model) == [3, 3, 2, 2]
    linearize(model, {"*": None})
    assert windows(model) == [None] * 4
    assert find_tracker(model) is None


@pytest.mark.parametrize(
    ("make", "mapping", "layers", "match"),
    [
        (tiny.flux, {"blocks.*": ClearProcessor()}, None, "matches none of the 4 layers"),
        (tiny.flux, ClearProcessor(), "nothing", "matches none"),
        (tiny.flux, ClearProcessor(), 4, "out of range"),
        (tiny.flux, ClearProcessor(), lambda name: False, "selects none"),
        (tiny.flux, ClearProcessor(), [], "No layer is selected"),
        (tiny.flux, {"single_*": None, "*": ClearProcessor()}, None, "decides nothing"),
        (tiny.flux, {"*": FluxAttnProcessor()}, None, "expected a processor such as"),
        (tiny.flux, {0: ClearProcessor()}, None, "Expected a layer-name pattern"),
        (tiny.flux, ClearProcessor(), 1.5, "Expected a layer-name pattern"),
        (tiny.flux, ClearProcessor(), [1.5], "Expected a layer-name pattern"),
        (tiny.flux, ClearProcessor(), True, "Expected a layer-name pattern"),
        (tiny.flux, FluxAttnProcessor(), None, "expected a processor such as"),
        (tiny.flux, ClearProcessor, None, "give an instance of it"),
        (tiny.flux, LinearProcessor(heads=3), None, "does not divide the 32 channels"),
        (tiny.vae, ClearProcessor(), None, "AutoencoderKL is not a transformer that diffusers_linattn knows"),
        (object, ClearProcessor(), None, "Expected a diffusers pipeline or a transformer"),
    ],
)
def test_bad_requests_name_the_problem_and_change_nothing(make: Any, mapping: Any, layers: Any, match: str) -> None:
    model = make()
    before = [getattr(module, "processor", None) for module in model.modules()] if hasattr(model, "modules") else []
    with pytest.raises(ValueError, match=match):
        linearize(model, mapping, layers=layers)
    after = [getattr(module, "processor", None) for module in model.modules()] if hasattr(model, "modules") else []
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert not getattr(model, "_forward_pre_hooks", None)


def test_a_pipeline_without_a_known_transformer_is_refused() -> None:
    class Unknown(DiffusionPipeline):
        def __init__(self, vae: AutoencoderKL):
            super().__init__()
            self.register_modules(vae=vae)

    with pytest.raises(ValueError, match=r"Unknown \(which holds AutoencoderKL\).*Supported: .*DiTTransformer2DModel"):
        linearize(Unknown(tiny.vae()), ClearProcessor())


def test_what_is_no_transformer_is_told_what_it_is() -> None:
    class FluxTransformer2DModels(torch.nn.Module):
        pass

    unet: Any = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    ddpm = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    for given, name in ((unet, "UNet2DModel"), (ddpm, r"DDPMPipeline \(which holds UNet2DModel\)")):
        with pytest.raises(ValueError, match=rf"{name} .*UNet2DModel is a U-Net: .* see docs/models.md\.$") as caught:
            linearize(given, ClearProcessor())
        assert "The closest" not in str(caught.value)
    block: Any = tiny.flux().transformer_blocks[0]
    for given, name in ((block, "FluxTransformerBlock"), (block.attn, "FluxAttention")):
        with pytest.raises(ValueError, match=f"{name} is a part of a transformer: give the whole transformer"):
            linearize(given, ClearProcessor())
    with pytest.raises(ValueError, match=r"The closest is FluxTransformer2DModel\. Supported: "):
        linearize(FluxTransformer2DModels(), ClearProcessor())
    with pytest.raises(ValueError, match=r"Linear is not a transformer that diffusers_linattn knows\. Supported: "):
        linearize(torch.nn.Linear(2, 2), ClearProcessor())


@pytest.mark.parametrize(
    ("cls", "arguments", "match"),
    [
        (ClearProcessor, {"window": 0}, "window must be an integer of at least 1, got 0"),
        (ClearProcessor, {"window": 2.5}, "window must be an integer"),
        (ClearProcessor, {"window": True}, "window must be an integer"),
        (ClearProcessor, {"down_factor": 0}, "down_factor must be"),
        (ClearProcessor, {"temporal_window": 0}, "temporal_window must be"),
        (ClearProcessor, {"impl": "cuda"}, "Unknown impl 'cuda': expected one of"),
        (LinearProcessor, {"feature_map": "cosine"}, "Unknown feature_map 'cosine'.*'hedgehog'"),
        (LinearProcessor, {"kernel_size": 4}, "kernel_size must be odd"),
        (LinearProcessor, {"heads": 0}, "heads must be"),
        (LinearProcessor, {"reset_projections": 1}, "reset_projections must be True or False"),
        (GLAProcessor, {"direction": "both"}, "Unknown direction 'both'"),
        (GLAProcessor, {"gate_low_rank": 0}, "gate_low_rank must be"),
        (GLAProcessor, {"feature_map": "hedgehog"}, "Unknown feature_map"),
        (GLAProcessor, {"input_conv": 3}, "input_conv must be True or False"),
        (HybridProcessor, {"window": 0}, "window must be an integer of at least 1, got 0"),
        (HybridProcessor, {"temporal_window": 0}, "temporal_window must be"),
        (HybridProcessor, {"feature_map": "cosine"}, "Unknown feature_map 'cosine'.*'hedgehog'"),
        (HybridProcessor, {"impl": "torch"}, "Unknown impl 'torch': expected one of"),
    ],
)
def test_bad_constructor_arguments(cls: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cls(**arguments)


@pytest.mark.parametrize(
    "processor",
    [
        ClearProcessor(window=3, down_factor=2, temporal_window=4),
        LinearProcessor(kernel_size=3, heads=2, feature_map="hedgehog", reset_projections=True),
        GLAProcessor(direction="alternate", gate_low_rank=4, gate_normalizer=8, input_conv=True),
        HybridProcessor(window=3, feature_map="elu", temporal_window=4, reset_projections=True, impl="tiled"),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_configurations_round_trip(processor: BaseProcessor) -> None:
    import json

    config = json.loads(json.dumps(processor.to_config()))
    again = type(processor).from_config(config)
    assert repr(again) == repr(processor)
    assert all(getattr(again, name) == value for name, value in config.items())
    with pytest.raises(ValueError, match="has no argument 'sigma'"):
        type(processor).from_config({**config, "sigma": 1})


def test_a_template_cannot_be_called() -> None:
    with pytest.raises(ValueError, match="is a template"):
        ClearProcessor()(None, torch.zeros(1))


def test_tokens_that_do_not_match_the_layout_are_refused() -> None:
    model, inputs = tiny.flux(), tiny.flux_inputs(6, 9, 7)
    linearize(model, ClearProcessor(window=2))
    shuffled = inputs["img_ids"].clone()
    shuffled[[10, 20]] = shuffled[[20, 10]]
    with pytest.raises(ValueError, match="not a 6x9 grid in raster order"):
        model(**{**inputs, "img_ids": shuffled})
    fresh = linearize(tiny.flux(), ClearProcessor(window=2))
    with pytest.raises(ValueError, match="No token layout: call the transformer as model"):
        fresh.transformer_blocks[0].attn(torch.randn(1, 54, 32), encoder_hidden_states=torch.randn(1, 7, 32))
    model(**inputs)
    with pytest.raises(ValueError, match=r"The tokens do not match the layout.*expected 61 query and key tokens"):
        model.transformer_blocks[0].attn(torch.randn(1, 50, 32), encoder_hidden_states=torch.randn(1, 7, 32))
    dit = linearize(tiny.dit(), ClearProcessor(window=2))
    with pytest.raises(ValueError, match="makes square pictures only"):
        dit(**{**tiny.dit_inputs(), "hidden_states": torch.randn(2, 4, 8, 16)})


def test_forward_without_hooks_is_an_error_before_any_call_and_at_another_length() -> None:
    model = linearize(tiny.flux(), ClearProcessor(window=2))
    with pytest.raises(ValueError, match=r"not model.forward\(...\)"):
        model.forward(**tiny.flux_inputs(4, 6))
    model(**tiny.flux_inputs(4, 6))
    with pytest.raises(ValueError, match="The tokens do not match the layout"):
        model.forward(**tiny.flux_inputs(4, 8))


@pytest.mark.parametrize(
    "template",
    [
        ClearProcessor(window=2, down_factor=2),
        LinearProcessor(reset_projections=True),
        GLAProcessor(),
        HybridProcessor(window=2),
    ],
    ids=lambda processor: type(processor).__name__,
)
@pytest.mark.parametrize("make", [tiny.flux, tiny.pixart, tiny.dit], ids=lambda f: f.__name__)
def test_restore_is_exact_after_training(make: Any, template: BaseProcessor) -> None:
    model = make()
    inputs = getattr(tiny, f"{make.__name__}_inputs")()
    state, expected = copy.deepcopy(model.state_dict()), model(**inputs)[0]
    linearize(model, template)
    layers = [layer.attn for layer in layers_of(model)]
    optimizer = torch.optim.SGD([p for attn in layers for p in attn.parameters()], lr=0.1)
    for _ in range(2):
        model(**inputs)[0].square().mean().backward()
        optimizer.step()
    linearize(model, LinearProcessor())  # converting again starts from the original
    restore(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**inputs)[0], expected)
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs


def test_original_attention_is_the_teacher_and_gives_the_student_back() -> None:
    model, inputs = tiny.flux(), tiny.flux_inputs()
    with torch.no_grad():
        teacher = model(**inputs)[0]
    linearize(model, LinearProcessor(reset_projections=True))
    with torch.no_grad():
        student = model(**inputs)[0]
        with original_attention(model):
            assert torch.equal(model(**inputs)[0], teacher)
        assert torch.equal(model(**inputs)[0], student)


def test_reset_projections_starts_them_afresh_and_keeps_the_rest() -> None:
    model = tiny.flux()
    before = copy.deepcopy(model.state_dict())
    linearize(model, LinearProcessor(reset_projections=True))
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before.get(name, tensor))
    }
    assert {name.rsplit(".", 1)[0].split(".", 2)[2] for name in changed} == {
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
    }
    assert model.transformer_blocks[0].attn.processor.conv.conv.weight.abs().sum() > 0


def test_converting_does_not_move_the_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    linearize(tiny_model := tiny.flux(), GLAProcessor())
    torch.manual_seed(3)
    linearize(tiny_model, GLAProcessor())
    assert torch.equal(torch.rand(3), expected)


def test_status_says_what_and_how() -> None:
    model = linearize(tiny.flux(), {"transformer_blocks.*": ClearProcessor(window=4), "single_*.0.*": GLAProcessor()})
    assert len(status(model).converted) == 3
    with torch.no_grad():
        model(**tiny.flux_inputs(12, 16))
        assert [layer.implementation for layer in status(model).layers] == ["tiled", "tiled", "chunked", "dense"]
        model(**tiny.flux_inputs(2, 3))
    assert "dense (the window covers the grid)" in str(status(model))
    assert "3 of 4 attention layers over images are converted" in str(status(model))


@pytest.mark.parametrize(
    ("template", "dim", "dtype", "expected"),
    [
        (ClearProcessor(window=4), 64, torch.bfloat16, "triton"),
        (ClearProcessor(window=4), 512, torch.bfloat16, "tiled"),
        (HybridProcessor(window=4), 64, torch.float64, "tiled; linear over all grids"),
        (LinearProcessor(), 64, torch.float16, "triton"),
        (LinearProcessor(heads=1), 512, torch.float32, "triton"),
        (LinearProcessor(heads=1), 1024, torch.float32, "torch"),
        (GLAProcessor(), 64, torch.bfloat16, "triton"),
        (GLAProcessor(), 64, torch.float64, "chunked"),
    ],
    ids=str,
)
def test_status_on_a_gpu_knows_dtype_and_head_dim(template, dim, dtype, expected, monkeypatch) -> None:
    for module in ("local_choice", "linear", "gated_choice"):
        monkeypatch.setattr(f"diffusers_linattn.ops.{module}.why_not", lambda device: None)
    with FakeTensorMode():
        query = torch.empty(1, 2, 1, dim, dtype=dtype, device="cuda")
        assert template.implementation(TokenLayout.image((1, 128, 128)), query) == expected
        assert template.implementation(None, query) == expected


def test_status_is_about_the_device_of_the_latest_call() -> None:
    """Weights of an offloaded model are elsewhere after it."""
    model = linearize(tiny.flux(), ClearProcessor(window=4))
    assert find_tracker(model).device is None
    with torch.no_grad():
        model(**tiny.flux_inputs())
    assert find_tracker(model.to("meta")).device == torch.device("cpu")
    assert status(model).layers[0].implementation == "tiled"


def test_status_tells_the_transformers_of_a_pipeline_apart() -> None:
    make = CASES["WanTransformer3DModel"].make
    pipe = diffusers.WanPipeline(None, None, None, None, transformer=make(), transformer_2=make(), boundary_ratio=0.9)
    linearize(pipe.transformer_2, ClearProcessor(window=4))
    rows = str(status(pipe)).splitlines()[2:]
    assert [row.split("  ")[0] for row in rows[:2]] == [
        "transformer: blocks.0.attn1 … blocks.1.attn1",
        "transformer_2: blocks.0.attn1 … blocks.1.attn1",
    ]
    assert ["ClearProcessor" in row for row in rows] == [False, True, False, False]
    assert "transformer" not in str(status(pipe.transformer_2))


def test_a_stock_processor_set_on_a_pipeline_restores_all_its_transformers() -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    make = CASES["WanTransformer3DModel"].make
    pipe = diffusers.WanPipeline(None, None, None, None, transformer=make(), transformer_2=make(), boundary_ratio=0.9)
    pipe.set_attn_processor(ClearProcessor(window=4))
    assert len(status(pipe).converted) == 4
    pipe.set_attn_processor(WanAttnProcessor())
    assert not status(pipe).converted


def test_a_transformer_in_two_places_of_a_pipeline_counts_once() -> None:
    model = CASES["WanTransformer3DModel"].make()
    pipe = diffusers.WanPipeline(None, None, None, None, transformer=model, transformer_2=model, boundary_ratio=0.9)
    assert len(status(linearize(pipe, ClearProcessor(window=4))).converted) == 2


def test_status_groups_layers_that_take_turns_and_differ_in_a_digit() -> None:
    if not hasattr(diffusers, "LTX2VideoTransformer3DModel"):
        pytest.skip("this diffusers has no LTX-2")
    rows = str(status(CASES["LTX2VideoTransformer3DModel"].make())).splitlines()
    assert sum("audio_attn1" in row for row in rows) == 1


def test_gradient_checkpointing_with_two_sizes_in_flight() -> None:
    calls = [tiny.flux_inputs(6, 9, 7, seed=1), tiny.flux_inputs(4, 4, 3, seed=2)]
    gradients = []
    for checkpointing in (False, True):
        model = linearize(tiny.flux(), ClearProcessor(window=2, down_factor=2)).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        losses = [model(**inputs)[0].square().mean() for inputs in calls]
        (losses[0] + losses[1]).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        restore(model)
        assert "CheckpointWithLayout" not in repr(getattr(model, "_gradient_checkpointing_func", None))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@torch.no_grad()
def test_copies_are_independent(copier: Any) -> None:
    model, inputs = tiny.flux(), tiny.flux_inputs()
    stock = model(**inputs)[0]
    linearize(model, ClearProcessor(window=2, down_factor=2))
    expected = model(**inputs)[0]
    other = copier(model)
    model(**tiny.flux_inputs(3, 3))
    assert torch.equal(other(**inputs)[0], expected)
    restore(other)
    assert torch.equal(other(**inputs)[0], stock)
    assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("template", [ClearProcessor(window=2), LinearProcessor()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("make", "call"),
    [
        (tiny.flux_pipeline, {"prompt": "a cat", **tiny.FLUX_CALL}),
        (tiny.pixart_pipeline, {"prompt": "a cat", "height": 24, "width": 32, "use_resolution_binning": False}),
        (tiny.dit_pipeline, {"class_labels": [1]}),
    ],
    ids=["flux", "pixart", "dit"],
)
def test_generate_save_and_reload_a_converted_pipeline(make: Any, call: Any, template: Any, tmp_path: Path) -> None:
    pipe = make()
    call = {"num_inference_steps": 2, "output_type": "np", **call}

    def generate(pipe: Any) -> Any:
        return torch.from_numpy(pipe(**call, generator=torch.Generator().manual_seed(0)).images)

    stock = generate(pipe)
    pipe.set_attn_processor(template)
    assert not torch.equal(generate(pipe), stock)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(again), stock, atol=1e-5, rtol=0)
    restore(pipe)
    assert torch.equal(generate(pipe), stock)


def test_prompts_of_other_lengths_and_guidance_in_one_pipeline_call() -> None:
    pipe = tiny.flux_pipeline()
    call = {**tiny.FLUX_CALL, "prompt": "a cat", "negative_prompt": "dog", "true_cfg_scale": 2.0, "output_type": "np"}
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    pipe.set_attn_processor(ClearProcessor(window=100))
    images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(torch.from_numpy(images), torch.from_numpy(expected), atol=1e-5, rtol=0)
    assert isinstance(pipe, FluxPipeline)
