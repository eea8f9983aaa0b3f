"""Pictures of teacher and student while a distillation runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_linattn.evaluate import device_of, draw_reference
from diffusers_linattn.evaluation.metrics import Measure, make_measures, measure
from diffusers_linattn.evaluation.pictures import Pictures, Request, draw_pictures, plan_request, prompts_of
from diffusers_linattn.evaluation.report import make_grid
from diffusers_linattn.files import write_atomically
from diffusers_linattn.linearize import transformers_of
from diffusers_linattn.samples import Samples
from diffusers_linattn.tracker import find_tracker
from diffusers_linattn.training.config import DistillConfig


FOLDER_NAME = "validation"
PROMPTS = 4  # of the samples, if the settings name none
SEED = 0  # the same pictures whatever the run's seed, so that runs can be compared


class Validation:
    """Draws the same few pictures with the teacher and the student, whenever it is called.

    The teacher's are drawn at the first call and kept. The training goes on as if nothing had been drawn: the model's
    flags, its mode, its token layouts, the scheduler and the random state stay as they are.

    Args:
        pipe: The pipeline in training.
        request: What is drawn.
        directory: Where the grids go.
        dtype: Of the model; trained parameters may be in fp32 beside it.
        measures: What is measured of them.
    """

    def __init__(self, pipe: Any, request: Request, directory: Path, dtype: torch.dtype, measures: Sequence[Measure]):
        self.pipe, self.request, self.directory, self.dtype, self.measures = pipe, request, directory, dtype, measures
        self._teacher: Pictures | None = None

    @classmethod
    def of(cls, pipe: Any, samples: Samples, config: DistillConfig, output_dir: Path) -> Validation | None:
        """The validation that the settings ask for, `None` if they ask for none.

        Raises:
            ValueError: Prompts of the wrong kind, no torchmetrics, or a metric whose package or weights are missing.
        """
        if not config.validation_steps:
            return None
        prompts = list(config.validation_prompts) or prompts_of(samples)[:PROMPTS]
        request = plan_request(pipe, prompts, samples, None, None, SEED, config.batch_size, None)
        measures = make_measures(config.validation_metrics, request.prompts, device_of(pipe))
        return cls(pipe, request, Path(output_dir) / FOLDER_NAME, _dtype_of(pipe), measures)

    def __call__(self, step: int) -> dict[str, float]:
        """Draw, write `step-000500.png`, and return the distances between student and teacher."""
        count = len(self.request.prompts) * (1 if self._teacher else 2)
        with self._undisturbed(), tqdm(total=count, desc="validation", unit="picture", leave=False) as bar:
            if self._teacher is None:
                self._teacher = draw_reference(self.pipe, None, self.request, bar)
            student = draw_pictures(self.pipe, self.request, bar)
        labels = [str(prompt) for prompt in self.request.prompts]
        grid = make_grid({"teacher": self._teacher.stills, "student": student.stills}, labels)
        write_atomically(self.directory / f"step-{step:06d}.png", lambda path: grid.save(path, format="PNG"))
        return measure(self.measures, student, self._teacher)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        models = transformers_of(self.pipe)
        trackers = [(tracker, tracker.current) for model in models if (tracker := find_tracker(model))]
        modes = [(model, model.training) for model in models]
        # Trained parameters are in fp32 beside others in bf16. Casts are not kept: teacher and student share names.
        device = getattr(models[0], "device", torch.device("cpu")).type
        low = self.dtype in (torch.bfloat16, torch.float16)
        autocast = torch.autocast(device, self.dtype, enabled=low, cache_enabled=False)
        try:
            for model, _ in modes:
                model.eval()
            with torch.no_grad(), autocast:
                yield
        finally:
            for model, mode in modes:
                model.train(mode)
            for tracker, last in trackers:
                tracker.set(last)


def _dtype_of(pipe: Any) -> torch.dtype:
    """The dtype that a pipeline's transformer computes in; what is trained of it may be in fp32."""
    dtypes = {parameter.dtype for parameter in transformers_of(pipe)[0].parameters()}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)
