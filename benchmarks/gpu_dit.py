"""The headline cases of LiT and DiG: DiT at its real size with random weights, one training and one inference step.

    python benchmarks/gpu_dit.py                                        # writes results/dit-<device>.json
    python benchmarks/gpu_dit.py --device cpu --sides 32 64 --layers 4  # ratios alone, in minutes
    python benchmarks/gpu_dit.py --smoke                                # runs every line on a CPU, tiny

In one run: softmax of the whole matrix between two products ("unfused", what both papers compare with), softmax by
the kernel that scaled_dot_product_attention chooses ("sdpa"), and ours, in LiT's form (2 heads for DiT-S) and DiG's
("gated, one way" is the paper's, "gated" scans both ways). Training is forward, backward and AdamW on fp32 weights
under bf16 autocast, one picture; inference a forward pass with bf16 weights and two, as guidance has; on a CPU all is
fp32. Ours is compared with the reference, output and gradients, before it is timed. Then one layer by the number of
its heads: LiT's other claim, that few large heads cost arithmetic but no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_linattn import LinearProcessor, linearize, status

from dit_methods import (
    BASELINES,
    BATCH,
    BOTH,
    GATED,
    LINEAR,
    MODELS,
    ONE_WAY,
    PATCH,
    SDPA,
    UNFUSED,
    Case,
    check,
    infer,
    loss_of,
    make_inputs,
    make_model,
    make_step,
)
from gpu_timing import environment, in_short, measure, write
from linear_attention import cpu_name, interleaved, kept_bytes


HEADS = (2, 3, 6, 12, 24, 48, 96)


CASES = (
    Case("S", 1792 // PATCH, (UNFUSED, SDPA, GATED, ONE_WAY), BOTH),
    Case("XL", 2048 // PATCH, (UNFUSED, SDPA, GATED, ONE_WAY), ("inference",)),
    Case("S", 2048 // PATCH, (UNFUSED, SDPA, LINEAR), BOTH),
    # Should the whole matrices of 12 layers not fit into the GPU's memory, this has a denominator.
    Case("S", 2048 // PATCH, (UNFUSED, SDPA, LINEAR), ("training",), layers=6),
)


def prepare(
    case: Case, method: str, name: str, device: str
) -> tuple[Callable[[], torch.Tensor], float | None, str | None]:
    """A step that has run, the memory that it takes and the implementation of ours; raises where it is wrong."""
    on_gpu = device == "cuda"
    if method not in BASELINES:
        check(case.model, method, device)
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model, run = make_step(case, method, name, device)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2 if on_gpu else 1):  # from the second step on there is the optimizer's state
        if not run().isfinite().all():
            raise RuntimeError("not finite, nothing was timed")
    memory = None
    if on_gpu:
        memory = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
    elif name == "training":
        inputs = make_inputs(case, BATCH[name], device, torch.float32)
        memory = round(kept_bytes(functools.partial(loss_of, model, inputs), model.parameters()) / 2**20, 1)
    return run, memory, None if method in BASELINES else status(model).converted[0].implementation


def compare(case: Case, name: str, device: str, seconds: float, rounds: int) -> dict[str, Any]:
    """One row: the memory of each method by itself, then all in turn."""
    row: dict[str, Any] = {**case.name, "pass": name, "batch": BATCH[name]}
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    memory: dict[str, float] = {}
    implementations: dict[str, str] = {}
    failed: dict[str, str] = {}
    for method in case.methods:
        try:
            runs[method], taken, implementation = prepare(case, method, name, device)
        except Exception as error:  # out of memory, for one: the others are still wanted
            failed[method] = in_short(error)
            continue
        if taken is not None:
            memory[method] = taken
        if implementation is not None:
            implementations[method] = implementation
    times = measure(runs, device, seconds, head_start=0) if device == "cuda" else interleaved(runs, rounds, device)
    failed |= {method: value for method, value in times.items() if isinstance(value, str)}
    if device == "cuda":
        row["ms"] = times
        # Where that is much less, the steps wait for the host to launch kernels.
        row["ms_with_a_head_start"] = measure(runs, device, 0, head_start=100)
    if memory:
        row["peak_gigabytes" if device == "cuda" else "kept_for_backward_megabytes"] = memory
    if failed:
        row["failed"] = failed
    row["times_faster"] = ratios(times)
    row["implementation"] = implementations
    return row


def ratios(times: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times faster ours are than each baseline that ran."""
    measured = {method: value for method, value in times.items() if isinstance(value, float)}
    return {
        method: {other: round(measured[other] / value, 2) for other in BASELINES if other in measured}
        for method, value in measured.items()
        if method not in BASELINES
    }


