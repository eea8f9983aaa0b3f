"""What the GPU benchmarks of one operator share: their options, the passes to time, the row of a table, the check."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_timing import environment, extra_megabytes, in_short, measure, write


Method = Callable[..., torch.Tensor]
Row = dict[str, Any]


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[64, 128, 256, 512], help="sides of the grid in tokens"
    )
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"])
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long one row takes; 0: one turn")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    return parser


def add_most_softmax_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--most-softmax-tokens",
        type=int,
        default=512**2,
        help="image tokens up to which softmax attention is timed: at the default's, one pass takes seconds",
    )


def softmax(backend: SDPBackend | None) -> Method:
    """`scaled_dot_product_attention` by one of its kernels; `None`: whichever torch takes."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def softmax_methods(on_gpu: bool) -> dict[str, Method]:
    """Softmax attention over all tokens, on a GPU by both of its fast kernels."""
    if not on_gpu:
        return {"sdpa": softmax(None)}
    return {"sdpa cudnn": softmax(SDPBackend.CUDNN_ATTENTION), "sdpa flash": softmax(SDPBackend.FLASH_ATTENTION)}


def make_inputs(tokens: int, heads: int, head_dim: int, dtype: str, device: str) -> list[torch.Tensor]:
    """Query, key and value, in the memory order that models have."""
    torch.manual_seed(0)
    shape = (1, tokens, heads, head_dim)
    return [torch.randn(shape, device=device, dtype=getattr(torch, dtype)).transpose(1, 2) for _ in range(3)]


def check(attend: Method, inputs: list[torch.Tensor]) -> None:
    """Output and gradients of `attend(*inputs, impl=)` against the reference: a speed-up of a wrong result is none."""
    results = []
    for impl in ("triton", "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = attend(*leaves, impl=impl)
        results.append([output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        error = (ours.float() - expected.float()).norm() / expected.float().norm()
        if not error < 2e-2:
            raise RuntimeError(f"off by {error:.1e}, nothing was timed")


def why_wrong(check: Callable[..., None], *arguments: Any) -> Row | None:
    """What stands in place of the times where ours fails the check; `None` if it passes."""
    try:
        check(*arguments)
    except Exception as error:  # whatever the compiler raises: the other rows are still wanted
        return {"ms": {"ours": in_short(error)}}
    return None


def compare(
    methods: dict[str, Method],
    inputs: list[torch.Tensor],
    name: str,
    device: str,
    seconds: float,
    known: dict[str, float | str] | None = None,
) -> Row:
    """The times of all methods in one pass, `"forward"` or `"backward"`, and how much faster `"ours"` is.

    `known` are times that were measured before, in the same run on such inputs.
    """
    runs: dict[str, Callable[[], Any]] = {}
    times = dict(known or {})
    for method, function in methods.items():
        if name == "forward":
            runs[method] = torch.no_grad()(functools.partial(function, *inputs))
            continue
        leaves = [x.detach().requires_grad_() for x in inputs]
        try:
            output = function(*leaves)
        except Exception as error:
            times[method] = in_short(error)
            continue
        options = {"retain_graph": True, "allow_unused": True}
        runs[method] = functools.partial(torch.autograd.grad, output, leaves, torch.randn_like(output), **options)
    times |= measure(runs, device, seconds)
    row: Row = {"pass": name, "ms": times}
    mine = times["ours"]
    if isinstance(mine, float):
        row["extra_megabytes"] = extra_megabytes(runs["ours"], device)
        others = {method: value for method, value in times.items() if isinstance(value, float) and method != "ours"}
        row["times_faster"] = {method: round(value / mine, 3) for method, value in others.items()}
    return row


def share_of_bandwidth(row: Row, moved_bytes: int, bandwidth: float | None) -> Row:
    """How close `"ours"` comes to the time that moving these bytes takes at the speed of a copy, in TB/s."""
    if bandwidth and isinstance(row["ms"]["ours"], float):
        row["share_of_bandwidth_limit"] = round(moved_bytes / (bandwidth * 1e9) / row["ms"]["ours"], 3)
    return row


def report(name: str, arguments: argparse.Namespace, setting: Row, rows: Iterable[Row]) -> None:
    """Print rows as they come, and store all so far after each: what was measured stays if time runs out.

    Ends with an error if one of ours failed somewhere.
    """
    table: Row = {"environment": environment(arguments.device), "setting": setting, "rows": []}
    for row in rows:
        table["rows"].append(row)
        print(json.dumps(row), flush=True)
        if not arguments.smoke:
            write(name, arguments.output, table)
    times = [(method, value) for row in table["rows"] for method, value in row["ms"].items()]
    if failed := sum(method.startswith("ours") and isinstance(value, str) for method, value in times):
        raise SystemExit(f"{name}: ours failed {failed} times")
