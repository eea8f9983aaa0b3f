"""What a kernel compiled by Triton needs of a chip, which need not be there, read from what the compiler gives."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wgmma_operands import overwritten_operands, register_products


# Bytes of shared memory that one block may have.
CHIPS = {80: 166912, 90: 232448, 100: 232448}
HEADER = "regs stack spills in loop  shared async   products        instructions of loops"
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
    under_way: int  # groups of such copies that none of them waits for before it computes
    products: str  # the matrix instruction
    register_products: int  # products of warp groups with an operand in registers
    overwritten: int  # those registers written while the product is under way
    # Where they were counted:
    instructions: tuple[int, ...]  # of each innermost loop with a matrix product
    other_loops: tuple[int, ...]  # of each innermost loop without one
    outside_loops: int  # and of what lies in none of them

    def __str__(self) -> str:
        loops = f"{self.asynchronous} of {self.loops}"
        spills = f"{self.spills:6} {self.loop_spills:7}"
        counts = " ".join(map(str, self.instructions))
        return (
            f"{self.registers:4} {self.stack:5} {spills} {self.shared:7} {loops}  {self.products:15} {counts}".rstrip()
        )


def compile_for(
    chip: int,
    kernel: Any,
    constants: dict[str, Any],
    dtype: torch.dtype,
    types: dict[str, str],
    head_dim: int,
    warps: int,
    stages: int,
    count: bool = False,
) -> Compiled:
    """Compile a kernel of Triton for `sm_<chip>`, and read what it needs.

    constants: values by name, of which the kernel takes those that it has. types: what pointers point to by name,
    where it is not `dtype`. The kernel's `do_not_specialize` names its integers. count: whether to count instructions,
    which takes a third of a test's time.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("scale", "log2_scale"):
            signature[argument] = "fp32"
        elif argument in kernel.do_not_specialize:
            signature[argument] = "i32"
        else:
            stride = argument.startswith("stride_")
            signature[argument] = "i32" if stride else "*" + types.get(argument, TYPES[dtype])
            # 16 does not divide strides between heads, or tokens, of 72 channels.
            if not (stride and head_dim % 16):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return _read(triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options), count)


def _read(compiled: Any, count: bool) -> Compiled:
    """What a kernel compiled by Triton needs, from its machine code and what comes before it."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cuobjdump = tools / "cuobjdump" if (tools / "cuobjdump").exists() else shutil.which("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
        # Without a stack there is no local memory.
        sass = ""
        if numbers["STACK"] or count or "wgmma" in compiled.asm["ptx"]:
            sass = subprocess.run([str(cuobjdump), "-sass", file.name], capture_output=True, text=True).stdout
    found = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
    loops = _loops_with_products(compiled.asm["ttgir"])
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]*);", sass)]
    spills = [address for address, text in code if re.search(r"\b(?:STL|LDL)\b", text)]
    inner = _innermost_loops(code)
    waits = [int(n) for loop in loops for text in loop for n in re.findall(r"ttg\.async_wait .*num = (\d+)", text)]
    bodies = [[text for address, text in code if first <= address <= last] for first, last in inner]
    outside = [text for address, text in code if not any(first <= address <= last for first, last in inner)]
    return Compiled(
        numbers["REG"],
        numbers["STACK"],
        len(spills),
        sum(any(first <= address <= last for first, last in inner) for address in spills),
        compiled.metadata.shared,
        len(loops),
        sum(any("async_copy_global_to_local" in text for text in loop) for loop in loops),
        min(waits, default=0),
        max(set(found), key=found.count) if found else "none",
        register_products(code),
        len(overwritten_operands(code)),
        tuple(len(body) for body in bodies if count and _multiplies(body)),
        tuple(len(body) for body in bodies if count and not _multiplies(body)),
        sum("NOP" not in text for text in outside) if count else 0,  # which fill up the end
    )


def _multiplies(body: list[str]) -> bool:
    return any("MMA" in text for text in body)


def _innermost_loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """From the target of each innermost backward branch to the branch."""
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    return [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]


def _loops_with_products(code: str) -> list[list[str]]:
    """The body of each innermost loop with a matrix product."""
    found: list[list[str]] = []
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
                found.append(body)
            innermost = False
        elif open_loops:
            open_loops[-1][1].append(line)
    return found
