"""Reads off a short run how a pipeline calls its transformer, before any long work starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffusers_linattn.samples.arguments import (
    Padding,
    Places,
    find_padding,
    find_places,
    first_difference,
    pack,
    together,
)
from diffusers_linattn.samples.model_call import ModelCall
from diffusers_linattn.samples.recorder import Recorder, Run


# Timesteps that pipelines make of the scheduler's t, which counts to n: t, t/n, 1 - t/n, n - t.
def _usual_timesteps(n: float) -> list[tuple[float, float]]:
    return [(1.0, 0.0), (1.0 / n, 0.0), (-1.0 / n, 1.0), (-1.0, n)]


def read_model_call(recorder: Recorder, prompt: Any, arguments: dict[str, Any]) -> ModelCall:
    """How the pipeline calls its transformer, read off the first steps of a run without guidance.

    Args:
        recorder: Of the pipeline.
        prompt: Any prompt.
        arguments: For the pipeline's call: size and what switches guidance off.

    Raises:
        ValueError: The transformer is not called once a step with the latents, a timestep that is linear in the
            scheduler's, and arguments that stay; or the scheduler is not given its output.
    """
    pipeline, transformer = type(recorder.pipe).__name__, type(recorder.model).__name__
    run = recorder.first_steps(prompt, {**arguments, "num_inference_steps": 3})
    if not len(run.calls) == len(run.outputs) == len(run.steps) >= 2:
        raise ValueError(
            f"{pipeline} calls its transformer {len(run.calls)} times in {len(run.steps)} steps without guidance: "
            "expected once a step."
        )
    if not all(output.isfinite().all() for output in run.outputs):
        raise ValueError(
            f"{transformer} gives NaN or infinity for {prompt!r}, expected finite numbers: bfloat16 or float32 may "
            "help."
        )
    changing = [name for name in run.calls[0] if first_difference(run.calls[0][name], run.calls[1][name]) is not None]
    latents = [name for name in changing if _one_tensor(run.calls[0][name]) is not None]
    timesteps = [name for name in changing if _number(run.calls[0][name]) is not None]
    if len(latents) != 1 or len(timesteps) != 1 or len(changing) != 2:
        raise ValueError(
            f"{pipeline} changes {', '.join(changing) or 'nothing'} from one call of {transformer} to the next: "
            "expected one tensor of latents and one timestep per sample. Distillation covers models that take no more "
            "than that."
        )
    _check_latents(run, latents[0], transformer)
    scale, offset = _fit_timestep(recorder, run, timesteps[0])
    as_list = isinstance(run.calls[0][latents[0]], list)
    call = ModelCall(latents[0], as_list, scale, offset, timesteps[0], 1.0)
    return replace(call, output_sign=_output_sign(run, call, pipeline))


def conditioning_of(call: ModelCall, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a transformer is called with, without latents and timestep."""
    return {name: value for name, value in arguments.items() if name not in (call.latents, call.timestep)}


def latents_of(call: ModelCall, arguments: dict[str, Any]) -> torch.Tensor:
    """`(batch, ...)` the latents that a transformer is called with."""
    latents = arguments[call.latents]
    return torch.stack(latents) if call.as_list else latents


def read_places(recorder: Recorder, call: ModelCall, prompt: Any, arguments: dict[str, Any]) -> tuple[Places, Padding]:
    """Where samples are in the conditioning, from a call for one and a call for two.

    Raises:
        ValueError: Arguments that cannot be put together from those of single samples, that cannot be kept, or that
            depend on the noise.
    """
    one = conditioning_of(call, recorder.first_call([prompt], arguments))
    two = conditioning_of(call, recorder.first_call([prompt, prompt], arguments))
    places = find_places(one, two)
    pack(one, lambda _: "")
    again = conditioning_of(call, recorder.first_call([prompt], arguments, seed=1))
    different = first_difference(one, again)
    if different is not None:
        raise ValueError(
            f"{type(recorder.pipe).__name__} gives its transformer another {different} for another seed: samples keep "
            "what it is given once per prompt."
        )
    padding = find_padding(one, places)
    # Two rows of a text encoder's batch are equal up to rounding, in bf16 to two digits.
    different = first_difference(together([one, one], places, padding), two, tolerance=0.05)
    if different is not None:
        raise ValueError(
            f"{type(recorder.pipe).__name__} gives its transformer another {different} for two samples than for each "
            "alone: samples of such a model cannot be kept."
        )
    return places, padding


