"""What is found out once per directory, by a few short runs of the pipeline, and kept in `settings.json`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffusers_linattn.files import nearest_existing
from diffusers_linattn.generation import call_parameters
from diffusers_linattn.samples.arguments import Places, batch_of, first_difference, leaves, row
from diffusers_linattn.samples.conditioning import ConditioningRecorder, Size, size_arguments, size_name
from diffusers_linattn.samples.model_call import ModelCall
from diffusers_linattn.samples.probe import conditioning_of, read_model_call, read_places
from diffusers_linattn.samples.recorder import Recorder
from diffusers_linattn.samples.settings import Assignment
from diffusers_linattn.samples.work import Job


MAX_SHARD_BYTES = 512_000_000
MAX_PER_SHARD = 64

# Latents are kept as the sampling loop has them, in fp32 at most.
_BYTES_OF_A_LATENT = 4


def make_plan(recorder: Recorder, assignment: Assignment) -> dict[str, Any]:
    """Find out how the pipeline calls its transformer, how large samples are, and how many go into a file.

    Raises:
        ValueError: A pipeline whose samples cannot be kept, or that does not take one of the resolutions.
    """
    prompt, sizes = assignment.prompts[0], assignment.sizes()
    _check_sizes(recorder.pipe, sizes)
    first = size_arguments(sizes[0])
    without_guidance = recorder.without_guidance(prompt, first)
    call = read_model_call(recorder, prompt, first | without_guidance)
    places, padding = read_places(recorder, call, prompt, first | without_guidance)
    conditioning = ConditioningRecorder(recorder, call, without_guidance)
    shapes = {size_name(size): conditioning.latent_shape(prompt, size) for size in sizes}
    sample_bytes = max(math.prod(shape) for shape in shapes.values()) * _BYTES_OF_A_LATENT
    tensors = leaves(conditioning.arguments(prompt, sizes[0]))
    prompt_bytes = sum(tensor.nbytes for path, tensor in tensors.items() if _of_sample(path, places))
    null, problem = _null_prompt(recorder, conditioning, places, prompt, sizes[0])
    return {
        "call": asdict(call),
        "without_guidance": without_guidance,
        "places": places,
        "padding": padding,
        "latent_shapes": shapes,
        "null_prompt": null,
        "no_null_because": problem,
        "sample_bytes": sample_bytes,
        "prompt_bytes": prompt_bytes,
        "samples_per_shard": _per_shard(sample_bytes),
        "prompts_per_shard": _per_shard(prompt_bytes),
    }


def conditioning_jobs(recorder: Recorder, assignment: Assignment, plan: dict[str, Any]) -> list[Job]:
    """The files of conditioning: a prompt's arguments at the resolutions of its samples, the null prompt last."""
    conditioning = ConditioningRecorder(recorder, ModelCall(**plan["call"]), plan["without_guidance"])
    prompts: list[tuple[Any, Sequence[Size]]] = list(
        zip(assignment.prompts, assignment.sizes_of_prompts(), strict=True)
    )
    if plan["null_prompt"] is not None:
        prompts.append((plan["null_prompt"], assignment.sizes()))
    return conditioning.jobs(prompts, plan["prompts_per_shard"])


def check_disk(directory: Path, assignment: Assignment, plan: dict[str, Any]) -> None:
    """Raise if what is still to be made will not fit on the disk."""
    need = assignment.num_samples * plan["sample_bytes"] + len(assignment.prompts) * plan["prompt_bytes"]
    need -= sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    free = shutil.disk_usage(nearest_existing(directory)).free
    if need > free:
        raise ValueError(
            f"{directory} needs about {need / 1e9:.2f} GB more, but the disk has {free / 1e9:.2f} GB left: free some, "
            "make fewer samples, or give another directory."
        )


def _check_sizes(pipe: Any, sizes: Sequence[Size]) -> None:
    """Raise for a resolution that the pipeline would round, as FLUX does, and then make pictures of another."""
    processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
    multiple = getattr(processor, "config", {}).get("vae_scale_factor", 1)
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise ValueError(
                f"resolutions has ({height}, {width}), expected multiples of {multiple} for {type(pipe).__name__}: "
                f"give ({max(height // multiple, 1) * multiple}, {max(width // multiple, 1) * multiple}), for example."
            )


def _null_prompt(
    recorder: Recorder, conditioning: ConditioningRecorder, places: Places, prompt: Any, size: Size
) -> tuple[Any, str | None]:
    """What stands for no prompt, as in training with prompt dropout; or why there is nothing."""
    null = recorder.model.config.num_embeds_ada_norm if recorder.of_classes else ""
    try:
        recorded = conditioning.arguments(null, size)
        guided = _unguided_rows(recorder, conditioning.call, places, prompt, size)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}"
    # Some pipelines put words around a prompt that they leave out around the one it is guided away from.
    if guided and all(first_difference(recorded, row, tolerance=0.05) is not None for row in guided):
        return None, "the pipeline guides by something else than what it passes for an empty prompt"
    return null, None


def _unguided_rows(
    recorder: Recorder, call: ModelCall, places: Places, prompt: Any, size: Size
) -> list[dict[str, Any]]:
    """The conditioning of each sample in the first step with guidance; none where the pipeline does not guide."""
    arguments: dict[str, Any] = {**size_arguments(size), "num_inference_steps": 2}
    if "negative_prompt" in call_parameters(recorder.pipe):
        arguments["negative_prompt"] = ""
    calls = [conditioning_of(call, found) for found in recorder.first_steps(prompt, arguments, steps=1).calls]
    batches = [batch_of(found, places) for found in calls]
    if sum(batches) < 2:
        return []
    return [row(found, places, k) for found, batch in zip(calls, batches, strict=True) for k in range(batch)]


def _of_sample(path: str, places: dict[str, Any]) -> bool:
    return path in places or any(path.startswith(f"{place}.") for place in places)


def _per_shard(size: int) -> int:
    return max(1, min(MAX_PER_SHARD, MAX_SHARD_BYTES // max(size, 1)))
