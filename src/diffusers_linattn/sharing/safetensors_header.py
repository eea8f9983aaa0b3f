"""Reads what a safetensors file says it holds, and believes nothing before it fits the file.

safetensors checks much of this itself. Files from strangers are checked here first, so that every such file gives an
error that names it, at once, in bounded memory, and so that what is downloaded can be judged by its first bytes.
"""

from __future__ import annotations

import json
import math
import stat
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers_linattn.files import parse_json


# FLUX.1 with 57 converted layers has 437 tensors and a header of 0.1 MB.
MAX_HEADER_BYTES = 2 << 20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 16
ITEM_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its dtype as safetensors names it, its shape, and its bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: its tensors by name, and its free-form strings."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The checked header of a file.

    Args:
        path: A safetensors file. Nothing but its header is read.

    Raises:
        ValueError: No regular file, or a header that does not fit it.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise ValueError(f"{path} is not a regular file.")
    with path.open("rb") as file:
        length = header_length(file.read(8), status.st_size, path)
        return parse_header(file.read(length), status.st_size - 8 - length, path)


def header_length(first_bytes: bytes, file_size: int, path: Path | str) -> int:
    """The length of the JSON that follows the first 8 bytes of a file of that size."""
    if len(first_bytes) < 8:
        raise ValueError(f"{path} is no safetensors file: it has {file_size} bytes. Download or save it again.")
    (length,) = struct.unpack("<Q", first_bytes[:8])
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{path} says that its header has {length} bytes; at most {MAX_HEADER_BYTES} are read. It is no "
            "safetensors file, or not one of linear attention."
        )
    if length > file_size - 8:
        raise ValueError(
            f"{path} cannot be read: it is cut short, to {file_size} bytes with a header of {length}. Download "
            "or save it again."
        )
    return int(length)


def parse_header(text: bytes, data_size: int, path: Path | str) -> Header:
    """A header from its JSON, checked against the bytes that follow it.

    Args:
        text: The JSON.
        data_size: How many bytes follow it in the file.
        path: Named in errors.

    Raises:
        ValueError: Broken or ambiguous JSON, dtypes other than F64, F32, F16 and BF16, or tensors that overlap, leave
            gaps, or do not end where the file does.

    Example:
        >>> header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        >>> parse_header(header, 8, "a.safetensors").tensors
        {'a': TensorInfo(dtype='F32', shape=(2,), start=0, stop=8)}
    """
    content = parse_json(text, f"the header of {path}")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: the header must be a JSON object.")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map names to strings.")
    if len(content) > MAX_TENSORS:
        raise ValueError(f"{path} names {len(content)} tensors; at most {MAX_TENSORS} are read.")
    tensors = {name: _tensor_info(name, entry, path) for name, entry in content.items()}
    spans = sorted((info.start, info.stop, name) for name, info in tensors.items())
    for (_, stop, name), (start, _, following) in pairwise(spans):
        if start != stop:
            problem = "overlap" if start < stop else "leave a gap"
            raise ValueError(f"{path}: the bytes of {_short(name)} and {_short(following)} {problem}.")
    first, last = (spans[0][0], spans[-1][1]) if spans else (0, 0)
    if first != 0 or last != data_size:
        raise ValueError(
            f"{path} cannot be read: it holds {data_size} bytes of tensors, its header describes {first} to {last}. "
            "It is cut short or altered. Download or save it again."
        )
    return Header(tensors, metadata)


def _tensor_info(name: str, entry: Any, path: Path | str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {_short(name)} must have dtype, shape and data_offsets and nothing else.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(
            f"{path}: {_short(name)} has dtype {_short(dtype)}, expected one of {', '.join(ITEM_SIZES)}. Quantized "
            "weights cannot be loaded: save them in bf16."
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {_short(name)} has an impossible shape or data_offsets.")
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ValueError(
            f"{path}: {_short(name)} of shape {_short(shape)} and dtype {dtype} cannot have {stop - start} bytes."
        )
    return TensorInfo(dtype, tuple(shape), start, stop)


def _are_sizes(values: Any) -> bool:
    # Numbers of the size of a file: products of a few of them stay cheap.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:120] + "…"
