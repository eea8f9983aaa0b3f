"""Distillation of every kind of pipeline: objectives, class labels, lists of latents, learned variance, video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, PipelineCase

from diffusers_linattn import ClearProcessor, LinearProcessor, distill, linearize, make_samples
from diffusers_linattn.training.objective import Denoising, objective_of


@pytest.mark.parametrize("case", PIPELINES.values(), ids=PIPELINES)
def test_a_student_that_is_the_teacher_loses_nothing(case: PipelineCase, tmp_path: Path) -> None:
    """A window over everything is the original attention: every distance to the teacher is 0, in both stages."""
    pipe: Any = case.make()
    samples = make_samples(
        pipe,
        list(case.prompts),
        tmp_path / "samples",
        num_samples=4,
        num_inference_steps=2,
        resolutions=list(case.sizes)[:1] or None,
        call_arguments=case.call,
    )
    linearize(pipe, ClearProcessor(window=1000))
    options = {"transfer_steps": 1, "steps": 1, "batch_size": 1, "prompt_dropout": 0.5}
    curves = distill(pipe, samples, tmp_path / "same", **options)
    (transfer,), (end,) = curves["transfer"], curves["end_to_end"]
    assert transfer["loss"] < 1e-9
    assert end["attention"] < 1e-9
    assert end["diffusion"] > 0.1  # random weights predict nothing
    learned = pipe.transformer.config.get("out_channels") == 2 * pipe.transformer.config.get("in_channels", 0)
    assert ("variance" in end) == learned
    linearize(pipe, LinearProcessor())
    curves = distill(pipe, samples, tmp_path / "other", **options)
    assert all(torch.tensor(value).isfinite() for rows in curves.values() for value in list(rows[0].values())[2:])
    assert curves["transfer"][0]["loss"] > 1e-6
    expected = {"CogVideoX": "v_prediction", "PixArt": "epsilon", "DiT": "epsilon"}
    name = next((name for name in expected if type(pipe).__name__.startswith(name)), None)
    objective = objective_of(pipe)
    assert (objective.prediction_type if isinstance(objective, Denoising) else None) == (name and expected[name])
