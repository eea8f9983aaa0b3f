"""Compiles the kernels of gated linear attention for chips that this machine does not have, and reads what they need.

python tests/compile_gated_kernels.py            # a table: registers, stack, shared memory
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from diffusers_linattn.kernels.gated_attention import BLOCK, CHUNK, SCAN, choose_warps, output_blocks, state_blocks

from compiled_kernels import CHIPS, TYPES, Compiled, compile_for


# What a training step launches, by name: the kernel and the constants that differ from the usual ones.
LAUNCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "weights": ("weights_kernel", {}),
    "states": ("states_kernel", {}),
    "gradients of states": ("states_kernel", {"GRADIENT": True}),
    "scan": ("scan_kernel", {}),
    "scan from a state": ("scan_kernel", {"HAS_INITIAL": True}),
    "output": ("output_kernel", {}),
    "value gradient": ("output_kernel", {"GRADIENT": True, "COUNTED": False}),
    "weight gradients": ("weight_gradients_kernel", {}),
    "gradients": ("gradients_kernel", {}),
}
_PER_HEAD = ", a gate per head"
PER_HEAD = {name + _PER_HEAD: (kernel, {**flags, "SCALAR": True}) for name, (kernel, flags) in LAUNCHES.items()}
_FP32 = ("gate", "weight", "counts", "grad_counts", "decays", "totals", "grad_totals", "dgate", "initial")
_WORKSPACE = ("states", "grad_states", "weights", "grad_weights", "decayed", "decayed_queries", "decayed_keys")
# The operator's output, and its gradient, which may stand where otherwise values do.
_FP32_IN = {
    "output": ("out",),
    "gradients of states": ("value",),
    "value gradient": ("value",),
    "weight gradients": ("grad",),
    "gradients": ("grad",),
}


def compile_launch(name: str, head_dim: int, dtype: torch.dtype, chip: int, count: bool = False) -> Compiled:
    """Compile one launch for `sm_<chip>`; `count` its instructions."""
    from diffusers_linattn.kernels import gated_gradients, gated_states, gated_weights

    kernel_name, flags = (LAUNCHES | PER_HEAD)[name]
    kernel = next(
        getattr(module, kernel_name)
        for module in (gated_states, gated_weights, gated_gradients)
        if hasattr(module, kernel_name)
    )
    operands = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    precision = "tf32" if dtype == torch.float16 else "ieee"
    blocks = BLOCK, 32
    if kernel_name == "states_kernel":
        blocks = state_blocks(operands, head_dim)
    elif kernel_name == "output_kernel":
        blocks = output_blocks(operands, precision)
    elif kernel_name == "scan_kernel":
        blocks = SCAN
    constants: dict[str, Any] = {
        "KEY_DIM": head_dim,
        "VALUE_DIM": head_dim,
        "BLOCK_K": blocks[0],
        "BLOCK_V": blocks[1],
        "ROWS": SCAN[0],
        "CHUNK": CHUNK,
        "HALF": CHUNK // 2,
        "LEVELS": (CHUNK // 2).bit_length() - 1,
        "COLUMNS": False,
        "SCALAR": False,
        "BOTH": True,
        "GRADIENT": False,
        "COUNTED": True,
        "HAS_INITIAL": False,
        "QUERY_FEATURES": "relu",
        "KEY_FEATURES": "relu",
        "PRECISION": precision,
    }
    types = dict.fromkeys(_FP32 + _FP32_IN.get(name.removesuffix(_PER_HEAD), ()), "fp32")
    types |= dict.fromkeys(_WORKSPACE, TYPES[operands])
    warps = choose_warps(operands, precision)
    return compile_for(chip, kernel, constants | flags, dtype, types, head_dim, warps, 1, count)


def main() -> None:
    print("chip dim dtype launch                                 regs stack spills in loop  shared async")
    for chip in CHIPS:
        for head_dim, dtype in ((128, torch.bfloat16), (64, torch.float16), (64, torch.float32)):
            for name in LAUNCHES | PER_HEAD:
                result = compile_launch(name, head_dim, dtype, chip)
                print(f"{chip:4} {head_dim:3} {TYPES[dtype]:5} {name:38} {result}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
