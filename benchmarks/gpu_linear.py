"""Linear attention on a GPU at the shapes of FLUX and of LiT: our kernels against others and the memory's speed.

    python benchmarks/gpu_linear.py                                   # writes results/linear-<device>.json
    TRITON_INTERPRET=1 python benchmarks/gpu_linear.py --smoke        # runs every line on a CPU, tiny

Compared are scaled_dot_product_attention (cuDNN, flash), our PyTorch implementation, the two products as plain einsum,
and fla-core's linear attention if it is installed, which is causal: it does half of the work in one direction. Beside
them stands the time that reading and writing every tensor once takes at the speed of a copy in the same run. Every
line is a ratio within one run; our output and gradients are checked before each.
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_linattn import TokenLayout, linear_attention

from gpu_timing import copy_bandwidth, environment, extra_megabytes, measure, write


# Heads, head_dim and text tokens.
CASES = {"flux, image alone": (24, 128, 0), "flux": (24, 128, 512), "lit": (2, 576, 0)}
# One pass of softmax attention over more takes seconds.
MOST_SOFTMAX_TOKENS = 256**2
Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend | None) -> torch.Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As one would write it, in the dtype of the inputs, without text."""
    phi_q, phi_k = F.relu(q) + 1e-6, F.relu(k) + 1e-6
    state = torch.einsum("bhnk,bhnv->bhkv", phi_k, v)
    divisor = torch.einsum("bhnk,bhk->bhn", phi_q, phi_k.sum(2))
    return torch.einsum("bhnk,bhkv->bhnv", phi_q, state) / (divisor[..., None] + 1e-6)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    q, k, v = (x.transpose(1, 2) for x in (F.relu(q), F.relu(k), v))
    return chunk_linear_attn(q, k, v, scale=1.0)[0].transpose(1, 2)


def methods(layout: TokenLayout, head_dim: int, device: str) -> dict[str, Method]:
    table: dict[str, Method] = {
        "ours": lambda q, k, v: linear_attention(q, k, v, layout, impl="triton"),
        "ours in pytorch": lambda q, k, v: linear_attention(q, k, v, layout, impl="torch"),
    }
    if not layout.num_text:
        table["einsum"] = einsum
        if importlib.util.find_spec("fla") is not None and device == "cuda" and head_dim <= 256:
            table["fla, causal"] = causal
    if layout.length <= MOST_SOFTMAX_TOKENS + layout.num_text:
        backends = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
        for name, backend in (backends if device == "cuda" and head_dim <= 256 else {"sdpa": None}).items():
            table[name] = functools.partial(softmax, backend=backend)
    return table


def make_inputs(arguments: argparse.Namespace, tokens: int, heads: int, head_dim: int) -> list[torch.Tensor]:
    shape, dtype = (1, tokens, heads, head_dim), getattr(torch, arguments.dtype)
    return [torch.randn(shape, device=arguments.device, dtype=dtype).transpose(1, 2) for _ in range(3)]


def check(arguments: argparse.Namespace, heads: int, head_dim: int, text: int) -> None:
    """A speed-up of a wrong result is none."""
    layout = TokenLayout.joint(text=min(text, 77), grid=(1, 17, 21))
    inputs = make_inputs(arguments, layout.length, min(heads, 2), head_dim)
    results = []
    for impl in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = linear_attention(*leaves, layout, impl=impl)
        results.append([output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        error = (ours.float() - expected.float()).norm() / expected.float().norm()
        if not error < 2e-2:
            raise SystemExit(f"ours is off by {error:.1e}: nothing was timed.")


def compare(arguments: argparse.Namespace, case: str, side: int, backward: bool) -> dict[str, Any]:
    """One row: the times of all methods at one size."""
    heads, head_dim, text = CASES[case]
    layout = TokenLayout.joint(text=text, grid=(1, side, side))
    inputs = make_inputs(arguments, layout.length, heads, head_dim)
    runs: dict[str, Callable[[], Any]] = {}
    for name, method in methods(layout, head_dim, arguments.device).items():
        if backward:
            leaves = [x.detach().requires_grad_() for x in inputs]
            try:
                output = method(*leaves)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"{name}: {type(error).__name__}", flush=True)
                continue
            gradient = torch.randn_like(output)
            runs[name] = functools.partial(torch.autograd.grad, output, leaves, gradient, retain_graph=True)
        else:
            runs[name] = torch.no_grad()(functools.partial(method, *inputs))
    times = measure(runs, arguments.device, arguments.seconds)
    row: dict[str, Any] = {"case": case, "side": side, "pass": "backward" if backward else "forward", "ms": times}
    mine = times.get("ours")
    if isinstance(mine, float):
        row["times_faster"] = {
            name: round(value / mine, 3)
            for name, value in times.items()
            if isinstance(value, float) and name != "ours"
        }
        if arguments.bandwidth:
            # Query, key, value and output; backward also their four gradients.
            moved = (8 if backward else 4) * inputs[0].numel() * inputs[0].element_size()
            row["share_of_bandwidth_limit"] = round(moved / (arguments.bandwidth * 1e9) / mine, 3)
    row["extra_megabytes"] = extra_megabytes(runs["ours"], arguments.device)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[64, 128, 256, 512], help="sides of the grid in tokens"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"])
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long one row takes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    vars(arguments).update(device="cuda", dtype="bfloat16", bandwidth=None)
    if arguments.smoke:
        CASES.update({"flux, image alone": (1, 16, 0), "flux": (1, 16, 5), "lit": (1, 144, 0)})
        vars(arguments).update(device="cpu", dtype="float32", seconds=0.0, sides=[6])
    else:
        arguments.bandwidth = copy_bandwidth()
    report: dict[str, Any] = {"environment": environment(arguments.device), "rows": []}
    report["setting"] = {"dtype": arguments.dtype, "cases": CASES, "copy_tb_per_s": arguments.bandwidth}
    for case in arguments.cases:
        check(arguments, *CASES[case])
        for side in arguments.sides:
            for name in arguments.passes:
                row = compare(arguments, case, side, name == "backward")
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if not arguments.smoke:  # after every row: what was measured stays if time runs out
                    write("linear", arguments.output, report)


if __name__ == "__main__":
    main()
