"""What a transformer is called with, as a tree: told apart by sample, put on disk, put together for a batch.

A tree is a tensor, a number, a string, `None`, or a list, tuple or dict of trees. A leaf is named by its path, such as
`added_cond_kwargs.resolution`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F


# By path, where the samples of a batch are in a leaf: the number of a tensor's dimension, or "list" where a list has
# an entry for each. A leaf that is missing is the same for all samples.
Places = dict[str, int | str]

# By path, the mask whose zeros hide what a leaf is padded with.
Padding = dict[str, str]


def find_places(one: Any, two: Any, path: str = "") -> Places:
    """Where the samples are, from the arguments for one sample and those for a batch of two.

    Raises:
        ValueError: An argument that depends on the batch in another way.
    """
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and one.ndim == two.ndim:
        sizes = [(i, *size) for i, size in enumerate(zip(one.shape, two.shape, strict=True)) if size[0] != size[1]]
        if not sizes:
            return {}
        if len(sizes) == 1 and sizes[0][1:] == (1, 2):
            return {path: sizes[0][0]}
    elif isinstance(one, list | tuple) and type(one) is type(two):
        if (len(one), len(two)) == (1, 2):
            return {path: "list"}
        if len(one) == len(two):
            return _merged(find_places(a, b, join(path, i)) for i, (a, b) in enumerate(zip(one, two, strict=True)))
    elif isinstance(one, Mapping) and isinstance(two, Mapping):
        if one.keys() == two.keys():
            return _merged(find_places(one[name], two[name], join(path, name)) for name in one)
    elif type(one) is type(two) and one == two:
        return {}
    raise ValueError(
        f"The transformer's argument {path} is {_brief(one)} for one sample and {_brief(two)} for two: expected one "
        "row, or one entry of a list, for each sample. Samples of such a model cannot be kept."
    )


def find_padding(arguments: Mapping[str, Any], places: Places) -> Padding:
    """Which leaves can be padded along their tokens, because a mask of 0 and 1 beside them has the same length."""
    tensors = {path: tensor for path, tensor in leaves(arguments).items() if places.get(path) == 0}
    masks = {
        path: tensor.shape[1]
        for path, tensor in tensors.items()
        if "mask" in path and tensor.ndim == 2 and bool(((tensor == 0) | (tensor == 1)).all())
    }
    padding: Padding = {}
    for path, tensor in tensors.items():
        fitting = [mask for mask, length in masks.items() if tensor.ndim >= 2 and tensor.shape[1] == length]
        if fitting:
            padding[path] = path if path in fitting else max(fitting, key=lambda mask: _likeness(mask, path))
    return padding


def leaves(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a tree, by path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    if isinstance(tree, Mapping):
        return _merged(leaves(part, join(path, name)) for name, part in tree.items())
    if isinstance(tree, list | tuple):
        return _merged(leaves(part, join(path, i)) for i, part in enumerate(tree))
    return {}


def first_difference(one: Any, two: Any, path: str = "", tolerance: float = 0.0) -> str | None:
    """The path of the first leaf in which two trees differ, `None` if they are the same."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.shape == two.shape and one.dtype == two.dtype
        if same and tolerance and one.is_floating_point():
            same = torch.allclose(one.double(), two.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
        elif same:
            same = torch.equal(one, two)
        return None if same else path
    if isinstance(one, Mapping) and isinstance(two, Mapping) and one.keys() == two.keys():
        pairs: list[Any] = [(name, one[name], two[name]) for name in one]
    elif isinstance(one, list | tuple) and type(one) is type(two) and len(one) == len(two):
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(one, two, strict=True))]
    else:
        return None if type(one) is type(two) and one == two else path
    found = (first_difference(a, b, join(path, name), tolerance) for name, a, b in pairs)
    return next((difference for difference in found if difference is not None), None)


def pack(tree: Any, keep: Callable[[torch.Tensor], str], path: str = "") -> Any:
    """A tree as JSON; `keep` takes each tensor and gives the name that stands for it.

    Raises:
        ValueError: A leaf that is neither a tensor nor JSON.
    """
    if isinstance(tree, torch.Tensor):
        return {"tensor": keep(tree)}
    if isinstance(tree, Mapping) and all(isinstance(name, str) for name in tree):
        return {"dict": {name: pack(part, keep, join(path, name)) for name, part in tree.items()}}
    if isinstance(tree, list | tuple):
        parts = [pack(part, keep, join(path, i)) for i, part in enumerate(tree)]
        return {"tuple": parts} if isinstance(tree, tuple) else parts
    if tree is None or type(tree) in (bool, int, str) or (type(tree) is float and math.isfinite(tree)):
        return tree
    raise ValueError(
        f"The transformer's argument {path} holds {_brief(tree)}: samples can hold tensors, numbers, strings, and "
        "lists, tuples and dicts of these. Its attention can be swapped with linearize."
    )


