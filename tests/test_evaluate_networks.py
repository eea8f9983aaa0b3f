"""LPIPS and the Fréchet distance with the real networks of torchmetrics, whose weights are random files here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_linattn import LinearProcessor, evaluate, linearize
from diffusers_linattn.generation import generate_images

import tiny


PROMPTS = ["a cat", "a dog", "the red cat", "the dog", "a letter"]
CALL = {**tiny.FLUX_CALL, "height": 64, "width": 72, "num_inference_steps": 1}


@pytest.fixture
def pipe() -> Any:
    return linearize(tiny.flux_pipeline(), LinearProcessor(feature_map="hedgehog", reset_projections=True))


def student_and_reference(pipe: Any, result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures that were compared, in whole numbers as they are measured."""
    _, images = generate_images(pipe, PROMPTS, range(len(PROMPTS)), **CALL)
    return (images * 255).round().byte(), result.reference.images


def test_lpips_is_that_of_torchmetrics(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    name = Path(models.SqueezeNet1_1_Weights.DEFAULT.url).name
    (tmp_path / "checkpoints").mkdir()
    torch.save(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "checkpoints" / name)
    result = evaluate(pipe, PROMPTS, call_arguments=CALL, metrics={"lpips": "squeeze"})
    student, reference = student_and_reference(pipe, result)
    expected = learned_perceptual_image_patch_similarity(
        student.float() / 255, reference.float() / 255, net_type="squeeze", normalize=True
    )
    assert result.rows["student"]["lpips"] == pytest.approx(float(expected), rel=1e-4)
    assert result.rows["student"]["lpips"] > 0
    assert result.rows["reference"]["lpips"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_fid_is_the_frechet_distance_of_features(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = tmp_path / "inception.pth"
    with monkeypatch.context() as patched:  # a network that has no weights yet to be saved as such
        patched.setattr(torch, "load", lambda *_, **__: {})
        patched.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        path.touch()
        torch.save(NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    result = evaluate(pipe, PROMPTS, call_arguments=CALL, metrics={"fid": str(path)})
    with torch.no_grad():
        features = [network(images).double() for images in student_and_reference(pipe, result)]
    (mean, centred), (other_mean, other) = ((part.mean(0), part - part.mean(0)) for part in features)
    # tr sqrt(A B) of two covariances is the sum of the singular values of the product of their factors.
    shared = torch.linalg.svdvals(centred @ other.T).sum()
    spread = centred.square().sum() + other.square().sum() - 2 * shared
    expected = float((mean - other_mean).square().sum() + spread / (len(PROMPTS) - 1))
    assert result.rows["student"]["fid"] == pytest.approx(expected, rel=1e-3)
    assert 0 <= abs(result.rows["reference"]["fid"]) < 1e-3 * expected
