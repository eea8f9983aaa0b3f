"""How one kind of transformer is described: its layers, and a function from forward arguments to token layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusers_linattn.layout import TokenLayout


# One layout for all samples of a batch, or one for each.
Layouts = TokenLayout | Sequence[TokenLayout]

# Pipelines alternate between conditional and unconditional arguments: what was read of this many tensors is kept.
_KEPT = 4

# A segment as [`TokenLayout.of`] takes it: its kind, and a number of tokens or a grid.
Part = tuple[str, int | Sequence[int]]

Memo = dict[str, list[tuple[torch.Tensor, int, Any]]]


class ForwardArguments(dict[str, Any]):
    """The arguments of one forward call of a transformer, by name; those left at their default are missing."""

    def __init__(self, arguments: Mapping[str, Any], memo: Memo | None = None):
        super().__init__(arguments)
        self._memo: Memo = {} if memo is None else memo

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"The transformer was called without {name}, which its token grid is read from: pass it as the pipeline "
            "does."
        )

    def read_once(self, name: str, read: Callable[[torch.Tensor], Any]) -> Any:
        """`read(self[name])`, kept for as long as the model is called with this very tensor, unchanged.

        Reading the values of a tensor waits for the device; pipelines pass the same object at every step. What is
        written through `.data` or memory shared with NumPy does not count as a change. `read` is one function for each
        name, and its result may depend on nothing but the tensor.
        """
        tensor = self[name]
        if tensor is None:
            self.__missing__(name)
        if tensor.is_inference():  # these do not count their changes
            return read(tensor)
        version = tensor._version
        entries = self._memo.setdefault(name, [])
        for kept, kept_version, result in entries:
            if kept is tensor and kept_version == version:
                return result
        result = read(tensor)
        entries[:] = [entry for entry in entries if entry[0] is not tensor][-_KEPT + 1 :]
        entries.append((tensor, version, result))
        return result


def _as_in_layers(model: Any) -> Mapping[str, str]:  # not a lambda: trackers are pickled with their family
    return {}


@dataclass(frozen=True)
class Family:
    """One kind of transformer.

    Args:
        layout: From the model and its forward arguments to the layout of the joint sequence: one [`TokenLayout`], or
            one for each sample where samples differ; or a dict of such by scope. Without an entry of its own the scope
            `"image"` is the image segments of `"joint"`.
        layers: Name patterns of the attention layers that convert, and the scope that each attends over. In a layer of
            the scope `"queries"` all tokens of `"joint"` are keys, but only those that are not text are queries. What
            a layout calls memory is never a query.
        order: The token order at the attention call, in words.
        about: One line for the table in `docs/models.md`.
        left: Name patterns of the other attention layers, and why they stay as they are.
        shared: Forward arguments that have no batch dimension.
        skipping: Arguments of attention layers that, when true, leave out their attention, as guidance does.
        scopes: Layers of one model, by name, whose scope is another than their pattern in `layers` says.
    """

    layout: Callable[[Any, ForwardArguments], Layouts | Mapping[str, Layouts]]
    layers: Mapping[str, str]
    order: str
    about: str
    left: Mapping[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    skipping: tuple[str, ...] = ()
    scopes: Callable[[Any], Mapping[str, str]] = _as_in_layers


CROSS = "cross-attention: its cost is linear in the image already"
TEXT = "attends over text alone"

DOUBLE_AND_SINGLE = {"transformer_blocks.*.attn": "joint", "single_transformer_blocks.*.attn": "joint"}
