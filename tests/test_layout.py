"""TokenLayout: what it lays out, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from diffusers_linattn import TokenLayout


def test_parts_follow_one_another() -> None:
    layout = TokenLayout.joint(text=7, grid=(2, 3, 5), text_first=False, references=[(1, 2, 2)], padding=3)
    assert [(s.kind, s.start, s.stop) for s in layout.segments] == [
        ("image", 0, 30),
        ("reference", 30, 34),
        ("text", 34, 41),
        ("padding", 41, 44),
    ]
    assert layout.length == 44
    assert layout.num_text == 10
    assert layout.image_part() == TokenLayout.image((2, 3, 5))
    assert str(layout) == "image 2x3x5 + reference 1x2x2 + text 7 + padding 3"


def test_layouts_are_values() -> None:
    layout = TokenLayout.of([("text", 0), ("image", (1, 4, 6)), ("reference", 9)])
    assert TokenLayout.decode(layout.encode()) == layout
    assert hash(TokenLayout.decode(layout.encode())) == hash(layout)
    assert [segment.kind for segment in layout.text] == ["text", "reference"]  # unknown grid: seen by everyone


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ([], "at least one segment"),
        ([("audio", 3)], "Unknown segment kind 'audio': expected one of text, image, reference, padding"),
        ([("image", 9)], "needs a \\(frames, height, width\\) grid, got 9"),
        ([("image", (3, 3))], "images and references take a \\(frames, height, width\\) grid"),
        ([("text", (1, 2, 3))], "text and padding a number of tokens"),
        ([("text", -1)], "cannot have the size -1"),
        ([("image", (1, 0, 4))], "cannot have the size"),
        ([("text", 7.5)], "measured in whole tokens"),
        ([("image", (1, 4.5, 4))], "measured in whole tokens"),
    ],
)
def test_bad_parts(parts: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TokenLayout.of(parts)