def _one_tensor(value: Any) -> torch.Tensor | None:
    """The latents in an argument: a tensor of several numbers, or a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, torch.Tensor) and value.numel() > 1 else None


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) else None


def _check_latents(run: Run, name: str, transformer: str) -> None:
    for arguments, step in zip(run.calls, run.steps, strict=True):
        taken, looped = _one_tensor(arguments[name]), step.sample
        assert taken is not None
        alike = sizes_above_one(taken.shape) == sizes_above_one(looped.shape)
        if alike:  # schedulers may scale their model's input, no more
            a, b = taken.double().flatten(), looped.double().flatten()
            alike = bool(torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99)
        if not alike:
            raise ValueError(
                f"{transformer} takes {name} of {tuple(taken.shape)} where the sampling loop has latents of "
                f"{tuple(looped.shape)}: distillation covers pipelines whose latents are the transformer's input."
            )


def sizes_above_one(shape: Sequence[int]) -> list[int]:
    """A shape without the dimensions that can be inserted and left out at will."""
    return [size for size in shape if size != 1]


def _fit_timestep(recorder: Recorder, run: Run, name: str) -> tuple[float, float]:
    values = [arguments[name] for arguments in run.calls]
    taken, given = [_number(value) for value in values], [float(step.timestep) for step in run.steps]
    dtype = values[0].dtype if isinstance(values[0], torch.Tensor) else torch.float64
    epsilon = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0

    def fits(scale: float, offset: float) -> bool:
        return all(
            abs(offset + scale * t - tau) <= 4 * epsilon * max(abs(scale * t), abs(offset), abs(tau)) + 1e-9
            for t, tau in zip(given, taken, strict=True)
            if tau is not None
        )

    n = float(recorder.pipe.scheduler.config.get("num_train_timesteps", 1000))
    usual = [(scale, offset) for scale, offset in _usual_timesteps(n) if fits(scale, offset)]
    if usual:
        return usual[0]
    assert taken[0] is not None
    assert taken[-1] is not None
    slope = (taken[-1] - taken[0]) / (given[-1] - given[0]) if given[-1] != given[0] else math.nan
    offset = taken[0] - slope * given[0]
    # A line through numbers of few digits would be a guess.
    if len(given) >= 3 and epsilon < 1e-6 and fits(slope, offset):
        return slope, offset
    raise ValueError(
        f"{type(recorder.model).__name__} is given the timesteps {taken} for the scheduler's {given}: expected one "
        "line through them."
    )


def _output_sign(run: Run, call: ModelCall, pipeline: str) -> float:
    latents, output, given = latents_of(call, run.calls[0]), run.outputs[0], run.steps[0].model_output
    readings = [output]
    if output.ndim == latents.ndim:
        # Learned variance doubles the channels; pipelines leave it out before the step.
        wider = [i for i in range(output.ndim) if output.shape[i] == 2 * latents.shape[i]]
        readings += [output.narrow(i, 0, latents.shape[i]) for i in wider[:1]]
    for reading in readings:
        for sign in (1.0, -1.0):
            if reading.numel() == given.numel() and torch.allclose(
                sign * reading.double().flatten(), given.double().flatten(), rtol=1e-2, atol=1e-5
            ):
                return sign
    raise ValueError(
        f"{pipeline} gives its scheduler {tuple(given.shape)} that is neither its transformer's output "
        f"{tuple(output.shape)} nor its negative: distillation covers pipelines that pass the output on."
    )
