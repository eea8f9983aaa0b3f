"""Compiles the kernels of windowed attention for chips that this machine does not have, and reads what they need.

python tests/compile_windowed_kernels.py            # a table: registers, spills, shared memory, instructions of loops
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from diffusers_linattn.kernels.tile_configurations import FAMILIES, Tiles, block_dim, choose_configuration

from compiled_kernels import CHIPS, HEADER, TYPES, Compiled, compile_for


_TYPES = {
    **dict.fromkeys(("bias", "lse", "minus_grad_lse", "delta", "pairs", "partial"), "fp32"),
    **dict.fromkeys(("items", "runs", "query_segments", "key_segments"), "i32"),
    "places": "i64",
}


def launches(head_dim: int, dtype: torch.dtype, chip: int) -> dict[str, Tiles]:
    """The launches of one configuration by the name of their kernel, and the wide ones."""
    chosen = choose_configuration(head_dim, dtype, chip)
    found = {
        "forward_kernel": chosen.forward,
        "query_gradient_kernel": chosen.query_gradient,
        "key_gradients_kernel": chosen.key_gradients,
    }
    wide = {f"{name}, wide": tiles.wider for name, tiles in found.items() if tiles.wide}
    return found | wide


def compile_kernel(
    name: str,
    tiles: Tiles,
    head_dim: int,
    dtype: torch.dtype,
    chip: int,
    family: str = "picture",
    count: bool = False,
    **flags: Any,
) -> Compiled:
    """Compile one kernel for `sm_<chip>`; `flags` override constants of the kernel, such as HAS_BIAS."""
    from diffusers_linattn.kernels import local_attention_forward, local_attention_key_gradients
    from diffusers_linattn.kernels import local_attention_query_gradient as query_gradient

    kernel = {
        "forward_kernel": local_attention_forward.forward_kernel,
        "query_gradient_kernel": query_gradient.query_gradient_kernel,
        "key_gradients_kernel": local_attention_key_gradients.key_gradients_kernel,
    }[name.removesuffix(", wide")]
    owner, other = FAMILIES[family][tiles.owner], FAMILIES[family][tiles.other]
    queries, keys = (other, owner) if name == "key_gradients_kernel" else (owner, other)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": block_dim(head_dim),
        "TIMED": False,
        "HAS_BIAS": False,
        "HAS_POOLED": False,
        "PRECISION": "ieee",
    }
    for side, shape in (("QUERY", queries), ("KEY", keys)):
        constants |= dict(zip((f"{side}_FRAMES", f"{side}_ROWS", f"{side}_COLUMNS"), shape, strict=True))
    return compile_for(chip, kernel, constants | flags, dtype, _TYPES, head_dim, tiles.warps, tiles.stages, count)


def main() -> None:
    import triton

    print(f"triton {triton.__version__}")
    print(f"chip dim dtype kernel                      owner x other warps stages  {HEADER}")
    for chip in CHIPS:
        for head_dim in (64, 128):
            for dtype in (torch.bfloat16, torch.float16):
                for name, tiles in launches(head_dim, dtype, chip).items():
                    result = compile_kernel(name, tiles, head_dim, dtype, chip, count=True)
                    print(
                        f"{chip:4} {head_dim:3} {TYPES[dtype]:5} {name:27} {tiles.owner:5} x {tiles.other:5}"
                        f" {tiles.warps:5} {tiles.stages:6}  {result}",
                        flush=True,
                    )


if __name__ == "__main__":
    sys.exit(main())
