"""Copies of a converted model in memory and on disk, averages of its weights, and models that are shared."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel

from diffusers_linattn import (
    ClearProcessor,
    GLAProcessor,
    linearize,
    load_linear_attention,
    original_attention,
    restore,
    save_linear_attention,
    status,
)
from diffusers_linattn.linearize import layers_of

import tiny


@pytest.fixture(params=tiny.TRAINABLE)
def model(request: pytest.FixtureRequest) -> Any:
    return student(request.param)


def student(mechanism: str) -> Any:
    """Processors with weights of their own, and layers with projections of their own."""
    model = tiny.train(linearize(tiny.flux(), tiny.TRAINABLE[mechanism]))
    for layer in layers_of(model):
        layer.processor.keep_original_weights(layer.attn, ["to_q.weight"])
        with torch.no_grad():
            layer.attn.to_q.weight.mul_(1.5)
    return model


@torch.no_grad()
def run(model: Any, *size: int) -> torch.Tensor:
    return model(**tiny.flux_inputs(*(size or (6, 9))))[0]


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_have_weights_and_layouts_of_their_own(copier: Any, model: Any) -> None:
    expected, plain = run(model), run(tiny.flux())
    other = copier(model)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    run(other, 4, 4)
    assert torch.equal(run(model), expected)
    assert torch.equal(run(other), expected)
    with torch.no_grad():
        for layer in layers_of(model):
            for parameter in layer.processor.own_parameters().values():
                parameter.mul_(3)
    assert not torch.equal(run(model), expected)
    restore(model)
    assert torch.equal(run(other), expected)
    assert torch.equal(run(restore(other)), plain)


def test_a_copied_pipeline(model: Any) -> None:
    call = {"prompt": "a cat", **tiny.FLUX_CALL}
    pipe = tiny.flux_pipeline()
    pipe.transformer = model
    expected = tiny.generate(pipe, **call)
    other = copy.deepcopy(pipe)
    restore(pipe)
    assert torch.equal(tiny.generate(other, **call), expected)


def test_save_pretrained_writes_the_weights_and_reloading_gives_stock_attention(model: Any, tmp_path: Path) -> None:
    expected = run(model)
    save_linear_attention(model, tmp_path / "student")
    model.save_pretrained(tmp_path / "model")
    reloaded = FluxTransformer2DModel.from_pretrained(tmp_path / "model")
    assert not status(reloaded).converted
    # Stock attention with the projections of the student: neither the student nor the original.
    stock = tiny.flux()
    stock.load_state_dict({name: t for name, t in model.state_dict().items() if ".processor." not in name})
    assert torch.equal(run(reloaded), run(stock))
    assert not torch.allclose(run(reloaded), run(tiny.flux()), atol=1e-4)
    assert not torch.allclose(run(reloaded), expected, atol=1e-4)
    # What brings the student back, into either of them.
    assert torch.equal(run(load_linear_attention(reloaded, tmp_path / "student")), expected)
    assert torch.equal(run(load_linear_attention(tiny.flux(), tmp_path / "student")), expected)
    # To publish the original again: restore first.
    restore(model).save_pretrained(tmp_path / "original")
    assert torch.equal(run(FluxTransformer2DModel.from_pretrained(tmp_path / "original")), run(tiny.flux()))


def test_a_saved_pipeline_and_its_saved_attention(model: Any, tmp_path: Path) -> None:
    call = {"prompt": "a cat", **tiny.FLUX_CALL}
    pipe = tiny.flux_pipeline()
    pipe.transformer = model
    expected = tiny.generate(pipe, **call)
    pipe.save_pretrained(tmp_path / "pipe")
    save_linear_attention(pipe, tmp_path / "student")
    again = FluxPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert not torch.allclose(tiny.generate(again, **call), expected, atol=1e-3)
    load_linear_attention(again, tmp_path / "student")
    torch.testing.assert_close(tiny.generate(again, **call), expected, atol=2e-5, rtol=0)


def train_steps(model: Any, ema: EMAModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(3):
        model(**tiny.flux_inputs(seed=seed))[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())


def test_ema(model: Any, tmp_path: Path) -> None:
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = EMAModel(model.parameters(), decay=0.5, use_ema_warmup=False)
    train_steps(model, ema)
    last = run(model)
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    averaged = run(model)
    assert not torch.equal(averaged, last)
    own = [name for name in start if ".processor." in name]
    assert any(not torch.equal(dict(model.named_parameters())[name], start[name]) for name in own)
    save_linear_attention(model, tmp_path / "ema")
    assert torch.equal(run(load_linear_attention(copy.deepcopy(model), tmp_path / "ema")), averaged)
    ema.restore(model.parameters())
    assert torch.equal(run(model), last)
    state = copy.deepcopy(ema.state_dict())
    again = EMAModel(model.parameters())
    again.load_state_dict(state)
    again.copy_to(model.parameters())
    assert torch.equal(run(model), averaged)


def test_save_pretrained_of_ema_knows_no_processors(tmp_path: Path) -> None:
    arguments = {"model_cls": FluxTransformer2DModel, "model_config": tiny.flux().config}
    model = student("clear")
    with pytest.raises(RuntimeError, match="size"):
        EMAModel(model.parameters(), **arguments).save_pretrained(tmp_path / "pooled")
    windows = linearize(tiny.flux(), ClearProcessor(window=2))  # adds no weights
    EMAModel(windows.parameters(), **arguments).save_pretrained(tmp_path / "windows")
    reloaded = FluxTransformer2DModel.from_pretrained(tmp_path / "windows")
    assert torch.equal(run(reloaded), run(tiny.flux()))


def test_two_pipelines_that_share_a_transformer() -> None:
    first = tiny.flux_pipeline()
    second = FluxImg2ImgPipeline(**first.components)
    second.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(3))
    text = {"prompt": "a cat", **tiny.FLUX_CALL}
    edit = {**text, "image": image, "strength": 1.0}
    plain = tiny.generate(first, **text), tiny.generate(second, **edit)
    linearize(first, ClearProcessor(window=100))
    assert len(status(second).converted) == 4
    for _ in range(2):
        torch.testing.assert_close(tiny.generate(first, **text), plain[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(tiny.generate(second, **edit), plain[1], atol=2e-5, rtol=0)
    linearize(second, GLAProcessor())
    assert not torch.allclose(tiny.generate(first, **text), plain[0], atol=1e-4)
    restore(second)
    assert torch.equal(tiny.generate(first, **text), plain[0])
    assert torch.equal(tiny.generate(second, **edit), plain[1])


@pytest.mark.parametrize("again", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@torch.no_grad()
def test_a_state_dict_loaded_into_a_converted_model(again: Any, tmp_path: Path) -> None:
    """As own training loops and accelerate go on: what it changes is saved, and the original is still known."""
    stock, trained = run(tiny.flux()), student("linear")
    resumed = again(linearize(tiny.flux(), tiny.TRAINABLE["linear"]))
    resumed.load_state_dict(trained.state_dict())
    assert torch.equal(run(resumed), run(trained))
    save_linear_attention(resumed, tmp_path)
    assert torch.equal(run(load_linear_attention(tiny.flux(), tmp_path)), run(trained))
    with original_attention(resumed):
        assert torch.equal(run(resumed), stock)
    restore(resumed).load_state_dict(tiny.flux().state_dict())
    assert torch.equal(run(resumed), stock)
    assert not any(layer.attn._load_state_dict_pre_hooks for layer in layers_of(resumed))


def test_a_state_dict_that_changes_nothing_keeps_nothing() -> None:
    model = linearize(tiny.flux(), tiny.TRAINABLE["linear"])
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not any(layer.processor.original_weights for layer in layers_of(model))


def in_threads(*jobs: Any) -> None:
    errors: list[BaseException] = []

    def guarded(job: Any) -> None:
        try:
            job()
        except BaseException as error:  # an assertion in a thread would otherwise be lost
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_threads_with_a_pipeline_each() -> None:
    stock = tiny.flux_pipeline()
    pipes = [tiny.train(linearize(tiny.flux_pipeline(), tiny.TRAINABLE[name])) for name in ("clear", "linear")]
    calls = [{"prompt": "a cat", **tiny.FLUX_CALL}, {"prompt": "a dog", **tiny.FLUX_CALL, "height": 40}]
    jobs, together = [], threading.Barrier(3)
    for pipe, call in zip([*pipes, stock], [*calls, calls[0]], strict=True):
        expected = tiny.generate(pipe, **call)

        def job(pipe: Any = pipe, call: Any = call, expected: Any = expected) -> None:
            for _ in range(4):
                together.wait(60)
                assert torch.equal(tiny.generate(pipe, **call), expected)

        jobs.append(job)
    in_threads(*jobs)


def test_two_threads_with_one_transformer() -> None:
    model, jobs, together = linearize(tiny.flux(), ClearProcessor(window=2)), [], threading.Barrier(2)
    for size in ((12, 20), (20, 12)):  # as many tokens, so that nothing but the numbers tells
        expected = run(model, *size).detach()

        def job(size: tuple[int, int] = size, expected: torch.Tensor = expected) -> None:
            together.wait(60)
            for _ in range(20):
                torch.testing.assert_close(run(model, *size), expected)

        jobs.append(job)
    in_threads(*jobs)


def test_converting_in_one_thread_while_another_generates() -> None:
    pipe, model = tiny.train(linearize(tiny.flux_pipeline(), tiny.TRAINABLE["gla"])), tiny.flux()
    call = {"prompt": "a cat", **tiny.FLUX_CALL}

    def draw() -> torch.Tensor:
        """Noise from the random state that all threads share."""
        images = pipe(**call, output_type="latent").images
        return torch.cat([images.flatten(), torch.rand(4)])

    torch.manual_seed(4)
    expected = [draw() for _ in range(4)]
    done = threading.Event()

    def convert() -> None:
        while not done.is_set():
            linearize(model, GLAProcessor(input_conv=True))
            restore(model)

    def generate() -> None:
        try:
            torch.manual_seed(4)
            for output in expected:
                assert torch.equal(draw(), output)
        finally:
            done.set()

    in_threads(convert, generate)
    assert torch.equal(run(model), run(tiny.flux()))
