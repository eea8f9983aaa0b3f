"""Times gated linear attention on a GPU against SDPA and fla-core, at the shapes of FLUX and of DiT-S.

    python benchmarks/gpu_gated.py --output results/     # every size; --smoke on a CPU, in Triton's interpreter

Ours both ways, one way and with one gate per head; two calls of fla-core where it is installed, the PyTorch
implementation at small sizes, and the time that reading and writing every tensor once takes at the memory's speed.
Every line is a ratio within one run; output and gradients are checked before each shape.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from diffusers_linattn import TokenLayout, gated_linear_attention

from gpu_timing import copy_bandwidth, environment, extra_megabytes, measure, write


SHAPES = {"flux": (24, 128), "dit-s": (6, 64)}
MOST_TORCH_TOKENS, MOST_SDPA_TOKENS = 128**2, 256**2


def make_inputs(arguments: argparse.Namespace, shape: tuple[int, int], tokens: int) -> list[torch.Tensor]:
    """Query, key, value, a gate per channel and one per head."""
    torch.manual_seed(0)
    heads, dim = shape
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    inputs = [torch.randn(1, tokens, heads, dim, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    gates = [F.logsigmoid(torch.randn(1, heads, tokens, width, device=device)) / 16 for width in (dim, 1)]
    return [*inputs, *gates]


def methods(layout: TokenLayout, on_gpu: bool) -> dict[str, Callable[..., torch.Tensor]]:
    def gated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return gated_linear_attention(q, k, v, g, layout, **kwargs)

    ours = functools.partial(gated, impl="triton")
    table: dict[str, Callable[..., torch.Tensor]] = {
        "ours": lambda q, k, v, g, _: ours(q, k, v, g),
        "ours, by columns": lambda q, k, v, g, _: ours(q, k, v, g, order="columns"),
        "ours, one way": lambda q, k, v, g, _: ours(q, k, v, g, direction="forward"),
        "ours, a gate per head": lambda q, k, v, _, h: ours(q, k, v, h),
    }
    if layout.length <= MOST_SDPA_TOKENS:
        table["sdpa"] = lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v)
    if layout.length <= MOST_TORCH_TOKENS:
        table["ours in pytorch"] = lambda q, k, v, g, _: gated(q, k, v, g, impl="chunked")
    if on_gpu and importlib.util.find_spec("fla") is not None:
        table["fla, two calls"] = lambda q, k, v, g, _: gated(q, k, v, g, impl="fla")
    return table


def check(arguments: argparse.Namespace, shape: tuple[int, int]) -> None:
    """A speed-up of a wrong result is none."""
    layout = TokenLayout.image((1, 7, 11))
    *inputs, gate, per_head = make_inputs(arguments, shape, layout.length)
    for g in (gate, per_head):
        results = []
        for impl in ("triton", "reference"):
            leaves = [x.detach().requires_grad_() for x in (*inputs, g)]
            output = gated_linear_attention(*leaves, layout, order="columns", impl=impl)
            results.append([output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)])
        for ours, expected in zip(*results, strict=True):
            error = (ours.float() - expected.float()).norm() / expected.float().norm()
            assert error < 2e-2, f"wrong by {error:.1e}"


def compare(arguments: argparse.Namespace, name: str, side: int, backward: bool) -> dict[str, Any]:
    """One row: the times of all methods at one size."""
    layout = TokenLayout.image((1, side, side))
    inputs = make_inputs(arguments, SHAPES[name], layout.length)
    runs: dict[str, Callable[[], Any]] = {}
    for method, function in methods(layout, arguments.device == "cuda").items():
        if backward:
            leaves = [x.detach().requires_grad_() for x in inputs]
            try:
                output = function(*leaves)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"{method}: {type(error).__name__}", flush=True)
                continue
            options = {"retain_graph": True, "allow_unused": True}
            runs[method] = functools.partial(torch.autograd.grad, output, leaves, torch.randn_like(output), **options)
        else:
            runs[method] = torch.no_grad()(functools.partial(function, *inputs))
    times = measure(runs, arguments.device, arguments.seconds)
    row: dict[str, Any] = {"shape": name, "side": side, "pass": "backward" if backward else "forward", "ms": times}
    mine = times.get("ours")
    if isinstance(mine, float):
        row["times_faster"] = {
            method: round(value / mine, 3)
            for method, value in times.items()
            if isinstance(value, float) and method != "ours"
        }
        if arguments.device == "cuda":
            row["share_of_bandwidth_limit"] = round(limit(arguments, inputs, backward) / mine, 3)
    row["extra_megabytes"] = extra_megabytes(runs["ours"], arguments.device)
    return row


def limit(arguments: argparse.Namespace, inputs: list[torch.Tensor], backward: bool) -> float:
    """Milliseconds to move q, k, v, the gate and the output once; backward these, the gradient and four gradients."""
    query, key, value, gate, _ = (x.numel() * x.element_size() for x in inputs)
    read = query + key + value + gate
    moved = 2 * read + value if backward else read + value
    return moved / (arguments.bandwidth * 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[64, 128, 256, 512], help="sides of the grid in tokens"
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"])
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long one row takes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    vars(arguments).update(device="cuda", dtype="bfloat16")
    if arguments.smoke:
        SHAPES["flux"] = (1, 16)
        vars(arguments).update(device="cpu", dtype="float32", seconds=0.0, sides=[6], shapes=["flux"])
    else:
        arguments.bandwidth = copy_bandwidth()
    report: dict[str, Any] = {"environment": environment(arguments.device), "rows": []}
    report["setting"] = {"dtype": arguments.dtype, "shapes": SHAPES, "copy_tb_per_s": vars(arguments).get("bandwidth")}
    for name in arguments.shapes:
        check(arguments, SHAPES[name])
        for side in arguments.sides:
            for kind in arguments.passes:
                row = compare(arguments, name, side, kind == "backward")
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if not arguments.smoke:  # after every row: what was measured stays if time runs out
                    write("gated", arguments.output, report)


if __name__ == "__main__":
    main()
