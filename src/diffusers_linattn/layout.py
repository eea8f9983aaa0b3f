"""What a token sequence is made of: text, image grids, reference grids, padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


KINDS = ("text", "image", "reference", "padding", "memory")
_FIELDS = 5  # integers per segment in `TokenLayout.encode`: kind, length, frames, height, width


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of one kind.

    Args:
        kind: `"text"`, `"image"`, `"reference"` (another picture the model looks at), `"padding"` (tokens that the
            model attends to although they carry nothing; they are treated as text) or `"memory"` (a reference before
            the image that is looked at but asks nothing, as in a cache of its keys and values).
        start: Position of the first token in the sequence.
        length: Number of tokens.
        grid: `(frames, height, width)` in tokens, raster order, for `"image"`, `"reference"` and `"memory"`; `None`
            for text, padding, and a reference or memory whose grid is unknown, which is then treated as text.
    """

    kind: str
    start: int
    length: int
    grid: tuple[int, int, int] | None = None

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.length


@dataclass(frozen=True)
class TokenLayout:
    """The ordered segments of one token sequence. Frozen, hashable, integers only.

    Build one with [`TokenLayout.joint`], [`TokenLayout.image`] or [`TokenLayout.of`].

    Example:
        >>> layout = TokenLayout.joint(text=512, grid=(1, 64, 64), text_first=True)
        >>> layout.length
        4608
        >>> [(segment.kind, segment.start, segment.stop) for segment in layout.segments]
        [('text', 0, 512), ('image', 512, 4608)]
    """

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, parts: Iterable[tuple[str, int | Sequence[int]]]) -> TokenLayout:
        """Lay out `(kind, size)` parts one after the other; `size` is a token count or a `(frames, height, width)`.

        Raises:
            ValueError: An unknown kind, a negative size, an image without a grid, or no part at all.

        Example:
            >>> TokenLayout.of([("image", (1, 4, 6)), ("text", 77)]).length
            101
        """
        segments, start = [], 0
        for kind, size in parts:
            if kind not in KINDS:
                raise ValueError(f"Unknown segment kind {kind!r}: expected one of {', '.join(KINDS)}.")
            if isinstance(size, Sequence):
                if len(size) != 3 or kind in ("text", "padding"):
                    raise ValueError(
                        f"A {kind} segment got {tuple(size)}: images and references take a (frames, height, width) "
                        "grid, text and padding a number of tokens."
                    )
                grid = (size[0], size[1], size[2])
                _check_integers(kind, grid)
                length = grid[0] * grid[1] * grid[2]
            else:
                if kind == "image":
                    raise ValueError(f"An image segment needs a (frames, height, width) grid, got {size!r}.")
                grid, length = None, size
                _check_integers(kind, (size,))
            if length < 0 or (grid is not None and min(grid) < 1):
                raise ValueError(f"A {kind} segment cannot have the size {size!r}: tokens are counted from 1.")
            segments.append(Segment(kind, start, length, grid))
            start += length
        if not segments:
            raise ValueError("A TokenLayout needs at least one segment, got none.")
        return cls(tuple(segments))

    @classmethod
    def image(cls, grid: Sequence[int]) -> TokenLayout:
        """Image tokens alone, as in DiT and PixArt. `grid` is `(frames, height, width)` in tokens.

        Example:
            >>> TokenLayout.image((1, 32, 48)).length
            1536
        """
        return cls.of([("image", grid)])

    @classmethod
    def joint(
        cls,
        *,
        text: int,
        grid: Sequence[int],
        text_first: bool = True,
        references: Iterable[Sequence[int]] = (),
        padding: int = 0,
    ) -> TokenLayout:
        """Text and image tokens in one sequence, as in FLUX (`text_first=True`) and SD3 (`text_first=False`).

        Args:
            text: Number of text tokens; 0 is allowed.
            grid: `(frames, height, width)` of the image in tokens.
            text_first: Whether text stands before the image.
            references: Grids of reference images; they follow the image directly.
            padding: Number of attended padding tokens at the end of the sequence.

        Example:
            >>> TokenLayout.joint(text=77, grid=(1, 3, 5), references=[(1, 2, 4)]).length
            100
        """
        parts: list[tuple[str, int | Sequence[int]]] = [("image", grid)]
        parts += [("reference", reference) for reference in references]
        parts.insert(0 if text_first else len(parts), ("text", text))
        if padding:
            parts.append(("padding", padding))
        return cls.of(parts)

    @property
    def length(self) -> int:
        """Number of tokens in the whole sequence."""
        return self.segments[-1].stop

    @property
    def grids(self) -> tuple[Segment, ...]:
        """Segments with a grid: the image, its references, and memory."""
        return tuple(segment for segment in self.segments if segment.grid is not None)

    @property
    def text(self) -> tuple[Segment, ...]:
        """Segments without a grid, seen by every query: text, attended padding, references of unknown grid, memory
        of unknown grid."""
        return tuple(segment for segment in self.segments if segment.grid is None)

    @property
    def num_text(self) -> int:
        """Number of tokens without a grid."""
        return sum(segment.length for segment in self.text)

    def image_part(self) -> TokenLayout:
        """The layout of the image segments alone, for layers that see no text."""
        return TokenLayout.of(
            [(segment.kind, segment.grid) for segment in self.segments if segment.grid and segment.kind == "image"]
        )

    def encode(self) -> list[int]:
        """The layout as a flat list of integers, for operators that take no Python objects; see [`decode`]."""
        flat: list[int] = []
        for segment in self.segments:
            frames, height, width = segment.grid or (0, 0, 0)
            flat += [KINDS.index(segment.kind), segment.length, frames, height, width]
        return flat

    @classmethod
    def decode(cls, flat: Sequence[int]) -> TokenLayout:
        """The inverse of [`encode`].

        Example:
            >>> layout = TokenLayout.joint(text=8, grid=(1, 4, 6))
            >>> TokenLayout.decode(layout.encode()) == layout
            True
        """
        parts: list[tuple[str, int | Sequence[int]]] = []
        for i in range(0, len(flat), _FIELDS):
            kind, length, *grid = flat[i : i + _FIELDS]
            parts.append((KINDS[kind], tuple(grid) if grid[0] else length))
        return cls.of(parts)

    def __str__(self) -> str:
        return " + ".join(
            f"{segment.kind} {'x'.join(map(str, segment.grid)) if segment.grid else segment.length}"
            for segment in self.segments
        )


def _check_integers(kind: str, sizes: Sequence[object]) -> None:
    # Sizes are symbolic integers inside a compiled block.
    if not all(isinstance(size, int | torch.SymInt) and not isinstance(size, bool) for size in sizes):
        raise ValueError(f"A {kind} segment is measured in whole tokens, got {tuple(sizes)!r}.")
