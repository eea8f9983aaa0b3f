"""Whole-model torch.compile of every family, converted: the values of the eager model at two sizes."""

from __future__ import annotations

import diffusers
import pytest
import torch
from test_models import assert_near, output_of

from diffusers_linattn import ClearProcessor, linearize

from model_cases import CASES


# One of each kind; the others take a quarter of an hour, and run once a week.
ALWAYS = ("WanTransformer3DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.weekly) for n in CASES])
@torch.no_grad()
def test_whole_models(name: str) -> None:
    case = CASES[name]
    missing = [need for need in (name.split()[0], *case.needs) if not hasattr(diffusers, need)]
    if missing:
        pytest.skip(f"this diffusers has no {missing[0]}")
    torch._dynamo.reset()
    model = linearize(case.make(), ClearProcessor(window=2))
    expected = [output_of(model, call.inputs) for call in case.calls[:2]]
    compiled = torch.compile(model, backend="eager")
    for call, output in zip(case.calls[:2], expected, strict=True):
        assert_near(output_of(compiled, call.inputs), output, tolerance=1e-5)
