"""The operators at FLUX's shapes (24 heads x 128, bf16, 512 text tokens) against full attention, on a GPU.

    python benchmarks/gpu.py            # writes results/operators-<device>.json

Each comparison runs both in turn and reports the ratio of the medians to scaled_dot_product_attention. The outputs are
compared with the reference on a small grid before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_linattn import TokenLayout, gated_linear_attention, linear_attention, local_attention


TEXT, HEADS, HEAD_DIM = 512, 24, 128


def operators(layout: TokenLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable]:
    gate = -torch.rand_like(k, dtype=torch.float32) / 16
    table: dict[str, Callable] = {
        f"local r={r}": (lambda r=r, impl=None: local_attention(q, k, v, layout, window=r, impl=impl))
        for r in (8, 16, 32)
    }
    table["linear"] = lambda impl=None: linear_attention(q, k, v, layout, impl=impl)
    table["gated"] = lambda impl=None: gated_linear_attention(q, k, v, gate, layout, impl=impl)
    return table


def check(device: str, dtype: torch.dtype) -> None:
    layout = TokenLayout.joint(text=13, grid=(1, 12, 20))
    q, k, v = torch.randn(3, 1, 2, layout.length, HEAD_DIM, device=device, dtype=dtype)
    for name, run in operators(layout, q, k, v).items():
        error = (run() - run(impl="reference")).abs().max().item()
        if not error < 0.03:
            raise SystemExit(f"{name} is off by {error}: nothing was timed.")


def seconds(run: Callable, device: str, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256], help="grid sides in tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    dtype = torch.bfloat16
    check(arguments.device, dtype)
    rows = []
    for side in arguments.sides:
        layout = TokenLayout.joint(text=TEXT, grid=(1, side, side))
        shape = (1, layout.length, HEADS, HEAD_DIM)
        q, k, v = (torch.randn(shape, device=arguments.device, dtype=dtype).transpose(1, 2) for _ in range(3))
        with torch.no_grad():
            for name, run in operators(layout, q, k, v).items():
                ours = seconds(run, arguments.device, arguments.rounds)
                full = functools.partial(F.scaled_dot_product_attention, q, k, v)
                dense = seconds(full, arguments.device, arguments.rounds)
                rows.append({"side": side, "operator": name, "times_faster_than_sdpa": round(dense / ours, 3)})
                if arguments.device == "cuda":
                    rows[-1] |= {"ms": round(1e3 * ours, 3), "sdpa_ms": round(1e3 * dense, 3)}
                print(rows[-1], flush=True)
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor()
    result = {"machine": machine, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    arguments.output.mkdir(exist_ok=True)
    name = machine.lower().replace(" ", "-") or arguments.device
    (arguments.output / f"operators-{name}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
