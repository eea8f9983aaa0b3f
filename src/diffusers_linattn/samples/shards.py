"""One file of samples: tensors, a record in JSON, and a checksum of all of it that the file carries itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffusers_linattn.files import parse_json, write_atomically


# safetensors writes its metadata in any order: one entry gives the same bytes each time.
_KEY = "diffusers_linattn_samples"
_EMPTY = "0" * 64
_BEFORE_DIGEST = json.dumps({_KEY: '{"sha256": "'}, separators=(",", ":"))[1:-2].encode()
_BLOCK = 1 << 20
_MAX_HEADER = 100_000_000

# Checking more than this takes a while, which a bar makes bearable.
_BAR_ABOVE = 2_000_000_000


@dataclass(frozen=True)
class Shard:
    """What the first bytes of a shard say.

    Args:
        digest: SHA-256 of the file with zeros in the place of this number.
        shapes: Of its tensors, by name.
        record: What was stored with them.
    """

    digest: str
    shapes: dict[str, tuple[int, ...]]
    record: dict[str, Any]


def write_shard(path: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Write a shard atomically; the same content gives the same bytes."""

    def write(temporary: Path) -> None:
        metadata = {_KEY: json.dumps({"sha256": _EMPTY, "record": record})}
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=metadata)
        with temporary.open("r+b") as file:
            place = _place_of_digest(file)
            digest = _digest(file, place)
            file.seek(place)
            file.write(digest.encode())

    write_atomically(path, write)


def read_shard(path: Path) -> Shard:
    """Read what a shard says of itself, without its tensors.

    Raises:
        ValueError: It is no shard of samples.
    """
    with path.open("rb") as file:
        header, _ = _header(file)
    try:
        content = parse_json(header, str(path))
        metadata = parse_json(content.pop("__metadata__")[_KEY], str(path))
        shapes = {name: tuple(info["shape"]) for name, info in content.items()}
        return Shard(metadata["sha256"], shapes, metadata["record"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of samples.") from error


def is_whole(path: Path) -> bool:
    """Whether a shard's bytes are those that its checksum was made of."""
    try:
        with path.open("rb") as file:
            place = _place_of_digest(file)
            file.seek(place)
            stored = file.read(len(_EMPTY)).decode("ascii", "replace")
            return _digest(file, place) == stored
    except (FileNotFoundError, ValueError):
        return False


def broken_shards(paths: list[Path], description: str) -> list[Path]:
    """Those of the files that are missing, truncated or altered."""
    size = sum(path.stat().st_size for path in paths if path.exists())
    bar = tqdm(total=size, desc=description, unit="B", unit_scale=True, disable=size < _BAR_ABOVE)
    broken = []
    with bar:
        for path in paths:
            if not is_whole(path):
                broken.append(path)
            bar.update(path.stat().st_size if path.exists() else 0)
    return broken


def _header(file: Any) -> tuple[bytes, int]:
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length) if 2 <= length <= _MAX_HEADER else b""
    if len(header) != length:
        raise ValueError(f"{file.name} is no safetensors file.")
    return header, 8


def _place_of_digest(file: Any) -> int:
    header, start = _header(file)
    found = header.find(_BEFORE_DIGEST)
    if found < 0:
        raise ValueError(f"{file.name} is no file of samples.")
    return start + found + len(_BEFORE_DIGEST)


def _digest(file: Any, place: int) -> str:
    """SHA-256 of a file with zeros for the 64 bytes at `place`."""
    digest = hashlib.sha256()
    file.seek(0)
    digest.update(file.read(place))
    digest.update(_EMPTY.encode())
    file.seek(place + len(_EMPTY))
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
