"""Counts what gated linear attention asks of an H100's cores, ours and fla-core's, in the machine code, without a GPU.

    python benchmarks/gated_instructions.py --output results/    # needs Triton and fla-core, and three minutes

The unit is one instruction of a warp, per chunk of 64 tokens and head of 128 channels, in bf16 with a gate per channel
in fp32. A loop counts as often as it runs. Of the configurations that fla-core's autotuner chooses from, each kernel
has the one with the fewest. Instructions are not time: memory, and scans in which a chunk waits for the one before,
come on top.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffusers_linattn.kernels.gated_attention import BLOCK, CHUNK, SCAN, choose_warps, output_blocks, state_blocks

from gpu_timing import environment, write


sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from compile_gated_kernels import compile_launch  # noqa: E402
from compiled_kernels import Compiled, compile_for  # noqa: E402


CHIP, DIM = 90, 128
RUN = 16  # tokens that fla-core takes at a time inside a chunk
RUNS = CHUNK // RUN
Counts = dict[str, float]

# Of fla-core's kernels, for a call with one gate per channel and without initial and final states.
FLA_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("USE_G", "USE_G_GAMMA", "USE_GV", "STATE_V_FIRST", "IS_VARLEN", "USE_GRAPH", "REVERSE"), False),
    **dict.fromkeys(("USE_INITIAL_STATE", "STORE_FINAL_STATE"), False),
    **dict.fromkeys(("USE_FINAL_STATE_GRADIENT", "STORE_INITIAL_STATE_GRADIENT"), False),
    **dict.fromkeys(("cu_seqlens", "chunk_indices", "split_offsets", "g_gamma", "gv", "h0", "ht", "dht", "dh0")),
    **{"USE_GK": True, "HAS_SCALE": True, "B": 1, "NG": 1, "H": 24, "HV": 24, "HQ": 24},
    **{"K": DIM, "V": DIM, "S": DIM, "BT": CHUNK, "BS": CHUNK, "BC": RUN, "NC": RUNS},
}
FLA_FP32 = ("g", "gk", "s", "A", "dA", "dh", "dq", "dk", "dq2", "dk2", "dg")  # what pointers are to


def instructions(
    kernel: Compiled, warps: int, programs: int, products: float = 1, others: float = 1, walks: bool = False
) -> float:
    """Of all programs, where a loop with matrix products runs `products` times, and one without `others` times.

    One that `walks` over all chunks counts by what it does in its loop.
    """
    looped = products * sum(kernel.instructions) + others * sum(kernel.other_loops)
    return warps * programs * (looped + (0 if walks else kernel.outside_loops))


def of_ours() -> tuple[Counts, Counts]:
    """Both directions, forward and backward."""
    warps = choose_warps(torch.bfloat16, "ieee")
    rows, columns = state_blocks(torch.bfloat16, DIM)
    read_rows, read_columns = output_blocks(torch.bfloat16, "ieee")

    def count(name: str, programs: int, **loops: Any) -> float:
        kernel = compile_launch(name, DIM, torch.bfloat16, CHIP, count=True)
        return instructions(kernel, warps, programs, **loops)

    states, scanned = DIM // rows * (DIM // columns), 2 * DIM // SCAN[0] * (DIM // SCAN[1])
    forward = {
        "weights": count("weights", 1, products=DIM // BLOCK),
        "states": count("states", states),
        "scan": count("scan", scanned, walks=True),
    }
    backward = forward | {
        "gradients of states": count("gradients of states", states),
        "scan of gradients": forward["scan"],
        "value gradient": count("value gradient", DIM // read_columns, products=DIM // read_rows),
        "weight gradients": count("weight gradients", 1, products=DIM // 32),
        "gradients": count("gradients", DIM // BLOCK, products=2),
    }
    return forward | {"output": count("output", DIM // read_columns, products=DIM // read_rows)}, backward


def fewest(
    kernel: Any,
    blocks: dict[str, tuple[int, ...]],
    programs: Callable[..., int],
    products: Callable[..., float] = lambda **_: 1,
    fp32: str = "",
    **loops: Any,
) -> float:
    """Instructions of fla-core's kernel with the blocks and warps with the fewest.

    `programs` and `products` are called with the blocks. fp32: a pointer that is to fp32 in this call alone.
    """
    tuner = kernel.fn  # within its heuristics
    kernel = tuner.fn
    # Some take the sums of gates per channel by a name of their own.
    constants = FLA_CONSTANTS | ({"g": None} if "gk" in kernel.arg_names else {})
    types = dict.fromkeys((*FLA_FP32, fp32), "fp32")
    counts = []
    for *sizes, warps in itertools.product(*blocks.values(), sorted({x.num_warps for x in tuner.configs})):
        chosen = dict(zip(blocks, sizes, strict=True))
        compiled = compile_for(CHIP, kernel, constants | chosen, torch.bfloat16, types, DIM, warps, 2, count=True)
        counts.append(instructions(compiled, warps, programs(**chosen), products(**chosen), **loops))
    return min(counts)


def of_fla() -> tuple[Counts, Counts]:
    """One direction, forward and backward."""
    from fla.ops.common.chunk_h import chunk_bwd_kernel_dh, chunk_fwd_kernel_h
    from fla.ops.gla import chunk as gla
    from fla.ops.utils.cumsum import chunk_local_cumsum_vector_kernel

    def per_state(BK: int, BV: int) -> int:
        return DIM // BK * (DIM // BV)

    either = (32, 64)
    states = {"blocks": {"BK": either, "BV": either}, "programs": per_state, "walks": True}
    forward = {
        "sums of gates": fewest(chunk_local_cumsum_vector_kernel, {"BS": either}, lambda BS: DIM // BS, fp32="o"),
        "states": fewest(chunk_fwd_kernel_h, **states),
        "weights between runs": fewest(
            gla.chunk_gla_fwd_A_kernel_intra_sub_inter,
            {"BK": either},
            lambda BK: RUNS * (RUNS - 1) // 2,
            lambda BK: DIM // BK,
        ),
        "weights in runs": fewest(
            gla.chunk_gla_fwd_A_kernel_intra_sub_intra, {"BK": (DIM,)}, lambda BK: RUNS, others=RUN
        ),
        "output": fewest(
            gla.chunk_gla_fwd_kernel_o,
            {"BK": either, "BV": (64, 128)},
            lambda BK, BV: DIM // BV,
            lambda BK, BV: DIM // BK,
        ),
    }
    backward = {
        "states": fewest(chunk_fwd_kernel_h, fp32="h", **states),
        "gradients of states": fewest(chunk_bwd_kernel_dh, **states),
        "value gradient": fewest(
            gla.chunk_gla_bwd_kernel_dv,
            {"BK": either, "BV": (64,)},
            lambda BK, BV: DIM // BV,
            lambda BK, BV: DIM // BK,
        ),
        "weight gradients": fewest(gla.chunk_gla_bwd_kernel_dA, {"BV": (64,)}, lambda BV: 1, lambda BV: DIM // BV),
        # A run meets one and a half others before it, and as many behind it.
        "gradients in chunks": fewest(
            gla.chunk_gla_bwd_kernel_intra,
            {"BK": (64,)},
            lambda BK: RUNS * DIM // BK,
            lambda BK: (RUNS - 1) / 2,
            others=RUN,
        ),
        "gradients": fewest(
            gla.chunk_gla_bwd_kernel_inter,
            {"BK": either, "BV": (64,)},
            lambda BK, BV: DIM // BK,
            lambda BK, BV: DIM // BV,
            fp32="h",
        ),
    }
    return forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    output = parser.parse_args().output
    kernels = {"ours": of_ours(), "fla-core, one way": of_fla()}
    rows = []
    for i, name in enumerate(("forward", "backward")):
        ours, fla = sum(kernels["ours"][i].values()), 2 * sum(kernels["fla-core, one way"][i].values())
        print(f"{name}: ours {ours / 1e3:.1f} thousand, two calls of fla-core {fla / 1e3:.1f}: {fla / ours:.2f} times")
        rows.append({"pass": name, "instructions": {"ours": ours, "two calls of fla-core": fla}, "ratio": fla / ours})
    compiled_for = environment("cpu") | {"device": f"sm_{CHIP}", "fla-core": version("fla-core")}
    write("gated_instructions", output, {"environment": compiled_for, "rows": rows, "kernels": kernels})


if __name__ == "__main__":
    main()
