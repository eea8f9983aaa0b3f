"""Compiles the kernels of windowed attention for chips that this machine does not have, and reads what they need.

python tests/compile_kernels.py            # a table: registers, stack, shared memory, asynchronous copies
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_linattn.kernels.tile_configurations import FAMILIES, Tiles, block_dim, choose_configuration


# Bytes of shared memory that one block may have.
CHIPS = {80: 166912, 90: 232448, 100: 232448}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one chip."""

    registers: int
    stack: int
    spills: int  # loads and stores of local memory in the machine code
    loop_spills: int  # those in innermost loops
    shared: int
    loops: int  # innermost loops with a matrix product
    asynchronous: int  # how many of them copy to shared memory asynchronously
    products: str  # the matrix instruction

    def __str__(self) -> str:
        loops = f"{self.asynchronous} of {self.loops}"
        spills = f"{self.spills:6} {self.loop_spills:7}"
        return f"{self.registers:4} {self.stack:5} {spills} {self.shared:7} {loops}  {self.products}"


def launches(head_dim: int, dtype: torch.dtype, chip: int) -> dict[str, Tiles]:
    """The launches of one configuration by the name of their kernel."""
    chosen = choose_configuration(head_dim, dtype, chip)
    return {
        "forward_kernel": chosen.forward,
        "query_gradient_kernel": chosen.query_gradient,
        "key_gradients_kernel": chosen.key_gradients,
    }


def compile_kernel(
    name: str, tiles: Tiles, head_dim: int, dtype: torch.dtype, chip: int, family: str = "picture", **flags: Any
) -> Compiled:
    """Compile one kernel for `sm_<chip>`; `flags` override constants of the kernel, such as HAS_BIAS."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffusers_linattn.kernels import local_attention_forward, local_attention_key_gradients
    from diffusers_linattn.kernels import local_attention_query_gradient as query_gradient

    kernel = {
        "forward_kernel": local_attention_forward.forward_kernel,
        "query_gradient_kernel": query_gradient.query_gradient_kernel,
        "key_gradients_kernel": local_attention_key_gradients.key_gradients_kernel,
    }[name]
    owner, other = FAMILIES[family][tiles.owner], FAMILIES[family][tiles.other]
    queries, keys = (other, owner) if name == "key_gradients_kernel" else (owner, other)
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": block_dim(head_dim),
        "ISOTROPIC": True,
        "TIMED": False,
        "HAS_BIAS": False,
        "HAS_POOLED": False,
        "PRECISION": "ieee",
    }
    for side, shape in (("QUERY", queries), ("KEY", keys)):
        constants |= dict(zip((f"{side}_FRAMES", f"{side}_ROWS", f"{side}_COLUMNS"), shape, strict=True))
    constants = {key: value for key, value in (constants | flags).items() if key in kernel.arg_names}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        signature[argument] = _type(argument, TYPES[dtype], constants)
        if signature[argument].startswith("*") or argument.startswith("stride_"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    return _read(compiled)


def _type(argument: str, element: str, constants: dict[str, Any]) -> str:
    if argument in constants:
        return "constexpr"
    if argument in ("places",):
        return "*i64"
    if argument in ("items", "runs", "query_segments", "key_segments"):
        return "*i32"
    if argument in ("bias", "lse", "delta", "pairs", "partial"):
        return "*fp32"
    if argument in ("scale", "log2_scale"):
        return "fp32"
    if argument.startswith("stride_") or argument in (
        "heads",
        "groups",
        "pooled_groups",
        "num_tokens",
        "num_pooled",
        "num_segments",
        "slots",
    ):
        return "i32"
    return f"*{element}"


def _read(compiled: Any) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cuobjdump = tools / "cuobjdump" if (tools / "cuobjdump").exists() else shutil.which("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
        # Without a stack there is no local memory; to read the machine code takes a third of a test.
        sass = ""
        if numbers["STACK"]:
            sass = subprocess.run([str(cuobjdump), "-sass", file.name], capture_output=True, text=True).stdout
    found = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
    loops = _loops_with_products(compiled.asm["ttgir"])
    return Compiled(
        numbers["REG"],
        numbers["STACK"],
        *_spills(sass),
        compiled.metadata.shared,
        len(loops),
        sum(loops),
        max(set(found), key=found.count) if found else "none",
    )


def _spills(sass: str) -> tuple[int, int]:
    """Loads and stores of local memory, and those between an innermost backward branch and its target."""
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]*);", sass)]
    spills = [address for address, text in code if re.search(r"\b(?:STL|LDL)\b", text)]
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    return len(spills), sum(any(a <= address <= b for a, b in inner) for address in spills)


def _loops_with_products(code: str) -> list[bool]:
    """For each innermost loop with a matrix product, whether it copies asynchronously."""
    found: list[bool] = []
    open_loops: list[tuple[int, list[str]]] = []
    innermost = False
    for line in code.splitlines():
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line:
            open_loops.append((indent, []))
            innermost = True
        elif open_loops and indent == open_loops[-1][0] and line.strip().startswith("}"):
            _, body = open_loops.pop()
            if innermost and any(re.search(r"tt\.dot|warp_group_dot|tc_gen5_mma", text) for text in body):
                found.append(any("async_copy_global_to_local" in text for text in body))
            innermost = False
        elif open_loops:
            open_loops[-1][1].append(line)
    return found


def main() -> None:
    import triton

    print(f"triton {triton.__version__}")
    print("chip dim dtype kernel                 owner x other warps stages  regs stack spills in loop  shared async")
    for chip in CHIPS:
        for head_dim in (64, 128):
            for dtype in (torch.bfloat16, torch.float16):
                for name, tiles in launches(head_dim, dtype, chip).items():
                    result = compile_kernel(name, tiles, head_dim, dtype, chip)
                    print(
                        f"{chip:4} {head_dim:3} {TYPES[dtype]:5} {name:22} {tiles.owner:5} x {tiles.other:5}"
                        f" {tiles.warps:5} {tiles.stages:6}  {result}",
                        flush=True,
                    )


if __name__ == "__main__":
    sys.exit(main())
