"""Captioned pictures on disk or in a dataset: found, read, and cut to a size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from diffusers_linattn.files import read_text


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_CAPTIONS = ("text", "caption", "prompt")
_LABELS = ("label", "labels", "class_label")


class Pictures(Protocol):
    """Captioned pictures, by number."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """One picture."""
        ...

    def caption(self, index: int) -> Any:
        """What it shows."""
        ...

    def name(self, index: int) -> str:
        """What tells it from others, and from another version of itself."""
        ...


def find_pictures(images: Any, captions: str | None, of_classes: bool) -> Pictures:
    """The pictures of a folder or of a dataset.

    Args:
        images: The folder or dataset.
        captions: The column, or the field of `metadata.jsonl`, with the captions; `None` looks for the usual ones.
        of_classes: Whether class labels are wanted instead.

    Raises:
        ValueError: No such folder, no pictures, or no captions.
    """
    names = (captions,) if captions else _LABELS if of_classes else _CAPTIONS
    if isinstance(images, str | Path):
        return _Folder(Path(images), names)
    if hasattr(images, "column_names") and hasattr(images, "__getitem__"):
        return _Dataset(images, names)
    raise ValueError(f"images is a {type(images).__name__}, expected a folder or a dataset with columns.")


class _Folder:
    """Pictures with a text file of the same name beside each, or with a `metadata.jsonl`."""

    def __init__(self, folder: Path, fields: Sequence[str]):
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: expected one with pictures and their captions.")
        self.folder = folder
        metadata = folder / "metadata.jsonl"
        self.captions = _read_metadata(metadata, fields) if metadata.exists() else _read_beside(folder)
        self.files = sorted(self.captions)
        if not self.files:
            raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Image.Image:
        return Image.open(self.folder / self.files[index])

    def caption(self, index: int) -> Any:
        return self.captions[self.files[index]]

    def name(self, index: int) -> str:
        return f"{self.files[index]} ({(self.folder / self.files[index]).stat().st_size} bytes)"


class _Dataset:
    """A dataset of the `datasets` library with a column of pictures and one of captions."""

    def __init__(self, dataset: Any, fields: Sequence[str]):
        columns = dataset.column_names
        if not isinstance(columns, list):
            raise ValueError("images holds several splits, expected one: give dataset['train'].")
        self.dataset = dataset
        self.image_column = _column(columns, ("image", "img", "picture"), "pictures")
        self.caption_column = _column(columns, fields, "captions")
        if not len(dataset):
            raise ValueError("images is an empty dataset: expected at least one picture.")

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, index: int) -> Image.Image:
        picture = self.dataset[index][self.image_column]
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"images[{index}][{self.image_column!r}] is a {type(picture).__name__}, expected a picture."
            )
        return picture

    def caption(self, index: int) -> Any:
        return self.dataset[index][self.caption_column]

    def name(self, index: int) -> str:
        return f"{index} of {getattr(self.dataset, '_fingerprint', 'a dataset')}"


def _column(columns: Sequence[str], wanted: Sequence[str], what: str) -> str:
    found = [name for name in wanted if name in columns]
    if not found:
        raise ValueError(
            f"The dataset's columns are {', '.join(columns)}; expected one of {what}: {', '.join(wanted)}."
        )
    return found[0]


def _read_metadata(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    captions: dict[str, Any] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file, found = row["file_name"], [row[field] for field in fields if field in row]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: expected an object with file_name and {fields[0]}.") from error
        if not found:
            raise ValueError(f"{path}, line {number} has no caption: expected one of {', '.join(fields)}.")
        if not (path.parent / file).is_file():
            raise ValueError(f"{path}, line {number}: {path.parent / file} does not exist.")
        captions[file] = found[0]
    return captions


def _read_beside(folder: Path) -> dict[str, Any]:
    captions: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix.lower() in SUFFIXES:
            text = path.with_suffix(".txt")
            if not text.is_file():
                raise ValueError(f"{path} has no caption: expected {text.name} beside it, or a metadata.jsonl.")
            captions[path.name] = read_text(text).strip()
    return captions


def nearest_sizes(pictures: Pictures, sizes: Sequence[list[int]]) -> list[list[int]]:
    """For each picture the `(height, width)` whose aspect ratio is nearest to its own."""
    found = []
    for index in tqdm(range(len(pictures)), desc="looking at pictures", unit="picture", leave=False):
        with _readable(pictures, index) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) >= 5:  # turned by a quarter
                width, height = height, width
        distances = [abs(math.log(size[0] / size[1]) - math.log(height / width)) for size in sizes]
        found.append(sizes[distances.index(min(distances))])
    return found


def read_picture(pictures: Pictures, index: int, size: tuple[int, int]) -> torch.Tensor:
    """A picture that fills `size`, cut at its centre: `(3, height, width)` in [-1, 1], fp32."""
    height, width = size
    with _readable(pictures, index) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    fitted = ImageOps.fit(upright, (width, height), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


@contextmanager
def _readable(pictures: Pictures, index: int) -> Iterator[Image.Image]:
    try:
        with pictures.open(index) as picture:
            yield picture
    except OSError as error:
        raise ValueError(f"The picture {pictures.name(index)} cannot be read: {error}.") from error
