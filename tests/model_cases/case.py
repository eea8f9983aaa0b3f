"""What a test of a model needs to know of it, written down by hand and not taken from the library."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


# (picture, frame, row, column, frames, height, width) of a token on a grid; None for any other.
Token = tuple[int, ...] | None


def tokens(*parts: tuple[str, int | tuple[int, int, int]]) -> list[Token]:
    """The tokens of a sequence of parts such as `("text", 7)`, `("image", (1, 6, 9))` and `("padding", 3)`."""
    found: list[Token] = []
    for picture, (_, size) in enumerate(parts):
        if isinstance(size, int):
            found += [None] * size
            continue
        frames, height, width = size
        found += [
            (picture, t, y, x, frames, height, width)
            for t in range(frames)
            for y in range(height)
            for x in range(width)
        ]
    return found


@dataclass
class Call:
    """One forward call.

    Args:
        inputs: The forward arguments. Batch 2 where the model takes batches.
        tokens: By scope, the tokens of the attention call: one list for all samples, or one for each.
        touched: Which numbers of the latents are changed to find a token: an index into the argument `latents`, and
            the row of the query of the first converted layer that must change, and no other.
        hidden: Numbers of an argument that a mask hides: (argument name, index). Changing them must change nothing.
        latents: The argument that holds the latents.
        asking: The tokens that are queries, where these are neither all nor all that are on a grid.
    """

    inputs: dict[str, Any]
    tokens: dict[str, list[Token] | list[list[Token]]]
    touched: tuple[Any, int] | None = None
    hidden: tuple[str, Any] | None = None
    latents: str = "hidden_states"
    asking: Sequence[int] | None = None


@dataclass
class Case:
    """One model: how a tiny random one is made, its converted layers, and calls that follow each other.

    Args:
        make: Makes the model, seeded, in eval mode.
        layers: Name patterns of the layers that must convert, and their scopes.
        calls: Calls of different resolution, prompt length and batch.
        left_out: Mechanisms that this model cannot have, with the reason.
        needs: Further names that must be in `diffusers`; older releases lack some models.
    """

    make: Callable[[], nn.Module]
    layers: dict[str, str]
    calls: Sequence[Call]
    left_out: dict[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(cls: type, **config: Any) -> nn.Module:
    """A model with random weights in eval mode; weights that start at zero would hide what attention does."""
    torch.manual_seed(0)
    model = cls(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.05)
    return model


def change(inputs: dict[str, Any], name: str, index: Any) -> dict[str, Any]:
    """`inputs` with 3 added to some numbers of one argument: a tensor, or lists of tensors whose index comes first."""
    value = item = copy.deepcopy(inputs[name])
    while isinstance(item, list):
        item, index = item[index[0]], index[1:]
    item[index] += 3
    return {**inputs, name: value}


def output_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    output = model(**inputs)
    output = output[0] if isinstance(output, tuple) else output
    return torch.cat([item.flatten() for item in output]) if isinstance(output, list) else output


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, atol=tolerance * max(1.0, expected.abs().max().item()), rtol=0)
