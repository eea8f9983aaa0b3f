"""Numbers of pictures: distances to the reference, what networks make of them, and what users measure themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from diffusers_linattn.evaluation.pictures import Pictures, Prompt


# Pictures in [0, 1], (pictures, 3, height, width), and their prompts, to a number or to numbers by name.
Metric = Callable[[torch.Tensor, Sequence[Prompt]], float | Mapping[str, float]]
Metrics = Sequence[str | Metric] | Mapping[str, str | Metric]
Measure = Callable[[Pictures, Pictures], dict[str, float]]
FRAMES_AT_A_TIME = 4
# For every metric of torchmetrics: not all processes may draw pictures, and one of them would wait for the others.
ALONE: dict[str, Any] = {"sync_on_compute": False}


def make_measures(metrics: Metrics | None, reference: Sequence[Prompt], device: torch.device) -> list[Measure]:
    """Everything that will be measured, ready: all that could be missing has been loaded.

    Args:
        metrics: What to measure besides the distances, as [`evaluate`] takes it.
        reference: The prompts of the pictures.
        device: Where networks run.

    Raises:
        ValueError: A package or weights are missing, an unknown name, or two metrics of one name.
    """
    measures: list[Measure] = [_distances()]
    names: set[str] = set()
    for name, metric in _named(metrics):
        if name in names or name in ("latent_mse", "psnr", "ssim"):
            raise ValueError(f"Two metrics are called {name!r}: give metrics as a dict with a name for each.")
        names.add(name)
        measures.append(_task(name, metric) if callable(metric) else _network(name, metric, reference, device))
    return measures


def measure(measures: Sequence[Measure], pictures: Pictures, reference: Pictures) -> dict[str, float]:
    """Every number of one row of the table.

    Raises:
        ValueError: Pictures of another size than the reference's, or two metrics that return the same name.
    """
    if pictures.latents.shape != reference.latents.shape or pictures.images.shape != reference.images.shape:
        raise ValueError(
            f"The pictures have latents {tuple(pictures.latents.shape)} and pixels {tuple(pictures.images.shape)}, "
            f"those of the reference {tuple(reference.latents.shape)} and {tuple(reference.images.shape)}: expected "
            "the same. Give height and width in call_arguments."
        )
    row: dict[str, float] = {}
    for each in measures:
        for name, value in each(pictures, reference).items():
            if name in row:
                raise ValueError(f"Two metrics return {name!r}: give one of them another name.")
            row[name] = value
    return row


def _named(metrics: Metrics | None) -> Iterator[tuple[str, Metric | str | None]]:
    """Names and metrics; of those that are networks, their weights or `None` for the usual ones."""
    if isinstance(metrics, str) or callable(metrics):
        raise ValueError(f"metrics takes a list or a dict, got {metrics!r}: put it into a list.")
    if isinstance(metrics, Mapping):
        items: list[tuple[Any, Any]] = list(metrics.items())
    else:
        items = [(item, None) if isinstance(item, str) else (_name_of(item), item) for item in metrics or ()]
    for name, metric in items:
        if not isinstance(name, str) or not (callable(metric) or name in NETWORKS):
            raise ValueError(
                f"Unknown metric {name!r}: expected {', '.join(NETWORKS)}, or a function of pictures and prompts."
            )
        yield name, metric


def _name_of(metric: Any) -> str:
    return str(getattr(metric, "__name__", type(metric).__name__))


def _distances() -> Measure:
    try:
        from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
    except ImportError as error:
        raise ValueError("PSNR and SSIM need torchmetrics: pip install torchmetrics.") from error

    def distances(pictures: Pictures, reference: Pictures) -> dict[str, float]:
        psnr: Any = PeakSignalNoiseRatio(data_range=1.0, **ALONE)
        ssim: Any = StructuralSimilarityIndexMeasure(data_range=1.0, **ALONE)
        for mine, theirs in zip(_parts(pictures.frames), _parts(reference.frames), strict=True):
            psnr.update(_unit(mine), _unit(theirs))
            ssim.update(_unit(mine), _unit(theirs))
        mse = (pictures.latents - reference.latents).square().mean()
        return {"latent_mse": float(mse), "psnr": float(psnr.compute()), "ssim": float(ssim.compute())}

    return distances


def _task(name: str, metric: Metric) -> Measure:
    def task(pictures: Pictures, _: Pictures) -> dict[str, float]:
        with torch.no_grad():
            found = metric(_unit(pictures.images), list(pictures.request.prompts))
        values = found if isinstance(found, Mapping) else {name: found}
        try:
            return {str(key): float(value) for key, value in values.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The metric {name!r} returned {found!r}, expected a number or a dict of them."
            ) from error

    return task


def _network(name: str, weights: str | None, prompts: Sequence[Prompt], device: torch.device) -> Measure:
    if name == "clip" and not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("The metric 'clip' compares pictures with prompts; class labels are none. Leave it out.")
    if name == "fid" and len(prompts) < 2:
        raise ValueError("The metric 'fid' needs at least 2 pictures, and thousands to mean something.")
    make, packages = NETWORKS[name]
    try:
        return make(weights, device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The metric {name!r} cannot be measured: {error} It needs {packages}, and its weights on this machine or "
            "from the network. Add them, or leave the metric out."
        ) from error


def _lpips(weights: str | None, device: torch.device) -> Measure:
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    network: Any = LearnedPerceptualImagePatchSimilarity(weights or "alex", normalize=True, **ALONE).to(device)  # type: ignore[arg-type]

    def lpips(pictures: Pictures, reference: Pictures) -> dict[str, float]:
        network.reset()
        for mine, theirs in zip(_parts(pictures.frames), _parts(reference.frames), strict=True):
            network.update(_unit(mine).to(device), _unit(theirs).to(device))
        return {"lpips": float(network.compute())}

    return lpips


def _clip(weights: str | None, device: torch.device) -> Measure:
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    place = weights or "openai/clip-vit-large-patch14"
    model: Any = CLIPModel.from_pretrained(place)
    processor = CLIPProcessor.from_pretrained(place)
    for method in ("get_image_features", "get_text_features"):
        setattr(model, method, _features_alone(getattr(model, method)))
    network: Any = CLIPScore(lambda: (model, processor), **ALONE).to(device)

    def clip(pictures: Pictures, _: Pictures) -> dict[str, float]:
        network.reset()
        frames = pictures.frames
        repeats = len(frames) // len(pictures.request.prompts)
        prompts = [str(prompt) for prompt in pictures.request.prompts for _ in range(repeats)]
        for start in range(0, len(frames), FRAMES_AT_A_TIME):
            chosen = slice(start, start + FRAMES_AT_A_TIME)
            network.update(list(frames[chosen].to(device)), prompts[chosen])
        return {"clip": float(network.compute())}

    return clip


def _features_alone(method: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """torchmetrics expects a tensor, transformers 5 returns an output that holds it."""

    def features(*args: Any, **kwargs: Any) -> torch.Tensor:
        found = method(*args, **kwargs)
        tensor: torch.Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
        return tensor

    return features


def _fid(weights: str | None, device: torch.device) -> Measure:
    from torchmetrics.image import FrechetInceptionDistance

    network: Any = FrechetInceptionDistance(feature_extractor_weights_path=weights, **ALONE).to(device)

    def fid(pictures: Pictures, reference: Pictures) -> dict[str, float]:
        network.reset()
        for real, part in ((True, reference), (False, pictures)):
            for frames in _parts(part.frames):
                network.update(frames.to(device), real=real)
        return {"fid": float(network.compute())}

    return fid


# By name: what makes the measure, and the packages that it takes.
NETWORKS: Mapping[str, tuple[Callable[[str | None, torch.device], Measure], str]] = {
    "lpips": (_lpips, "torchmetrics and torchvision"),
    "clip": (_clip, "torchmetrics and transformers"),
    "fid": (_fid, "torchmetrics and torch-fidelity"),
}


def _parts(frames: torch.Tensor) -> Sequence[torch.Tensor]:
    """A few at a time: structural similarity takes many times the memory of its pictures."""
    return frames.split(FRAMES_AT_A_TIME)


def _unit(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255


def as_text(value: float) -> str:
    """A number of the table: four digits that count."""
    return "∞" if math.isinf(value) and value > 0 else format(value, ".4g")
