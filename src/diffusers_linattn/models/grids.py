"""Token grids, read from the shapes of latents or from position ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


Grid = tuple[int, int, int]


def patch_grid(latents: torch.Tensor, patch: int | Sequence[int]) -> Grid:
    """The (frames, height, width) grid in tokens of (batch, channels, height, width) latents, or of 5-dimensional ones
    (batch, channels, frames, height, width).

    Args:
        latents: The latents.
        patch: Latents per token: one number for height and width (frames are then tokens), or one for each of the
            latents' axes.
    """
    sides = tuple(latents.shape[2:])
    if not isinstance(patch, Sequence):
        patch = (patch,) * len(sides) if len(sides) == 2 else (1, patch, patch)
    if len(sides) == 2:
        sides, patch = (1, *sides), (1, *patch)
    frames, height, width = (side // size for side, size in zip(sides, patch, strict=True))
    return frames, height, width


def padded_grid(latents: torch.Tensor, patch: Sequence[int]) -> Grid:
    """The grid of (batch, channels, frames, height, width) latents that are padded to whole patches."""
    frames, height, width = (-(-side // size) for side, size in zip(latents.shape[2:], patch, strict=True))
    return frames, height, width


@torch.compiler.disable
def grids_of_ids(ids: torch.Tensor) -> list[Grid]:
    """The grids in position ids: one for each run of tokens of one picture.

    Args:
        ids: (tokens, columns) or (batch, tokens, columns). Columns 1 and 2 are y and x, in raster order and perhaps
            scaled; the other columns tell one picture from the next.

    Raises:
        ValueError: The tokens of a picture are not a grid in raster order.
    """
    ids = (ids[0] if ids.ndim == 3 else ids).cpu()
    pictures = torch.cat([ids[:, :1], ids[:, 3:]], 1)
    starts = [0, *((pictures[1:] != pictures[:-1]).any(1).nonzero()[:, 0] + 1).tolist()]
    grids = []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        y, x = ids[start:stop, 1], ids[start:stop, 2]
        # Pipelines make the ids in the dtype of the latents, where whole numbers above 256 may be rounded: a row ends
        # where y changes or x falls, and neighbours may be equal.
        ends = (y[1:] != y[:-1]) | (x[1:] < x[:-1])
        width = int(ends.nonzero()[0]) + 1 if ends.any() else len(x)
        height = len(x) // width
        rows, columns = y[::width, None], x[None, :width]
        in_raster_order = (
            height * width == len(x)
            and bool((y.view(height, width) == rows).all())
            and bool((x.view(height, width) == columns).all())
            and bool((rows[1:] >= rows[:-1]).all())
        )
        if not in_raster_order:
            raise ValueError(
                f"Position ids {start} to {stop} are those of {stop - start} tokens that are not a {height}x{width} "
                "grid in raster order. Make them as the pipeline of this model does."
            )
        grids.append((1, height, width))
    return grids


@torch.compiler.disable
def lengths_of_mask(mask: torch.Tensor) -> list[int]:
    """The number of visible tokens of each sample in a (batch, tokens) mask of ones and zeros."""
    return [int(length) for length in mask.reshape(len(mask), -1).sum(1).tolist()]


def text_length(states: Any) -> int:
    """Number of tokens in (batch, tokens, channels) text embeddings."""
    return states.shape[1]
