"""Fills a directory with samples, wherever their latents come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_linattn.samples.conditioning import Size, shard_name, size_name
from diffusers_linattn.samples.plan import check_disk, conditioning_jobs, make_plan
from diffusers_linattn.samples.reading import MANIFEST_NAME, Samples
from diffusers_linattn.samples.recorder import Recorder
from diffusers_linattn.samples.settings import FORMAT_VERSION, SETTINGS_NAME, Assignment, open_directory
from diffusers_linattn.samples.shards import read_shard
from diffusers_linattn.samples.work import Content, Job, complete, tidy_up, write_together


class Source(ABC):
    """Where latents come from: made by the pipeline, or encoded from pictures.

    Args:
        pipe: The pipeline.
        assignment: What each sample is of.
        batch_size: Samples made at a time.
    """

    def __init__(self, pipe: Any, assignment: Assignment, batch_size: int):
        self.pipe, self.assignment, self.batch_size = pipe, assignment, batch_size

    @abstractmethod
    def check(self, plan: dict[str, Any]) -> None:
        """Raise if the latents cannot be made, before any of them is."""

    @abstractmethod
    def latents(self, indices: Sequence[int], size: Size, shape: Sequence[int]) -> torch.Tensor:
        """`(samples, ...)` the latents of samples of one size, on any device.

        Args:
            indices: The samples.
            size: Their resolution.
            shape: Of one sample's latents, as the transformer takes them.
        """

    @abstractmethod
    def record(self, index: int) -> dict[str, Any]:
        """What to keep of a sample besides its number, prompt and resolution."""

    def jobs(self, plan: dict[str, Any]) -> list[Job]:
        """One job for each file of samples."""
        size, total = plan["samples_per_shard"], self.assignment.num_samples

        def job(number: int, indices: range) -> Job:
            return Job(shard_name("samples", number), len(indices), lambda made: self._content(indices, plan, made))

        starts = range(0, total, size)
        return [job(number, range(start, min(start + size, total))) for number, start in enumerate(starts)]

    def _content(self, indices: Sequence[int], plan: dict[str, Any], made: Callable[[int], Any]) -> Content:
        # Batches are formed inside of a file, so that files are independent of each other.
        groups: dict[Size, list[int]] = {}
        for index in indices:
            groups.setdefault(self.assignment.size(index), []).append(index)
        tensors: dict[str, torch.Tensor] = {}
        for size, group in groups.items():
            shape = plan["latent_shapes"][size_name(size)]
            for start in range(0, len(group), self.batch_size):
                chosen = group[start : start + self.batch_size]
                for index, latents in zip(chosen, self.latents(chosen, size, shape).cpu(), strict=True):
                    self._check_finite(index, latents)
                    tensors[f"latents.{index}"] = latents.reshape(shape).clone()
                made(len(chosen))
        return tensors, {"samples": [self._full_record(index) for index in indices]}

    def _full_record(self, index: int) -> dict[str, Any]:
        prompt = self.assignment.prompts[self.assignment.prompt(index)]
        resolution = list(self.assignment.size(index))
        return {"index": index, "prompt": prompt, "resolution": resolution, **self.record(index)}

    def _check_finite(self, index: int, latents: torch.Tensor) -> None:
        if not latents.isfinite().all():
            raise ValueError(
                f"The latents of sample {index} ({self._full_record(index)['prompt']!r}) are not finite: the pipeline "
                "gives NaN or infinity in this dtype or at these settings; bfloat16 or float32 may help."
            )


def fill_directory(directory: Path, recorder: Recorder, source: Source) -> Samples:
    """Make whatever of a directory of samples is not there yet, together with other processes that do the same.

    Args:
        directory: The directory.
        recorder: Of the pipeline.
        source: Of the latents.
    """
    assignment = source.assignment
    content = open_directory(directory, assignment.settings)
    if content is None:
        content = {"settings": assignment.settings, "plan": make_plan(recorder, assignment)}
        source.check(content["plan"])
    plan = content["plan"]
    check_disk(directory, assignment, plan)
    if not (directory / SETTINGS_NAME).exists():
        write_together(directory, SETTINGS_NAME, content)
    conditioning, samples = conditioning_jobs(recorder, assignment, plan), source.jobs(plan)
    complete(directory, conditioning, "prompts", "prompt")
    complete(directory, samples, "samples", "sample")
    digests = {job.name: read_shard(directory / job.name).digest for job in conditioning + samples}
    write_together(directory, MANIFEST_NAME, {"format_version": FORMAT_VERSION, **content, "shards": digests})
    tidy_up(directory)
    return Samples(directory)
