"""Which implementation of `local_attention` answers a call where the user names none."""

from __future__ import annotations

import torch

from diffusers_linattn.kernels.launching import DTYPES, why_not
from diffusers_linattn.kernels.local_attention import MAX_HEAD_DIM
from diffusers_linattn.layout import Segment, TokenLayout


# One attention over all tokens computes its pairs faster than the windowed kernel does, in which the disc cuts most
# tiles: by the arithmetic of docs/kernels.md by a third. So the window has to leave out more than that.
LEAST_GAIN = (4, 3)
# Above this many tokens the window as a mask of all pairs is no longer small beside the model.
MOST_DENSE_TOKENS = 8192


def window_covers(layout: TokenLayout, window: int, temporal_window: int | None = None) -> bool:
    """Whether every query sees every key, so that [`local_attention`] is plain attention.

    Example:
        >>> from diffusers_linattn import TokenLayout
        >>> layout = TokenLayout.image((1, 4, 5))  # the farthest tokens are 3 rows and 4 columns apart
        >>> window_covers(layout, 5), window_covers(layout, 6)
        (False, True)
    """
    grids = layout.grids
    for queries in grids:
        for keys in grids:
            assert queries.grid is not None
            assert keys.grid is not None
            (frames, *query_size), (_, *key_size) = queries.grid, keys.grid
            (dy, per_row), (dx, per_column) = (_farthest(q, k) for q, k in zip(query_size, key_size, strict=True))
            if (dy * per_column) ** 2 + (dx * per_row) ** 2 >= (window * per_row * per_column) ** 2:
                return False
            if temporal_window is not None and queries == keys and frames > temporal_window:
                return False
    return True


def window_wins(layout: TokenLayout, window: int, temporal_window: int | None = None) -> bool:
    """Whether the windowed kernel has less to do than one attention over all tokens under a mask of all pairs.

    The pairs of tokens in visited tiles, text and text queries included, have to be fewer than those of all tokens by
    `LEAST_GAIN`. They are estimated in integers, without making the lists, so that sizes may be symbolic; the exact
    counts are in `kernels.tile_lists`.

    Example:
        >>> from diffusers_linattn import TokenLayout
        >>> [window_wins(TokenLayout.joint(text=512, grid=(1, 64, 64)), r) for r in (8, 16, 32)]
        [True, True, False]
        >>> window_wins(TokenLayout.joint(text=512, grid=(1, 128, 128)), 32)
        True
    """
    tokens = layout.length
    if tokens > MOST_DENSE_TOKENS:
        return True
    pairs = layout.num_text * (2 * tokens - layout.num_text)
    for queries in layout.grids:
        for keys in layout.grids:
            pairs += _visited_pairs(queries, keys, window, temporal_window)
    numerator, denominator = LEAST_GAIN
    return numerator * pairs < denominator * tokens * tokens


def choose_impl(
    query: torch.Tensor,
    value: torch.Tensor,
    layout: TokenLayout,
    window: int,
    temporal_window: int | None,
    mask: torch.Tensor | None,
) -> str:
    """The implementation for a call: `"dense"`, `"triton"` or `"tiled"`."""
    if window_covers(layout, window, temporal_window):
        return "dense"
    impl = choose_windowed(query, value, mask)
    return "dense" if impl == "triton" and not window_wins(layout, window, temporal_window) else impl


def choose_windowed(query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> str:
    """The implementation of linear cost for a call: `"triton"` on a GPU that it runs on, else `"tiled"`."""
    on_gpu = query.device.type == "cuda"
    return "triton" if on_gpu and why_not_triton(query, value, mask) is None else "tiled"


def why_not_triton(query: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Why `impl="triton"` cannot answer this call, as the rest of a sentence; `None` if it can."""
    if mask is not None and mask.ndim > 1 and mask.shape[-2] != 1:
        return (
            f"it takes a mask of keys, (batch or 1, heads or 1, 1, tokens), but got {tuple(mask.shape)}: use "
            "impl='tiled' for a pairwise mask"
        )
    if query.dtype not in DTYPES:
        return f"it computes in bf16, fp16 and fp32, but got {query.dtype}: use impl='tiled'"
    if query.shape[-1] > MAX_HEAD_DIM or value.shape[-1] != query.shape[-1]:
        return (
            f"head_dim may be at most {MAX_HEAD_DIM} and the same for value, but got {query.shape[-1]} and "
            f"{value.shape[-1]}: use impl='tiled'"
        )
    return why_not(str(query.device))


def _visited_pairs(queries: Segment, keys: Segment, window: int, temporal_window: int | None) -> int:
    """About how many pairs of tokens the tiles hold that are visited between two grids."""
    assert queries.grid is not None
    assert keys.grid is not None
    (query_frames, *query_size), (key_frames, *key_size) = queries.grid, keys.grid
    pairs = query_frames * key_frames
    if temporal_window is not None and queries == keys:
        pairs = query_frames * torch.sym_min(key_frames, 2 * temporal_window - 1)
    for q, k in zip(query_size, key_size, strict=True):
        # Around each query `window` keys on both sides, less what the borders cut off, plus half a tile on both.
        reach = torch.sym_min(window, k)
        pairs = pairs * torch.sym_min(q * k, (2 * reach + 7) * q - (reach * reach * q) // k)
    return pairs


def _farthest(queries: int, keys: int) -> tuple[int, int]:
    """The largest of the reference's `axis_offsets`, and its units per token."""
    return (queries - 1, 1) if queries == keys else (2 * queries * keys - queries - keys, 2 * queries)
