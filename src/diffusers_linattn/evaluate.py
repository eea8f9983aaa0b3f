"""How close a converted pipeline is to its original, on the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_linattn.evaluation.metrics import Metrics, make_measures, measure
from diffusers_linattn.evaluation.pictures import Pictures, Prompt, Request, draw_pictures, plan_request
from diffusers_linattn.evaluation.report import OTHER_SEED, REFERENCE, Evaluation, check_directory
from diffusers_linattn.generation import check_pipeline
from diffusers_linattn.linearize import layers_of, original_attention
from diffusers_linattn.samples import Samples
from diffusers_linattn.version import __version__


__all__ = ["Evaluation", "Pictures", "evaluate"]


def evaluate(
    pipe: Any,
    prompts: Sequence[Prompt] | str | Path | None = None,
    *,
    reference: Any = None,
    samples: Samples | str | Path | None = None,
    num_images: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    metrics: Metrics | None = None,
    output_dir: str | Path | None = None,
    call_arguments: Mapping[str, Any] | None = None,
    name: str = "student",
    other_seed: bool = False,
) -> Evaluation:
    """Draw the same pictures with a pipeline and with a reference, and measure how far apart they are.

    Always measured: the mean squared error of the final latents, and PSNR (dB) and SSIM of the pictures (of videos:
    of all frames) in 8 bits. Needs torchmetrics. The pipeline is left as it was.

    Args:
        pipe: A converted pipeline; any kind, for pictures or videos, from prompts or class labels.
        prompts: Prompts, or a text file with one per line; class labels of class-conditional pipelines.
        reference: `None` is the same pipeline with its original attention; or another pipeline; or the `reference`
            of an earlier evaluation, which is not drawn again.
        samples: Samples of [`make_samples`] whose prompts and settings (guidance, steps, the first resolution) are
            used as far as no others are given. The seeds are other ones than those of the samples.
        num_images: How many; picture i takes prompt i modulo their number. `None`: one for each prompt, of samples
            at most 64.
        seed: Picture i has a generator of its own, seeded with `seed` + i.
        batch_size: Pictures drawn at a time.
        metrics: Further ones. `"lpips"`, `"clip"` and `"fid"` are those of torchmetrics, if their weights are there.
            A function gets the pictures, fp32 in [0, 1], `(pictures, 3, height, width)` (of videos `(pictures, frames,
            3, height, width)`), and the list of their prompts, and returns a number or a dict of numbers. A dict
            gives metrics other names, or `"lpips"`, `"clip"`, `"fid"` other weights: `{"clip": "folder or Hub id"}`.
        output_dir: Where `evaluation.json`, `evaluation.md` and `grid.png` go, over those of the same evaluation.
        call_arguments: For the pipeline's call, such as `{"height": 512, "width": 512, "guidance_scale": 3.5}`.
        name: What the pipeline is called in the table.
        other_seed: Whether the reference draws every prompt from a second seed too, which says how far apart equally
            good pictures are.

    Returns:
        The numbers and the pictures.

    Raises:
        ValueError: Nothing is converted and no other reference given, no prompts, a metric whose package or weights
            are missing, pictures other than those of the reference, or an `output_dir` that holds another evaluation:
            of other prompts, seeds, call arguments or layers. All but a metric's own errors come before the
            first picture.

    Example:
        >>> result = evaluate(pipe, ["a cat", "a dog"], output_dir="evaluation/")  # doctest: +SKIP
        >>> print(result.to_markdown())  # doctest: +SKIP
    """
    check_pipeline(pipe)
    drawn = reference if isinstance(reference, Pictures) else None
    if name in (REFERENCE, OTHER_SEED):
        raise ValueError(f"name={name!r} is the name of another row: choose a different one.")
    if drawn is not None and other_seed:
        raise ValueError("other_seed needs the reference itself, not its pictures: give it when they are drawn.")
    if reference is None and not any(layer.processor for layer in layers_of(pipe)):
        raise ValueError(
            "No attention layer is converted, so that there is nothing to compare: linearize(pipe, processor) first, "
            "or give another pipeline as reference=."
        )
    request = plan_request(pipe, prompts, samples, drawn, num_images, seed, batch_size, call_arguments)
    measures = make_measures(metrics, request.prompts, device_of(pipe))
    settings = _settings(pipe, request, name)
    if output_dir is not None:
        check_directory(Path(output_dir), settings)
    count = len(request.prompts)
    pictures: dict[str, Pictures] = {}
    with tqdm(total=count * (1 + (drawn is None) + other_seed), desc="pictures", unit="picture", leave=False) as bar:
        pictures[REFERENCE] = drawn or draw_reference(pipe, reference, request, bar)
        pictures[name] = draw_pictures(pipe, request, bar)
        if other_seed:
            later = replace(request, seeds=tuple(seed + count for seed in request.seeds))
            pictures[OTHER_SEED] = draw_reference(pipe, reference, later, bar)
    rows = {row: measure(measures, made, pictures[REFERENCE]) for row, made in pictures.items()}
    result = Evaluation(rows, pictures, settings)
    if output_dir is not None:
        result.save(output_dir)
    return result


def draw_reference(pipe: Any, reference: Any, request: Request, progress: Any) -> Pictures:
    """The pictures of another pipeline, or those of `pipe` with its original attention."""
    # Autocast keeps casts by parameter, and knows nothing of values that are switched.
    torch.clear_autocast_cache()
    try:
        with nullcontext() if reference is not None else original_attention(pipe):
            return draw_pictures(pipe if reference is None else reference, request, progress)
    finally:
        torch.clear_autocast_cache()


def device_of(pipe: Any) -> torch.device:
    """Where a pipeline computes."""
    # With offloading, `device` is where the weights wait.
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


def _settings(pipe: Any, request: Request, name: str) -> dict[str, Any]:
    converted = {layer.name: f"{layer.processor!r}" for layer in layers_of(pipe) if layer.processor is not None}
    return {
        "call_arguments": _jsonable(request.call_arguments),
        "pipelines": {
            name: {
                "class": type(pipe).__name__,
                "layers": converted,
                "name_or_path": str(getattr(pipe, "name_or_path", "") or ""),
            }
        },
        "prompts": list(request.prompts),
        "seeds": list(request.seeds),
        "versions": {
            "diffusers": version("diffusers"),
            "diffusers_linattn": __version__,
            "torch": version("torch"),
            "torchmetrics": version("torchmetrics"),
        },
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    shape = f" {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"{type(value).__name__}{shape}"
