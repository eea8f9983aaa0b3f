"""The lists of tiles behind the Triton kernels: every visible pair is in them, and they are as short as computed."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing

from diffusers_linattn.kernels.tile_configurations import FAMILIES, Tiles, choose_family, plan
from diffusers_linattn.kernels.tile_lists import PLACE_BITS, list_tiles
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.local_choice import window_wins


# Keys visited per image query by 16 x 8 tiles of queries, in 16 x 8 and in 8 x 8 tiles of keys.
VISITED = {
    (64, 8): (880, 616),
    (64, 16): (1360, 1360),
    (64, 32): (2912, 2848),
    (128, 8): (1012, 690),
    (128, 16): (1628, 1628),
    (128, 32): (4216, 4072),
    (256, 8): (1081, 728),
    (256, 16): (1771, 1771),
    (256, 32): (4958, 4762),
    (512, 8): (1116, 748),
    (512, 16): (1845, 1845),
    (512, 32): (5352, 5126),
}

LAYOUTS = {
    "odd": TokenLayout.joint(text=9, grid=(1, 11, 21)),
    "text on both sides": TokenLayout.of([("text", 70), ("image", (1, 9, 10)), ("text", 5)]),
    "references": TokenLayout.joint(text=3, grid=(1, 13, 11), references=[(1, 5, 24), (2, 9, 4)]),
    "video": TokenLayout.joint(text=5, grid=(5, 9, 10)),
    "one row": TokenLayout.image((1, 1, 300)),
    "no text": TokenLayout.joint(text=0, grid=(1, 17, 9)),
}


@pytest.mark.parametrize(("side", "window"), VISITED)
def test_number_of_visited_keys(side: int, window: int) -> None:
    layout = TokenLayout.image((1, side, side))
    for other, expected in zip(((1, 16, 8), (1, 8, 8)), VISITED[side, window], strict=True):
        for keys_own in (False, True):
            lists = list_tiles(layout, window, None, (1, 16, 8), other, keys_own)
            assert abs(lists.num_pairs / layout.length - expected) <= 1


@pytest.mark.parametrize(
    ("window", "temporal_window", "shape", "expected"),
    [(8, 3, (2, 8, 8), 3010), (8, 3, (4, 4, 8), 5243), (16, None, (2, 8, 8), 27692), (16, 1, (1, 16, 8), 1402)],
)
def test_number_of_visited_keys_in_video(window: int, temporal_window: int, shape: tuple, expected: int) -> None:
    layout = TokenLayout.image((21, 45, 80))
    assert abs(list_tiles(layout, window, temporal_window, shape, shape).num_pairs / layout.length - expected) <= 1


def test_video_chooses_its_tiles() -> None:
    layout = TokenLayout.image((21, 45, 80))
    assert choose_family(layout, 8, 3, 128, 128) == "video"
    assert choose_family(layout, 16, 1, 128, 128) == "picture"


def test_wide_tiles_are_for_pictures_whose_window_has_them() -> None:
    tiles = Tiles(128, 64, 8, 2, wide=2)
    picture, row = TokenLayout.joint(text=512, grid=(1, 128, 128)), TokenLayout.image((1, 1, 4096))
    assert [plan(picture, window, None, tiles)[0].other for window in (8, 16, 32)] == [64, 128, 128]
    assert plan(row, 256, None, tiles)[0].other == 64


def tokens_of(segment: list[int], place: tuple[int, ...], shape: tuple[int, int, int]) -> torch.Tensor:
    """The tokens of a tile as the kernels compute them."""
    start, stop, frame_tokens, row_tokens, height, width = segment
    frame, row, column = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    first = start + place[0] * frame_tokens + place[1] * row_tokens + place[2]
    tokens = first + frame * frame_tokens + row * row_tokens + column
    return tokens[(place[1] + row < height) & (place[2] + column < width) & (tokens < stop)]


@pytest.mark.parametrize("keys_own", [False, True], ids=["queries own", "keys own"])
@pytest.mark.parametrize(("window", "temporal_window"), [(1, None), (4, 2), (7, None), (40, None)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_lists_hold_every_visible_pair_once(layout, family, window, temporal_window, keys_own) -> None:
    owner, other = FAMILIES[family][32], FAMILIES[family][16]
    lists = list_tiles(layout, window, temporal_window, owner, other, keys_own)
    mask = 2**PLACE_BITS - 1
    visited = torch.zeros(layout.length, layout.length, dtype=torch.int32)
    untested = torch.zeros_like(visited)
    for segment, *place, first_run, last_run, _, _ in lists.items.tolist():
        own = tokens_of(lists.owners[segment].tolist(), place, owner)
        for index, first, cut, last in lists.runs[first_run:last_run].tolist():
            for i in range(first, last):
                entry = int(lists.places[i])
                there = (entry >> 2 * PLACE_BITS, (entry >> PLACE_BITS) & mask, entry & mask)
                tokens = tokens_of(lists.visited[index].tolist(), there, other)
                visited[own[:, None], tokens] += 1
                untested[own[:, None], tokens] += i < cut
                assert i >= cut or len(tokens) == math.prod(other)
    seen = reference.local_mask(layout, window, temporal_window)
    seen = seen.T if keys_own else seen
    assert visited.max() <= 1
    assert (visited.bool() >= seen).all()
    assert (seen >= untested.bool()).all()


@pytest.mark.parametrize("pooled", [0, 300])
def test_long_lists_are_cut_and_lose_nothing(pooled: int) -> None:
    layout = TokenLayout.joint(text=100, grid=(1, 128, 128))
    lists = list_tiles(layout, 8, None, (1, 8, 8), (1, 8, 8), True, pooled)
    assert lists.slots == -(-(pooled or 100) // 64) * lists.parts
    assert lists.parts > 1
    total = 256 + (0 if pooled else 3)  # 100 tokens of text are a tile, four rows of one, and four tokens
    for tile in range(lists.slots // lists.parts):
        items = lists.items[lists.items[:, 6] // lists.parts == tile]
        items = items[items[:, 6] >= 0].tolist()
        assert sum(int(r[3] - r[1]) for item in items for r in lists.runs[item[4] : item[5]]) == total


def test_dense_attention_only_where_the_window_leaves_out_too_little() -> None:
    """The rule's estimate against the exact count, where it decides."""
    for grid in [(64, 64), (48, 80), (32, 128), (64, 96)]:
        for window in (8, 16, 24, 32, 40, 64):
            layout = TokenLayout.joint(text=512, grid=(1, *grid))
            pairs = list_tiles(layout, window, None, (1, 16, 8), (1, 8, 8)).num_pairs
            gain = layout.length**2 / pairs
            if not math.isclose(gain, 4 / 3, rel_tol=0.1):
                assert window_wins(layout, window) == (gain > 4 / 3), (grid, window, gain)
    assert not window_wins(TokenLayout.joint(text=512, grid=(1, 64, 64)), 32)


def test_the_rule_takes_symbolic_sizes() -> None:
    def wins(text: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        layout = TokenLayout.joint(text=text.shape[0], grid=(1, grid.shape[0], grid.shape[1]))
        return grid + 1 if window_wins(layout, 8) else grid

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(wins, backend=counter, fullgraph=True, dynamic=True)
    for text, height, width in [(7, 60, 62), (9, 70, 64), (31, 64, 81), (12, 63, 66)]:
        assert compiled(torch.zeros(text), torch.zeros(height, width)).all()
    assert not compiled(torch.zeros(7), torch.zeros(12, 13)).any()
    assert counter.frame_count == 2
