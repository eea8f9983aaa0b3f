"""Run any pipeline on prompts and seeds, and catch the latents of its sampling loop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Step:
    """One step of a scheduler.

    Args:
        model_output: What the scheduler was given as the model's output.
        timestep: The scheduler's timestep.
        sample: `(batch, ...)` latents before the step.
        result: `(batch, ...)` latents after it.
    """

    model_output: torch.Tensor
    timestep: torch.Tensor | float
    sample: torch.Tensor
    result: torch.Tensor


def generate_latents(
    pipe: Any, prompts: Sequence[str] | Sequence[int], seeds: Sequence[int], **call_arguments: Any
) -> torch.Tensor:
    """Run a pipeline and return its final latents, in the form that its sampling loop gives them.

    The latents are what the scheduler returned last, so that pipelines without a latent output have them as well.

    Args:
        pipe: Any pipeline that takes prompts or class labels and has a `scheduler`.
        prompts: One prompt (or class label) per sample.
        seeds: One seed per sample; each sample has its own generator, on the CPU.
        call_arguments: For the pipeline's call.

    Returns:
        `(samples, ...)` latents, in the dtype and on the device of the sampling loop.

    Raises:
        ValueError: Numbers of prompts and seeds that differ, a pipeline that takes neither prompts nor class labels,
            that has no scheduler, or whose scheduler was not called with these samples.

    Example:
        >>> from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, AutoencoderKL
        >>> from diffusers_linattn.generation import generate_latents
        >>> model = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        ...     num_layers=1, sample_size=8)
        >>> pipe = DiTPipeline(model, AutoencoderKL(latent_channels=4), DDIMScheduler())
        >>> generate_latents(pipe, [3, 7], seeds=[0, 1], num_inference_steps=2).shape
        torch.Size([2, 4, 8, 8])
    """
    # Pictures that nobody asked for are not decoded, where the pipeline can do without.
    output = {"output_type": "latent"} if "output_type" in call_parameters(pipe) else {}
    return _generate(pipe, prompts, seeds, {**output, **call_arguments})[0]


def generate_images(
    pipe: Any, prompts: Sequence[str] | Sequence[int], seeds: Sequence[int], **call_arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a pipeline and return its final latents and its pictures.

    Args:
        pipe: As in [`generate_latents`], with a VAE.
        prompts: One prompt (or class label) per sample.
        seeds: One seed per sample.
        call_arguments: For the pipeline's call.

    Returns:
        The latents as [`generate_latents`] returns them, and the pictures in fp32 and in [0, 1]:
        `(samples, 3, height, width)`, of video pipelines `(samples, frames, 3, height, width)`.

    Raises:
        ValueError: As [`generate_latents`], or a pipeline that does not return pictures as tensors.

    Example:
        >>> latents, images = generate_images(pipe, ["a cat"], [0], guidance_scale=3.5)  # doctest: +SKIP
    """
    latents, output = _generate(pipe, prompts, seeds, {**call_arguments, "output_type": "pt"})
    images = output[0]
    if isinstance(images, list | tuple) and images and all(isinstance(image, torch.Tensor) for image in images):
        images = torch.stack(list(images))
    if isinstance(images, np.ndarray):  # DiTPipeline of older releases: channels last
        images = torch.from_numpy(images).movedim(-1, -3)
    if not isinstance(images, torch.Tensor) or len(images) != len(latents):
        raise ValueError(
            f"{type(pipe).__name__} returned a {type(images).__name__} for output_type='pt', expected a tensor with "
            f"{len(latents)} pictures."
        )
    return latents, images.float()


def check_pipeline(pipe: Any) -> None:
    """Raise for a transformer that is given in the place of its pipeline."""
    if isinstance(pipe, torch.nn.Module):
        raise ValueError(
            f"Got a {type(pipe).__name__}: give the pipeline, not its transformer. Its scheduler and text encoders "
            "are needed."
        )


def prompt_argument(pipe: Any) -> str:
    """The name of the argument that takes what a sample is of: `"prompt"`, or `"class_labels"`.

    Raises:
        ValueError: The pipeline's call takes neither.
    """
    names = call_parameters(pipe)
    for name in ("prompt", "class_labels"):
        if name in names:
            return name
    raise ValueError(
        f"{type(pipe).__name__} takes neither prompt nor class_labels: expected a pipeline that makes pictures or "
        "videos from prompts or classes."
    )


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a pipeline's call, by name."""
    if not callable(pipe):
        raise ValueError(f"Expected a diffusers pipeline, got a {type(pipe).__name__}.")
    return dict(inspect.signature(pipe.__call__).parameters)


