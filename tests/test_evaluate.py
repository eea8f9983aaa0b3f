"""Evaluation and validation pictures, on tiny pipelines of every kind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import PIPELINES
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from diffusers_linattn import (
    ClearProcessor,
    DistillConfig,
    LinearProcessor,
    distill,
    evaluate,
    linearize,
    make_samples,
    original_attention,
    restore,
)
from diffusers_linattn.evaluate import Evaluation
from diffusers_linattn.evaluation.pictures import Pictures
from diffusers_linattn.generation import generate_images
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.samples import Samples
from diffusers_linattn.tracker import find_tracker
from diffusers_linattn.training.trainable import trained_parameters
from diffusers_linattn.training.validation import Validation

import tiny


PROMPTS = ["a cat", "a dog", "the red cat"]


@pytest.fixture
def pipe() -> Any:
    return linearize(tiny.flux_pipeline(), LinearProcessor())


def brightness(images: torch.Tensor, prompts: Any) -> float:
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert len(images) == len(prompts)
    return float(images.mean())


@pytest.mark.parametrize("name", ["FLUX", "SD3", "PixArt", "DiT", "Z-Image", "Wan", "CogVideoX"])
def test_the_distances_are_those_of_the_same_seeds(name: str) -> None:
    case = PIPELINES[name]
    pipe = case.make()
    size = dict(zip(("height", "width"), case.sizes[0], strict=True)) if case.sizes else {}
    call = {**case.call, **size, "num_inference_steps": 2}
    teacher = generate_images(pipe, case.prompts, [5, 6, 7], **call)
    linearize(pipe, LinearProcessor(feature_map="softmax"))
    student = generate_images(pipe, case.prompts, [5, 6, 7], **call)
    result = evaluate(
        pipe, case.prompts, seed=5, batch_size=3, call_arguments=call, metrics=[brightness], other_seed=True
    )
    assert list(result.rows) == ["reference", "student", "reference, other seed"]
    row = result.rows["student"]
    mse = float((student[0].float() - teacher[0].float()).square().mean())
    assert row["latent_mse"] == pytest.approx(mse, rel=1e-5)
    frames = [images.flatten(0, -4).mul(255).round().div(255) for images in (student[1], teacher[1])]
    assert row["psnr"] == pytest.approx(float(peak_signal_noise_ratio(*frames, data_range=1.0)), rel=1e-4)
    ssim = structural_similarity_index_measure(*frames, data_range=1.0)
    assert row["ssim"] == pytest.approx(float(ssim), rel=1e-4)  # type: ignore[arg-type]
    assert row["brightness"] == pytest.approx(float(student[1].mean()), abs=1e-3)
    assert result.rows["reference"]["latent_mse"] == 0
    assert result.rows["reference"]["ssim"] == pytest.approx(1)
    # Another seed is another picture, of the same prompt.
    assert result.rows["reference, other seed"]["latent_mse"] > 10 * mse
    other = result.pictures["reference, other seed"].request
    assert other.seeds == (8, 9, 10)
    assert other.prompts == tuple(case.prompts)
    # The table can be drawn, of videos the middle frame.
    assert result.reference.stills.shape[1:] == (3, *student[1].shape[-2:])


def test_a_picture_does_not_depend_on_the_batch(pipe: Any) -> None:
    one, many = (evaluate(pipe, PROMPTS, batch_size=size, call_arguments=tiny.FLUX_CALL) for size in (1, 3))
    for name, pictures in one.pictures.items():
        torch.testing.assert_close(pictures.latents, many.pictures[name].latents, atol=1e-4, rtol=0)
    more = evaluate(pipe, PROMPTS, num_images=7, batch_size=2, call_arguments=tiny.FLUX_CALL)
    assert more.reference.request.prompts == (*PROMPTS, *PROMPTS, PROMPTS[0])
    assert more.reference.request.seeds == tuple(range(7))


def test_nothing_is_left_behind(pipe: Any) -> None:
    processors = [layer.attn.processor for layer in layers_of(pipe)]
    state = copy.deepcopy(pipe.transformer.state_dict())
    scheduler, bar = copy.deepcopy(vars(pipe.scheduler)), dict(pipe._progress_bar_config)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    evaluate(pipe, PROMPTS, call_arguments=tiny.FLUX_CALL, metrics=[brightness])
    assert torch.equal(torch.rand(2), expected)
    assert [layer.attn.processor for layer in layers_of(pipe)] == processors
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert torch.equal(pipe.scheduler.timesteps, scheduler["timesteps"])
    assert torch.equal(pipe.scheduler.sigmas, scheduler["sigmas"])
    assert pipe._progress_bar_config == bar


def test_references_of_three_kinds_are_one(pipe: Any) -> None:
    own = evaluate(pipe, PROMPTS, call_arguments=tiny.FLUX_CALL)
    other = evaluate(pipe, PROMPTS, call_arguments=tiny.FLUX_CALL, reference=tiny.flux_pipeline())
    assert own.rows == other.rows
    calls: list[Any] = []
    with pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(type(layers_of(pipe)[0].processor))):
        kept = evaluate(pipe, reference=own.reference)
    assert kept.rows == own.rows
    assert len(calls) == tiny.FLUX_CALL["num_inference_steps"]  # of the student alone
    for changes in ({"seed": 1}, {"prompts": ["a cat"]}, {"num_images": 2}, {"call_arguments": {"height": 16}}):
        with pytest.raises(ValueError, match="The reference was drawn with other"):
            evaluate(pipe, **{"prompts": PROMPTS, "reference": own.reference, **changes})
    with pytest.raises(ValueError, match="other_seed needs the reference itself"):
        evaluate(pipe, reference=own.reference, other_seed=True)


def test_several_pipelines_in_one_table(pipe: Any, tmp_path: Path) -> None:
    linear = evaluate(pipe, PROMPTS, call_arguments=tiny.FLUX_CALL, other_seed=True)
    linearize(pipe, ClearProcessor(window=2))
    clear = evaluate(pipe, reference=linear.reference)
    both = Evaluation.join({"linear": linear, "clear": clear})
    assert list(both.rows) == ["reference", "linear", "clear", "reference, other seed"]
    assert both.rows["clear"] == clear.rows["student"]
    assert both.rows["linear"] == linear.rows["student"] != both.rows["clear"]
    both.save(tmp_path)
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert "ClearProcessor(window=2" in kept["pipelines"]["clear"]["layers"]["transformer_blocks.0.attn"]
    assert set(kept["pipelines"]) == {"linear", "clear"}
    another = evaluate(pipe, PROMPTS, seed=9, call_arguments=tiny.FLUX_CALL)
    with pytest.raises(ValueError, match="compared with other pictures than 'linear'"):
        Evaluation.join({"linear": linear, "clear": another})
    with pytest.raises(ValueError, match="is the name of another row"):
        Evaluation.join({"reference": linear})


def test_no_other_evaluation_is_written_over(pipe: Any, tmp_path: Path) -> None:
    settings = {"call_arguments": tiny.FLUX_CALL, "output_dir": tmp_path}
    evaluate(pipe, PROMPTS, **settings)
    result = evaluate(pipe, PROMPTS, metrics=[brightness], **settings)  # the same with one number more
    written = (tmp_path / "evaluation.json").read_text()
    assert "brightness" in written
    for changes, named in [
        ({"prompts": ["a dog"]}, "prompts and seeds"),
        ({"seed": 5}, "seeds"),
        ({"name": "other"}, "pipelines"),
        ({"call_arguments": {**tiny.FLUX_CALL, "guidance_scale": 2.0}}, "call arguments"),
    ]:
        with (
            pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("too late")),
            pytest.raises(ValueError, match=f"holds an evaluation with other {named}: give another output_dir"),
        ):
            evaluate(pipe, **{"prompts": PROMPTS, **settings, **changes})
    assert (tmp_path / "evaluation.json").read_text() == written
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(ValueError, match=r"holds a evaluation.md of something else"):
        result.save(tmp_path)


def test_the_files(pipe: Any, tmp_path: Path) -> None:
    prompts = ["a | cat", "a very long prompt of a red cat and a red dog and the letter", "日本\n語"]
    result = evaluate(
        pipe,
        prompts,
        num_images=10,
        call_arguments=tiny.FLUX_CALL,
        metrics={"shine": brightness, "both": lambda images, _: {"one": 1, "two": float("nan")}},
        output_dir=tmp_path / "new" / "folder",
        name="a|b",
    )
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "evaluation.md", "grid.png"]
    kept = json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert kept["rows"]["reference"]["psnr"] == "inf"
    assert kept["rows"]["a|b"]["two"] == "nan"
    assert kept["rows"]["a|b"]["shine"] == result.rows["a|b"]["shine"]
    assert kept["seeds"] == list(range(10))
    assert kept["prompts"][:4] == [*prompts, prompts[0]]
    assert kept["call_arguments"] == tiny.FLUX_CALL
    assert set(kept["versions"]) == {"diffusers", "diffusers_linattn", "torch", "torchmetrics"}
    lines = (folder / "evaluation.md").read_text().splitlines()
    assert lines[0] == "|  | latent MSE | PSNR (dB) | SSIM | shine | one | two |"
    assert lines[2].startswith("| reference | 0 | ∞ | 1 | ")
    assert lines[3].startswith("| a\\|b | ")
    grid = Image.open(folder / "grid.png")
    assert grid.mode == "RGB"
    # Eight columns of pictures 32 pixels wide, each wide enough for a label.
    assert grid.width > 8 * 64
    # The very pictures are in it: one of the student's, by its pixels.
    pixels = np.asarray(grid)
    picture = result.pictures["a|b"].images[0].permute(1, 2, 0).numpy()
    height, width = picture.shape[:2]
    places = np.argwhere((pixels == picture[0, 0]).all(-1))
    assert any(np.array_equal(pixels[y : y + height, x : x + width], picture) for y, x in places)


def test_samples_give_prompts_and_settings(tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline()
    samples = make_samples(
        pipe,
        PROMPTS,
        tmp_path / "samples",
        num_samples=4,
        resolutions=[(24, 32)],
        guidance_scale=2.5,
        num_inference_steps=3,
        call_arguments={"max_sequence_length": 8},
    )
    linearize(pipe, LinearProcessor())
    result = evaluate(pipe, samples=tmp_path / "samples")
    assert result.reference.request.prompts == tuple(PROMPTS)
    assert result.reference.request.call_arguments == {
        "height": 24,
        "width": 32,
        "guidance_scale": 2.5,
        "num_inference_steps": 3,
        "max_sequence_length": 8,
    }
    other = evaluate(pipe, ["a dog"], samples=samples, call_arguments={"num_inference_steps": 1})
    assert other.reference.request.prompts == ("a dog",)
    assert other.reference.request.call_arguments == {
        **result.reference.request.call_arguments,
        "num_inference_steps": 1,
    }


def test_prompts_from_a_file(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    result = evaluate(pipe, tmp_path / "prompts.txt", call_arguments=tiny.FLUX_CALL)
    assert result.reference.request.prompts == ("a cat", "a dog")
    dit = linearize(tiny.dit_pipeline(), LinearProcessor())
    (tmp_path / "classes.txt").write_text("3\n7\n")
    classes = evaluate(dit, str(tmp_path / "classes.txt"), call_arguments={"num_inference_steps": 1})
    assert classes.reference.request.prompts == (3, 7)
    with pytest.raises(ValueError, match="has a line that is no class label"):
        evaluate(dit, tmp_path / "prompts.txt")


def test_the_clip_score_is_that_of_torchmetrics(pipe: Any, tmp_path: Path) -> None:
    _, tokenizer = tiny.clip(8)
    shape = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    text = {**shape, "vocab_size": 8, "max_position_embeddings": 16, "bos_token_id": 6, "eos_token_id": 7}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**text, "pad_token_id": 7},
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    result = evaluate(pipe, PROMPTS, call_arguments=tiny.FLUX_CALL, metrics={"clip": str(tmp_path)})
    for row, pictures in result.pictures.items():
        processor, model = CLIPProcessor.from_pretrained(tmp_path), CLIPModel.from_pretrained(tmp_path)
        with torch.no_grad():
            inputs = processor(text=PROMPTS, images=list(pictures.images), return_tensors="pt", padding=True)
            output = model(**inputs)
        scores = 100 * (output.image_embeds * output.text_embeds).sum(-1)
        assert result.rows[row]["clip"] == pytest.approx(float(scores.mean().clamp_min(0)), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompts": None}, "No prompts: give prompts="),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a cat", 3]}, r"prompts\[1\] is 3: FluxPipeline takes prompts, strings"),
        ({"prompts": "no/such/file.txt"}, "is no file"),
        ({"num_images": 0}, "num_images must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"call_arguments": {"hieght": 8}}, "call_arguments has hieght, which FluxPipeline does not take"),
        ({"call_arguments": {"generator": None}}, "which follow from the prompts and seeds"),
        ({"call_arguments": {"num_images_per_prompt": 2}}, "which follow from the prompts and seeds"),
        ({"metrics": ["beauty"]}, "Unknown metric 'beauty': expected lpips, clip, fid"),
        ({"metrics": "clip"}, "metrics takes a list or a dict"),
        ({"metrics": [brightness, brightness]}, "Two metrics are called 'brightness'"),
        ({"metrics": {"psnr": brightness}}, "Two metrics are called 'psnr'"),
        ({"metrics": {"lpips": "no-such-net"}}, "The metric 'lpips' cannot be measured"),
        ({"metrics": {"fid": "no/such/weights"}}, "The metric 'fid' cannot be measured"),
        ({"metrics": {"clip": "no/such/folder"}}, "The metric 'clip' cannot be measured"),
        ({"metrics": ["fid"], "prompts": ["a cat"]}, "'fid' needs at least 2 pictures"),
        ({"output_dir": __file__}, "is a file, expected a directory"),
        ({"name": "reference"}, "is the name of another row"),
    ],
)
def test_errors_come_before_the_first_picture(pipe: Any, changes: dict[str, Any], match: str) -> None:
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=match):
        evaluate(pipe, **{"prompts": PROMPTS, "call_arguments": tiny.FLUX_CALL, **changes})


def test_class_labels_have_no_clip_score_and_are_numbers() -> None:
    dit = linearize(tiny.dit_pipeline(), LinearProcessor())
    with pytest.raises(ValueError, match="class labels are none"):
        evaluate(dit, [1, 2], metrics=["clip"])
    with pytest.raises(ValueError, match=r"prompts\[0\] is 'a cat': DiTPipeline takes class labels"):
        evaluate(dit, PROMPTS)


def test_what_cannot_be_compared(pipe: Any) -> None:
    restore(pipe)
    with pytest.raises(ValueError, match="No attention layer is converted"):
        evaluate(pipe, PROMPTS)
    small = evaluate(pipe, PROMPTS, reference=pipe, call_arguments=tiny.FLUX_CALL)
    assert small.rows["student"] == small.rows["reference"]
    linearize(pipe, LinearProcessor())
    with pytest.raises(ValueError, match="returned 'dark', expected a number"):
        evaluate(pipe, PROMPTS, call_arguments=tiny.FLUX_CALL, metrics={"mood": lambda *_: "dark"})  # type: ignore[dict-item,return-value]
    twice = {"a": lambda *_: {"x": 1.0}, "b": lambda *_: {"x": 2.0}}
    with pytest.raises(ValueError, match="Two metrics return 'x'"):
        evaluate(pipe, PROMPTS, call_arguments=tiny.FLUX_CALL, metrics=twice)  # type: ignore[arg-type]
    reference = evaluate(pipe, PROMPTS, call_arguments=tiny.FLUX_CALL).reference
    larger = Pictures(reference.request, reference.latents, reference.images[..., :16])
    with pytest.raises(ValueError, match="those of the reference"):
        evaluate(pipe, reference=larger)


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return make_samples(
        tiny.flux_pipeline(),
        [*PROMPTS, "the dog", "a letter"],
        tmp_path / "samples",
        num_samples=5,
        resolutions=[(24, 32)],
        num_inference_steps=2,
        call_arguments={"max_sequence_length": 8},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", ["attention", "lora"])
def test_validation_disturbs_nothing(samples: Samples, tmp_path: Path, dtype: torch.dtype, trainable: str) -> None:
    pipe = tiny.flux_pipeline().to(dtype)
    model = linearize(pipe, LinearProcessor(feature_map="hedgehog")).transformer
    config = DistillConfig(validation_steps=2, trainable=trainable, rank=2, batch_size=2)
    with trained_parameters(model, layers_of(model), config) as parameters:
        validation = Validation.of(pipe, samples, config, tmp_path / "run")
        assert validation is not None
        with torch.no_grad():
            inputs = {
                name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in tiny.flux_inputs().items()
            }
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
                before = model(**inputs)[0]
        model.train()
        tracker = find_tracker(model)
        assert tracker is not None
        kept = {
            "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "dtypes": {name: parameter.dtype for name, parameter in model.named_parameters()},
            "layouts": dict(tracker.last),
            "processors": [layer.attn.processor for layer in layers_of(pipe)],
            "training": [module.training for module in model.modules()],
            "random": torch.random.get_rng_state().tolist(),
        }
        steps = pipe.scheduler.timesteps.clone()
        first = validation(2)
        assert set(first) == {"latent_mse", "psnr", "ssim"}
        assert first["latent_mse"] > 0
        assert validation(4) == first
        assert kept == {
            "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "dtypes": {name: parameter.dtype for name, parameter in model.named_parameters()},
            "layouts": dict(tracker.last),
            "processors": [layer.attn.processor for layer in layers_of(pipe)],
            "training": [module.training for module in model.modules()],
            "random": torch.random.get_rng_state().tolist(),
        }
        assert torch.equal(pipe.scheduler.timesteps, steps)
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            assert torch.equal(model(**inputs)[0], before)
        # The student is drawn with what is trained by now; the teacher is not drawn again.
        teacher = validation._teacher
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        assert validation(6)["latent_mse"] != first["latent_mse"]
        assert validation._teacher is teacher
    assert sorted(path.name for path in (tmp_path / "run" / "validation").iterdir()) == [
        "step-000002.png",
        "step-000004.png",
        "step-000006.png",
    ]


def test_validation_draws_the_teacher_and_the_prompts_asked_for(samples: Samples, tmp_path: Path) -> None:
    pipe = linearize(tiny.flux_pipeline(), LinearProcessor())
    assert Validation.of(pipe, samples, DistillConfig(), tmp_path) is None
    validation = Validation.of(pipe, samples, DistillConfig(validation_steps=1), tmp_path)
    assert validation is not None
    assert validation.request.prompts == (*PROMPTS, "the dog")
    validation(1)
    with original_attention(pipe):
        _, images = generate_images(pipe, validation.request.prompts, validation.request.seeds, **tiny.FLUX_CALL)
    assert validation._teacher is not None
    torch.testing.assert_close(validation._teacher.images, (images * 255).round().byte(), atol=1, rtol=0)
    chosen = DistillConfig(validation_steps=1, validation_prompts=("a cat",))
    own = Validation.of(pipe, samples, chosen, tmp_path)
    assert own is not None
    assert own.request.prompts == ("a cat",)
    with pytest.raises(ValueError, match="takes prompts, strings"):
        Validation.of(pipe, samples, DistillConfig(validation_steps=1, validation_prompts=(3,)), tmp_path)


def test_training_goes_the_same_way_with_validation(samples: Samples, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"transfer_steps": 3, "steps": 3, "batch_size": 2}
    for name, more in (("plain", {}), ("drawn", {"validation_steps": 2})):
        distill(linearize(tiny.flux_pipeline(), LinearProcessor()), samples, tmp_path / name, **quick, **more)
    weights = [(tmp_path / name / "linear_attention.safetensors").read_bytes() for name in ("plain", "drawn")]
    assert weights[0] == weights[1]
    drawn = tmp_path / "drawn" / "validation"
    assert sorted(path.name for path in drawn.iterdir()) == [f"step-00000{i}.png" for i in (2, 4, 6)]
