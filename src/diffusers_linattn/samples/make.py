"""The teacher's own samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_linattn.generation import call_parameters, generate_latents
from diffusers_linattn.linearize import original_attention
from diffusers_linattn.ops.checks import check_positive_int
from diffusers_linattn.samples.conditioning import shard_name, size_arguments, size_name
from diffusers_linattn.samples.plan import check_disk, conditioning_jobs, make_plan
from diffusers_linattn.samples.reading import MANIFEST_NAME, Samples
from diffusers_linattn.samples.recorder import Recorder
from diffusers_linattn.samples.settings import (
    FORMAT_VERSION,
    SETTINGS_NAME,
    Assignment,
    as_json,
    describe_pipeline,
    open_directory,
    read_prompts,
    read_sizes,
)
from diffusers_linattn.samples.shards import read_shard
from diffusers_linattn.samples.work import Content, Job, complete, remove_locks, write_together


def make_samples(
    pipe: Any,
    prompts: Sequence[str] | Sequence[int] | str | Path,
    directory: str | Path,
    num_samples: int = 10_000,
    batch_size: int = 4,
    resolutions: Sequence[tuple[int, int]] | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    call_arguments: dict[str, Any] | None = None,
) -> Samples:
    """Let a pipeline make the samples that its attention is distilled on, and keep them on disk.

    Kept per sample: the final latents; per distinct prompt: what the transformer is called with besides latents and
    timestep; once: the same for no prompt, and how the transformer is called. The original attention makes the
    samples, whether the pipeline is converted or not.

    An interrupted run goes on where it stopped, and several processes share the work, started by hand or by
    `accelerate launch`. Sample i depends on `seed` and i, up to the rounding that another `batch_size` may bring.

    Args:
        pipe: A pipeline with one transformer that is called with latents, a timestep, and arguments that stay the same
            from step to step: pictures or video, from prompts or class labels.
        prompts: Prompts or class labels: a list, a column of a dataset, or a text file with one per line. Sample i
            takes the i-th distinct one, modulo their number.
        directory: Where to; made if it does not exist.
        num_samples: How many.
        batch_size: Samples made at a time.
        resolutions: `(height, width)` in pixels; each sample draws one. `None` is the pipeline's default.
        guidance_scale: As in the pipeline's call; `None` is its default.
        num_inference_steps: As in the pipeline's call; `None` is its default.
        seed: Seeds everything.
        call_arguments: More arguments for the pipeline's call, such as `{"max_sequence_length": 256}` or
            `{"num_frames": 81}`.

    Returns:
        The samples, opened.

    Raises:
        ValueError: Prompts that are missing, empty or of the wrong kind, a pipeline whose samples cannot be kept, too
            little disk space, or a directory that holds samples of other settings, or other things.

    Example:
        >>> samples = make_samples(pipe, "prompts.txt", "samples/", num_samples=10_000, batch_size=8,
        ...     resolutions=[(1024, 1024), (768, 1344)], guidance_scale=3.5)  # doctest: +SKIP
    """
    for name, number in (("num_samples", num_samples), ("batch_size", batch_size)):
        check_positive_int(name, number)
    call = dict(call_arguments or {})
    for name, value in (("guidance_scale", guidance_scale), ("num_inference_steps", num_inference_steps)):
        if value is not None:
            call[name] = value
    recorder = Recorder(pipe, call)
    classes = recorder.model.config.num_embeds_ada_norm if recorder.of_classes else None
    settings = as_json(
        {
            "format_version": FORMAT_VERSION,
            "num_samples": num_samples,
            "prompts": read_prompts(prompts, num_samples, recorder.of_classes, classes),
            "resolutions": read_sizes(resolutions),
            "seed": seed,
            "call_arguments": call,
            "model": describe_pipeline(pipe),
        }
    )
    maker = _Maker(pipe, Assignment(settings), call, batch_size)
    return fill_directory(Path(directory), recorder, settings, maker.jobs)


def fill_directory(
    directory: Path,
    recorder: Recorder,
    settings: dict[str, Any],
    sample_jobs: Callable[[dict[str, Any]], list[Job]],
) -> Samples:
    """Make whatever of a directory of samples is not there yet.

    Args:
        directory: The directory.
        recorder: Of the pipeline.
        settings: What decides the samples, as JSON.
        sample_jobs: From the plan to the files of samples.
    """
    assignment = Assignment(settings)
    content = open_directory(directory, settings)
    if content is None:
        content = {"settings": settings, "plan": make_plan(recorder, assignment)}
    plan = content["plan"]
    check_disk(directory, assignment, plan)
    if not (directory / SETTINGS_NAME).exists():
        write_together(directory, SETTINGS_NAME, content)
    conditioning, samples = conditioning_jobs(recorder, assignment, plan), sample_jobs(plan)
    complete(directory, conditioning, "prompts", "prompt")
    complete(directory, samples, "samples", "sample")
    digests = {job.name: read_shard(directory / job.name).digest for job in conditioning + samples}
    write_together(directory, MANIFEST_NAME, {"format_version": FORMAT_VERSION, **content, "shards": digests})
    remove_locks(directory)
    return Samples(directory)


class _Maker:
    """Makes the files of samples."""

    def __init__(self, pipe: Any, assignment: Assignment, call_arguments: dict[str, Any], batch_size: int):
        self.pipe, self.assignment, self.batch_size = pipe, assignment, batch_size
        self.call_arguments = call_arguments
        default = call_parameters(pipe).get("guidance_scale")
        self.guidance_scale = call_arguments.get("guidance_scale", default.default if default else None)

    def jobs(self, plan: dict[str, Any]) -> list[Job]:
        """One job for each file."""
        size, total = plan["samples_per_shard"], self.assignment.num_samples

        def job(number: int, indices: range) -> Job:
            return Job(shard_name("samples", number), len(indices), lambda made: self.content(indices, plan, made))

        starts = range(0, total, size)
        return [job(number, range(start, min(start + size, total))) for number, start in enumerate(starts)]

    def content(self, indices: Sequence[int], plan: dict[str, Any], made: Callable[[int], Any]) -> Content:
        """The tensors and the record of one file: batches are formed inside of it, so that files are independent."""
        assignment = self.assignment
        groups: dict[tuple[int, int], list[int]] = {}
        for index in indices:
            groups.setdefault(assignment.size(index), []).append(index)
        tensors: dict[str, torch.Tensor] = {}
        for size, group in groups.items():
            shape = plan["latent_shapes"][size_name(size)]
            for start in range(0, len(group), self.batch_size):
                chosen = group[start : start + self.batch_size]
                for index, latents in zip(chosen, self._generate(chosen, size), strict=True):
                    tensors[f"latents.{index}"] = latents.reshape(shape).clone()
                made(len(chosen))
        records = [
            {
                "index": index,
                "prompt": assignment.prompts[assignment.prompt(index)],
                "seed": assignment.seed(index),
                "resolution": list(assignment.size(index)),
                "guidance_scale": self.guidance_scale,
            }
            for index in indices
        ]
        return tensors, {"samples": records}

    def _generate(self, indices: Sequence[int], size: tuple[int, int]) -> torch.Tensor:
        assignment = self.assignment
        with original_attention(self.pipe):
            latents = generate_latents(
                self.pipe,
                [assignment.prompts[assignment.prompt(index)] for index in indices],
                [assignment.seed(index) for index in indices],
                **self.call_arguments,
                **size_arguments(size),
            ).cpu()
        for index, sample in zip(indices, latents, strict=True):
            if not sample.isfinite().all():
                raise ValueError(
                    f"Sample {index} ({assignment.prompts[assignment.prompt(index)]!r}) is not finite: the pipeline "
                    "gives NaN or infinity in this dtype or at these settings; bfloat16 or float32 may help."
                )
        return latents