def call_pipeline(
    pipe: Any,
    prompts: Sequence[str] | Sequence[int],
    generators: Sequence[torch.Generator],
    call_arguments: dict[str, Any],
) -> Any:
    """Call a pipeline for these prompts, with a generator for each.

    Its progress bar is silent meanwhile, and what it draws without a generator leaves the global one as it was.
    """
    known = call_parameters(pipe)
    unknown = sorted(call_arguments.keys() - known.keys())
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}: expected some of {', '.join(known)}.")
    arguments = {prompt_argument(pipe): list(prompts), "generator": list(generators), **call_arguments}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with _silent(pipe), torch.random.fork_rng(devices=devices):
        torch.manual_seed(generators[0].initial_seed())
        return pipe(**arguments)


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator for each seed, on the CPU, where seeds mean the same on every machine."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def scheduler_of(pipe: Any) -> Any:
    """The scheduler of a pipeline.

    Raises:
        ValueError: It has none.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "step"):
        raise ValueError(f"{type(pipe).__name__} has no scheduler with steps, which its latents are read from.")
    return scheduler


@contextmanager
def caught_steps(
    pipe: Any, catch: Callable[[Step], None], generators: Sequence[torch.Generator] = ()
) -> Iterator[None]:
    """Within this context every step of the pipeline's scheduler is shown to `catch`.

    Args:
        pipe: The pipeline.
        catch: Called after each step.
        generators: One for each sample, for schedulers that draw noise in pipelines that do not pass them on.

    Raises:
        ValueError: The pipeline has no scheduler.
    """
    scheduler = scheduler_of(pipe)
    original: Any = type(scheduler).step
    signature = inspect.signature(original)
    before = vars(scheduler).get("step")
    call = scheduler.step

    @functools.wraps(original)  # pipelines look at the signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not scheduler:
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        latents = given.arguments["sample"]
        if "generator" in signature.parameters and given.arguments.get("generator") is None and generators:
            given.arguments["generator"] = _repeated(generators, len(latents))
        output = call(*given.args[1:], **given.kwargs)
        catch(Step(given.arguments["model_output"], given.arguments["timestep"], latents, output[0]))
        return output

    # A method, not a function: in a copy that a pipeline makes of its scheduler it is bound to the copy.
    scheduler.step = MethodType(step, scheduler)
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


def _repeated(generators: Sequence[torch.Generator], rows: int) -> list[torch.Generator]:
    """A generator for each row of a batch that may hold all samples twice, which then draw the same."""
    copies = []
    for i in range(len(generators), rows):
        copy = torch.Generator("cpu")
        copy.set_state(generators[i % len(generators)].get_state())
        copies.append(copy)
    return [*generators, *copies]


def _generate(
    pipe: Any, prompts: Sequence[str] | Sequence[int], seeds: Sequence[int], call_arguments: dict[str, Any]
) -> tuple[torch.Tensor, Any]:
    if len(prompts) != len(seeds) or len(prompts) == 0:
        raise ValueError(f"Got {len(prompts)} prompts and {len(seeds)} seeds, expected one seed per prompt.")
    last: list[torch.Tensor] = []

    def keep(step: Step) -> None:
        last[:] = [step.result]

    generators = generators_of(seeds)
    with caught_steps(pipe, keep, generators):
        output = call_pipeline(pipe, prompts, generators, call_arguments)
    found = last[0] if last else None
    # Some pipelines step the conditional and the unconditional half of a doubled batch alike.
    if found is None or len(found) not in (len(prompts), 2 * len(prompts)):
        shape = None if found is None else tuple(found.shape)
        raise ValueError(
            f"{type(pipe).__name__} made {len(prompts)} samples, its scheduler stepped latents of {shape}: expected "
            "one row per sample."
        )
    return found[: len(prompts)].detach(), output


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    name = "_progress_bar_config"
    before = vars(pipe).get(name)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            delattr(pipe, name)
        else:
            setattr(pipe, name, before)
