"""Pictures that a pipeline makes from prompts and seeds, and which pictures an evaluation asks for."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusers_linattn.files import read_lines
from diffusers_linattn.generation import call_parameters, generate_images, prompt_argument
from diffusers_linattn.ops.checks import check_positive_int
from diffusers_linattn.samples import Samples


Prompt = str | int
# Prompts of samples that are drawn when nobody says how many: enough for the distances to settle.
PICTURES_OF_SAMPLES = 64
# Arguments of calls that would change which picture is whose, or what is returned.
FIXED = ("num_images_per_prompt", "num_videos_per_prompt", "output_type", "return_dict")


@dataclass(frozen=True)
class Request:
    """Which pictures to draw.

    Args:
        prompts: A prompt or class label per picture.
        seeds: A seed per picture.
        batch_size: Pictures drawn at a time.
        call_arguments: For the pipeline's call.
    """

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    batch_size: int = 4
    call_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """What a pipeline drew for a request.

    Args:
        request: What was asked for.
        latents: (pictures, ...) fp32 final latents, on the CPU.
        images: (pictures, 3, height, width) uint8, on the CPU; of videos (pictures, frames, 3, height, width).
    """

    request: Request
    latents: torch.Tensor
    images: torch.Tensor

    @property
    def frames(self) -> torch.Tensor:
        """(pictures · frames, 3, height, width) uint8: the frames of all videos in a row."""
        return self.images.flatten(0, -4)

    @property
    def stills(self) -> torch.Tensor:
        """(pictures, 3, height, width) uint8: the pictures, of videos the middle frame."""
        return self.images if self.images.ndim == 4 else self.images[:, self.images.shape[1] // 2]


def draw_pictures(pipe: Any, request: Request, progress: Any) -> Pictures:
    """Let a pipeline draw. Its scheduler and the global random state stay as they are.

    Args:
        pipe: The pipeline.
        request: What to draw.
        progress: A bar that counts pictures.
    """
    latents, images = [], []
    count, size = len(request.prompts), request.batch_size
    with _scheduler_kept(pipe):
        for start in range(0, count, size):
            chosen = slice(start, min(start + size, count))
            made = generate_images(pipe, request.prompts[chosen], request.seeds[chosen], **request.call_arguments)  # type: ignore[arg-type]
            latents.append(made[0].float().cpu())
            images.append((made[1].clamp(0, 1) * 255).round().byte().cpu())
            progress.update(len(made[1]))
    return Pictures(request, torch.cat(latents), torch.cat(images))


def plan_request(
    pipe: Any,
    prompts: Sequence[Prompt] | str | Path | None,
    samples: Samples | str | Path | None,
    reference: Pictures | None,
    num_images: int | None,
    seed: int,
    batch_size: int,
    call_arguments: Mapping[str, Any] | None,
) -> Request:
    """Decide which pictures an evaluation draws, from what its caller gave.

    Raises:
        ValueError: No prompts or prompts of the wrong kind, numbers out of range, or pictures other than those of the
            reference that was drawn before.
    """
    check_positive_int("batch_size", batch_size)
    if num_images is not None:
        check_positive_int("num_images", num_images)
    kind = prompt_argument(pipe)
    source = None if samples is None else samples if isinstance(samples, Samples) else Samples(samples)
    if prompts is None and source is None and reference is not None:
        known: Sequence[Prompt] = reference.request.prompts
    elif prompts is None and source is None:
        raise ValueError("No prompts: give prompts=, a list or a text file, or samples=, a directory of make_samples.")
    elif prompts is None:
        assert source is not None
        known = prompts_of(source)
        num_images = num_images or min(len(known), PICTURES_OF_SAMPLES)
    else:
        known = read_prompts(prompts, kind)
    _check_prompts(known, kind, type(pipe).__name__)
    count = num_images or len(known)
    if reference is not None and source is None and call_arguments is None:
        arguments = reference.request.call_arguments
    else:
        arguments = {**({} if source is None else call_of(source)), **(call_arguments or {})}
    _check_call(arguments, pipe, kind)
    request = Request(
        tuple(known[i % len(known)] for i in range(count)),
        tuple(range(seed, seed + count)),
        batch_size,
        dict(arguments),
    )
    if reference is not None:
        _check_same(request, reference.request)
    return request


def read_prompts(prompts: Sequence[Prompt] | str | Path, kind: str = "prompt") -> list[Prompt]:
    """Prompts from a text file with one per line, or from a list.

    Args:
        prompts: The list, or the file.
        kind: `"class_labels"` reads the lines as numbers.

    Raises:
        ValueError: No such file, or lines that are no class labels.
    """
    if not isinstance(prompts, str | Path):
        return list(prompts)
    path = Path(prompts)
    lines = read_lines(path)
    if kind != "class_labels":
        return list(lines)
    try:
        return [int(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"prompts: {path} has a line that is no class label: {error}.") from error


def prompts_of(samples: Samples) -> list[Prompt]:
    """The distinct prompts or class labels of samples."""
    return list(samples.manifest["settings"]["prompts"])


def call_of(samples: Samples) -> dict[str, Any]:
    """The arguments that samples were made with; of several resolutions the first."""
    settings = samples.manifest["settings"]
    arguments = dict(settings["call_arguments"])
    if settings["resolutions"]:
        arguments["height"], arguments["width"] = settings["resolutions"][0]
    return arguments


def _check_prompts(prompts: Sequence[Prompt], kind: str, pipeline: str) -> None:
    if not prompts:
        raise ValueError("prompts is empty: at least one prompt is needed.")
    expected, meaning = (int, "class labels, whole numbers") if kind == "class_labels" else (str, "prompts, strings")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, expected) or isinstance(prompt, bool):
            raise ValueError(f"prompts[{index}] is {prompt!r}: {pipeline} takes {meaning}.")


def _check_call(arguments: Mapping[str, Any], pipe: Any, kind: str) -> None:
    taken = sorted(set(arguments) & {kind, "generator", "latents", *FIXED})
    if taken:
        raise ValueError(
            f"call_arguments has {', '.join(taken)}, which follow from the prompts and seeds: leave it out."
        )
    known = call_parameters(pipe)
    unknown = sorted(set(arguments) - set(known))
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(f"call_arguments has {', '.join(unknown)}, which {type(pipe).__name__} does not take.")


def _check_same(request: Request, drawn: Request) -> None:
    """Raise unless both ask for the same pictures."""
    for name in ("prompts", "seeds", "call_arguments"):
        mine, theirs = getattr(request, name), getattr(drawn, name)
        if not _equal(mine, theirs):
            raise ValueError(
                f"The reference was drawn with other {name}: {_brief(theirs)}, now asked for {_brief(mine)}. Give the "
                "same prompts, num_images, seed and call_arguments, or draw the reference again (reference=None)."
            )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return set(one) == set(other) and all(_equal(one[name], other[name]) for name in one)
    return bool(one == other)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


@contextmanager
def _scheduler_kept(pipe: Any) -> Iterator[None]:
    """The state of the scheduler, which every call sets, is given back as it was."""
    scheduler = getattr(pipe, "scheduler", None)
    state = None if scheduler is None else copy.copy(vars(scheduler))
    try:
        yield
    finally:
        if scheduler is not None and state is not None:
            vars(scheduler).clear()
            vars(scheduler).update(state)
