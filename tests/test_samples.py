"""The teacher's own samples, of every kind of pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import PIPELINES, SHORT, PipelineCase, wan, wan_transformer

from diffusers_linattn import LinearProcessor, make_samples
from diffusers_linattn.generation import generate_images, generate_latents
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.samples import Samples
from diffusers_linattn.samples.arguments import find_padding, find_places, form, pack, together
from diffusers_linattn.samples.probe import read_model_call
from diffusers_linattn.samples.recorder import Recorder

import tiny


PROMPTS = ["a cat", "a dog", "the red cat"]
CALL: dict[str, Any] = {
    "num_samples": 7,
    "batch_size": 2,
    "resolutions": [(24, 32), (32, 16)],
    "num_inference_steps": 2,
    "call_arguments": {"max_sequence_length": 8},
}

cases = pytest.mark.parametrize("case", PIPELINES.values(), ids=PIPELINES)


def make(case: PipelineCase, pipe: Any, directory: Path, **changes: Any) -> Samples:
    call = {"num_samples": 5, "batch_size": 2, "num_inference_steps": 2, "resolutions": list(case.sizes) or None}
    return make_samples(pipe, list(case.prompts), directory, call_arguments=case.call, **{**call, **changes})


def size_of(samples: Samples, index: int) -> dict[str, int]:
    return {name: size for name, size in zip(("height", "width"), samples.resolution_of(index), strict=True) if size}


def passed(pipe: Any, **call: Any) -> tuple[dict[str, Any], Any, Any]:
    """What the transformer was first called with and returned, and what the scheduler then got."""
    model = pipe.transformer
    names = (
        list(type(model).forward.__wrapped__.__code__.co_varnames)
        if hasattr(type(model).forward, "__wrapped__")
        else []
    )
    names = names or list(type(model).forward.__code__.co_varnames)
    found: list[Any] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        found.append(({**dict(zip(names[1:], args, strict=False)), **kwargs}, output))

    original, stepped = pipe.scheduler.step, []
    pipe.scheduler.step = lambda *args, **kwargs: stepped.append((args, kwargs)) or original(*args, **kwargs)
    handle = model.register_forward_hook(keep, with_kwargs=True)
    try:
        pipe(**call)
    finally:
        handle.remove()
        del pipe.scheduler.step
    return *found[0], stepped[0][0]


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        return
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_same(actual[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


@cases
def test_samples_are_what_the_pipeline_makes_and_passes(case: PipelineCase, tmp_path: Path) -> None:
    pipe = case.make()
    samples = make(case, pipe, tmp_path)
    assert len(samples) == 5
    assert samples.prompt_of(4) == case.prompts[1]
    call = samples.call
    assert (call.timestep_scale, call.timestep_offset, call.output_sign) == (case.scale, case.offset, case.sign)
    # Two samples of prompts of one length and one size.
    group = max((g for g in samples.groups if samples.prompt_of(g[0]) in case.prompts[:2]), key=len)
    pair = [
        next(i for i in group if samples.prompt_of(i) == prompt)
        for prompt in dict.fromkeys(map(samples.prompt_of, group))
    ]
    pair = (pair + pair)[:2]
    batch = samples.batch(pair)
    name = "class_labels" if isinstance(case.prompts[0], int) else "prompt"
    generators = [torch.Generator().manual_seed(samples._assignment.seed(i)) for i in pair]
    arguments = {**case.call, **samples._plan["without_guidance"], **size_of(samples, pair[0])}
    prompts = [samples.prompt_of(i) for i in pair]
    given, output, stepped = passed(
        pipe, **{name: prompts}, generator=generators, num_inference_steps=2, output_type="latent", **arguments
    )
    latents, timestep = given.pop(call.latents), given.pop(call.timestep)
    assert_same(batch.arguments, given)
    assert call.as_list == isinstance(latents, list)
    latents = torch.stack(latents) if call.as_list else latents
    assert batch.latents.shape == latents.shape
    # A call like the pipeline's own gives what its scheduler got; learned variance is left out there.
    with torch.no_grad():
        predicted = call.predict(pipe.transformer, latents, torch.as_tensor(stepped[1]).expand(2), batch.arguments)
    torch.testing.assert_close(call.timestep_offset + call.timestep_scale * stepped[1].float(), timestep[0].float())
    shape = tuple(slice(0, size) for size in latents.shape)
    assert_same(predicted[shape].reshape(stepped[0].shape), stepped[0])


@cases
def test_latents_are_those_of_the_pipeline_with_guidance(case: PipelineCase, tmp_path: Path) -> None:
    pipe = case.make()
    samples = make(case, pipe, tmp_path)
    name = "class_labels" if isinstance(case.prompts[0], int) else "prompt"
    last: list[torch.Tensor] = []
    original = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: last.append(original(*args, **kwargs)) or last[-1]
    pipe(
        **{name: [samples.prompt_of(1)]},
        generator=torch.Generator().manual_seed(samples._assignment.seed(1)),
        num_inference_steps=2,
        **case.call,
        **size_of(samples, 1),
    )
    latents = samples.batch([1]).latents
    torch.testing.assert_close(latents, last[-1][0][:1].reshape(latents.shape), atol=1e-5, rtol=1e-4)


@cases
def test_no_prompt_is_what_the_pipeline_passes_for_the_empty_one(case: PipelineCase, tmp_path: Path) -> None:
    pipe = case.make()
    samples = make(case, pipe, tmp_path, num_samples=2)
    if type(pipe).__name__.startswith("Lumina2"):  # guides by a prompt without its system prompt
        assert not samples.has_null
        assert "guides by something else" in samples.manifest["plan"]["no_null_because"]
        return
    assert samples.has_null
    name, null = ("class_labels", 1000) if isinstance(case.prompts[0], int) else ("prompt", "")
    arguments = {**case.call, **samples._plan["without_guidance"], **size_of(samples, 0)}
    given, *_ = passed(pipe, **{name: [null]}, num_inference_steps=2, output_type="latent", **arguments)
    del given[samples.call.latents], given[samples.call.timestep]
    assert_same(samples.batch([0], [True]).arguments, given)
    if samples.null_fits(0):
        mixed = samples.batch([0, 0], [False, True]).arguments
        own = samples.batch([0, 0]).arguments
        different = [key for key in own if str(mixed[key]) != str(own[key])]
        assert different
    else:
        with pytest.raises(ValueError, match="drop prompts only where null_fits says so"):
            samples.batch([0, 0], [False, True])


def test_noise_that_the_scheduler_draws_belongs_to_the_sample(tmp_path: Path) -> None:
    """DiTPipeline steps a doubled batch and does not pass its generators on."""
    pipe = tiny.dit_pipeline()
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    found = [
        make_samples(pipe, [3, 7], tmp_path / str(size), 4, size, num_inference_steps=3).batch(range(4)).latents
        for size in (1, 3)
    ]
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)
    assert not torch.allclose(found[0][0], found[0][2], atol=0.1)


def test_the_original_attention_makes_them(tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline()
    samples = make_samples(pipe, PROMPTS, tmp_path / "samples", **CALL)
    pipe.set_attn_processor(LinearProcessor())
    again = make_samples(pipe, PROMPTS, tmp_path / "again", **CALL)
    assert again.manifest == samples.manifest
    assert isinstance(layers_of(pipe)[0].processor, LinearProcessor)


def test_the_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline()
    del pipe._progress_bar_config
    state = torch.get_rng_state()
    latents, images = generate_images(pipe, PROMPTS[:2], [4, 5], **tiny.FLUX_CALL)
    assert "_progress_bar_config" not in vars(pipe)
    pipe.set_progress_bar_config(disable=False, desc="mine")
    make_samples(pipe, PROMPTS, tmp_path, **CALL)
    assert pipe._progress_bar_config == {"disable": False, "desc": "mine"}
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert images.shape == (2, 3, 24, 32)
    assert 0 <= images.min() < images.max() <= 1
    expected = tiny.flux_pipeline()(
        PROMPTS[1], generator=torch.Generator().manual_seed(5), output_type="latent", **tiny.FLUX_CALL
    )
    torch.testing.assert_close(latents[1:], expected.images, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="Got 2 prompts and 1 seeds"):
        generate_latents(pipe, PROMPTS[:2], [4])
    with pytest.raises(ValueError, match="FluxPipeline takes no heigth: expected some of"):
        generate_latents(pipe, PROMPTS[:2], [4, 5], heigth=24)


def test_pictures_of_videos_and_of_classes() -> None:
    case = PIPELINES["Wan"]
    call = {**case.call, "height": 16, "width": 32, "num_inference_steps": 2}
    latents, images = generate_images(case.make(), ["a cat", "a dog"], [0, 1], **call)
    assert images.shape == (2, 5, 3, 16, 32)
    latents, images = generate_images(PIPELINES["DiT"].make(), [3, 7], [0, 1], num_inference_steps=2)
    assert (latents.shape, images.shape) == ((2, 4, 16, 16), (2, 3, 32, 32))


@pytest.mark.parametrize(
    ("prompts", "changes", "match"),
    [
        ([], {}, "prompts is empty"),
        (["a cat", "  "], {}, r"prompts\[1\] is '  ', expected a prompt"),
        (["a cat", 3], {}, r"prompts\[1\] is 3, expected a prompt"),
        (5, {}, "prompts is a int"),
        ("no/such/file.txt", {}, "is no file"),
        (PROMPTS, {"num_samples": 0}, "num_samples must be"),
        (PROMPTS, {"batch_size": 1.5}, "batch_size must be"),
        (PROMPTS, {"num_inference_steps": 0}, "num_inference_steps must be"),
        (PROMPTS, {"resolutions": []}, "resolutions is empty"),
        (PROMPTS, {"resolutions": 1024}, r"resolutions is 1024, expected a list of \(height, width\)"),
        (PROMPTS, {"resolutions": "24x32"}, r"resolutions is '24x32', expected a list of \(height, width\)"),
        (PROMPTS, {"resolutions": [24]}, r"resolutions\[0\] is 24, expected \(height, width\)"),
        (PROMPTS, {"resolutions": [(24, 0)]}, r"resolutions\[0\] must be"),
        (
            PROMPTS,
            {"resolutions": [(24, 32), (25, 33)]},
            r"\(25, 33\), expected multiples of 4 for FluxPipeline: give \(24, 32\)",
        ),
        (PROMPTS, {"call_arguments": {"image": object()}}, "call_arguments must be JSON-able"),
        (PROMPTS, {"call_arguments": {"max_length": 8}}, "FluxPipeline takes no max_length"),
    ],
)
def test_bad_requests(tmp_path: Path, prompts: Any, changes: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_samples(tiny.flux_pipeline(), prompts, tmp_path / "samples", **{**CALL, **changes})
    assert not (tmp_path / "samples").exists()


def test_prompts_of_files_and_classes(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n the red cat \na cat\n")
    samples = make_samples(tiny.flux_pipeline(), str(tmp_path / "prompts.txt"), tmp_path / "flux", **CALL)
    assert samples.manifest["settings"]["prompts"] == ["a cat", "the red cat"]
    (tmp_path / "marked.txt").write_bytes("\ufeffa cät\r\nred\u2028letter\x0c 1\r\n".encode())
    samples = make_samples(tiny.flux_pipeline(), tmp_path / "marked.txt", tmp_path / "marked", **CALL)
    assert samples.manifest["settings"]["prompts"] == ["a cät", "red\u2028letter\x0c 1"]
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "prompts.txt").write_text("a cät\n", encoding=encoding)
        with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8: save it as such"):
            make_samples(tiny.flux_pipeline(), tmp_path / "prompts.txt", tmp_path / "other", **CALL)
    dit = PIPELINES["DiT"].make()
    (tmp_path / "labels.txt").write_text("3\n999\n")
    samples = make_samples(dit, tmp_path / "labels.txt", tmp_path / "dit", 3, num_inference_steps=1)
    assert [samples.prompt_of(i) for i in range(3)] == [3, 999, 3]
    samples = make_samples(dit, np.arange(5), tmp_path / "array", 3, num_inference_steps=1)
    assert samples.manifest["settings"]["prompts"] == [0, 1, 2]
    for labels, match in (
        ([3, 1000], r"prompts\[1\] is 1000, expected a class label, an integer from 0 to 999"),
        (PROMPTS, "is 'a cat'"),
    ):
        with pytest.raises(ValueError, match=match):
            make_samples(dit, labels, tmp_path / "bad", 3)
    with pytest.raises(ValueError, match="DiTPipeline takes no height"):
        make_samples(dit, [3], tmp_path / "bad", 3, resolutions=[(32, 32)])
    assert not (tmp_path / "bad").exists()


def test_pipelines_that_are_refused(tmp_path: Path) -> None:
    parts = {"transformer_2": wan_transformer(), "boundary_ratio": 0.9}
    with pytest.raises(ValueError, match="WanPipeline has 2 transformers: distillation covers pipelines with one"):
        make_samples(wan(**parts), PROMPTS, tmp_path / "samples", **CALL)
    kontext = diffusers.FluxKontextPipeline(**tiny.flux_pipeline().components)
    picture = Image.new("RGB", (32, 24))
    call = {"image": picture, "max_area": 24 * 32, "_auto_resize": False, **SHORT, "height": 24, "width": 32}
    with pytest.raises(
        ValueError, match=r"takes hidden_states of \(1, 96, 16\) where the sampling loop has latents of"
    ):
        read_model_call(Recorder(kontext, call), "a cat", {})
    with pytest.raises(ValueError, match="ClassifierPipeline|Expected a diffusers pipeline|takes neither|got object"):
        make_samples(object(), PROMPTS, tmp_path / "samples", **CALL)
    assert not (tmp_path / "samples").exists()


def test_a_pipeline_that_takes_pictures_is_taken_without_one(tmp_path: Path) -> None:
    kontext = diffusers.FluxKontextPipeline(**tiny.flux_pipeline().components)
    arguments = {**CALL["call_arguments"], "max_area": 24 * 32}
    call = {**CALL, "num_samples": 2, "resolutions": [(24, 32)], "call_arguments": arguments}
    assert len(make_samples(kontext, PROMPTS, tmp_path, **call)) == 2


def test_a_pipeline_that_takes_no_empty_prompt(tmp_path: Path) -> None:
    case = PIPELINES["Qwen-Image"]
    pipe = case.make()
    encode = pipe.encode_prompt

    def picky(prompt: Any, **arguments: Any) -> Any:
        if "" in prompt:
            raise RuntimeError("nothing to encode")
        return encode(prompt, **arguments)

    pipe.encode_prompt = picky
    samples = make(case, pipe, tmp_path)
    assert not samples.has_null
    assert not samples.null_fits(0)
    with pytest.raises(
        ValueError, match="no conditioning of no prompt .RuntimeError: nothing to encode.: train without"
    ):
        samples.batch([0], [True])


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline()
    with torch.no_grad():
        pipe.text_encoder_2.shared.weight[3 + tiny.WORDS.index("red")] = float("nan")
    with pytest.raises(ValueError, match=r"latents of sample 2 \('the red cat'\) are not finite"):
        make_samples(pipe, PROMPTS, tmp_path / "samples", **{**CALL, "batch_size": 1})
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="FluxTransformer2DModel gives NaN or infinity for 'a cat'"):
        make_samples(pipe, PROMPTS, tmp_path / "none", **CALL)
    assert not (tmp_path / "none").exists()


def test_indices_that_do_not_go_together(tmp_path: Path) -> None:
    samples = make_samples(tiny.flux_pipeline(), PROMPTS, tmp_path, **CALL)
    (first, *_), (second, *_) = samples.groups
    for indices, match in (
        ([first, second], "differ in size or in the shape"),
        ([], "Got 0 samples"),
        ([7], "holds samples 0 to 6"),
    ):
        with pytest.raises(ValueError, match=match):
            samples.batch(indices)
    batch = samples.batch([first, first]).to("cpu", torch.bfloat16)
    assert batch.latents.dtype == batch.arguments["encoder_hidden_states"].dtype == torch.bfloat16


def tree(length: int, mask: bool = True, value: float = 1.0) -> dict[str, Any]:
    """Arguments of one sample with a prompt of some length."""
    rows = torch.full((1, length, 3), value)
    return {
        "text": rows,
        "nested": {"rows": (rows[None].transpose(1, 2)[0], torch.ones(4))},
        "flags": [torch.tensor([value]), None, True, "name", 2.5],
        **({"text_mask": torch.ones(1, length, dtype=torch.long)} if mask else {}),
    }


def doubled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: doubled(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(doubled, value))
    batched = isinstance(value, torch.Tensor) and value.shape[0] == 1
    return torch.cat([value, value]) if batched else value


def test_prompts_of_several_lengths_are_padded_where_a_mask_says_so() -> None:
    short, long = tree(3), tree(5, value=2.0)
    short["nested"] = long["nested"] = {"none": None}
    places = find_places(short, doubled(short))
    assert places == {"text": 0, "flags.0": 0, "text_mask": 0}
    padding = find_padding(short, places)
    assert padding == {"text": "text_mask", "text_mask": "text_mask"}
    shapes: dict[str, Any] = {}

    def keep(tensor: torch.Tensor) -> str:
        shapes[str(len(shapes))] = tensor.shape
        return str(len(shapes) - 1)

    forms = [form(pack(some, keep), shapes.__getitem__, places, padding) for some in (short, long)]
    assert forms[0] == forms[1]
    both = together([short, long], places, padding)
    assert both["text_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert both["text"][0, :, 0].tolist() == [1, 1, 1, 0, 0]
    assert both["text"][1, :, 0].tolist() == [2.0] * 5
    assert both["flags"][1:] == [None, True, "name", 2.5]
    unmasked = [tree(length, mask=False) for length in (3, 5)]
    places = find_places(unmasked[0], doubled(unmasked[0]))
    assert not find_padding(unmasked[0], places)
    forms = [form(pack(some, keep), shapes.__getitem__, places, {}) for some in unmasked]
    assert forms[0] != forms[1]


@pytest.mark.parametrize(
    ("one", "two", "match"),
    [
        ({"x": torch.ones(3, 2)}, {"x": torch.ones(6, 2)}, r"argument x is a tensor \(3, 2\) for one sample and a"),
        ({"x": [1, 2]}, {"x": [1, 2, 1, 2]}, "argument x is a list of 2 for one sample and a list of 4"),
        ({"x": {"y": 3}}, {"x": {"y": 6}}, "argument x.y is 3 for one sample and 6 for two"),
        ({"x": None}, {"x": torch.ones(2)}, "argument x is None for one sample and a tensor"),
    ],
)
def test_arguments_that_hide_their_samples(one: Any, two: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        find_places(one, two)


def test_arguments_that_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="argument x.y holds a object: samples can hold tensors"):
        pack({"x": {"y": object()}}, lambda _: "")
