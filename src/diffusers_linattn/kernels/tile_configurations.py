"""How many tokens a tile has and how a kernel is launched: chosen by head_dim, dtype and chip, never by timing.

`tests/test_triton_compile.py` compiles those of bf16 at 64 and 128 channels for sm_80, sm_90 and sm_100, and some
others for sm_90, and asserts that they need no more registers and shared memory than there are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from diffusers_linattn.kernels.launching import SMALL_CHIPS
from diffusers_linattn.kernels.tile_lists import Shape, TileLists, list_tiles
from diffusers_linattn.layout import TokenLayout


@dataclass(frozen=True)
class Tiles:
    """Tokens of a tile of the side that owns the programs and of the one that is visited; warps; pipeline stages.

    With `wide`, there is a launch of so many stages whose visited tiles have twice the tokens. It needs a fifth fewer
    instructions per pair, and computes more pairs unless they fit the window as well. Its registers just suffice for
    pictures without a mask and pooled keys.
    """

    owner: int
    other: int
    warps: int
    stages: int
    wide: int = 0

    @property
    def wider(self) -> Tiles:
        """The wide launch."""
        return Tiles(self.owner, 2 * self.other, self.warps, self.wide)


@dataclass(frozen=True)
class Configuration:
    """The launches of one call."""

    forward: Tiles
    query_gradient: Tiles
    key_gradients: Tiles


# Shapes of a tile by its tokens, in families that suit different grids: pictures, single rows (or columns that are
# written as such), video seen over few frames and over many.
FAMILIES: dict[str, dict[int, Shape]] = {
    "picture": {128: (1, 16, 8), 64: (1, 8, 8), 32: (1, 4, 8), 16: (1, 4, 4)},
    "row": {128: (1, 1, 128), 64: (1, 1, 64), 32: (1, 1, 32), 16: (1, 1, 16)},
    "video": {128: (2, 8, 8), 64: (2, 4, 8), 32: (2, 4, 4), 16: (2, 2, 4)},
    "long video": {128: (4, 4, 8), 64: (4, 4, 4), 32: (4, 2, 4), 16: (4, 2, 2)},
}
# Times the pairs that a wide launch may compute: it saves a fifth of the instructions, which take about as long as the
# products.
MOST_MORE_PAIRS = 1.125
MOST_FRAMES = max(frames for family in FAMILIES.values() for frames, _, _ in family.values())


@functools.lru_cache(maxsize=64)
def choose_configuration(head_dim: int, dtype: torch.dtype, chip: int) -> Configuration:
    """The launches for a head_dim and dtype on a chip, given as its compute capability times 10; 0: the interpreter.

    Example:
        >>> choose_configuration(128, torch.bfloat16, 90).forward
        Tiles(owner=128, other=64, warps=8, stages=3, wide=2)
    """
    if not chip:
        small = Tiles(128, 64, 4, 1)
        return Configuration(small, small, small)
    block = block_dim(head_dim)
    if dtype == torch.float32:
        if block <= 64:
            return Configuration(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2))
        if block == 128:
            if chip in SMALL_CHIPS:
                return Configuration(Tiles(32, 16, 8, 1), Tiles(16, 16, 8, 1), Tiles(32, 16, 8, 1))
            return Configuration(Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 2))
        keys = Tiles(32, 16, 8, 1) if chip in SMALL_CHIPS else Tiles(32, 16, 8, 2)
        return Configuration(Tiles(32, 16, 8, 2), Tiles(16, 16, 8, 2), keys)
    if block <= 64:
        if chip == 90:
            return Configuration(Tiles(128, 64, 8, 3, wide=2), Tiles(128, 64, 8, 2, wide=2), Tiles(128, 64, 8, 2))
        return Configuration(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2))
    if block == 128:
        if chip == 90:
            return Configuration(Tiles(128, 64, 8, 3, wide=2), Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2))
        if chip in SMALL_CHIPS:
            return Configuration(Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2))
        if chip >= 100:
            return Configuration(Tiles(128, 32, 8, 3), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2))
        return Configuration(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2))
    if chip in SMALL_CHIPS:
        return Configuration(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1))
    return Configuration(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2))


def block_dim(head_dim: int) -> int:
    """Channels that a kernel computes with: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.lru_cache(maxsize=64)
def choose_family(layout: TokenLayout, window: int, temporal_window: int | None, owner: int, other: int) -> str:
    """The shapes of tiles that visit the fewest pairs of tokens.

    Example:
        >>> choose_family(TokenLayout.image((1, 64, 64)), 8, None, 128, 64)
        'picture'
        >>> choose_family(TokenLayout.image((1, 1, 4096)), 8, None, 128, 64)
        'row'
    """
    sizes = [segment.grid for segment in layout.grids if segment.grid is not None]
    families = ["picture"]
    if any(min(rows, columns) < 8 for _, rows, columns in sizes):
        families.append("row")
    if any(frames > 1 for frames, _, _ in sizes):
        families += ["video", "long video"]
    return min(
        families,
        key=lambda name: (
            list_tiles(layout, window, temporal_window, FAMILIES[name][owner], FAMILIES[name][other]).num_pairs
        ),
    )


@functools.lru_cache(maxsize=128)
def plan(
    layout: TokenLayout,
    window: int,
    temporal_window: int | None,
    tiles: Tiles,
    *,
    owners_are_keys: bool = False,
    num_pooled: int = 0,
) -> tuple[Tiles, TileLists, Shape, Shape]:
    """The launch, wide or not, its lists and the shapes of its tiles, the owner's first.

    Example:
        >>> tiles = Tiles(128, 64, 8, 3, wide=2)
        >>> layout = TokenLayout.joint(text=512, grid=(1, 64, 64))
        >>> [plan(layout, window, None, tiles)[0].other for window in (8, 16, 32)]
        [64, 128, 128]
    """
    # The relation is nearly symmetric, so that the family with the fewest pairs is that of both directions.
    family = FAMILIES[choose_family(layout, window, temporal_window, tiles.owner, tiles.other)]
    owner, other = family[tiles.owner], family[tiles.other]
    lists = list_tiles(layout, window, temporal_window, owner, other, owners_are_keys, num_pooled)
    if tiles.wide:
        wider = tiles.wider
        wide = plan(layout, window, temporal_window, wider, owners_are_keys=owners_are_keys, num_pooled=num_pooled)
        if wide[3] == FAMILIES["picture"][wider.other] and wide[1].num_pairs < MOST_MORE_PAIRS * lists.num_pairs:
            return wide
    return tiles, lists, owner, other
