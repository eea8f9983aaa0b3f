"""How `local_attention` compares with full attention on this machine's CPU: time, memory and growth.

    python benchmarks/local_attention.py            # a few minutes
    python benchmarks/local_attention.py --quick    # the smallest size

Nothing is printed before the outputs have been checked. All figures are ratios: medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops import reference
from diffusers_linattn.ops.local import local_attention


HEADS, HEAD_DIM, TEXT, WINDOW = 4, 64, 512, 8
RESULTS = Path(__file__).parent / "results" / "local_attention-cpu.json"


def make_layout(side: int) -> TokenLayout:
    return TokenLayout.joint(text=TEXT, grid=(1, side, side))


def make_inputs(side: int, backward: bool) -> list[torch.Tensor]:
    """query, key and value in the memory order that attention layers hand over."""
    torch.manual_seed(0)
    shape = (1, make_layout(side).length, HEADS, HEAD_DIM)
    return [torch.randn(shape).transpose(1, 2).requires_grad_(backward) for _ in range(3)]


def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, side: int) -> torch.Tensor:
    return local_attention(query, key, value, make_layout(side), window=WINDOW, impl="tiled")


def full(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, side: int) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value)


METHODS: dict[str, Callable[..., torch.Tensor]] = {"full": full, "ours": ours}


def run_once(method: str, side: int, inputs: list[torch.Tensor], backward: bool) -> float:
    """Seconds of one forward pass, or of one forward and backward pass."""
    # One thread's CPU time counts nothing of what else runs on the machine.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    out = METHODS[method](*inputs, side)
    if backward:
        torch.autograd.grad(out, inputs, out.detach())
    return clock() - start


def check(side: int) -> None:
    """Compare some rows with attention under the pairwise mask; at the smallest size all rows and gradients."""
    layout, inputs = make_layout(side), make_inputs(side, backward=side <= 64)
    out = ours(*inputs, side)
    if side <= 64:
        mask = reference.local_mask(layout, WINDOW)
        expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        grad = torch.randn_like(expected)
        pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        return
    # Some tokens of the text, of every border and of the inside, against all keys.
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    some = torch.tensor([0, 1, side // 3, side // 2 + 3, side - 8, side - 1])
    for i in [0, TEXT - 1] + (TEXT + (some[:, None] * side + some).flatten()).tolist():
        mask = torch.ones(layout.length, dtype=torch.bool)
        if i >= TEXT:
            row, column = divmod(i - TEXT, side)
            mask[TEXT:] = ((y - row) ** 2 + (x - column) ** 2 < WINDOW**2).flatten()
        query, key, value = inputs
        expected = F.scaled_dot_product_attention(query[:, :, i : i + 1], key, value, attn_mask=mask[None])
        torch.testing.assert_close(out[:, :, i : i + 1], expected, atol=1e-5, rtol=1e-4)


def measure_time(sides: list[int], only_ours: list[int], backward: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Ratio of full attention to ours, and our time per token relative to the smallest size."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for side in sides + only_ours:
            inputs = make_inputs(side, backward)
            for method in METHODS if side in sides else ["ours"]:
                # Few full passes at the large sizes: they take most of the time and vary least.
                times = seconds.setdefault((method, side), [])
                if method == "full" and side >= 256 and times:
                    continue
                times.append(run_once(method, side, inputs, backward))
    median = {key: statistics.median(times) for key, times in seconds.items()}
    first = median["ours", sides[0]] / make_layout(sides[0]).length
    results: dict[str, dict[str, float]] = {}
    for side in sides + only_ours:
        row = {"time_per_token_growth": median["ours", side] / make_layout(side).length / first}
        if side in sides:
            row["speedup"] = median["full", side] / median["ours", side]
        results[str(side)] = row
    return results


def measure_memory(method: str, side: int, backward: bool) -> float:
    """Peak megabytes beyond inputs and results of one pass, in a fresh process."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, __file__, "--threads", threads, "--memory-of", method, str(side), str(int(backward))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def memory_of(method: str, side: int, backward: bool) -> float:
    run_once(method, 16, make_inputs(16, backward), backward)  # loads libraries
    inputs = make_inputs(side, backward)
    before = peak_megabytes()
    run_once(method, side, inputs, backward)
    used = peak_megabytes() - before
    # The output; with gradients also the output's gradient (its copy) and those of the three inputs.
    results = 1 + (3 if backward else 0)
    return used - results * inputs[0].nbytes / 2**20


def peak_megabytes() -> float:
    """Peak memory of this process; `ru_maxrss` would start from the peak of the process that started it."""
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("This benchmark reads VmHWM from /proc/self/status: run it on Linux.")


def environment() -> dict[str, object]:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only 64x64 tokens, nothing written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="1 measures CPU time, which a busy machine disturbs less")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", nargs=3, metavar=("METHOD", "SIDE", "BACKWARD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        method, side, backward = args.memory_of
        print(memory_of(method, int(side), bool(int(backward))))
        return

    sides = [64] if args.quick else [64, 128, 256]
    for side in sides:
        check(side)
    report: dict[str, object] = {
        "setting": {"heads": HEADS, "head_dim": HEAD_DIM, "text_tokens": TEXT, "window": WINDOW, "dtype": "float32"},
        "environment": environment(),
    }
    for backward in (False, True):
        name = "forward and backward" if backward else "forward"
        timed = [side for side in sides if not (backward and side > 128)]  # full attention takes minutes there
        only_ours = [] if args.quick else ([256] if backward else [512])
        rows = measure_time(timed, only_ours, backward, args.rounds)
        for side in timed + only_ours:
            row = rows[str(side)]
            row["extra_megabytes"] = measure_memory("ours", side, backward)
            if side <= 128:
                row["extra_megabytes_full"] = measure_memory("full", side, backward)
            row["extra_bytes_per_token"] = row["extra_megabytes"] * 2**20 / make_layout(side).length
            row = rows[str(side)] = {key: round(number, 2) for key, number in row.items()}
            print(f"{name}, {side}x{side}: " + ", ".join(f"{key} {number}" for key, number in row.items()), flush=True)
        report[name] = rows
    if not args.quick:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