def unpack(packed: Any, load: Callable[[str], torch.Tensor]) -> Any:
    """The inverse of [`pack`]."""
    if isinstance(packed, list):
        return [unpack(part, load) for part in packed]
    if isinstance(packed, dict):
        ((kind, content),) = packed.items()
        if kind == "tensor":
            return load(content)
        if kind == "tuple":
            return tuple(unpack(part, load) for part in content)
        return {name: unpack(part, load) for name, part in content.items()}
    return packed


def form(packed: Any, shapes: Callable[[str], Sequence[int]], places: Places, padding: Padding) -> str:
    """What has to be equal for samples to stand in one batch: shapes, and whatever all samples share.

    Args:
        packed: The arguments of one sample, from [`pack`].
        shapes: The shape of a tensor, by the name that stands for it.
        places: Of the samples in each leaf.
        padding: The leaves that can be padded.
    """
    names = _packed_leaves(packed)

    def of(part: Any, path: str) -> Any:
        place = places.get(path)
        if place == "list":
            return "list"
        if isinstance(part, list):
            return [of(item, join(path, i)) for i, item in enumerate(part)]
        if not isinstance(part, dict):
            return part
        ((kind, content),) = part.items()
        if kind == "tuple":
            return ["tuple", *(of(item, join(path, i)) for i, item in enumerate(content))]
        if kind == "dict":
            return {name: of(item, join(path, name)) for name, item in content.items()}
        if place is None:
            return content
        shape = list(shapes(content))
        mask = names.get(padding.get(path, ""))
        if mask is not None and shapes(mask)[1] == shape[1]:
            shape[1] = -1
        return shape

    return repr(of(packed, ""))


def together(trees: Sequence[Any], places: Places, padding: Padding, path: str = "") -> Any:
    """The arguments for a batch, from those for each of its samples, which must have the same [`form`]."""
    first, place = trees[0], places.get(path)
    if place == "list":
        return type(first)(item for tree in trees for item in tree)
    if isinstance(first, Mapping):
        return {name: together([tree[name] for tree in trees], places, padding, join(path, name)) for name in first}
    if isinstance(first, list | tuple):
        columns = zip(*trees, strict=True)
        return type(first)(together(parts, places, padding, join(path, i)) for i, parts in enumerate(columns))
    if not isinstance(first, torch.Tensor) or place is None:
        return first
    tensors: list[torch.Tensor] = list(trees)
    if path in padding:
        length = max(tensor.shape[1] for tensor in tensors)
        tensors = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, length - t.shape[1])) for t in tensors]
    assert isinstance(place, int)
    return torch.cat(tensors, dim=place)


def batch_of(tree: Any, places: Places, path: str = "") -> int:
    """How many samples the arguments are for."""
    place = places.get(path)
    if place == "list":
        return len(tree)
    if isinstance(tree, torch.Tensor):
        return tree.shape[place] if isinstance(place, int) else 1
    if isinstance(tree, Mapping):
        return max((batch_of(part, places, join(path, name)) for name, part in tree.items()), default=1)
    if isinstance(tree, list | tuple):
        return max((batch_of(part, places, join(path, i)) for i, part in enumerate(tree)), default=1)
    return 1


def row(tree: Any, places: Places, number: int, path: str = "") -> Any:
    """The arguments of one sample of a batch."""
    place = places.get(path)
    if place == "list":
        return type(tree)([tree[number]])
    if isinstance(tree, torch.Tensor):
        return tree.narrow(place, number, 1) if isinstance(place, int) else tree
    if isinstance(tree, Mapping):
        return {name: row(part, places, number, join(path, name)) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(row(part, places, number, join(path, i)) for i, part in enumerate(tree))
    return tree


def content_name(tensor: torch.Tensor) -> str:
    """A name that tensors with the same dtype, shape and bytes share."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def join(path: str, name: str | int) -> str:
    return f"{path}.{name}" if path else str(name)


def _packed_leaves(packed: Any, path: str = "") -> dict[str, str]:
    if isinstance(packed, list):
        return _merged(_packed_leaves(part, join(path, i)) for i, part in enumerate(packed))
    if not isinstance(packed, dict):
        return {}
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return {path: content}
    parts = content.items() if kind == "dict" else enumerate(content)
    return _merged(_packed_leaves(part, join(path, name)) for name, part in parts)


def _merged(parts: Any) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _likeness(mask: str, path: str) -> int:
    """How many words the names have in common: text_embedding_mask_t5 belongs to encoder_hidden_states_t5."""
    return len(set(mask.split("_")) & set(path.split("_")))


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
