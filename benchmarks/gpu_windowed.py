"""Windowed attention at FLUX's shapes (24 heads x 128, bf16, 512 text tokens) on a GPU: our kernel against others.

    python benchmarks/gpu_windowed.py                                        # writes results/windowed-<device>.json
    TRITON_INTERPRET=1 python benchmarks/gpu_windowed.py --smoke             # runs every line on a CPU, tiny

Compared are scaled_dot_product_attention over all tokens (cuDNN, flash), compiled FlexAttention over tokens in
raster order, as CLEAR runs it, and in tile order (the permutation not counted), and NATTEN (a square window, no text)
if it is installed. Every line is a ratio within one run; our output and gradients are checked before each.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

import windowed_methods as methods
from gpu_timing import environment, extra_megabytes, measure, write


def compare(arguments: argparse.Namespace, side: int, window: int, backward: bool) -> dict[str, Any]:
    """One row: the times of all methods at one size and window."""
    text, device, dtype = arguments.text, arguments.device, getattr(torch, arguments.dtype)
    layout = methods.make_layout(text, side)
    shape = (1, layout.length, arguments.heads, arguments.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))
    methods.check(text, side, window, q, k, v)

    table: dict[str, methods.Method | None] = {"ours": methods.ours(layout, window)}
    long = side > 256 and backward  # seconds per pass
    if device == "cuda" and not long:
        table["sdpa cudnn"] = methods.sdpa(SDPBackend.CUDNN_ATTENTION)
        table["sdpa flash"] = methods.sdpa(SDPBackend.FLASH_ATTENTION)
    elif not long:
        table["sdpa"] = methods.sdpa(None)
    if side <= 64:
        table["sdpa under the mask"] = methods.dense_under_the_mask(layout, window)
    compiled = device == "cuda"
    if window in arguments.flex_windows and not (backward and not compiled):
        table["flex raster"] = methods.flex(text, side, window, device, tiled=False, compiled=compiled)
        if side % 16 == 0:
            table["flex tiles"] = methods.flex(text, side, window, device, tiled=True, compiled=compiled)
    table["natten (square, no text)"] = methods.natten(text, side, window)

    runs: dict[str, Callable[[], Any]] = {}
    grad = torch.randn_like(q)
    for name, method in table.items():
        if method is None:
            continue
        if backward:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            try:
                out = method(*leaves)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"{name}: {type(error).__name__}", flush=True)
                continue
            gradient = grad[:, :, -out.shape[2] :]
            runs[name] = functools.partial(torch.autograd.grad, out, leaves, gradient, retain_graph=True)
        else:
            runs[name] = torch.no_grad()(functools.partial(method, q, k, v))
    times = measure(runs, device, arguments.seconds)
    row: dict[str, Any] = {"side": side, "window": window, "pass": "backward" if backward else "forward", "ms": times}
    mine = times.get("ours")
    if isinstance(mine, float):
        row["times_faster"] = {
            name: round(value / mine, 3)
            for name, value in times.items()
            if isinstance(value, float) and name != "ours"
        }
        row |= rates(arguments, layout, side, window, backward, mine, times)
    row["extra_megabytes"] = extra_megabytes(runs["ours"], device)
    return row


def rates(
    arguments: argparse.Namespace, layout: Any, side: int, window: int, backward: bool, mine: float, times: dict
) -> dict[str, float]:
    """TFLOP/s of the pairs that count and of those computed, and the latter's share of dense attention's rate."""
    chip = 0
    if arguments.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        chip = 10 * major + minor
    dtype = getattr(torch, arguments.dtype)
    visited = methods.visited_pairs(layout, window, arguments.head_dim, dtype, chip)
    one = 2 * arguments.heads * arguments.head_dim  # operations of one product per pair
    useful = (5 if backward else 2) * methods.exact_pairs(arguments.text, side, window)
    # Two products forward; the query's gradient takes three, the key's and value's together four.
    executed = 3 * visited["query gradient"] + 4 * visited["key gradients"] if backward else 2 * visited["forward"]
    found = {
        "useful_tflops": round(one * useful / mine / 1e9, 2),
        "executed_tflops": round(one * executed / mine / 1e9, 2),
    }
    dense = [value for name, value in times.items() if name in ("sdpa", "sdpa cudnn", "sdpa flash")]
    fastest = min((value for value in dense if isinstance(value, float)), default=None)
    if fastest:
        rate = one * (5 if backward else 2) * layout.length**2 / fastest / 1e9
        found["dense_tflops"] = round(rate, 2)
        found["share_of_dense_rate"] = round(found["executed_tflops"] / rate, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[64, 128, 256, 512], help="sides of the grid in tokens"
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument(
        "--flex-windows", type=int, nargs="*", default=[16], help="those FlexAttention is compiled for"
    )
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"])
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long one row takes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    vars(arguments).update(device="cuda", text=512, heads=24, head_dim=128, dtype="bfloat16")
    if arguments.smoke:
        vars(arguments).update(device="cpu", text=5, heads=1, head_dim=16, dtype="float32", seconds=0.0)
        vars(arguments).update(sides=[16], windows=[4], flex_windows=[4])
    report: dict[str, Any] = {"environment": environment(arguments.device), "rows": []}
    report["setting"] = {key: vars(arguments)[key] for key in ("text", "heads", "head_dim", "dtype")}
    for side in arguments.sides:
        for window in arguments.windows:
            for name in arguments.passes:
                row = compare(arguments, side, window, name == "backward")
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if not arguments.smoke:  # after every row: what was measured stays if time runs out
                    write("windowed", arguments.output, report)


if __name__ == "__main__":
    main()
