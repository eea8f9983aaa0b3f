"""Boards of letters: every cell of a board shows the same capital letter in the same typeface.

A board is drawn from five choices (letter, typeface, size, and an offset of a pixel in x and in y); all its cells
share them, so the cells of a picture must agree with each other, and no single cell can tell from the prompt which
typeface the others took. Everything here is a pure function of its arguments; randomness comes from seeds.
"""

from __future__ import annotations

import itertools
import string
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


LETTERS = string.ascii_uppercase
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmb10",
    "cmr10",
    "cmti10",
    "cmtt10",
)
CAP_HEIGHTS = (14, 16, 18)
OFFSETS = (-1, 0, 1)
CELL = 32
SUPERSAMPLING = 4


class Spec(NamedTuple):
    """The choices that make a board: indices into LETTERS, FACES and CAP_HEIGHTS, and an offset in pixels."""

    letter: int
    face: int
    size: int
    dx: int
    dy: int


def prompt(letter: int | str) -> str:
    """The prompt of a letter, given as the letter or as its index. It does not name the typeface."""
    return f"the letter {letter if isinstance(letter, str) else LETTERS[letter]}"


@cache
def _font(face: int, cap_height: int) -> ImageFont.FreeTypeFont:
    """The face at the size at which a capital H is `cap_height` pixels tall in the supersampled picture."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FACES[face]}.ttf"
    probe = 1000
    _, top, _, bottom = ImageFont.truetype(path, probe).getbbox("H", anchor="ls")
    return ImageFont.truetype(path, cap_height * SUPERSAMPLING * probe / (bottom - top))


@cache
def cell(spec: Spec) -> np.ndarray:
    """One cell as uint8 (32, 32), black on white, its ink centred and then moved by the offset."""
    font = _font(spec.face, CAP_HEIGHTS[spec.size])
    side = CELL * SUPERSAMPLING
    left, top, right, bottom = font.getbbox(LETTERS[spec.letter], anchor="ls")
    x = (side - left - right) // 2 + spec.dx * SUPERSAMPLING
    y = (side - top - bottom) // 2 + spec.dy * SUPERSAMPLING
    image = Image.new("L", (side, side), 255)
    ImageDraw.Draw(image).text((x, y), LETTERS[spec.letter], font=font, fill=0, anchor="ls")
    pixels = np.asarray(image.reduce(SUPERSAMPLING))
    pixels.flags.writeable = False
    return pixels


def all_specs() -> list[Spec]:
    """Every board there is, in a fixed order."""
    ranges = (range(len(LETTERS)), range(len(FACES)), range(len(CAP_HEIGHTS)), OFFSETS, OFFSETS)
    return [Spec(*choice) for choice in itertools.product(*ranges)]


def sample_specs(letters: list[int], seed: int) -> list[Spec]:
    """One random spec for each of the given letters."""
    rng = np.random.default_rng(seed)
    return [
        Spec(
            letter,
            int(rng.integers(len(FACES))),
            int(rng.integers(len(CAP_HEIGHTS))),
            int(rng.choice(OFFSETS)),
            int(rng.choice(OFFSETS)),
        )
        for letter in letters
    ]


def to_images(cells: np.ndarray, rows: int, columns: int) -> torch.Tensor:
    """Join uint8 cells (N, rows * columns, 32, 32) into float images (N, 3, H, W) in [0, 1]."""
    grid = torch.from_numpy(np.ascontiguousarray(cells)).view(-1, rows, columns, CELL, CELL)
    gray = grid.permute(0, 1, 3, 2, 4).reshape(-1, 1, rows * CELL, columns * CELL)
    return gray.expand(-1, 3, -1, -1).float() / 255


def draw(specs: list[Spec], rows: int = 4, columns: int = 4) -> torch.Tensor:
    """The boards of these specs as float images (N, 3, H, W) in [0, 1]."""
    cells = np.stack([cell(spec) for spec in specs])[:, None]
    return to_images(np.repeat(cells, rows * columns, axis=1), rows, columns)


def real_boards(letters: list[int], seed: int, rows: int = 4, columns: int = 4) -> torch.Tensor:
    """Random boards of the given letters: what a perfect model would make."""
    return draw(sample_specs(letters, seed), rows, columns)


def shuffled_boards(letters: list[int], seed: int, rows: int = 4, columns: int = 4) -> torch.Tensor:
    """Boards whose cells come each from another board of the same letter: right letters that do not agree."""
    count = rows * columns
    specs = sample_specs([letter for letter in letters for _ in range(count)], seed)
    cells = np.stack([cell(spec) for spec in specs])
    return to_images(cells.reshape(len(letters), count, CELL, CELL), rows, columns)