def compare_heads(model: str, side: int, device: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """One attention layer, forward, by its number of heads: time and multiplications."""
    own_heads, head_dim, _ = MODELS[model]
    channels, tokens, batch = own_heads * head_dim, side**2, BATCH["inference"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    case = Case(model, side, (SDPA,), ("inference",), layers=1)
    hidden = torch.randn(batch, tokens, channels, device=device).to(dtype)
    failed: dict[str, str] = {}
    for heads in (None, *HEADS):
        built = make_model(case, SDPA, device, dtype)
        if heads is not None:
            linearize(built, LinearProcessor(heads=heads))
            try:
                infer(built, make_inputs(case, batch, device, dtype))  # says what the tokens are
            except Exception as error:
                failed[str(heads)] = in_short(error)
                continue
        attention = built.transformer_blocks[0].attn1
        runs[SDPA if heads is None else str(heads)] = torch.no_grad()(functools.partial(attention, hidden))
    times = measure(runs, device, seconds) if device == "cuda" else interleaved(runs, rounds, device)
    times |= failed
    rows = []
    for heads in HEADS:
        # Projections, the state and its product with the queries, the 5x5 convolution.
        operations = tokens * channels * (4 * channels + 2 * channels // heads + 25)
        row: dict[str, Any] = {"model": f"DiT-{model}/2", "tokens": tokens, "heads": heads}
        row |= {"head_dim": channels // heads, "giga_multiplications": round(operations / 1e9, 3)}
        mine, own, full = (times[name] for name in (str(heads), str(own_heads), SDPA))
        if isinstance(mine, float) and isinstance(own, float):
            row["time_relative_to_own_heads"] = round(mine / own, 3)
        if isinstance(mine, float) and isinstance(full, float):
            row["times_faster_than_sdpa"] = round(full / mine, 2)
        if isinstance(mine, str):
            row["failed"] = {str(heads): mine}
        rows.append(row | ({"ms": mine} if device == "cuda" else {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sides", type=int, nargs="+", help="DiT-S at these sides of the grid instead of the papers'")
    parser.add_argument("--layers", type=int, help="of every model; default: all it has")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a row takes on a GPU; 0: one turn")
    parser.add_argument("--rounds", type=int, default=2, help="on a CPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(device="cpu", sides=[8], layers=1, rounds=1)
    device, limits = arguments.device, (arguments.device, arguments.seconds, arguments.rounds)
    cases = CASES
    if arguments.sides:
        passes = BOTH if device == "cuda" or arguments.smoke else ("training",)
        methods = (UNFUSED, SDPA, LINEAR, GATED, ONE_WAY)
        cases = tuple(Case("S", side, methods, passes) for side in arguments.sides)
    if arguments.layers:
        cases = tuple(dataclasses.replace(case, layers=arguments.layers) for case in cases)
    if arguments.methods:
        chosen = arguments.methods
        cases = tuple(dataclasses.replace(c, methods=tuple(m for m in c.methods if m in chosen)) for c in cases)
    machine: dict[str, Any] = environment(device)
    if device == "cpu":
        torch.set_num_threads(1)
        machine |= {"device": "cpu", "machine": cpu_name(), "threads": 1}
    report: dict[str, Any] = {"environment": machine, "rows": [], "heads": []}

    def store(table: str, rows: list[dict[str, Any]]) -> None:
        report[table] += rows
        for row in rows:
            print(json.dumps(row), flush=True)
        if not arguments.smoke:  # after every row: what was measured stays if time runs out
            write("dit", arguments.output, report)

    for case in cases:
        for name in case.passes:
            store("rows", [compare(case, name, *limits)])
    for side in dict.fromkeys(case.side for case in cases) if arguments.sides else (CASES[-1].side,):
        for model in ("S", "B"):
            store("heads", compare_heads(model, side, *limits))
    rows = report["rows"] + report["heads"]
    if any(method not in BASELINES for row in rows for method in row.get("failed", ())):
        raise SystemExit("dit: ours failed")


if __name__ == "__main__":
    main()
