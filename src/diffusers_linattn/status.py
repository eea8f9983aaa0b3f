"""What is in a pipeline: which attention layers are converted, how, and why others are not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

import torch
from torch import nn

from diffusers_linattn.linearize import Layer, layers_of, transformers_of
from diffusers_linattn.lora import lora_off
from diffusers_linattn.models import find_family
from diffusers_linattn.processors.base import BaseProcessor, attention_size
from diffusers_linattn.tracker import find_tracker


@dataclass(frozen=True)
class LayerStatus:
    """How one layer attends.

    Args:
        name: Its module name in the transformer.
        processor: Its processor of this library, `None` while it has another.
        implementation: What answers its attention call, with a reason where it is not the usual implementation;
            `"dense"` for layers that are not converted, and why.
        transformer: Which transformer of the pipeline it is in, such as `"transformer_2"`; empty if there is one only.
    """

    name: str
    processor: BaseProcessor | None
    implementation: str
    transformer: str = ""


@dataclass(frozen=True)
class Status:
    """What [`status`] found; prints as a table.

    Args:
        layers: The layers that can be converted, in the order of the forward pass.
        left: The other attention layers of the transformer, which stay as they are.
    """

    layers: tuple[LayerStatus, ...]
    left: tuple[LayerStatus, ...] = ()

    @property
    def converted(self) -> tuple[LayerStatus, ...]:
        """The layers that have a processor of this library."""
        return tuple(layer for layer in self.layers if layer.processor is not None)

    def __repr__(self) -> str:  # what a notebook shows
        return str(self)

    def __str__(self) -> str:
        rows = [("layers", "", "processor", "implementation"), *_rows(self.layers), *_rows(self.left)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{len(self.converted)} of {len(self.layers)} attention layers over images are converted"]
        for name, count, processor, implementation in rows:
            line = f"{name:<{widths[0]}}  {count:>{widths[1]}}  {processor:<{widths[2]}}  {implementation}"
            lines.append(line.rstrip())
        return "\n".join(lines)


def status(pipe_or_model: Any) -> Status:
    """Which layers are converted, how, and by which implementation for the size of the latest call.

    Args:
        pipe_or_model: A pipeline or transformer, converted or not.

    Returns:
        The layers as data, which `print` shows as a table. Neighbours that are alike share a row.

    Raises:
        ValueError: No supported transformer.

    Example:
        >>> from diffusers import PixArtTransformer2DModel
        >>> from diffusers_linattn import ClearProcessor, linearize, status
        >>> model = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4,
        ...     num_layers=2, cross_attention_dim=16, caption_channels=16, sample_size=8)
        >>> len(status(linearize(model, ClearProcessor(window=4), layers=0)).converted)
        1
    """
    models = transformers_of(pipe_or_model)
    places = _places(pipe_or_model) if len(models) > 1 else {}
    layers = [
        LayerStatus(layer.name, layer.processor, _implementation(layer), places.get(layer.model, ""))
        for layer in layers_of(pipe_or_model)
    ]
    left = [item for model in models for item in _left(model, places.get(model, ""))]
    return Status(tuple(layers), tuple(left))


def _places(pipe: Any) -> dict[nn.Module, str]:
    """The names of a pipeline's modules in it."""
    parts = pipe.components.items()
    return {getattr(part, "_orig_mod", part): name for name, part in parts if isinstance(part, nn.Module)}


def _implementation(layer: Layer) -> str:
    tracker = find_tracker(layer.model)
    if layer.processor is None:
        if tracker is not None and layer.name in tracker.installed:
            return f"was converted, then replaced by a {type(layer.attn.processor).__name__}"
        return "dense"
    layouts = tracker.last.get(layer.scope) if tracker is not None else None
    heads, head_dim, _ = attention_size(layer.attn)
    model: Any = layer.model
    device = (tracker.device if tracker is not None else None) or model.device
    query = torch.empty(1, heads, 1, head_dim, dtype=model.dtype, device=device)
    found = [layer.processor.implementation(layout, query) for layout in layouts or (None,)]
    lost = ", without the LoRA trained with it" if lora_off(layer.attn, layer.processor.lora) else ""
    return " or ".join(dict.fromkeys(found)) + lost


def _left(model: nn.Module, place: str) -> Iterator[LayerStatus]:
    family = find_family(model)
    assert family is not None
    for name, module in model.named_modules():
        if not hasattr(module, "processor") or any(fnmatchcase(name, pattern) for pattern in family.layers):
            continue
        reasons = [reason for pattern, reason in family.left.items() if fnmatchcase(name, pattern)]
        reason = reasons[0] if reasons else "unknown to this library"
        yield LayerStatus(name, None, f"dense: {reason}", place)


def _rows(layers: tuple[LayerStatus, ...]) -> Iterator[tuple[str, str, str, str]]:
    def key(layer: LayerStatus) -> tuple[str, str, str]:
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name)  # not the number of attn1 and attn2
        processor = "original" if layer.processor is None else repr(layer.processor)
        return f"{layer.transformer} {kind}", processor, layer.implementation

    # Layers of two kinds may take turns (attn1, attn2 of every block): sort by kind, in the order of appearance.
    order = {key(layer)[0]: i for i, layer in reversed(list(enumerate(layers)))}
    for (_, processor, implementation), group in groupby(sorted(layers, key=lambda x: order[key(x)[0]]), key):
        some = list(group)
        names = [layer.name for layer in some]
        name = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        name = f"{some[0].transformer}: {name}" if some[0].transformer else name
        yield name, str(len(names)), processor, implementation
