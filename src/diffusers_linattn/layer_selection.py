"""Which layers of a model are meant: by patterns of their names, by index, or by a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any


Layers = str | int | Callable[[str], bool] | Iterable[str | int]


def select_layers(names: list[str], layers: Layers) -> set[int]:
    """The places in `names` of the layers that `layers=` means: patterns, indices, or a function of the name.

    Raises:
        ValueError: It means no layer, or a pattern or an index does.
    """
    if callable(layers):
        selected = {i for i, name in enumerate(names) if layers(name)}
        if not selected:
            raise ValueError(f"layers= selects none of the {len(names)} layers {_some(names)}.")
        return selected
    selected = set()
    for item in layers if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]:
        if isinstance(item, int) and not isinstance(item, bool):
            if not -len(names) <= item < len(names):
                raise ValueError(f"Layer index {item} is out of range: there are {len(names)} attention layers.")
            selected.add(item % len(names))
        else:
            selected |= set(match_pattern(names, item))
    return selected


def match_pattern(names: list[str], pattern: Any) -> list[int]:
    """The places in `names` of those that match a pattern such as `"transformer_blocks.*"`, which must be some."""
    if not isinstance(pattern, str):
        raise ValueError(f"Expected a layer-name pattern such as 'transformer_blocks.*', got {pattern!r}.")
    matched = [i for i, name in enumerate(names) if fnmatchcase(name, pattern)]
    if not matched:
        raise ValueError(f"The pattern {pattern!r} matches none of the {len(names)} layers {_some(names)}.")
    return matched


def _some(names: list[str]) -> str:
    return f"({names[0]} … {names[-1]})" if names else "(none)"
