"""Compiles the kernels of linear attention for chips that this machine does not have, and reads what they need.

python tests/compile_linear_kernels.py            # a table: registers, spills, shared memory, instructions of loops
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from diffusers_linattn.kernels.linear_launches import Launch, block_of, choose_launch

from compiled_kernels import CHIPS, HEADER, TYPES, Compiled, compile_for


# What a training step of each kind launches, by name: the kernel and the constants that differ from the usual ones.
LAUNCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "state": ("state_kernel", {}),
    "product": ("product_kernel", {}),
    "query gradient": ("feature_gradient_kernel", {}),
    "state of gradients": ("state_kernel", {"WEIGHTED": True, "COUNTED": True}),
    "key gradient": ("feature_gradient_kernel", {"NORMALIZED": False}),
    "value gradient": ("product_kernel", {"NORMALIZED": False}),
}
# Instead of the last two, for heads of up to 64.
NARROW_LAUNCHES: dict[str, tuple[str, dict[str, Any]]] = {"narrow gradients": ("narrow_gradients_kernel", {})}
TEXT_LAUNCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "product, text": ("product_kernel", {"HAS_TEXT": True}),
    "query gradient, text": ("feature_gradient_kernel", {"HAS_TEXT": True}),
    "text gradients": ("text_gradients_kernel", {"HAS_TEXT": True}),
}
# Where other weights than those of linear attention are blended with the text's.
BLENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "blend": ("blend_kernel", {}),
    "blend gradients": ("blend_gradients_kernel", {}),
    "blend, text": ("blend_kernel", {"HAS_TEXT": True}),
    "blend gradients, text": ("blend_gradients_kernel", {"HAS_TEXT": True}),
}
_FP32 = ("weights", "counts", "state", "normalizer", "text_bias", "lse", "shrunk", "minus_delta", "dsums", "dcounts")

# What else is fp32: parts that are added up, and the sums that are blended.
_FP32_IN = {"text_gradients_kernel": ("dkey", "dvalue"), "blend_kernel": ("value",)}


def launches(head_dim: int) -> list[str]:
    """The names of the launches that heads of a size have, text beside them included."""
    beside_text = [*TEXT_LAUNCHES, *BLENDS] if head_dim <= 128 else []
    return [*LAUNCHES, *(NARROW_LAUNCHES if head_dim <= 64 else ()), *beside_text]


def compile_launch(
    name: str,
    head_dim: int,
    dtype: torch.dtype,
    chip: int,
    launch: Launch | None = None,
    count: bool = False,
    **flags: Any,
) -> Compiled:
    """Compile one launch for `sm_<chip>`; `flags` override constants of the kernel, such as HAS_BIAS."""
    from diffusers_linattn.kernels import linear_attention_backward as backward
    from diffusers_linattn.kernels import linear_attention_forward as forward
    from diffusers_linattn.kernels import text_blending_passes as blending

    kernel_name, own = (LAUNCHES | NARROW_LAUNCHES | TEXT_LAUNCHES | BLENDS)[name]
    flags = own | flags
    kernel = next(getattr(x, kernel_name) for x in (forward, backward, blending) if hasattr(x, kernel_name))
    block = block_of(head_dim)
    launch = launch or choose_launch(kernel_name, head_dim, dtype, chip, "HAS_TEXT" in flags)
    constants: dict[str, Any] = {
        "FEATURES": head_dim,
        "COLUMNS": head_dim,
        "BLOCK_K": launch.summed if kernel_name == "product_kernel" else block,
        "BLOCK_V": launch.summed if kernel_name == "feature_gradient_kernel" else block,
        "WIDE_K": block,
        "WIDE_V": block,
        "BLOCK_M": launch.tokens,
        "BLOCK_T": launch.text,
        "FEATURE_MAP": "relu",
        "NORMALIZED": True,
        "WEIGHTED": False,
        "COUNTED": False,
        "HAS_TEXT": False,
        "HAS_BIAS": True,
        "RAGGED": True,
        "SPLIT": dtype == torch.bfloat16,
        "PRECISION": "tf32" if dtype == torch.float16 else "ieee",
    }
    types = dict.fromkeys(_FP32 + _FP32_IN.get(kernel_name, ()), "fp32")
    return compile_for(chip, kernel, constants | flags, dtype, types, head_dim, launch.warps, launch.stages, count)


def main() -> None:
    import triton

    print(f"triton {triton.__version__}")
    print(f"chip dim dtype launch                 {HEADER}")
    sizes = [(128, torch.bfloat16), (72, torch.float16), (576, torch.bfloat16), (64, torch.bfloat16)]
    for chip in [int(x) for x in sys.argv[1:]] or CHIPS:
        for head_dim, dtype in sizes:
            for name in launches(head_dim):
                result = compile_launch(name, head_dim, dtype, chip, count=True, HAS_BIAS=False, RAGGED=False)
                print(f"{chip:4} {head_dim:3} {TYPES[dtype]:5} {name:22} {result}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
