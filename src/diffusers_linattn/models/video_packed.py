"""Video transformers that take packed tokens, with their grid in numbers or coordinates beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models.family import CROSS, TEXT, Family, ForwardArguments
from diffusers_linattn.models.grids import Grid


# A grid, or the number of tokens that are not one.
Part = Grid | int

VIDEO_TAG = 0  # of MiniMax-H3


class Frame(NamedTuple):
    """Consecutive tokens of one picture: their number, when it begins and ends, and (height, width) of a grid."""

    length: int
    begin: float
    end: float | None
    size: tuple[int, int] | None

    def follows(self, last: Frame) -> bool:
        """Whether both are frames of one video."""
        return last.size == self.size and (last.begin < self.begin if last.end is None else last.end == self.begin)


@torch.compiler.disable
def read_frames(coordinates: torch.Tensor) -> list[Frame]:
    """The frames in (tokens, 3 or 4) coordinates: time, y and x of each token, perhaps also when its time ends."""
    coordinates = coordinates.cpu()
    time, y, x = coordinates.diff(dim=0).unbind(1)[:3]
    begins = (time != 0) | (y < 0) | ((y == 0) & (x <= 0))
    starts = [0, *(begins.nonzero()[:, 0] + 1).tolist()]
    return [_frame(coordinates[i:j]) for i, j in zip(starts, [*starts[1:], len(coordinates)], strict=True)]


def _frame(coordinates: torch.Tensor) -> Frame:
    length, begin = len(coordinates), coordinates[0, 0].item()
    end = coordinates[0, 3].item() if coordinates.shape[1] > 3 else None
    ends = coordinates[:, 1].diff().nonzero()
    width = int(ends[0]) + 1 if len(ends) else length
    if length == 1 or length % width:  # of tokens in no order each is a frame of its own
        return Frame(length, begin, end, None)
    y, x = (coordinates[:, axis].reshape(-1, width) for axis in (1, 2))
    raster = bool((y == y[:, :1]).all() and (x == x[:1]).all())
    return Frame(length, begin, end, (length // width, width) if raster else None)


def parts_of_frames(frames: Iterable[Frame]) -> list[Part]:
    """Frames of one size that follow each other are a video; tokens that are no grid are counted."""
    groups: list[list[Frame]] = []
    for frame in frames:
        last = groups[-1][-1] if groups else None
        if last and (frame.follows(last) or frame.size is last.size is None):
            groups[-1].append(frame)
        else:
            groups.append([frame])
    return [(len(some), *some[0].size) if some[0].size else sum(frame.length for frame in some) for some in groups]


def split_frames(frames: Iterable[Frame], lengths: Sequence[int]) -> list[list[Frame]]:
    """The frames of each of several runs of tokens.

    Raises:
        ValueError: A frame reaches over the end of a run.
    """
    runs: list[list[Frame]] = []
    rest = iter(frames)
    for length in lengths:
        runs.append([])
        while length > 0 and (frame := next(rest, None)) is not None:
            runs[-1].append(frame)
            length -= frame.length
        if length:
            raise ValueError(
                f"The coordinates of the video tokens do not fit into runs of {list(lengths)} tokens. Make them as "
                "the pipeline of this model does."
            )
    return runs


def _ltx(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid, length = _given_grid(arguments), arguments["hidden_states"].shape[1]
    if grid is not None and prod(grid) == length:
        return TokenLayout.image(grid)
    # The condition pipelines give coordinates instead, and prepend the tokens of key frames.
    parts = parts_of_frames(_read_coordinates(arguments, grid))
    sizes = [0 if isinstance(part, int) else prod(part) for part in parts]
    return _with_references(parts, max(range(len(parts)), key=lambda i: (sizes[i], i)))


def _ltx2(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid, length = _given_grid(arguments), arguments["hidden_states"].shape[1]
    if grid is not None:
        spatial, temporal = model.config.patch_size, model.config.patch_size_t
        grid = -(-grid[0] // temporal), -(-grid[1] // spatial), -(-grid[2] // spatial)
        if prod(grid) == length:
            return TokenLayout.image(grid)
    # Key frames and references follow the video.
    frames = _read_coordinates(arguments, grid)
    if grid is None:
        return _with_references(parts_of_frames(frames), 0)
    _, rest = split_frames(frames, [prod(grid), length - prod(grid)])
    return _with_references([grid, *parts_of_frames(rest)], 0)


def _given_grid(arguments: ForwardArguments) -> Grid | None:
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    return None if frames is None or height is None or width is None else (frames, height, width)


def _read_coordinates(arguments: ForwardArguments, grid: Grid | None) -> list[Frame]:
    if arguments.get("video_coords") is None:
        raise ValueError(
            f"{arguments['hidden_states'].shape[1]} video tokens are not a grid of (num_frames, height, width) = "
            f"{grid}: pass the size of the latents, or video_coords as the pipelines do."
        )
    return arguments.read_once("video_coords", lambda coords: read_frames(_first_sample(coords)))


def _first_sample(coords: torch.Tensor) -> torch.Tensor:
    """(batch, 3, tokens) coordinates, in LTX-2 with a last axis of begin and end, as [`read_frames`] takes them."""
    first = coords[0]
    return first.T if first.ndim == 2 else torch.cat([first[..., 0], first[:1, :, 1]]).T


def _with_references(parts: Sequence[Part], image: int) -> TokenLayout:
    if isinstance(parts[image], int):
        raise ValueError(
            "The video_coords do not say which tokens are the video: its grid is not in raster order. Make them as "
            "the pipeline of this model does."
        )
    return TokenLayout.of([("image" if i == image else "reference", part) for i, part in enumerate(parts)])


def _minimax_h3(model: Any, arguments: ForwardArguments) -> TokenLayout:
    runs = arguments.read_once("token_tags", _read_runs)
    frames = arguments.read_once("position_ids", read_frames)
    parts: list[tuple[str, Part]] = []
    for (tag, length), some in zip(runs, split_frames(frames, [length for _, length in runs]), strict=True):
        found = parts_of_frames(some) if tag == VIDEO_TAG else [length]
        parts += [("reference" if tag == VIDEO_TAG else "text", part) for part in found]
    grids = [i for i, (_, part) in enumerate(parts) if not isinstance(part, int)]
    if not grids:
        raise ValueError("The position_ids of the video tokens are no grid in raster order.")
    parts[grids[-1]] = ("image", parts[grids[-1]][1])  # what is generated comes last
    return TokenLayout.of(parts)


@torch.compiler.disable
def _read_runs(tags: torch.Tensor) -> list[tuple[int, int]]:
    """Each run of equal tags, and its length."""
    return [(tag, len(list(run))) for tag, run in groupby(tags.tolist())]


VIDEO_PACKED_MODELS: dict[str, Family] = {
    "LTXVideoTransformer3DModel": Family(
        _ltx,
        {"transformer_blocks.*.attn1": "joint"},
        order="references (key frames), video",
        about="LTX-Video",
        left={"transformer_blocks.*.attn2": CROSS},
    ),
    "LTX2VideoTransformer3DModel": Family(
        _ltx2,
        {"transformer_blocks.*.attn1": "joint"},
        order="video, references (key frames, IC-LoRA)",
        about="LTX-2, the video stream",
        left={
            "transformer_blocks.*.attn2": CROSS,
            "transformer_blocks.*.audio_attn1": "attends over sound alone",
            "transformer_blocks.*.audio_attn2": "cross-attention of the sound",
            "transformer_blocks.*_to_*_attn": "between sound and video: its cost is linear in the video already",
        },
        skipping=("all_perturbed",),  # spatio-temporal guidance
    ),
    "MiniMaxH3Transformer3DModel": Family(
        _minimax_h3,
        {"transformer_blocks.*.attn": "joint"},
        order="text, references and sound as packed, video last",
        about="MiniMax-H3",
        left={"token_refiner.*": TEXT},
        shared=(
            *("timestep", "timestep_indices", "token_tags", "position_ids"),
            *("video_indices", "audio_indices", "text_indices"),
        ),
    ),
}
