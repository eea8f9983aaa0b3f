"""The teacher's own samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_linattn.generation import call_parameters, generate_latents
from diffusers_linattn.linearize import original_attention
from diffusers_linattn.ops.checks import check_positive_int
from diffusers_linattn.samples.conditioning import Size, size_arguments
from diffusers_linattn.samples.filling import Source, fill_directory
from diffusers_linattn.samples.reading import Samples
from diffusers_linattn.samples.recorder import Recorder
from diffusers_linattn.samples.settings import Assignment, make_settings, read_prompts


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
            little disk space, or a directory that holds samples of other settings, of a model with other weights, or
            other things.

    Example:
        >>> samples = make_samples(pipe, "prompts.txt", "samples/", num_samples=10_000, batch_size=8,
        ...     resolutions=[(1024, 1024), (768, 1344)], guidance_scale=3.5)  # doctest: +SKIP
    """
    for name, number in (("num_samples", num_samples), ("batch_size", batch_size)):
        check_positive_int(name, number)
    if num_inference_steps is not None:
        check_positive_int("num_inference_steps", num_inference_steps)
    call = dict(call_arguments or {})
    for name, value in (("guidance_scale", guidance_scale), ("num_inference_steps", num_inference_steps)):
        if value is not None:
            call[name] = value
    recorder = Recorder(pipe, call)
    classes = recorder.model.config.num_embeds_ada_norm if recorder.of_classes else None
    distinct = read_prompts(prompts, num_samples, recorder.of_classes, classes)
    settings = make_settings(pipe, num_samples, distinct, resolutions, seed, call)
    return fill_directory(Path(directory), recorder, _Generated(pipe, Assignment(settings), batch_size))


class _Generated(Source):
    """Latents that the pipeline makes."""

    def check(self, plan: dict[str, Any]) -> None:
        """The plan comes from runs of this very pipeline: there is nothing more to try."""

    def latents(self, indices: Sequence[int], size: Size, shape: Sequence[int]) -> torch.Tensor:
        assignment = self.assignment
        with original_attention(self.pipe):
            return generate_latents(
                self.pipe,
                [assignment.prompts[assignment.prompt(index)] for index in indices],
                [assignment.seed(index) for index in indices],
                **assignment.settings["call_arguments"],
                **size_arguments(size),
            )

    def record(self, index: int) -> dict[str, Any]:
        default = call_parameters(self.pipe).get("guidance_scale")
        scale = self.assignment.settings["call_arguments"].get("guidance_scale", default.default if default else None)
        return {"seed": self.assignment.seed(index), "guidance_scale": scale}
