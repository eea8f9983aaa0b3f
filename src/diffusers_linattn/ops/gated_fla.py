"""Gated linear attention by fla-core (flash-linear-attention), an optional dependency that is imported when asked for.

Its kernel scans one way: two calls for both directions, the second on tokens in reverse.

Letters: B batch, H heads, L tokens of a grid, K features, V value columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffusers_linattn.kernels.scan_paths import describe_path
from diffusers_linattn.ops.features import full_precision


Scan = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def fla_scan(
    chunk_gla: Scan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    grid: tuple[int, int, int],
    both: bool,
    path: int,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights times values over the scan of one grid, the token itself included: (B, H, L, V) in the value's dtype.

    Args:
        chunk_gla: `fla.ops.gla.chunk_gla`, what scans one way.
        query: (B, H, L, K), tokens in raster order, like all of them.
        key: (B, H, L, K).
        value: (B, H, L, V).
        gate: (B, H, L, K or 1), ≤ 0.
        grid: (frames, height, width) with L tokens.
        both: Add the scans both ways.
        path: What [`scan_path`] gives.
        initial_state: What the scan begins with, (B, H, K, V); with `both` (2, B, H, K, V). `None` is 0.
    """
    direction, order = describe_path(path, both)
    tokens = torch.arange(query.shape[2], device=query.device).reshape(grid)
    tokens = (tokens if order == "rows" else tokens.transpose(1, 2)).reshape(-1)
    inputs = [x.transpose(1, 2) for x in (query, key, value, gate.expand_as(key))]
    ways = {"forward": tokens, "backward": tokens.flip(0)}
    paths = list(ways.values()) if both else [ways[direction]]
    states = [None] * len(paths)
    if initial_state is not None:
        states = list(full_precision(initial_state if both else initial_state[None]))
    output = torch.zeros_like(inputs[2])
    for visited, state in zip(paths, states, strict=True):
        scanned, _ = chunk_gla(*(x[:, visited] for x in inputs), scale=1.0, initial_state=state)
        output = output.index_add(1, visited, scanned.to(output.dtype))
    if both:  # each of the two counts the token itself
        output = output - ((inputs[0] * inputs[1]).sum(-1, keepdim=True) * inputs[2]).to(output.dtype)
    return output.transpose(1, 2)


def load_chunk_gla() -> Scan:
    """fla-core's scan of (B, L, H, K) tensors; a ValueError where it is not installed."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError as error:
        raise ValueError(
            f"impl='fla' needs fla-core, which cannot be imported ({error}): pip install 'diffusers-linattn[fla]', or "
            "use impl='triton'."
        ) from error
    return chunk_gla
