"""What can be saved and comes back bit for bit: full, processor-only and low-rank, in every dtype, shard and place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from diffusers_linattn import (
    ClearProcessor,
    GLAProcessor,
    HybridProcessor,
    LinearProcessor,
    linearize,
    load_linear_attention,
    original_attention,
    restore,
    save_linear_attention,
    status,
)
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.sharing.checkpoint import WEIGHTS_NAME
from diffusers_linattn.sharing.saved_config import CONFIG_KEY, CONFIG_NAME

import tiny


MIXED = {
    "transformer_blocks.0.*": ClearProcessor(window=2, down_factor=2),
    "single_transformer_blocks.0.*": LinearProcessor(feature_map="hedgehog"),
    "single_transformer_blocks.1.*": GLAProcessor(),
}
TEMPLATES: dict[str, Any] = {
    "clear": ClearProcessor(window=2),
    "pooled clear": ClearProcessor(window=2, down_factor=2),
    "linear": LinearProcessor(),
    "hedgehog": LinearProcessor(feature_map="hedgehog", heads=4),
    "gla both ways": GLAProcessor(),
    "gla alternate": GLAProcessor(direction="alternate", input_conv=True),
    "gla, a gate per head": GLAProcessor(gates="scalar"),
    "hybrid": HybridProcessor(window=2),
    "mixed": MIXED,
}


def output(model: Any) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    inputs = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and name != "img_ids" else value
        for name, value in tiny.flux_inputs().items()
    }
    with torch.no_grad():
        return model(**inputs)[0]


def train(model: Any, form: str) -> Any:
    """Change what that form saves, as training would."""
    for layer in layers_of(model):
        if layer.processor is None:
            continue
        if form == "full":
            layer.processor.keep_original_weights(layer.attn, ["to_q.weight", "to_v.bias"])
        if form == "low rank":
            continue
    if form == "low rank":
        peft = pytest.importorskip("peft")
        names = [f"{layer.name}.{m}" for layer in layers_of(model) if layer.processor for m in ("to_q", "to_v")]
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, init_lora_weights=False)
        model.add_adapter(config)
    with torch.no_grad():
        for layer in layers_of(model):
            if layer.processor is None:
                continue
            changed = dict(layer.processor.own_parameters())
            own = layer.processor.weights_of(layer.attn)
            changed |= {name: own[name] for name in layer.processor.original_weights}
            for parameter in changed.values():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("form", ["processor only", "full", "low rank"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_round_trip(name: str, form: str, tmp_path: Path) -> None:
    model = train(linearize(tiny.flux(), TEMPLATES[name]), form)
    save_linear_attention(model, tmp_path)
    other = tiny.flux()
    stock, state = output(other), copy.deepcopy(other.state_dict())
    assert torch.equal(output(load_linear_attention(other, tmp_path)), output(model))
    with original_attention(other):
        assert torch.equal(output(other), stock)
    assert torch.equal(output(other), output(model))
    restore(other)
    assert torch.equal(output(other), stock)
    assert other.state_dict().keys() == state.keys()
    # Again after restore, from what is saved again: the same bytes.
    load_linear_attention(other, tmp_path)
    assert torch.equal(output(other), output(model))
    save_linear_attention(other, tmp_path / "again")
    for file in (WEIGHTS_NAME, CONFIG_NAME):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_what_the_files_hold(tmp_path: Path) -> None:
    model = train(train(linearize(tiny.flux(), {"transformer_blocks.0.*": ClearProcessor(2, 2)}), "full"), "low rank")
    save_linear_attention(model, tmp_path, recipe={"steps": 5}, metrics={"FID": 3.5})
    name = "transformer_blocks.0.attn"
    with safe_open(tmp_path / WEIGHTS_NAME, framework="pt") as file:
        assert set(file.keys()) == {
            f"{name}.processor.pool.spatial_weight",
            f"{name}.to_q.weight",
            f"{name}.to_v.bias",
            f"{name}.to_q.lora_A.weight",
            f"{name}.to_q.lora_B.weight",
            f"{name}.to_v.lora_A.weight",
            f"{name}.to_v.lora_B.weight",
        }
        config = json.loads((tmp_path / CONFIG_NAME).read_text())
        assert json.loads(file.metadata()[CONFIG_KEY]) == config
    assert config["layers"][name] == {
        "processor": "clear",
        "arguments": {"window": 2, "down_factor": 2, "temporal_window": None, "reset_projections": False},
        "weights": ["to_q.weight", "to_v.bias"],
        "lora": {"to_q": {"rank": 3, "scale": 5 / 3}, "to_v": {"rank": 3, "scale": 5 / 3}},
    }
    assert config["recipe"] == {"steps": 5}
    assert config["metrics"] == {"FID": 3.5}
    other = load_linear_attention(tiny.flux(), tmp_path)
    save_linear_attention(other, tmp_path / "again", metrics={"PSNR": 20.0})
    again = json.loads((tmp_path / "again" / CONFIG_NAME).read_text())
    assert again["recipe"] == {"steps": 5}
    assert again["metrics"] == {"FID": 3.5, "PSNR": 20.0}


@pytest.mark.parametrize("form", ["full", "low rank"])
def test_bf16(form: str, tmp_path: Path) -> None:
    model = train(linearize(tiny.flux().to(torch.bfloat16), MIXED), form)
    save_linear_attention(model, tmp_path)
    other = load_linear_attention(tiny.flux().to(torch.bfloat16), tmp_path)
    assert torch.equal(output(other), output(model))
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}


def test_fp32_weights_into_fp16_that_cannot_hold_them(tmp_path: Path) -> None:
    model = train(linearize(tiny.flux(), ClearProcessor(window=2)), "full")
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight[0, 0] = 1e6
    save_linear_attention(model, tmp_path)
    with pytest.raises(ValueError, match=r"to_q.weight holds values that are NaN or infinite in torch.float16"):
        load_linear_attention(tiny.flux().half(), tmp_path)


def test_shards_of_one_megabyte_and_a_variant(tmp_path: Path) -> None:
    size = {"num_attention_heads": 8, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    model = linearize(tiny.flux(**size), ClearProcessor(window=2))
    for layer in layers_of(model):
        layer.processor.keep_original_weights(layer.attn, ["to_q.weight", "to_k.weight", "to_v.weight"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    save_linear_attention(model, tmp_path, max_shard_size="1MB", variant="fp32")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[-1] == CONFIG_NAME
    assert "linear_attention.safetensors.index.fp32.json" in names
    shards = [name for name in names if name.endswith(".safetensors")]
    assert shards[0] == f"linear_attention.fp32-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    assert all((tmp_path / name).stat().st_size < 1.1e6 for name in shards)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_linear_attention(model, tmp_path, max_shard_size="1MB", variant="fp32")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    other = tiny.flux(**size)
    with torch.no_grad():
        for (_, parameter), (_, theirs) in zip(other.named_parameters(), model.named_parameters(), strict=True):
            parameter.copy_(theirs)
        for layer in layers_of(other):
            for name in ("to_q", "to_k", "to_v"):
                layer.attn.get_submodule(name).weight.zero_()
    assert torch.equal(output(load_linear_attention(other, tmp_path, variant="fp32")), output(model))
    # In one file: the shards go, another variant stays.
    save_linear_attention(model, tmp_path)
    save_linear_attention(model, tmp_path, variant="fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "linear_attention.fp32.safetensors",
        WEIGHTS_NAME,
        CONFIG_NAME,
    ]
    with pytest.raises(ValueError, match="also holds the variant None, of another conversion"):
        save_linear_attention(linearize(tiny.flux(), ClearProcessor(window=3)), tmp_path, variant="fp32")
    with pytest.raises(ValueError, match="variant must be a short word"):
        save_linear_attention(model, tmp_path, variant="../fp16")


def test_one_file_is_enough(tmp_path: Path) -> None:
    model = train(linearize(tiny.flux(), MIXED), "full")
    save_linear_attention(model, tmp_path)
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / WEIGHTS_NAME).rename(tmp_path / "mine.safetensors")
    other = load_linear_attention(tiny.flux(), tmp_path, weight_name="mine.safetensors")
    assert torch.equal(output(other), output(model))
    for options, message in (
        ({"weight_name": "mine.safetensors", "variant": "fp16"}, "weight_name names one file and variant a set"),
        ({"weight_name": "../mine.safetensors"}, "named without a path"),
        ({"weight_name": "mine.bin"}, r"\.safetensors file.*Other formats can run code"),
        ({"subfolder": "../elsewhere"}, "subfolder must be a relative path inside"),
        ({"revision": "main"}, "is a folder: revision='main' only means something on the Hub"),
        ({"weight_name": "mine.safetensors", "processor": ClearProcessor(2)}, "tells the settings.*leave processor="),
        ({"processor": ClearProcessor(2)}, "goes with weight_name="),
    ):
        with pytest.raises(ValueError, match=message):
            load_linear_attention(tiny.flux(), tmp_path, **options)


def test_switching_between_two_sets_and_loading_onto_a_converted_model(tmp_path: Path) -> None:
    first = train(linearize(tiny.flux(), {"transformer_blocks.*": ClearProcessor(window=2, down_factor=2)}), "full")
    second = train(linearize(tiny.flux(), {"single_*": LinearProcessor()}), "low rank")
    save_linear_attention(first, tmp_path / "first")
    save_linear_attention(second, tmp_path / "second")
    model = linearize(tiny.flux(), GLAProcessor(reset_projections=True))
    stock = output(tiny.flux())
    for name, expected in (("first", first), ("second", second), ("second", second), ("first", first)):
        load_linear_attention(model, tmp_path / name)
        assert torch.equal(output(model), output(expected))
        assert len(status(model).converted) == 2
    assert torch.equal(output(restore(model)), stock)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("before", ["stock", "full", "low rank"])
def test_a_failure_while_copying_leaves_the_model_as_it_was(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_linear_attention(train(linearize(tiny.flux(), MIXED), "full"), tmp_path / "full")
    save_linear_attention(train(linearize(tiny.flux(), ClearProcessor(2)), "low rank"), tmp_path / "low rank")
    model = tiny.flux()
    if before != "stock":
        save_linear_attention(train(linearize(tiny.flux(), LinearProcessor()), before), tmp_path / "before")
        load_linear_attention(model, tmp_path / "before")
    expected, processors = output(model), [layer.attn.processor for layer in layers_of(model)]
    hooks, names = len(model._forward_pre_hooks), list(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    copy_into, left = torch.Tensor.copy_, []

    def fail(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return copy_into(self, *args, **kwargs)

    for folder in ("full", "low rank"):
        for stop_at in (1, 6, 14):
            left[:] = [stop_at]
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "copy_", fail)
                with pytest.raises(KeyboardInterrupt):
                    load_linear_attention(model, tmp_path / folder)
            assert [layer.attn.processor for layer in layers_of(model)] == processors
            assert torch.equal(output(model), expected)
            assert len(model._forward_pre_hooks) == hooks
            assert sorted(model.state_dict()) == sorted(names)
            assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(output(restore(model)), output(tiny.flux()))


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linearize(tiny.flux(), MIXED)
    save_linear_attention(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(model, "full")
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr("diffusers_linattn.sharing.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_linear_attention(model, tmp_path, max_shard_size="2KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_is_saved_that_could_not_be_loaded(tmp_path: Path) -> None:
    model = train(linearize(tiny.flux(), MIXED), "full")
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"to_q.weight holds NaN or infinite values: the training diverged"):
        save_linear_attention(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_style_lora_is_not_part_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    model = tiny.flux()
    style = peft.LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)
    model.add_adapter(style, "style")
    styled = output(model)
    train(linearize(model, ClearProcessor(window=2)), "full")
    save_linear_attention(model, tmp_path)
    assert "lora" not in (tmp_path / CONFIG_NAME).read_text()
    assert "The LoRA style is not part of what is saved" in caplog.text
    other = tiny.flux()
    other.add_adapter(style, "style")
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    load_linear_attention(other, tmp_path)
    assert torch.equal(output(other), output(model))
    # A low-rank form beside it: both are active, and restoring takes only ours away.
    low = train(linearize(tiny.flux(), ClearProcessor(window=2)), "low rank")
    save_linear_attention(low, tmp_path / "low")
    load_linear_attention(other, tmp_path / "low")
    assert set(other.active_adapters()) == {"style", "linear_attention"}
    save_linear_attention(other, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == (tmp_path / "low" / WEIGHTS_NAME).read_bytes()
    assert torch.equal(output(restore(other)), styled)
    assert other.active_adapters() == ["style"]


def test_low_rank_forms_of_many_layers_and_a_name_that_is_taken(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    size = {"num_layers": 5, "num_single_layers": 14}
    even = {f"single_transformer_blocks.{i}.*": ClearProcessor(window=2) for i in range(0, 14, 2)}
    model = train(linearize(tiny.flux(**size), {"transformer_blocks.*": LinearProcessor(), **even}), "low rank")
    save_linear_attention(model, tmp_path)
    other = tiny.flux(**size)
    stock = output(other)
    assert torch.equal(output(load_linear_attention(other, tmp_path)), output(model))
    assert torch.equal(output(restore(other)), stock)
    taken = peft.LoraConfig(r=2, target_modules=["proj_mlp"], init_lora_weights=False)
    other.add_adapter(taken, "linear_attention")
    theirs = output(other)
    with pytest.raises(ValueError, match='has a LoRA named "linear_attention" outside its converted layers'):
        load_linear_attention(other, tmp_path)
    assert torch.equal(output(other), theirs)
    assert not status(other).converted


def test_low_rank_forms_that_cannot_be_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["transformer_blocks.0.attn.to_q"]
    for config, message in (
        ({"use_dora": True}, "only plain LoRA"),
        ({"lora_bias": True}, "only plain LoRA"),
    ):
        model = linearize(tiny.flux(), ClearProcessor(window=2))
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, **config))
        with pytest.raises(ValueError, match=message):
            save_linear_attention(model, tmp_path)


def test_a_model_with_a_device_map(tmp_path: Path) -> None:
    model = train(linearize(tiny.flux(), MIXED), "full")
    save_linear_attention(model, tmp_path / "weights")
    tiny.flux().save_pretrained(tmp_path / "model")
    blocks = ("transformer_blocks", "single_transformer_blocks")
    places = {name: "cpu" for name, _ in tiny.flux().named_children() if name not in blocks}
    places |= {f"{name}.{i}": "cpu" for name in blocks for i in range(2)}
    for device_map in ({"": "cpu"}, places):
        other = type(model).from_pretrained(tmp_path / "model", device_map=device_map).eval()
        stock = output(other)
        assert torch.equal(output(load_linear_attention(other, tmp_path / "weights")), output(model))
        assert torch.equal(output(restore(other)), stock)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(kind: str, tmp_path: Path) -> None:
    from diffusers.hooks import apply_group_offloading

    model = train(linearize(tiny.flux(), MIXED), "full")
    save_linear_attention(model, tmp_path / "weights")
    other = tiny.flux()
    options: dict[str, Any] = {"onload_device": torch.device("cpu"), "offload_type": kind}
    if kind == "block_level":
        options["num_blocks_per_group"] = 1
    try:
        apply_group_offloading(other, **options)
    except AttributeError:
        pytest.skip("diffusers before 0.42 offloads from an accelerator only")
    assert torch.equal(output(load_linear_attention(other, tmp_path / "weights")), output(model))
    on_disk = tiny.flux()
    apply_group_offloading(on_disk, **options, offload_to_disk_path=str(tmp_path / "disk"))
    with pytest.raises(ValueError, match="offloaded to disk.*convert it, or load them, before enable_group_offload"):
        load_linear_attention(on_disk, tmp_path / "weights")


def test_sequential_offloading_is_refused(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = train(linearize(tiny.flux(), MIXED), "full")
    save_linear_attention(model, tmp_path)
    other = tiny.flux()
    cpu_offload(other, execution_device="cpu")
    with pytest.raises(ValueError, match="before enable_sequential_cpu_offload"):
        load_linear_attention(other, tmp_path)
    other = load_linear_attention(tiny.flux(), tmp_path)
    cpu_offload(other, execution_device="cpu")
    assert torch.equal(output_offloaded(other), output(model))
    with pytest.raises(ValueError, match="remove_all_hooks"):
        save_linear_attention(other, tmp_path / "again")


def output_offloaded(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny.flux_inputs())[0]


def test_quantized_layers(tmp_path: Path) -> None:
    model = train(linearize(tiny.flux(), {"transformer_blocks.0.*": ClearProcessor(window=2, down_factor=2)}), "full")
    save_linear_attention(model, tmp_path)
    other = tiny.flux()
    # What stands for a quantized layer: weights that are no floating-point numbers.
    for block in other.single_transformer_blocks:
        for name in ("weight", "bias"):
            old = getattr(block.attn.to_q, name)
            setattr(block.attn.to_q, name, torch.nn.Parameter(old.to(torch.int8), requires_grad=False))
    load_linear_attention(other, tmp_path)  # other layers than the loaded ones do not matter
    own = other.transformer_blocks[0].attn.to_q
    restore(other)
    own.weight = torch.nn.Parameter(own.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized or split over devices"):
        load_linear_attention(other, tmp_path)


def test_layers_quantized_by_torchao(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for form in ("full", "low rank"):
        save_linear_attention(train(linearize(tiny.flux(), MIXED), form), tmp_path / form)
    attention = tuple(f"{layer.name}." for layer in layers_of(tiny.flux()))
    for quantize_attention, form in ((False, "full"), (False, "low rank"), (True, "low rank"), (True, "full")):
        model = tiny.flux()
        quantize_(
            model,
            Int8WeightOnlyConfig(),
            lambda module, name, too=quantize_attention: (
                isinstance(module, torch.nn.Linear) and (too or not name.startswith(attention))
            ),
        )
        stock = output(model)
        if (quantize_attention, form) == (True, "full"):
            with pytest.raises(ValueError, match="quantized or split over devices"):
                load_linear_attention(model, tmp_path / form)
        else:
            assert not torch.equal(output(load_linear_attention(model, tmp_path / form)), stock)
        assert torch.equal(output(restore(model)), stock)


def test_fused_projections_are_made_again(tmp_path: Path) -> None:
    trained = train(linearize(tiny.flux(), MIXED), "full")
    save_linear_attention(trained, tmp_path)
    model, stock = tiny.flux(), tiny.flux()
    for each in (model, stock):
        each.fuse_qkv_projections()
    load_linear_attention(model, tmp_path)
    torch.testing.assert_close(output(model), output(trained), atol=1e-5, rtol=0)
    assert torch.equal(output(restore(model)), output(stock))


def test_loading_takes_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from diffusers_linattn.sharing import checkpoint

    model = train(linearize(tiny.flux(), MIXED), "full")
    save_linear_attention(model, tmp_path)
    alive: list[Any] = []
    most = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def get_tensor(self, name: str) -> torch.Tensor:
            tensor = self.file.get_tensor(name)
            alive.append(weakref.ref(tensor))
            most.append(sum(reference() is not None for reference in alive))
            return tensor

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
    other = load_linear_attention(tiny.flux(), tmp_path)
    assert torch.equal(output(other), output(model))
    assert max(most) <= 2
