"""What the library knows of each diffusers transformer: which layers convert, and where the token grid comes from.

A model costs one function (forward arguments to [`TokenLayout`]) and one row of [`FAMILIES`]; see
`docs/adding_a_model.md`. Nothing here knows an attention mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusers_linattn.layout import TokenLayout


class ForwardArguments(dict[str, Any]):
    """The arguments of one forward call of a transformer, by name."""

    def __init__(self, arguments: Mapping[str, Any], memo: dict[str, tuple[torch.Tensor, int, Any]]):
        super().__init__(arguments)
        self._memo = memo

    def read_once(self, name: str, read: Callable[[torch.Tensor], Any]) -> Any:
        """`read(self[name])`, kept for as long as the model is called with this very tensor, unchanged.

        Reading the values of a tensor waits for the device; pipelines pass the same object at every step.
        """
        tensor = self[name]
        if tensor.is_inference():  # these do not count their changes
            return read(tensor)
        version = tensor._version
        kept, kept_version, result = self._memo.get(name, (None, 0, None))
        if kept is not tensor or kept_version != version:
            result = read(tensor)
            self._memo[name] = (tensor, version, result)
        return result


@dataclass(frozen=True)
class Family:
    """One kind of transformer.

    Args:
        layout: Forward arguments to the layout of the joint sequence.
        layers: Name patterns of the attention layers that convert, and what each attends over: `"joint"` (the whole
            layout) or `"image"` (its image segments).
        about: One line for the table in `docs/models.md`.
        shared: Forward arguments that have no batch dimension.
    """

    layout: Callable[[nn.Module, ForwardArguments], TokenLayout]
    layers: Mapping[str, str]
    about: str
    shared: tuple[str, ...] = ()


def find_family(model: nn.Module) -> Family | None:
    """The family of a model or of one of its base classes, by class name; `None` when there is none."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    return None


def unsupported_message(found: str) -> str:
    """Why a model is refused, which are supported and how to add one."""
    return (
        f"{found} is not a transformer that diffusers_linattn knows. Supported: {', '.join(FAMILIES)}. A new model is "
        "one function and one row of the table in diffusers_linattn/models.py: see docs/adding_a_model.md."
    )


def _patch_grid(model: Any, arguments: ForwardArguments) -> tuple[int, int, int]:
    """(1, height, width) in tokens of (batch, channels, height, width) latents."""
    height, width = arguments["hidden_states"].shape[-2:]
    return 1, height // model.config.patch_size, width // model.config.patch_size


def _dit_layout(model: Any, arguments: ForwardArguments) -> TokenLayout:
    grid = _patch_grid(model, arguments)
    if grid[1] != grid[2]:
        raise ValueError(
            f"DiTTransformer2DModel makes square pictures only, got latents of {grid[1]}x{grid[2]} tokens: diffusers "
            "takes the square root of the number of tokens when it unpatchifies."
        )
    return TokenLayout.image(grid)


def _pixart_layout(model: Any, arguments: ForwardArguments) -> TokenLayout:
    return TokenLayout.image(_patch_grid(model, arguments))


@torch.compiler.disable
def _grids_of_ids(ids: torch.Tensor) -> list[tuple[int, int, int]]:
    """The grids in FLUX position ids, (tokens, 3) rows of (picture, y, x): one for each run of equal pictures."""
    ids = (ids[0] if ids.ndim == 3 else ids).cpu()
    starts = [0, *((ids[1:, 0] != ids[:-1, 0]).nonzero()[:, 0] + 1).tolist()]
    grids = []
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        positions = ids[start:stop, 1:]
        # Pipelines make the ids in the dtype of the latents, where whole numbers above 256 may be rounded: a row ends
        # where y changes or x falls, and the comparison is made in that dtype.
        ends = (positions[1:, 0] != positions[:-1, 0]) | (positions[1:, 1] < positions[:-1, 1])
        width = int(ends.nonzero()[0]) + 1 if ends.any() else len(positions)
        height = len(positions) // width
        raster = torch.cartesian_prod(torch.arange(height), torch.arange(width)).reshape(-1, 2)
        if not torch.equal(positions, (raster + positions[0].double()).to(positions.dtype)):
            raise ValueError(
                f"img_ids[{start}:{stop}] holds {stop - start} tokens that are not a {height}x{width} grid in raster "
                "order. Make img_ids as FluxPipeline._prepare_latent_image_ids does."
            )
        grids.append((1, height, width))
    return grids


def _flux_layout(model: nn.Module, arguments: ForwardArguments) -> TokenLayout:
    # Fill and Control add channels, not tokens; Kontext appends the tokens of a reference with ids[:, 0] = 1.
    grid, *references = arguments.read_once("img_ids", _grids_of_ids)
    return TokenLayout.joint(text=arguments["encoder_hidden_states"].shape[1], grid=grid, references=references)


FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(
        _dit_layout, {"transformer_blocks.*.attn1": "image"}, "DiT; square pictures only, as in diffusers"
    ),
    "PixArtTransformer2DModel": Family(
        _pixart_layout, {"transformer_blocks.*.attn1": "image"}, "PixArt-α, PixArt-Σ; cross-attention stays as it is"
    ),
    "FluxTransformer2DModel": Family(
        _flux_layout,
        {"transformer_blocks.*.attn": "joint", "single_transformer_blocks.*.attn": "joint"},
        "FLUX.1 dev, schnell, Kontext (reference image), Fill, Control",
        shared=("img_ids", "txt_ids"),
    ),
}
