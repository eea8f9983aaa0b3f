"""What a gated scan reads of the state that it begins with.

Outside the kernels: the state decays from token to token by the gates alone, so that its share of the output is one
product of matrices, whatever the rest of the scan is computed by.

Letters: B batch, H heads, L tokens of a grid, K features, C columns of a state.
"""

from __future__ import annotations

import torch

from diffusers_linattn.kernels.scan_paths import describe_path
from diffusers_linattn.ops.checks import check_tensor
from diffusers_linattn.ops.features import full_precision, resolve_feature_map
from diffusers_linattn.ops.gated_chunked import from_path, to_path


def read_initial_state(
    query: torch.Tensor,
    gate: torch.Tensor,
    initial_state: torch.Tensor,
    grid: tuple[int, int, int],
    both: bool,
    path: int,
    features: str,
) -> torch.Tensor:
    """φ(q_t)ᵀ diag(a_1 … a_t) S for the tokens t of a grid, a = exp(gate): (B, H, L, C) in fp32, or fp64 for fp64.

    Args:
        query: (B, H, L, K), tokens in raster order.
        gate: (B, H, L, K or 1), ≤ 0.
        initial_state: S, (B, H, K, C); with `both` (2, B, H, K, C), one for each way.
        grid: (frames, height, width) with L tokens.
        both: Read along the path and against it.
        path: What [`scan_path`] gives.
        features: φ: a name of `reference.FEATURE_MAPS`, or `"none"`.
    """
    direction, order = describe_path(path, both)
    of_query = full_precision if features == "none" else resolve_feature_map(features)[0]
    query = to_path(of_query(query), order, *grid[1:])
    gate = to_path(gate, order, *grid[1:]).to(query.dtype)
    output = query.new_zeros(*query.shape[:3], initial_state.shape[-1])
    backward = (False, True) if both else (direction == "backward",)
    for against, state in zip(backward, initial_state if both else initial_state[None], strict=True):
        passed = gate.flip(2).cumsum(2).flip(2) if against else gate.cumsum(2)
        output = output + (query * passed.exp()) @ state.to(query.dtype)
    return from_path(output, order, *grid[1:])


def check_initial_state(initial_state: torch.Tensor, phi_k: torch.Tensor, columns: int, both: bool) -> None:
    """Raise a ValueError unless it is a state of that many columns for each way that a scan goes."""
    check_tensor("initial_state", initial_state, phi_k)
    batch, heads, _, features = phi_k.shape
    shape = (*((2,) if both else ()), batch, heads, features, columns)
    if initial_state.shape != shape or not initial_state.is_floating_point():
        raise ValueError(
            f"initial_state is {tuple(initial_state.shape)} in {initial_state.dtype}, expected {shape} in a floating "
            f"dtype: ({'2, ' * both}batch, heads, features, value_dim), and with a denominator one column more, the "
            "sum of the features of the keys."
        )
